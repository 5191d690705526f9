"""The matrix of operations: made from OpenAPI, so that an operation that is added is held to it too.

Without a valid token everything but what is named here answers 401 and takes no connection, and another person's id
is answered as one that nobody has, by the same work.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import iter_route_contexts

from asking import TASKS, Caller, hold, people
from postgres_server import PostgresServer
from src.config.database import parse
from src.embedded.roles import APPLICATION
from src.services import schema

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.api.conftest import MakeApp, Serve

OPEN = {("get", path) for path in ("/livez", "/readyz", "/health", "/metrics", "/.well-known/jwks.json")} | {
    ("post", path) for path in ("/v1/users", "/v1/tokens", "/v1/tokens/refresh", "/v1/tokens/revoke")
}
"""Operations for machines that have no token, and for people who come for one."""
PAGES = {"/openapi.json", "/docs", "/docs/{asset}", "/problems", "/problems/{slug}"}
"""The reference, which is not an operation."""
VERBS = ("get", "put", "post", "delete", "patch")
BODIES: dict[str, str] = {
    "create_task": '{"title": "a"}',
    "update_task": '{"title": "b"}',
    "replace_task": '{"title": "c"}',
    "batch_tasks": '{"operations": [{"op": "update", "id": "ID", "task": {"title": "d"}}]}',
    "update_me": '{"current_password": "correct horse battery", "email": "ID@example.com"}',
    "import_tasks": '{"id": "ID", "title": "e"}\n',
}
ABSENT = {"read_task": 404, "update_task": 404, "delete_task": 404, "replace_task": 201}


def operations(app: FastAPI) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Path, verb and description of every operation, by OpenAPI."""
    for path, item in app.openapi()["paths"].items():
        yield from ((path, verb, item[verb]) for verb in VERBS if verb in item)


def unlisted(app: FastAPI) -> set[str]:
    """Routes that OpenAPI does not show, which the matrix would therefore not see."""
    shown = {path for path, _, _ in operations(app)}
    routed = {getattr(route, "path_format", "") for route in iter_route_contexts(app.routes)}
    return routed - shown - PAGES - {""}


def request_of(path: str, operation: dict[str, Any], task_id: str) -> dict[str, Any]:
    """What a client would send for this operation on this id."""
    name = operation["operationId"]
    media_types = list(operation.get("requestBody", {}).get("content", {}))
    sent: dict[str, Any] = {"path": path.replace("{task_id}", task_id)}
    if media_types:
        sent["content"] = BODIES[name].replace("ID", task_id).encode()
        sent["headers"] = {"content-type": media_types[0]}
    return sent


async def unprotected(app: FastAPI, client: httpx.AsyncClient) -> list[str]:
    """Operations that answer a stranger, or that ask nobody for a token in OpenAPI."""
    found = []
    for path, verb, operation in operations(app):
        if (verb, path) in OPEN:
            continue
        sent = request_of(path, operation, str(uuid4()))
        answer = await client.request(
            verb, sent["path"], content=sent.get("content"), headers=sent.get("headers")
        )
        if answer.status_code != 401 or not operation.get("security"):
            found.append(f"{verb} {path}: {answer.status_code}")
    return found


BAD = {
    "none": None,
    "empty": "Bearer ",
    "another scheme": "Basic YW5hOmFuYQ==",
    "rubbish": "Bearer rubbish",
    "unsigned": "Bearer eyJhbGciOiJub25lIn0.e30.",
}


@pytest.fixture
def app(make_app: MakeApp, app_database_url: str, database_url: str) -> FastAPI:
    return make_app(
        database_url=app_database_url,
        database_migration_url=database_url,
        database_pool_size=1,
        database_pool_timeout_seconds=60.0,
    )


@pytest.mark.parametrize("kind", BAD)
async def test_without_a_valid_token_every_operation_is_401_and_takes_no_connection(
    app: FastAPI, serve: Serve, kind: str
) -> None:
    # The only connection is taken: whoever wanted one would wait for a minute.
    async with serve(app) as client, app.state.database.transaction():
        for path, verb, operation in operations(app):
            if (verb, path) in OPEN:
                continue
            sent = request_of(path, operation, str(uuid4()))
            headers = {**sent.get("headers", {}), **({"authorization": BAD[kind]} if BAD[kind] else {})}
            answer = hold(
                await client.request(verb, sent["path"], content=sent.get("content"), headers=headers)
            )
            assert answer.status_code == 401, (verb, path)
            assert app.state.database.observe().pool.waiting == 0
            # Nor is anything of the request looked at before it is known who asks.
            if "content" in sent:
                answer = await client.request(verb, sent["path"], content=b"\xff{", headers=headers)
                assert answer.status_code == 401, (verb, path)
            answer = await client.request(f"{verb}", sent["path"] + "?limit=-1", headers=headers)
            assert answer.status_code == 401, (verb, path)


async def test_a_route_without_protection_is_found(app: FastAPI, serve: Serve) -> None:
    async with serve(app) as client:
        assert await unprotected(app, client) == []
        assert unlisted(app) == set()
    router = APIRouter()

    @router.get("/v1/open", operation_id="left_open")
    async def left_open() -> int:
        return 1

    @router.get("/v1/hidden", include_in_schema=False)
    async def hidden() -> int:
        return 1

    app.include_router(router)
    app.openapi_schema = None
    async with serve(app) as client:
        assert await unprotected(app, client) == ["get /v1/open: 200"]
        assert unlisted(app) == {"/v1/hidden"}


def test_every_operation_of_tasks_is_in_the_matrix(app: FastAPI) -> None:
    named = {
        operation["operationId"]: operation
        for path, verb, operation in operations(app)
        if (verb, path) not in OPEN
    }
    assert [
        name for name, operation in named.items() if "requestBody" in operation and name not in BODIES
    ] == []
    with_id = {operation["operationId"] for path, _, operation in operations(app) if "{task_id}" in path}
    assert with_id == set(ABSENT)
    assert set(named) >= with_id | {"list_tasks", "create_task"}


# Another person's id (A4)


def without_ids(answer: httpx.Response, *ids: str) -> tuple[int, dict[str, str], str]:
    """An answer but for what differs between any two requests: their ids, the ids asked for, the time."""
    text = answer.text
    headers = {name: value for name, value in answer.headers.items() if name not in ("x-request-id", "etag")}
    for known in (answer.headers["x-request-id"], *ids):
        text = text.replace(known, "ID")
        headers = {name: value.replace(known, "ID") for name, value in headers.items()}
    if text.startswith("{"):
        body = json.loads(text)
        text = json.dumps({name: value for name, value in body.items() if not name.endswith("_at")})
    return answer.status_code, headers, text


@asynccontextmanager
async def watched(
    private_postgres: Callable[..., PostgresServer], make_app: MakeApp, serve: Serve
) -> AsyncIterator[tuple[FastAPI, Caller, Caller, asyncpg.Connection[asyncpg.Record]]]:
    """Two people in front of a server that counts its statements, and a connection that reads the counts."""
    options = {"shared_preload_libraries": "pg_stat_statements", "fsync": "off", "track_io_timing": "off"}
    server = private_postgres(options=options)
    name = server.url.rsplit("/", 1)[1]
    await schema.create_tables(parse(server.url))
    counter = await asyncpg.connect(server.url)
    try:
        await counter.execute("CREATE EXTENSION pg_stat_statements")
        app = make_app(
            database_url=server.url_for(name, role=APPLICATION),
            database_migration_url=server.url,
            database_pool_size=1,
            health_probes="passive",  # nothing but requests speaks to the server
        )
        async with people(serve, app) as (ana, bob):
            yield app, ana, bob, counter
    finally:
        await counter.close()


async def work_of(
    counter: asyncpg.Connection[asyncpg.Record], caller: Caller, verb: str, sent: dict[str, Any]
) -> tuple[httpx.Response, list[tuple[Any, ...]]]:
    """The answer, and every statement that PostgreSQL ran for it: how often, and how many rows each gave."""
    await counter.execute("SELECT pg_stat_statements_reset()")
    answer = await caller(verb.upper(), **sent)
    rows = await counter.fetch(
        "SELECT query, calls, rows FROM pg_stat_statements WHERE userid = $1::regrole ORDER BY query, toplevel",
        APPLICATION,
    )
    return answer, [tuple(row) for row in rows]


async def test_a4_a_foreign_id_is_answered_as_an_unused_one_by_the_same_work_on_every_verb(
    private_postgres: Callable[..., PostgresServer], make_app: MakeApp, serve: Serve
) -> None:
    async with watched(private_postgres, make_app, serve) as (app, ana, bob, counter):
        await bob.create("bob's own")  # He is known, so that being provisioned makes no difference.
        with_id = [found for found in operations(app) if found[2]["operationId"] in {*ABSENT, "batch_tasks"}]
        conditions: list[dict[str, str]] = [{}, {"if-match": "*"}, {"if-none-match": "*"}]
        checked = 0
        for path, verb, operation in with_id:
            for condition in conditions:
                foreign = (await ana.create("ana's own", description="private"))["id"]
                before = await counter.fetchrow(
                    "SELECT t::text, xmin::text FROM tasks t WHERE id = $1", foreign
                )
                # What a connection prepares at its first use is not the request's work.
                seen = []
                for task_id in (str(uuid4()), foreign, str(uuid4())):
                    sent = request_of(path, operation, task_id)
                    sent["headers"] = {**sent.get("headers", {}), **condition}
                    answer, work = await work_of(counter, bob, verb, sent)
                    seen.append((without_ids(answer, task_id), work))
                shown = (operation["operationId"], condition)
                assert seen[1] == seen[2], shown
                assert len(seen[1][1]) >= 1 or seen[1][0][0] in (412, 422), shown
                if not condition and operation["operationId"] in ABSENT:
                    assert seen[1][0][0] == ABSENT[operation["operationId"]], shown
                after = await counter.fetchrow(
                    "SELECT t::text, xmin::text FROM tasks t WHERE id = $1 AND user_id = $2", foreign, ana.id
                )
                assert before == after, shown
                checked += 1
        assert checked >= 3 * len(ABSENT)
        # And no list of his holds one of hers.
        assert {task["user_id"] for task in await bob.all()} == {str(bob.id)}
        answer, _ = await work_of(counter, ana, "get", {"path": f"{TASKS}?q=private"})
        assert len(answer.json()["items"]) == checked


async def test_a4_a_foreign_id_that_differs_in_its_work_or_its_answer_would_be_found(
    private_postgres: Callable[..., PostgresServer], make_app: MakeApp, serve: Serve
) -> None:
    """The comparison itself: one's own task is told from an unused id by the answer and by the rows."""
    async with watched(private_postgres, make_app, serve) as (_, ana, _, counter):
        own = (await ana.create())["id"]
        seen = []
        for task_id in (str(uuid4()), own, str(uuid4())):
            answer, work = await work_of(counter, ana, "get", {"path": f"{TASKS}/{task_id}"})
            seen.append((without_ids(answer, task_id), work))
        assert seen[1][0] != seen[2][0]
        assert seen[1][1] != seen[2][1]
