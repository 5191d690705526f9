"""A primary and a standby that streams from it, one address with both hosts, and a service that follows by itself.

What is acknowledged survives the primary's death where replication is synchronous. Where it is not, what had not
been sent yet is lost: that is what asynchronous means, and a test shows it, so that nobody has to believe it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import httpx
import pytest

from asking import Caller, problem, served
from clusters import Proxy
from conftest import open_directory
from replicas import Pair, standby_of
from src.config.database import parse
from src.embedded.roles import APPLICATION, NAME
from src.services import schema
from src.services.signing import SigningKeys, new_key, seeds

if TYPE_CHECKING:
    from postgres_server import PostgresServer

pytestmark = pytest.mark.slow

KEY = new_key()


@pytest.fixture
def pair(private_postgres: Callable[..., PostgresServer]) -> Iterator[Pair]:
    """A migrated primary, and its standby."""
    primary = private_postgres()
    asyncio.run(schema.create_tables(parse(primary.url)))
    with (
        open_directory() as directory,
        Proxy(primary.port) as wire,
        standby_of(primary, directory / "standby", through=wire.port) as standby,
    ):
        pair = Pair(primary, standby, wire)
        pair.is_streaming()
        yield pair


def address(pair: Pair, role: str, first_port: int | None = None) -> str:
    """Both hosts, and whichever takes writes."""
    password = pair.primary.password_of(role)
    hosts = f"127.0.0.1:{first_port or pair.primary.port},127.0.0.1:{pair.standby.port}"
    return f"postgresql://{role}:{password}@{hosts}/{NAME}?target_session_attrs=read-write"


@asynccontextmanager
async def following(pair: Pair, first_port: int | None = None, **settings: str) -> AsyncIterator[Caller]:
    """Somebody in front of a service that knows both hosts."""
    with served(
        **settings,
        database_url=address(pair, APPLICATION, first_port),
        database_migration_url=address(pair, NAME, first_port),
        signing_keys=KEY,
    ) as service:
        async with httpx.AsyncClient(base_url=service.address, timeout=30) as client:
            ana = Caller(client, SigningKeys(seeds(KEY)))
            await ana.create("warm")
            yield ana


@dataclass
class Load:
    """Careful clients: each write has a key that is sent until there is an answer."""

    ana: Caller
    acknowledged: dict[str, str] = field(default_factory=dict)
    answers: list[tuple[float, int]] = field(default_factory=list)
    readiness: list[tuple[float, int]] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    async def write(self) -> None:
        while not self.done.is_set():
            title = uuid4().hex
            deadline = time.monotonic() + 60
            while True:
                assert time.monotonic() < deadline, self.answers[-20:]
                answer = await self.ana("POST", json={"title": title}, headers={"idempotency-key": title})
                self.answers.append((time.monotonic(), answer.status_code))
                if answer.status_code == 201:
                    self.acknowledged[title] = answer.json()["id"]
                    break
                assert answer.status_code in (503, 504), answer.text
                await asyncio.sleep(0.05)

    async def read(self) -> None:
        while not self.done.is_set():
            await self.ana("GET", expect=(200, 503))
            await asyncio.sleep(0.01)

    async def look(self) -> None:
        while not self.done.is_set():
            answer = await self.ana.client.get("/readyz")
            self.readiness.append((time.monotonic(), answer.status_code))
            assert (await self.ana.client.get("/livez")).status_code == 200
            await asyncio.sleep(0.02)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        workers = [asyncio.create_task(work()) for work in (*[self.write] * 6, *[self.read] * 2, self.look)]
        try:
            yield
        finally:
            self.done.set()
            await asyncio.gather(*workers)

    def figures(self, promoted: float) -> str:
        """What was acknowledged, the longest time without, and how much of it came after the promotion."""
        times = sorted(at for at, status in self.answers if status == 201)
        gap, ended = max((after - before, after) for before, after in pairwise(times))
        return (
            f"{len(self.acknowledged)} acknowledged; longest without: {gap:.2f} s, "
            f"of which after the promotion: {max(ended - promoted, 0):.2f} s"
        )

    async def more(self, count: int) -> None:
        """Returns once so many more were acknowledged."""
        goal = len(self.acknowledged) + count
        deadline = time.monotonic() + 60
        while len(self.acknowledged) < goal:
            assert time.monotonic() < deadline, self.answers[-20:]
            await asyncio.sleep(0.01)


async def stored(server: PostgresServer, ana: Caller) -> dict[str, str]:
    connection = await asyncpg.connect(server.url)
    rows = await connection.fetch(
        "SELECT title, id FROM tasks WHERE user_id = $1 AND title <> 'warm'", ana.id
    )
    await connection.close()
    found = {row["title"]: str(row["id"]) for row in rows}
    assert len(found) == len(rows)  # None twice.
    return found


async def test_a_primary_killed_under_load_loses_no_acknowledged_write_and_the_service_follows_by_itself(
    pair: Pair,
) -> None:
    pair.make_synchronous()
    async with following(pair) as ana:
        load = Load(ana)
        async with load.running():
            await load.more(100)
            await asyncio.to_thread(pair.primary.kill)
            await asyncio.to_thread(pair.promote)
            promoted = time.monotonic()
            await load.more(100)
        assert await stored(pair.standby, ana) == load.acknowledged
        # It says so while there is nobody who takes writes, and no longer than that.
        assert 503 in {status for _, status in load.readiness}
        assert load.readiness[-1][1] == 200
        print(load.figures(promoted))


async def test_a_primary_that_falls_silent_does_not_keep_the_service_from_the_new_one(pair: Pair) -> None:
    """Its machine is gone: nothing refuses, nothing answers. It stands first in the address, and always will."""
    pair.make_synchronous()
    with Proxy(pair.primary.port) as way:
        async with following(pair, way.port) as ana:
            load = Load(ana)
            async with load.running():
                await load.more(50)
                way.black_hole()
                await asyncio.to_thread(pair.primary.kill)
                await asyncio.to_thread(pair.promote)
                promoted = time.monotonic()
                await load.more(100)
            assert await stored(pair.standby, ana) == load.acknowledged
            assert load.readiness[-1][1] == 200
            print(load.figures(promoted))


async def test_what_was_the_primary_and_comes_back_as_a_standby_is_passed_over(pair: Pair) -> None:
    async with following(pair) as ana:
        await asyncio.to_thread(pair.primary.kill)
        await asyncio.to_thread(pair.promote)
        load = Load(ana)
        async with load.running():
            await load.more(20)
            with (
                open_directory() as directory,
                standby_of(pair.standby, directory / "again", port=pair.primary.port) as returned,
            ):
                for _ in range(5):
                    # Every connection is made anew, and the address names the standby first.
                    pair.ask(
                        pair.standby,
                        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'app'",
                    )
                    await load.more(20)
                assert pair.ask(returned, "SELECT pg_is_in_recovery()") is True
        assert await stored(pair.standby, ana) == load.acknowledged


async def test_without_its_synchronous_standby_a_write_is_504_reads_go_on_and_the_key_resolves_it(
    pair: Pair,
) -> None:
    pair.make_synchronous()
    hasty = {"database_command_timeout_seconds": "1.5", "database_statement_timeout_seconds": "1"}
    async with following(pair, **hasty) as ana:
        pair.wire.freeze()
        keyed = {"idempotency-key": "k"}
        for headers in ({}, keyed, keyed):
            asked = asyncio.create_task(ana("POST", json={"title": "x"}, headers=headers, expect=504))
            for _ in range(5):
                found = {task["title"] for task in await ana.all()}
                # While PostgreSQL waits nobody sees it. Given up, it stands on the primary and may not survive it.
                assert found == {"warm"} or headers
                await asyncio.sleep(0.02)
            assert problem(await asked) == "outcome-unknown"
        pair.wire.thaw()
        made = await ana("POST", json={"title": "x"}, headers=keyed, expect=201)
        ids = {task["id"] for task in await ana.all() if task["title"] == "x"}
        assert made.json()["id"] in ids
        assert len(ids) == 2  # One without a key, and one with it.
        await asyncio.to_thread(pair.primary.kill)
        await asyncio.to_thread(pair.promote)
        connection = await asyncpg.connect(pair.standby.url)
        rows = await connection.fetch("SELECT id FROM tasks WHERE user_id = $1 AND title = 'x'", ana.id)
        await connection.close()
        assert {str(row["id"]) for row in rows} == ids


async def test_asynchronously_what_had_not_been_sent_is_lost_and_the_rest_is_there(pair: Pair) -> None:
    """The risk of an asynchronous standby, so that nobody takes it for the other kind."""
    async with following(pair) as ana:
        sent = [(await ana.create(f"sent-{number}"))["title"] for number in range(20)]
        deadline = time.monotonic() + 30
        while set(sent) - set(await stored(pair.standby, ana)):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        pair.wire.black_hole()
        for number in range(20):
            await ana.create(f"not-sent-{number}")
        await asyncio.to_thread(pair.primary.kill)
        await asyncio.to_thread(pair.promote)
        assert sorted(await stored(pair.standby, ana)) == sorted(sent)
