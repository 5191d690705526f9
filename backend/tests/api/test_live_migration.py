"""S4 of docs/reliability.md: columns change their type while requests are under way, directly and behind PgBouncer.

Every statement that the service has prepared is then outdated at once, on every connection. Nobody is to notice.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import pytest

from asking import TASKS, Caller, people
from clusters import PgBouncer, tracking_settings
from conftest import FAST
from postgres_server import PostgresServer
from src.config.database import parse
from src.embedded.roles import APPLICATION, NAME
from src.services import schema

if TYPE_CHECKING:
    from fastapi import FastAPI

    from tests.api.conftest import MakeApp, Serve

CHANGES = [
    ("version", "bigint", "integer"),
    ("title", "varchar(255)", "text"),
    ("description", "varchar(20000)", "text"),
    ("created_at", "timestamptz(3)", "timestamptz"),
]


# Neon's pooler tracks. `auto` does without what it offers; an operator may say `tracking`.
TRACKING = [word for _ in tracking_settings() for word in ("tracking, unsaid", "tracking")]


@pytest.fixture
def server(private_postgres: Callable[..., PostgresServer]) -> PostgresServer:
    server = private_postgres(options=FAST)
    asyncio.run(schema.create_tables(parse(server.url)))
    return server


@pytest.fixture(
    params=[
        "direct",
        pytest.param("pgbouncer", marks=pytest.mark.debian),
        *[pytest.param(word, marks=pytest.mark.debian) for word in TRACKING],
    ]
)
def way(request: pytest.FixtureRequest, server: PostgresServer) -> Iterator[str]:
    """Where the service reaches the database."""
    with ExitStack() as stack:
        if request.param == "direct":
            yield server.url_for(NAME, role=APPLICATION)
        else:
            settings = {"default_pool_size": "3"}
            if request.param in TRACKING:
                settings |= tracking_settings()[0]
            pooler = stack.enter_context(PgBouncer(server, settings=settings))
            yield pooler.url_for(NAME, role=APPLICATION)


@pytest.fixture
def app(request: pytest.FixtureRequest, way: str, server: PostgresServer, make_app: MakeApp) -> FastAPI:
    """Patient: a change of type keeps everybody waiting, and for how long is not the matter here."""
    return make_app(
        database_url=way,
        database_migration_url=server.url,
        database_pooler="tracking" if request.node.callspec.params["way"] == "tracking" else "auto",
        database_lock_timeout_seconds=30.0,
        database_statement_timeout_seconds=35.0,
        database_command_timeout_seconds=40.0,
        database_pool_timeout_seconds=30.0,
    )


async def test_s4_what_waited_for_a_change_of_type_finds_every_row_there(
    app: FastAPI, server: PostgresServer, serve: Serve
) -> None:
    """To who looks by a snapshot from before it, a table that was written anew is empty."""
    async with people(serve, app) as (ana, _), beside(server) as operator:
        ids = [(await ana.create(str(number)))["id"] for number in range(4)]

        async def read() -> None:
            assert (await ana("GET", f"{TASKS}/{ids[0]}", expect=200)).json()["title"] == "0"

        async def page() -> None:
            assert {task["id"] for task in await ana.all()} >= set(ids[:2])

        async def export() -> None:
            exported = (await ana("GET", f"{TASKS}/export", expect=200)).text
            assert {json.loads(line)["id"] for line in exported.splitlines()} >= set(ids[:2])

        async def change() -> None:
            await ana("PATCH", f"{TASKS}/{ids[1]}", json={"description": "x"}, expect=200)

        async def put() -> None:
            await ana("PUT", f"{TASKS}/{ids[1]}", json={"title": "1"}, expect=200)

        async def batch() -> None:
            operations = [{"op": "update", "id": each, "task": {"title": "0"}} for each in ids[:2]]
            await ana("POST", f"{TASKS}/batch", json={"operations": operations}, expect=200)
            await ana("PATCH", f"{TASKS}/{ids[1]}", json={"title": "1"}, expect=200)

        async def import_one_that_is_there() -> None:
            line = json.dumps({"id": ids[1], "title": "again"}).encode()
            ndjson = {"content-type": "application/x-ndjson"}
            await ana("POST", f"{TASKS}/import", content=line, headers=ndjson, expect=(409, 422))

        async def delete() -> None:
            await ana("DELETE", f"{TASKS}/{ids.pop()}", expect=204)

        for prepared in (False, True):
            for ask in (read, page, export, change, put, batch, import_one_that_is_there, delete):
                async with operator.transaction():
                    kind = "bigint" if not prepared else "integer"
                    await operator.execute(f"ALTER TABLE tasks ALTER COLUMN version TYPE {kind}")
                    await operator.execute("ALTER TABLE tasks ALTER COLUMN title TYPE varchar(255)")
                    asked = asyncio.create_task(ask())
                    await waiting(operator)
                await asked
                await operator.execute("ALTER TABLE tasks ALTER COLUMN title TYPE text")


@asynccontextmanager
async def beside(server: PostgresServer) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection beside the service, as the owner of the tables."""
    operator = await asyncpg.connect(server.url)
    try:
        yield operator
    finally:
        operator.terminate()


async def waiting(operator: asyncpg.Connection[asyncpg.Record]) -> None:
    """Returns once somebody else waits for a lock."""
    deadline = time.monotonic() + 30
    question = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    while not await operator.fetchval(question):
        assert time.monotonic() < deadline, "nobody waits"
        await asyncio.sleep(0.01)


async def test_s4_columns_change_their_type_under_live_traffic_and_no_request_fails(
    app: FastAPI, server: PostgresServer, serve: Serve
) -> None:
    async with people(serve, app) as (ana, ben):
        done = asyncio.Event()
        lives = carried = 0

        async def live(caller: Caller) -> None:
            """Everything that can be done with a task, and each answer is what was written."""
            nonlocal lives
            while not done.is_set():
                title = uuid4().hex
                keyed = {"idempotency-key": title}
                made = await caller("POST", json={"title": title}, headers=keyed, expect=201)
                one = made.headers["location"]
                again = await caller("POST", json={"title": title}, headers=keyed, expect=201)
                assert again.text == made.text
                seen = await caller("GET", one, expect=200)
                assert (seen.json()["title"], seen.json()["version"]) == (title, 1)
                changed = await caller("PATCH", one, json={"description": title}, expect=200)
                assert (changed.json()["version"], changed.json()["description"]) == (2, title)
                put = await caller("PUT", one, json={"title": "put", "is_completed": True}, expect=200)
                assert (put.json()["version"], put.json()["description"]) == (3, None)
                listed = (await caller("GET", params={"limit": 200, "q": "put"}, expect=200)).json()
                assert put.json()["id"] in {task["id"] for task in listed["items"]}
                operations = [{"op": "update", "id": put.json()["id"], "task": {"title": "batch"}}]
                await caller("POST", f"{TASKS}/batch", json={"operations": operations}, expect=200)
                await caller("DELETE", one, expect=204)
                await caller("GET", one, expect=404)
                lives += 1

        async def carry() -> None:
            """One export or import at a time is what a process allows."""
            nonlocal carried
            cy = ana.stranger()
            ndjson = {"content-type": "application/x-ndjson"}
            while not done.is_set():
                titles = {uuid4().hex for _ in range(20)}
                lines = "".join(json.dumps({"title": title}) + "\n" for title in titles)
                await cy("POST", f"{TASKS}/import", content=lines.encode(), headers=ndjson, expect=(200, 201))
                exported = await cy("GET", f"{TASKS}/export", expect=200)
                assert titles <= {json.loads(line)["title"] for line in exported.text.splitlines()}
                carried += 1

        async def more(count: int) -> None:
            goal, deadline = lives + count, time.monotonic() + 120
            so_far = carried
            while lives < goal or carried == so_far:
                for client in clients:
                    if client.done():
                        client.result()
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)

        clients = [asyncio.create_task(live(caller)) for caller in (ana, ben) for _ in range(3)]
        clients.append(asyncio.create_task(carry()))
        async with beside(server) as operator:
            try:
                await more(6)
                for column, there, back in CHANGES:
                    for kind in (there, back):
                        await operator.execute(f"ALTER TABLE tasks ALTER COLUMN {column} TYPE {kind}")
                        await more(3)
            finally:
                done.set()
                await asyncio.gather(*clients)
