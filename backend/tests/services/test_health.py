"""Health of the database, cell by cell of the table in docs/health.md: what can be known, and how fast.

Direct or through a proxy that counts every byte; idle or under traffic; passive or active. The PgBouncer column
is in test_pgbouncer.py.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime

import asyncpg
import pytest

from clusters import Proxy
from echoes import ECHO, SLEEP
from postgres_server import PostgresServer
from src.config.database import ConnectionSettings, parse
from src.errors import RequestError
from src.services.database import Database, Limits, Observation
from src.services.revision import CodeRevision
from waiting import eventually


@pytest.fixture
async def passive(through_proxy: ConnectionSettings) -> AsyncIterator[Database]:
    async with Database(through_proxy, passive=True, schema=CodeRevision(through_proxy)) as opened:
        yield opened


@pytest.fixture
async def active(through_proxy: ConnectionSettings) -> AsyncIterator[Database]:
    async with Database(through_proxy, schema=CodeRevision(through_proxy)) as opened:
        yield opened


async def kill_backends(url: str) -> None:
    killer = await asyncpg.connect(url)
    await killer.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await killer.close()


LOOK = 0.05


async def until(database: Database, wanted: Callable[[Observation], bool], seconds: float = 60) -> None:
    """Asks every 50 ms, as an impatient probe would, until the answer is the wanted one.

    What counts is how long the answers take and how many pauses lie between them, not how long a busy machine makes
    of a pause.
    """
    waited = 0.0
    while True:
        asked = time.monotonic()
        if wanted(await database.check()):
            return
        waited += time.monotonic() - asked + LOOK
        assert waited < seconds, f"still {database.observe()}"
        await asyncio.sleep(LOOK)


async def traffic(database: Database, stop: asyncio.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(RequestError):
            await database.value(ECHO, x="x")
        await asyncio.sleep(0.02)


# Passive


async def test_passive_idle_probes_send_no_byte_and_open_no_connection(passive: Database, proxy: Proxy):
    await passive.value(ECHO, x="x")
    with proxy.counting() as count:
        for _ in range(60):
            seen = await passive.check()
            assert seen.ready
            assert seen.status == "up"
            await asyncio.sleep(0.02)
        assert count().bytes_to_server == 0
        assert count().connections == 0


async def test_passive_when_the_server_closes_idle_connections_it_is_asleep_ready_and_left_alone(
    passive: Database, proxy: Proxy, database_url: str
):
    await passive.value(ECHO, x="x")
    await kill_backends(database_url)
    await until(passive, lambda seen: seen.status == "asleep")
    with proxy.counting() as count:
        for _ in range(60):
            seen = await passive.check()
            assert (seen.status, seen.ready, seen.pool.open) == ("asleep", True, 0)
            await asyncio.sleep(0.02)
        assert count().connections == 0
        # The next request wakes it, within its own deadline.
        assert await passive.value(ECHO, x="x") == "x"
        assert count().connections >= 1
    assert (await passive.check()).status == "up"


async def test_passive_asleep_and_gone_is_known_at_the_first_request_and_stays_down_until_a_success(
    private_postgres: Callable[..., PostgresServer],
):
    server = private_postgres()
    async with Database(parse(server.url), Limits(recovery_wait_seconds=0.3), passive=True) as database:
        await asyncio.to_thread(server.stop)
        # Nothing was asked, so this cannot be told from sleep; the age of the evidence says as much.
        await until(database, lambda seen: seen.status == "asleep")
        with pytest.raises(RequestError):
            await database.value(ECHO, x="x")
        assert (await database.check()).status == "down"
        assert not database.observe().ready
        await asyncio.to_thread(server.start)
        await until(database, lambda seen: seen.status == "up")


async def test_passive_under_traffic_a_stop_is_down_within_two_seconds_and_a_start_up_within_two(
    private_postgres: Callable[..., PostgresServer],
):
    server = private_postgres()
    async with Database(parse(server.url), passive=True) as database:
        stop = asyncio.Event()
        busy = asyncio.create_task(traffic(database, stop))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(server.stop)
        await until(database, lambda seen: not seen.ready, 2.0)
        assert database.observe().status == "down"
        await asyncio.to_thread(server.start)
        await until(database, lambda seen: seen.ready and seen.status == "up", 2.0)
        stop.set()
        await busy


# Active


async def test_active_an_idle_stop_is_down_within_two_seconds_and_a_start_up_within_two(
    private_postgres: Callable[..., PostgresServer],
):
    server = private_postgres()
    async with Database(parse(server.url)) as database:
        assert (await database.check()).ready
        for stop in (server.stop, server.kill):
            await asyncio.to_thread(stop)
            await until(database, lambda seen: not seen.ready, 2.0)
            assert database.observe().status == "down"
            await asyncio.to_thread(server.start)
            await until(database, lambda seen: seen.ready, 2.0)


async def test_active_a_frozen_server_is_down_within_the_command_budget_and_heals(
    private_postgres: Callable[..., PostgresServer],
):
    server = private_postgres()
    async with Database(parse(server.url)) as database:
        server.freeze()
        await until(database, lambda seen: not seen.ready, Limits().command_timeout_seconds)
        server.thaw()
        await until(database, lambda seen: seen.ready)


async def test_active_however_many_ask_there_is_one_real_check_an_interval(active: Database, proxy: Proxy):
    interval = Limits().check_interval_seconds
    await active.check()
    await asyncio.sleep(interval)
    with proxy.counting() as count:
        began = time.monotonic()
        await asyncio.gather(*(active.check() for _ in range(200)))
        intervals = 1 + int((time.monotonic() - began) / interval)
        assert 0 < count().round_trips <= 4 * intervals
        first = count().round_trips
        await asyncio.gather(*(active.check() for _ in range(200)))
        # Nothing more, unless the machine was so busy that another interval has begun.
        assert count().round_trips - first <= 4 * int((time.monotonic() - began) / interval)
        assert count().connections == 0


async def test_active_traffic_is_evidence_enough_and_saves_the_check(active: Database, proxy: Proxy):
    await asyncio.sleep(Limits().check_interval_seconds)
    began = time.monotonic()
    await active.value(ECHO, x="x")
    with proxy.counting() as count:
        seen = await active.check()
        assert count().bytes_to_server == 0
    assert seen.evidence == "traffic"
    assert seen.evidence_age_seconds is not None
    assert seen.evidence_age_seconds <= time.monotonic() - began


async def test_active_with_every_connection_busy_a_check_waits_for_none(through_proxy: ConnectionSettings):
    limits = Limits(
        pool_size=1, check_interval_seconds=0.1, command_timeout_seconds=60, statement_timeout_seconds=50
    )
    async with Database(through_proxy, limits) as database:
        sleeping = asyncio.create_task(database.value(SLEEP, seconds=40.0))
        await eventually(lambda: database.observe().pool.in_use == 1)
        await asyncio.sleep(0.3)
        assert (await database.check()).ready
        assert not sleeping.done()
        sleeping.cancel()
        await asyncio.gather(sleeping, return_exceptions=True)


async def test_a_single_killed_connection_is_not_an_outage(active: Database, database_url: str):
    await kill_backends(database_url)
    for _ in range(20):
        assert (await active.check()).ready
        await asyncio.sleep(0.1)


# Facts


async def test_a_read_only_server_is_ready_and_says_so(private_postgres: Callable[..., PostgresServer]):
    server = private_postgres(options={"default_transaction_read_only": "on"})
    async with Database(parse(server.url)) as database:
        seen = await database.check()
        assert seen.ready
        assert seen.read_only


async def test_a_revision_that_may_not_be_read_is_told_and_is_no_outage(
    database_url: str,
):
    owner = await asyncpg.connect(database_url)
    name = f"app_{time.monotonic_ns()}"
    await owner.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'pw'")
    try:
        connection = parse(f"postgresql://{name}:pw@{database_url.rpartition('@')[2]}")
        async with Database(connection, schema=CodeRevision(connection)) as database:
            seen = await database.check()
            assert (seen.status, seen.ready, seen.reason) == ("up", False, "insufficient-privilege")
            assert await database.value(ECHO, x="x") == "x"
            await owner.execute(f"GRANT SELECT ON alembic_version TO {name}")
            await until(database, lambda seen: seen.ready)
            # Once it is known, a right lost later does not take a working service away.
            await owner.execute(f"REVOKE SELECT ON alembic_version FROM {name}")
            await kill_backends(database_url)
            assert await database.value(ECHO, x="x") == "x"
            assert (await database.check()).ready
    finally:
        owner = await asyncpg.connect(database_url)
        await owner.execute(f"DROP OWNED BY {name}")
        await owner.execute(f"DROP ROLE {name}")
        await owner.close()


async def test_the_time_of_the_evidence_is_its_own_and_not_the_question_s(passive: Database):
    def said_to_be_at() -> datetime:
        """Of several times, because a busy machine may come between the looks at the two clocks."""
        return min(at for at in (passive.observe().evidence_at for _ in range(20)) if at is not None)

    await passive.value(ECHO, x="x")
    first = said_to_be_at()
    await asyncio.sleep(0.2)
    assert abs((said_to_be_at() - first).total_seconds()) < 0.05
    second = passive.observe()
    assert second.evidence_age_seconds is not None
    assert second.evidence_age_seconds >= 0.2


def test_before_it_is_opened_the_database_is_starting(through_proxy: ConnectionSettings, proxy: Proxy):
    async def look() -> Observation:
        return Database(through_proxy).observe()

    with proxy.counting() as count:
        seen = asyncio.run(look())
        assert (seen.status, seen.ready, seen.reason) == ("starting", False, "connecting")
        assert count().connections == 0
