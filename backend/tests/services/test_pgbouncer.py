"""Behind PgBouncer in transaction mode, on PostgreSQL 15 and 18. Debian's 1.18 follows no prepared statements; one
that does (1.21 and newer) is tried too where it is at hand, by itself and by the operator's word.

The hot statements run a hundred at once, directly and through the pooler, and never fail for the pooler's sake.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from uuid import UUID

import asyncpg
import pytest
from sqlmodel import select, text

from clusters import PgBouncer, postgres_15_binaries, tracking_settings
from postgres_server import PostgresServer
from src.config.database import ConnectionSettings, parse
from src.errors import RequestError
from src.models import Task, TaskCreate, TaskUpdate, User, UserCreate
from src.services import schema, tasks, users
from src.services.database import Database, Limits
from src.services.revision import CodeRevision
from waiting import PATIENT, eventually

pytestmark = pytest.mark.debian


@pytest.fixture(params=["15", "18"])
def server(request: pytest.FixtureRequest, private_postgres: Callable[..., PostgresServer]) -> PostgresServer:
    return private_postgres(binaries=postgres_15_binaries() if request.param == "15" else None)


# Neon's pooler tracks. `auto` does without what it offers; an operator may say `tracking`.
TRACKING = [word for _ in tracking_settings() for word in ("tracking, unsaid", "tracking")]


@pytest.fixture(params=["direct", "pgbouncer", *TRACKING])
def settings(request: pytest.FixtureRequest, server: PostgresServer) -> Iterator[ConnectionSettings]:
    with ExitStack() as stack:
        if request.param == "direct":
            yield parse(server.url)
        else:
            # Two backends for all: every transaction meets another one than the last.
            tracks = tracking_settings()[0] if request.param in TRACKING else {}
            pooler = stack.enter_context(PgBouncer(server, settings={"default_pool_size": "2"} | tracks))
            yield parse(pooler.url, pooler="tracking" if request.param == "tracking" else "auto")


@pytest.fixture
def pooler(private_postgres: Callable[..., PostgresServer]) -> Iterator[PgBouncer]:
    # After a failed login PgBouncer turns everybody away for server_login_retry, 15 s unless told otherwise.
    settings = {"default_pool_size": "2", "server_login_retry": "1"}
    with PgBouncer(private_postgres(), settings=settings) as opened:
        yield opened


async def test_l3_six_hot_statements_a_hundred_at_once_meet_no_error(settings: ConnectionSettings):
    await schema.create_tables(settings)
    async with Database(settings, replace(PATIENT, pool_size=8)) as database:

        async def life(number: int) -> None:
            owner = UUID(
                json.loads(await users.create(database, UserCreate(email=f"u{number}@example.com")))["id"]
            )
            made = await tasks.create(database, tasks.Known(owner), TaskCreate(title=f"task {number}"))
            task = json.loads(made.body)
            assert (await tasks.read(database, owner, made.task_id)).body == made.body
            await tasks.update(database, tasks.Known(owner), task["id"], TaskUpdate(is_completed=True))
            (listed,) = json.loads((await tasks.page(database, owner)).items)
            assert (listed["id"], listed["is_completed"], listed["version"]) == (task["id"], True, 2)
            if number % 2:
                await tasks.delete(database, tasks.Known(owner), task["id"])
                assert (await tasks.page(database, owner)).items == "[]"

        await asyncio.gather(*(life(number) for number in range(100)))
        async with database.session() as session:
            assert len((await session.exec(select(Task))).all()) == 50


async def test_the_pooler_is_found_out_without_being_told(pooler: PgBouncer):
    async with Database(parse(pooler.url)) as database:
        assert database.pooler == "transaction"
    async with Database(parse(pooler.server.url)) as database:
        assert database.pooler == "none"


async def test_sessions_and_statements_take_turns_behind_the_pooler(pooler: PgBouncer):
    settings = parse(pooler.url)
    await schema.create_tables(settings)
    async with Database(settings, replace(PATIENT, pool_size=6)) as database:

        async def by_session(number: int) -> None:
            async with database.session() as session:
                session.add(User(email=f"s{number}@example.com"))
            async with database.session() as session:
                found = await session.exec(select(User).where(User.email == f"s{number}@example.com"))
                assert found.one().email == f"s{number}@example.com"

        async def by_statement(number: int) -> None:
            await users.create(database, UserCreate(email=f"t{number}@example.com"))

        work = [by_session(i) for i in range(60)] + [by_statement(i) for i in range(60)]
        await asyncio.gather(*work)
        async with database.session(read_only=True) as session:
            assert len((await session.exec(select(User))).all()) == 120


async def test_a_changed_column_type_is_right_at_once_behind_the_pooler(pooler: PgBouncer):
    settings = parse(pooler.url)
    await schema.create_tables(settings)
    async with Database(settings) as database:
        owner = UUID(json.loads(await users.create(database, UserCreate(email="ana@example.com")))["id"])
        await tasks.create(database, tasks.Known(owner), TaskCreate(title="before"))
        direct = await asyncpg.connect(pooler.server.url)
        await direct.execute("ALTER TABLE tasks ALTER COLUMN version TYPE bigint")
        await direct.close()
        for _ in range(10):
            assert json.loads((await tasks.page(database, owner)).items)[0]["version"] == 1
        async with database.session() as session:
            assert (await session.exec(select(Task.version))).one() == 1


async def test_start_up_migrates_through_the_pooler_and_two_at_once_are_safe(pooler: PgBouncer):
    settings = parse(pooler.url)
    async with (
        Database(settings, schema=CodeRevision(settings), migrate=True) as one,
        Database(settings, schema=CodeRevision(settings), migrate=True) as other,
    ):
        await eventually(lambda: one.observe().ready and other.observe().ready)


async def test_no_setting_of_one_caller_reaches_another_through_the_pooler(pooler: PgBouncer):
    async with Database(parse(pooler.url), Limits(pool_size=4)) as database:
        async with database.session() as session:
            await session.exec(text("SELECT set_config('app.user_id', 'ana', true)"))
        for _ in range(8):
            async with database.transaction() as connection:
                assert await connection.fetchval("SELECT current_setting('app.user_id', true)") in (None, "")


# Health behind a pooler: the socket says nothing about PostgreSQL, so only traffic or an active check can.


async def until_ready(database: Database, ready: bool, seconds: float = 60) -> None:
    start = time.monotonic()
    while (await database.check()).ready is not ready:
        assert time.monotonic() - start < seconds, f"still {database.observe()}"
        await asyncio.sleep(0.05)


async def test_active_behind_the_pooler_a_stop_is_known_within_two_seconds_and_a_start_after_its_retry(
    pooler: PgBouncer,
):
    async with Database(parse(pooler.url)) as database:
        assert (await database.check()).ready
        await asyncio.to_thread(pooler.server.stop)
        await until_ready(database, False, 2.0)
        await asyncio.to_thread(pooler.server.start)
        await until_ready(database, True)


async def test_active_behind_the_pooler_a_frozen_server_is_known_within_the_command_budget(pooler: PgBouncer):
    async with Database(parse(pooler.url)) as database:
        pooler.server.freeze()
        await until_ready(database, False, Limits().command_timeout_seconds)
        pooler.server.thaw()
        await until_ready(database, True)


async def test_passive_and_idle_behind_the_pooler_a_stop_is_not_known_and_the_evidence_ages(
    pooler: PgBouncer,
):
    async with Database(parse(pooler.url), passive=True) as database:
        await asyncio.to_thread(pooler.server.stop)
        await asyncio.sleep(2.5)
        seen = await database.check()
        assert (seen.status, seen.ready) == ("up", True)
        assert seen.evidence_age_seconds is not None
        assert seen.evidence_age_seconds > 2.0


async def test_passive_under_traffic_behind_the_pooler_a_stop_is_known_within_the_command_budget(
    pooler: PgBouncer,
):
    settings = parse(pooler.url)
    limits = replace(Limits(), command_timeout_seconds=2.0)
    await schema.create_tables(settings)
    async with Database(settings, limits, passive=True) as database:
        await asyncio.to_thread(pooler.server.stop)
        with pytest.raises(RequestError):
            await users.page(database)
        assert not (await database.check()).ready
        await asyncio.to_thread(pooler.server.start)
        await until_ready(database, True)
        assert json.loads(await users.page(database)) == []
