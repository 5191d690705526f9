"""The floor: as little as can stand between a socket and PostgreSQL in Python.

One ASGI function, a few asyncpg connections held open and handed over in the order of asking, JSON written by
PostgreSQL. No identity (`X-User-Id` says who asks), no validation, no limits, no metrics, no log, no problem bodies:
a connection that breaks stays broken. It is a measure, and nothing to build on.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any
from urllib.parse import parse_qsl

import asyncpg

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

FIELDS = "id, user_id, title, description, is_completed, version, created_at, updated_at"
READ = f"SELECT row_to_json(t)::text FROM (SELECT {FIELDS} FROM tasks WHERE user_id = $1 AND id = $2) t"
LIST = (
    f"SELECT coalesce(json_agg(t), '[]')::text FROM (SELECT {FIELDS} FROM tasks WHERE user_id = $1"
    " ORDER BY created_at DESC, id DESC LIMIT $2) t"
)
LATER = (
    f"SELECT coalesce(json_agg(t), '[]')::text FROM (SELECT {FIELDS} FROM tasks"
    " WHERE user_id = $1 AND (created_at, id) < ($3, $4) ORDER BY created_at DESC, id DESC LIMIT $2) t"
)
CREATE = (
    "WITH made AS (INSERT INTO tasks (user_id, id, title, description, is_completed) VALUES ($1, $2, $3, $4, $5)"
    f" RETURNING {FIELDS}) SELECT row_to_json(made)::text FROM made"
)
UPDATE = (
    "WITH changed AS (UPDATE tasks SET title = coalesce($3, title), is_completed = coalesce($4, is_completed),"
    " description = CASE WHEN $5 THEN $6 ELSE description END, version = version + 1, updated_at = now()"
    f" WHERE user_id = $1 AND id = $2 RETURNING {FIELDS}) SELECT row_to_json(changed)::text FROM changed"
)
BATCH = (
    "WITH asked AS (SELECT o.id, t.* FROM json_to_recordset($2::json->'operations') AS o(id uuid, task json),"
    " json_to_record(o.task) AS t(title text, description text, is_completed boolean)),"
    " made AS (INSERT INTO tasks (user_id, id, title, description, is_completed)"
    " SELECT $1, id, title, description, coalesce(is_completed, false) FROM asked"
    f" RETURNING {FIELDS}) SELECT json_build_object('results',"
    " json_agg(json_build_object('op', 'create', 'id', made.id, 'task', made)))::text FROM made"
)

free: deque[asyncpg.Connection[asyncpg.Record]] = deque()
waiting: deque[asyncio.Future[asyncpg.Connection[asyncpg.Record]]] = deque()


async def value(statement: str, *arguments: Any) -> str | None:
    if free:
        connection = free.popleft()
    else:
        turn = asyncio.get_running_loop().create_future()
        waiting.append(turn)
        connection = await turn
    try:
        text: str | None = await connection.fetchval(statement, *arguments)
    finally:
        if waiting:
            waiting.popleft().set_result(connection)
        else:
            free.append(connection)
    return text


async def answer(send: Send, body: str | None, status: int = 200) -> None:
    content = b"" if body is None else body.encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    status = 404 if body is None else status
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def content_of(receive: Receive) -> bytes:
    message = await receive()
    body: bytes = message["body"]
    while message.get("more_body"):
        message = await receive()
        body += message["body"]
    return body


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await live(receive, send)
        return
    path, method = scope["path"], scope["method"]
    if path == "/livez":
        await answer(send, '{"status":"ok"}')
        return
    owner = uuid.UUID(next(value for name, value in scope["headers"] if name == b"x-user-id").decode())
    if method == "GET" and path == "/v1/tasks":
        asked = dict(parse_qsl(scope["query_string"].decode()))
        count = int(asked.get("limit", 50))
        if "before" in asked:
            moment = datetime.fromisoformat(asked["before"])
            items = await value(LATER, owner, count, moment, uuid.UUID(asked["before_id"]))
        else:
            items = await value(LIST, owner, count)
        await answer(send, f'{{"items":{items}}}')
    elif method == "GET":
        await answer(send, await value(READ, owner, uuid.UUID(path[10:])))
    elif path == "/v1/tasks":
        task = json.loads(await content_of(receive))
        made = uuid.uuid4()
        completed = task.get("is_completed", False)
        body = await value(CREATE, owner, made, task["title"], task.get("description"), completed)
        await answer(send, body, 201)
    elif path == "/v1/tasks/batch":
        await answer(send, await value(BATCH, owner, (await content_of(receive)).decode()))
    else:
        task = json.loads(await content_of(receive))
        described = "description" in task
        changed = await value(
            UPDATE,
            owner,
            uuid.UUID(path[10:]),
            task.get("title"),
            task.get("is_completed"),
            described,
            task.get("description"),
        )
        await answer(send, changed)


async def live(receive: Receive, send: Send) -> None:
    await receive()
    for _ in range(int(os.environ["POOL_SIZE"])):
        free.append(await asyncpg.connect(os.environ["DATABASE_URL"], server_settings={"timezone": "UTC"}))
    await send({"type": "lifespan.startup.complete"})
    await receive()
    for connection in free:
        await connection.close()
    await send({"type": "lifespan.shutdown.complete"})
