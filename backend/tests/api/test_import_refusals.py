"""Imports that are refused by what their head says: the answer comes before any of their body is read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import asyncpg
import pytest

from asking import Served, served
from conftest import Administrator
from speaking import Line
from src.embedded.roles import APPLICATION
from src.embedded.server import EmbeddedPostgres
from src.services.signing import SigningKeys, new_key, seeds

KEY = new_key()
LINES = "application/x-ndjson"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.fixture(scope="module")
def database(postgres: EmbeddedPostgres, administrator: Administrator, template: str) -> Iterator[str]:
    name = f"test_{uuid4().hex[:16]}"
    administrator.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    yield name
    administrator.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture(scope="module")
def service(postgres: EmbeddedPostgres, database: str) -> Iterator[Served]:
    with served(
        database_url=postgres.url_for(database, role=APPLICATION),
        database_migration_url=postgres.url_for(database),
        signing_keys=KEY,
        # An export waits for its table while a test holds that.
        database_lock_timeout_seconds="50",
        database_statement_timeout_seconds="55",
        database_command_timeout_seconds="60",
    ) as started:
        yield started


@contextlib.asynccontextmanager
async def connected(service: Served) -> AsyncIterator[Line]:
    host, _, port = service.address.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Line(reader, writer)
    finally:
        writer.transport.abort()


def token() -> str:
    return SigningKeys(seeds(KEY)).mint(uuid4(), None, 3600)


def head(method: str = "POST", path: str = "import", **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"{method} /v1/tasks/{path} HTTP/1.1\r\nHost: a\r\n{lines}\r\n".encode()


FRAMINGS = [{"content_length": "1000000"}, {"transfer_encoding": "chunked"}]
EXPECTING = [{"expect": "100-continue"}, {}]
REFUSED = {
    "no token": ({"content_type": LINES}, 401),
    "a bad token": ({"authorization": "Bearer x.y.z", "content_type": LINES}, 401),
    "no content type": ({"authorization": "a good one"}, 415),
    "another content type": ({"authorization": "a good one", "content_type": "application/json"}, 415),
}


@pytest.mark.parametrize("expecting", EXPECTING, ids=["expect", "plain"])
@pytest.mark.parametrize("framing", FRAMINGS, ids=["length", "chunked"])
@pytest.mark.parametrize("name", REFUSED)
async def test_an_import_is_refused_by_its_head_alone(
    service: Served, name: str, framing: dict[str, str], expecting: dict[str, str]
) -> None:
    given, status = REFUSED[name]
    headers = {**given, **framing, **expecting}
    if headers.get("authorization") == "a good one":
        headers["authorization"] = f"Bearer {token()}"
    async with connected(service) as line:
        await line.say(head(**headers))
        # The first bytes are the answer's: no 100 comes before it, and no byte of a body was sent.
        assert (await line.answer())[0] == status


async def begun(service: Served, stack: contextlib.AsyncExitStack, **headers: str) -> Line:
    """An import that was told to continue; one that another test left behind may still hold a place."""
    async with asyncio.timeout(30):
        while True:
            line = await stack.enter_async_context(connected(service))
            await line.say(
                head(authorization=f"Bearer {token()}", content_type=LINES, expect="100-continue", **headers)
            )
            if await line.reader.readuntil(b"\r\n\r\n") == CONTINUE:
                return line
            await asyncio.sleep(0.05)


async def test_an_import_beside_too_many_others_is_429_before_its_body_is_read(service: Served) -> None:
    async with contextlib.AsyncExitStack() as stack, connected(service) as third:
        for _ in range(2):
            await begun(service, stack, content_length="1000000")
        await third.say(
            head(
                authorization=f"Bearer {token()}",
                content_type=LINES,
                content_length="1000000",
                expect="100-continue",
            )
        )
        status, found, _ = await third.answer()
        assert (status, found["retry-after"]) == (429, "5")


async def test_an_import_beside_an_export_is_429_before_its_body_is_read(
    service: Served, postgres: EmbeddedPostgres, database: str
) -> None:
    holder = await asyncpg.connect(postgres.url_for(database))
    authorization = f"Bearer {token()}"
    async with connected(service) as exporting, connected(service) as importing:
        transaction = holder.transaction()
        await transaction.start()
        try:
            await holder.execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
            await exporting.say(head("GET", "export", authorization=authorization))
            async with asyncio.timeout(30):
                while not await holder.fetchval(
                    "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'tasks'::regclass"
                ):
                    await asyncio.sleep(0.02)
            await importing.say(
                head(
                    authorization=authorization,
                    content_type=LINES,
                    content_length="1000000",
                    expect="100-continue",
                )
            )
            assert (await importing.answer())[0] == 429
        finally:
            await transaction.rollback()
            await holder.close()


async def test_an_import_that_is_accepted_is_told_to_continue(service: Served) -> None:
    body = b'{"title": "a"}\n'
    async with contextlib.AsyncExitStack() as stack:
        line = await begun(service, stack, content_length=str(len(body)))
        await line.say(body)
        status, _, answer = await line.answer()
        assert (status, answer) == (200, b'{"count":1}')
