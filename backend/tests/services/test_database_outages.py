"""What the database service does when the database, or the way to it, fails. Every fault is caused."""

import asyncio
import contextlib
import io
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import sqlalchemy as sa
from sqlmodel import text
from sqlmodel.ext.asyncio.session import AsyncSession

from clusters import Proxy, resolving
from echoes import ECHO, SLEEP
from postgres_server import PostgresServer
from src.config.database import ConnectionSettings, parse
from src.config.logging import configure
from src.errors import (
    ConfigurationError,
    DatabaseRefused,
    OutcomeUnknown,
    Overloaded,
    RequestError,
    Unavailable,
)
from src.models import TaskCreate, TaskPut, TaskUpdate, User, UserCreate
from src.services import tasks, users
from src.services.database import Database, Limits
from src.services.idempotency import IdempotencyKey
from src.services.revision import CodeRevision
from src.services.statements import Statement
from waiting import PATIENT, eventually

ADD_USER = Statement(
    "test.add_user",
    lambda: (
        sa.insert(User).values(id=sa.func.gen_random_uuid(), email=sa.bindparam("email")).returning(User.id)
    ),
    repeatable=False,
)
COUNT_USERS = Statement("test.count", lambda: sa.select(sa.func.count()).select_from(User), repeatable=True)

# Impatient, so that the tests are quick; the promises are written in terms of these.
PID = Statement("test.pid", lambda: sa.select(sa.func.pg_backend_pid()), repeatable=True)
QUICK = Limits(
    pool_size=3,
    pool_timeout_seconds=1.0,
    connect_timeout_seconds=2.0,
    command_timeout_seconds=1.5,
    statement_timeout_seconds=1.2,
    lock_timeout_seconds=0.5,
    recovery_wait_seconds=0.8,
    check_interval_seconds=0.2,
)
THREE = replace(PATIENT, pool_size=3)


@pytest.fixture
async def proxied(through_proxy: ConnectionSettings) -> AsyncIterator[Database]:
    async with Database(through_proxy, QUICK) as opened:
        assert await opened.value(ECHO, x="warm") == "warm"
        yield opened


async def answers(database: Database) -> bool:
    try:
        return await database.value(ECHO, x="x") == "x"
    except RequestError:
        return False


# Round trips


async def test_a_read_and_a_single_statement_write_cost_one_round_trip_each(proxied: Database, proxy: Proxy):
    await proxied.value(ADD_USER, email="warm@example.com")
    with proxy.counting() as count:
        await proxied.value(ECHO, x="x")
        assert count().round_trips == 1
    with proxy.counting() as count:
        await proxied.value(ADD_USER, email="ana@example.com")
        assert count().round_trips == 1


async def test_whatever_is_done_with_users_and_tasks_costs_one_round_trip(
    through_proxy: ConnectionSettings, proxy: Proxy
):
    async with Database(through_proxy, Limits(pool_size=1)) as database:
        owner = UUID(json.loads(await users.create(database, UserCreate(email="ana@example.com")))["id"])
        ana = tasks.Known(owner)
        task = (await tasks.create(database, ana, TaskCreate(title="one"))).task_id
        doomed = [(await tasks.create(database, ana, TaskCreate(title="two"))).task_id for _ in range(4)]
        gone = [
            UUID(json.loads(await users.create(database, UserCreate(email=f"{name}@example.com")))["id"])
            for name in ("bo", "cy")
        ]
        change = TaskUpdate(description=None, is_completed=True)
        work: dict[str, Callable[[int], Awaitable[object]]] = {
            "users.create": lambda turn: users.create(database, UserCreate(email=f"{turn}@example.com")),
            "users.read": lambda _: users.read(database, owner),
            "users.find": lambda _: users.find(database, "ana@example.com"),
            "users.page": lambda _: users.page(database),
            "users.delete": lambda turn: users.delete(database, tasks.Known(gone[turn])),
            "tasks.create": lambda _: tasks.create(database, ana, TaskCreate(title="three")),
            "tasks.read": lambda _: tasks.read(database, owner, task),
            "tasks.page": lambda _: tasks.page(database, owner),
            "tasks.create by key": lambda turn: tasks.create(
                database, ana, TaskCreate(title="four"), idempotency=IdempotencyKey(f"key {turn}", b"0" * 32)
            ),
            "tasks.put": lambda _: tasks.put(database, ana, task, TaskPut(title="five")),
            "tasks.update": lambda _: tasks.update(database, ana, task, change),
            "tasks.update if it matches": lambda _: tasks.update(database, ana, task, change, if_match="*"),
            "tasks.delete": lambda turn: tasks.delete(database, ana, doomed[turn]),
            "tasks.delete if it matches": lambda turn: tasks.delete(
                database, ana, doomed[2 + turn], if_match="*"
            ),
        }
        for name, do in work.items():
            await do(0)  # The first time on a connection prepares the statement.
            with proxy.counting() as count:
                await do(1)
                assert (name, count().round_trips) == (name, 1)


async def test_a_session_on_the_same_connection_does_not_cost_later_statements_their_round_trip(
    through_proxy: ConnectionSettings, proxy: Proxy
):
    async with Database(through_proxy, Limits(pool_size=1)) as database:
        await database.value(ECHO, x="x")
        await database.value(COUNT_USERS)
        for number in range(2):
            async with database.session() as session:
                session.add(User(email=f"u{number}@example.com"))
            with proxy.counting() as count:
                await database.value(ECHO, x="x")
                await database.value(COUNT_USERS)
                assert count().round_trips == 2
        assert count().connections == 0


# Network


async def test_n1_a_black_hole_is_503_within_twice_the_timeout_and_the_pool_is_whole_after_it(
    proxied: Database, proxy: Proxy
):
    proxy.black_hole()
    start = time.monotonic()
    outcomes = await asyncio.gather(*(proxied.value(ECHO, x="x") for _ in range(12)), return_exceptions=True)
    assert time.monotonic() - start < 2 * QUICK.command_timeout_seconds + 3
    assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
    assert proxied.observe().status == "down"
    proxy.heal()
    await eventually(lambda: proxied.observe().status == "up")
    assert await asyncio.gather(*(proxied.value(ECHO, x=str(i)) for i in range(12))) == [
        str(i) for i in range(12)
    ]
    await eventually(lambda: proxied.observe().pool.in_use == 0)
    assert proxied.observe().pool.open <= QUICK.pool_size


async def test_a_connection_is_opened_for_no_longer_than_its_caller_waits(
    through_proxy: ConnectionSettings, proxy: Proxy
):
    patient = replace(QUICK, connect_timeout_seconds=30.0)
    async with Database(through_proxy, patient) as database:
        proxy.black_hole()
        proxy.reset_all()
        await eventually(lambda: database.observe().pool.open == 0)
        start = time.monotonic()
        with pytest.raises(Unavailable):
            await database.value(ECHO, x="x")
        assert time.monotonic() - start < QUICK.command_timeout_seconds + 3


async def test_a_statement_whose_time_went_by_in_the_queue_is_no_sign_of_a_dead_server(
    through_proxy: ConnectionSettings,
):
    limits = replace(
        QUICK, pool_size=1, pool_timeout_seconds=3.5, command_timeout_seconds=4, statement_timeout_seconds=3.5
    )
    async with Database(through_proxy, limits) as database:
        first = asyncio.create_task(database.value(SLEEP, seconds=2.0))
        await eventually(lambda: database.observe().pool.in_use == 1)
        with pytest.raises(Unavailable):
            await database.value(SLEEP, seconds=3.0)
        assert database.observe().status == "up"
        assert await first is None
        assert await database.value(ECHO, x="x") == "x"
        assert database.observe().status == "up"


async def test_n2_every_connection_reset_is_invisible_to_reads(
    through_proxy: ConnectionSettings, proxy: Proxy
):
    async with Database(through_proxy, THREE) as database:
        for _ in range(5):
            reads = [asyncio.create_task(database.value(SLEEP, seconds=0.02)) for _ in range(9)]
            await asyncio.sleep(0.01)
            proxy.reset_all()
            assert await asyncio.gather(*reads) == [None] * 9


async def test_n3_while_down_requests_are_turned_away_at_once(proxied: Database, proxy: Proxy):
    proxy.refuse()
    proxy.reset_all()
    with pytest.raises(Unavailable):
        await proxied.value(ECHO, x="x")
    assert proxied.observe().status == "down"
    assert proxied.observe().reason == "connection-refused"
    await asyncio.sleep(QUICK.recovery_wait_seconds)
    took = []
    for _ in range(20):
        start = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            await proxied.value(ADD_USER, email="ana@example.com")
        took.append(time.monotonic() - start)
        assert caught.value.retry_after_seconds == 1
    assert sorted(took)[10] < 0.05  # A busy machine may hold up some of them.
    proxy.accept()
    await eventually(lambda: proxied.observe().status == "up")
    assert await proxied.value(COUNT_USERS) == 0


async def test_n4_two_hundred_milliseconds_of_latency_do_not_collapse_the_pool(
    through_proxy: ConnectionSettings, proxy: Proxy
):
    proxy.delay_seconds = 0.1  # each way
    async with Database(through_proxy, Limits(pool_timeout_seconds=60)) as database:
        for _ in range(2):
            reads = (database.value(ECHO, x="x") for _ in range(12))
            assert await asyncio.gather(*reads, return_exceptions=True) == ["x"] * 12
        assert database.observe().status == "up"


async def test_n5_a_write_whose_reply_is_lost_is_unknown_and_was_not_repeated(
    proxied: Database, proxy: Proxy
):
    await proxied.value(ADD_USER, email="warm@example.com")
    proxy.lose_replies()
    with pytest.raises(OutcomeUnknown):
        await proxied.value(ADD_USER, email="ana@example.com")
    assert await proxied.value(COUNT_USERS) == 2


async def test_a_commit_whose_reply_is_lost_is_unknown(proxied: Database, proxy: Proxy):
    with pytest.raises(OutcomeUnknown):
        async with proxied.transaction() as connection:
            await connection.execute("INSERT INTO users (email) VALUES ('ana@example.com')")
            proxy.lose_replies()
    with pytest.raises(OutcomeUnknown):
        async with proxied.session() as session:
            session.add(User(email="bo@example.com"))
            await session.flush()
            proxy.lose_replies()
    assert await proxied.value(COUNT_USERS) == 2


async def test_n6_a_name_that_does_not_resolve_is_503_and_is_looked_up_anew_later(
    proxy: Proxy, database_url: str
):
    connection = parse(proxy.through(database_url, host="database.example.com") + "?sslmode=disable")
    async with Database(connection, QUICK) as database:
        assert database.observe().status == "down"
        assert database.observe().reason == "host-not-found"
        with pytest.raises(Unavailable):
            await database.value(ECHO, x="x")
        with resolving({"database.example.com": "127.0.0.1"}):
            await eventually(lambda: database.observe().status == "up")
            assert await database.value(ECHO, x="x") == "x"


@pytest.mark.parametrize("kind", ["session", "transaction"])
@pytest.mark.parametrize("what", [Proxy.black_hole, Proxy.freeze])
async def test_work_in_a_transaction_that_falls_silent_is_503_and_a_silent_commit_is_unknown(
    proxied: Database, proxy: Proxy, kind: str, what: Callable[[Proxy], None]
):
    for fault, sent in ((Unavailable, False), (OutcomeUnknown, True)):
        with pytest.raises(fault) as caught:
            async with getattr(proxied, kind)() as access:
                await execute(access, "INSERT INTO users (email) VALUES ('ana@example.com')")
                what(proxy)
                if not sent:
                    await execute(access, "SELECT 1")
        assert caught.value.reason == "timeout"  # type: ignore[attr-defined]
        assert proxied.observe().status == "down"
        proxy.heal()
        proxy.thaw()
        await eventually(lambda: proxied.observe().status == "up")
    await eventually(lambda: proxied.observe().pool.in_use == 0)


@pytest.mark.parametrize("kind", ["session", "transaction"])
async def test_a_timeout_of_the_callers_own_says_nothing_about_the_database(proxied: Database, kind: str):
    with pytest.raises(TimeoutError):
        async with getattr(proxied, kind)() as access:
            async with asyncio.timeout(0.1):
                await execute(access, "SELECT pg_sleep(1)")
    assert proxied.observe().status == "up"
    await eventually(lambda: proxied.observe().pool.in_use == 0)


async def execute(access: Any, statement: str) -> None:
    await (access.exec(text(statement)) if isinstance(access, AsyncSession) else access.execute(statement))


# The database


async def test_d1_an_immediate_restart_under_reads_fails_none_of_them(
    private_postgres: Callable[..., PostgresServer],
):
    server = private_postgres()
    async with Database(parse(server.url), THREE) as database:
        done = asyncio.Event()
        reads, failures = 0, []

        async def read() -> None:
            nonlocal reads
            while not done.is_set():
                try:
                    await database.value(ECHO, x="x")
                    reads += 1
                except RequestError as error:
                    failures.append(error)
                await asyncio.sleep(0.001)

        readers = [asyncio.create_task(read()) for _ in range(16)]
        await asyncio.sleep(0.3)
        for _ in range(2):
            await asyncio.to_thread(server.stop, "immediate")
            await asyncio.to_thread(server.start)
            before = reads
            await eventually(lambda before=before: reads > before + 50)
        done.set()
        await asyncio.gather(*readers)
    assert failures == []


async def test_d2_killed_outright_it_is_503_and_back_within_a_second_of_its_return(
    private_postgres: Callable[..., PostgresServer],
):
    server = private_postgres()
    async with Database(parse(server.url), QUICK) as database:
        assert await answers(database)
        await asyncio.to_thread(server.kill)
        assert not await answers(database)
        assert database.observe().status == "down"
        await asyncio.sleep(1.0)
        await asyncio.to_thread(server.start)
        start = time.monotonic()
        while not await answers(database):
            await asyncio.sleep(0.01)
        assert time.monotonic() - start < 5
        assert database.observe().status == "up"


async def test_d3_a_frozen_server_is_503_within_the_budget_and_heals_when_it_thaws(
    private_postgres: Callable[..., PostgresServer],
):
    server = private_postgres()
    async with Database(parse(server.url), QUICK) as database:
        assert await answers(database)
        server.freeze()
        start = time.monotonic()
        assert not await answers(database)
        assert time.monotonic() - start < QUICK.command_timeout_seconds + 4
        assert database.observe().status == "down"
        server.thaw()
        await eventually(lambda: database.observe().status == "up")
        assert await answers(database)


async def test_d6_too_many_connections_is_503_and_one_that_comes_free_is_used(
    private_postgres: Callable[..., PostgresServer],
):
    server = private_postgres(options={"max_connections": "6", "superuser_reserved_connections": "0"})
    async with contextlib.AsyncExitStack() as stack:
        others = [await asyncpg.connect(server.url) for _ in range(6)]
        for other in others:
            stack.push_async_callback(other.close)
        async with Database(parse(server.url), QUICK) as database:
            with pytest.raises(Unavailable) as caught:
                await database.value(ECHO, x="x")
            assert caught.value.reason == "too-many-connections"
            await others[0].close()
            await eventually(lambda: database.observe().status == "up")
            # One connection is all there is; the pool wants three and makes do.
            assert await asyncio.gather(*(database.value(ECHO, x="x") for _ in range(9))) == ["x"] * 9


async def test_d6_a_further_connection_that_is_refused_is_no_loss_of_those_that_are_open(
    private_postgres: Callable[..., PostgresServer],
):
    server = private_postgres(options={"max_connections": "6", "superuser_reserved_connections": "0"})
    async with contextlib.AsyncExitStack() as stack, Database(parse(server.url), THREE) as database:
        pid = await database.value(PID)
        others = [await asyncpg.connect(server.url) for _ in range(5)]
        for other in others:
            stack.push_async_callback(other.close)
        known = set[str]()

        async def watch() -> None:
            while True:
                known.add(database.observe().status)
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        # The pool wants three, two are refused, and take turns on the one there is.
        slow = [asyncio.create_task(database.value(SLEEP, seconds=0.3)) for _ in range(3)]
        await asyncio.gather(*slow)
        assert await asyncio.gather(*(database.value(PID) for _ in range(9))) == [pid] * 9
        watching.cancel()
        assert known == {"up"}


async def test_however_many_wait_one_healer_alone_asks_a_database_that_is_not_there():
    asked = 0

    async def turn_away(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        writer.close()

    nobody = await asyncio.start_server(turn_away, "127.0.0.1", 0)
    port = nobody.sockets[0].getsockname()[1]
    began = time.monotonic()
    async with (
        nobody,
        Database(parse(f"postgresql://a:b@127.0.0.1:{port}/c?sslmode=disable"), QUICK) as database,
    ):
        for _ in range(3):
            callers = [database.value(ECHO, x="x") for _ in range(100)]
            outcomes = await asyncio.gather(*callers, return_exceptions=True)
            assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
            await asyncio.sleep(0.5)
        # One after the other, with a pause of 50 ms or of a quarter less between them.
        assert 1 < asked <= 2 + (time.monotonic() - began) / 0.0375


# Starting


async def test_an_unreachable_database_at_the_start_is_waited_for(
    postgres: PostgresServer, database_url: str
):
    with Proxy(postgres.port) as proxy:
        proxy.refuse()
        start = time.monotonic()
        patient = replace(QUICK, connect_timeout_seconds=60.0)
        async with Database(parse(proxy.through(database_url)), patient) as database:
            # Nobody is kept from answering /livez by it.
            assert time.monotonic() - start < 30
            assert not database.observe().ready
            assert database.observe().status == "down"
            proxy.accept()
            await eventually(lambda: database.observe().ready)
            assert await answers(database)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [({"password": "wrong"}, "authentication-failed"), ({"database": "nowhere"}, "unknown-database")],
)
async def test_what_waiting_does_not_mend_ends_the_start(
    connection_settings: ConnectionSettings, wrong: dict[str, str], reason: str
):
    from pydantic import SecretStr

    lines = io.StringIO()
    configure("info", "json", lines)
    changed = {key: SecretStr(value) if key == "password" else value for key, value in wrong.items()}
    with pytest.raises(DatabaseRefused) as caught:
        async with Database(replace(connection_settings, **changed)):
            pass
    assert caught.value.reason == reason
    assert "wrong" not in str(caught.value)
    # Whoever started it says the one line.
    assert lines.getvalue() == ""


async def test_a_certificate_file_that_is_not_there_ends_the_start_and_is_named(database_url: str):
    with pytest.raises(ConfigurationError, match=r"nowhere\.crt"):
        async with Database(parse(f"{database_url}?sslmode=verify-full&sslrootcert=nowhere.crt")):
            pass


async def test_c2_a_rotated_password_is_503_at_run_time_and_recovers_when_mended(
    private_postgres: Callable[..., PostgresServer],
):
    server = private_postgres()
    administrator = await asyncpg.connect(server.url)
    await administrator.execute("CREATE ROLE rotated LOGIN PASSWORD 'old'")
    settings = parse(f"postgresql://rotated:old@127.0.0.1:{server.port}/groundwork")
    async with Database(settings, QUICK) as database:
        assert await answers(database)
        await administrator.execute("ALTER ROLE rotated PASSWORD 'new'")
        await administrator.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'rotated'"
        )
        await eventually(lambda: database.observe().pool.open == 0)
        with pytest.raises(Unavailable):
            await database.value(ECHO, x="x")
        assert database.observe().reason == "authentication-failed"
        await administrator.execute("ALTER ROLE rotated PASSWORD 'old'")
        await eventually(lambda: database.observe().status == "up")
        assert await answers(database)
    await administrator.close()


async def test_start_up_migrates_an_empty_database(empty_database_url: str):
    connection = parse(empty_database_url)
    async with Database(connection, schema=CodeRevision(connection), migrate=True) as database:
        assert database.observe().ready
        assert database.observe().schema.status == "current"
        assert await database.value(COUNT_USERS) == 0


async def test_tables_of_somebody_else_are_left_alone_and_named_as_the_reason(empty_database_url: str):
    raw = await asyncpg.connect(empty_database_url)
    await raw.execute("CREATE TABLE users (mine text)")
    connection = parse(empty_database_url)
    async with Database(connection, QUICK, schema=CodeRevision(connection), migrate=True) as database:
        await eventually(lambda: database.observe().reason == "schema-occupied")
        assert not database.observe().ready
    assert await raw.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 1
    await raw.close()


async def test_s2_two_processes_that_start_at_once_both_succeed(empty_database_url: str):
    connection = parse(empty_database_url)
    async with (
        Database(connection, schema=CodeRevision(connection), migrate=True) as one,
        Database(connection, schema=CodeRevision(connection), migrate=True) as other,
    ):
        await eventually(lambda: one.observe().ready and other.observe().ready)


async def test_without_migration_an_older_schema_is_not_ready_until_somebody_migrates(
    empty_database_url: str,
):
    from src.services import schema

    connection = parse(empty_database_url)
    async with Database(connection, QUICK, schema=CodeRevision(connection)) as database:
        assert not (await database.check()).ready
        assert database.observe().reason == "schema-behind"
        with pytest.raises(Unavailable) as caught:
            await database.value(COUNT_USERS)
        assert caught.value.reason == "schema-mismatch"
        await schema.create_tables(connection)

        async def is_ready() -> bool:
            return (await database.check()).ready

        await eventually(is_ready)


async def test_an_unknown_newer_schema_is_ready_with_a_warning(connection_settings: ConnectionSettings):
    raw = await asyncpg.connect(**connection_settings.asyncpg_arguments())
    await raw.execute("UPDATE alembic_version SET version_num = 'from_the_future'")
    await raw.close()
    async with Database(
        connection_settings, schema=CodeRevision(connection_settings), migrate=True
    ) as database:
        await eventually(lambda: database.observe().ready)
        assert database.observe().schema.status == "ahead"
        assert database.observe().reason == "schema-ahead"


# The pool


async def test_l1_a_pool_emptied_by_slow_statements_is_503_within_its_wait_and_told_once_a_second(
    connection_settings: ConnectionSettings,
):
    lines = io.StringIO()
    configure("info", "json", lines)
    limits = replace(THREE, pool_timeout_seconds=1.0)
    async with Database(connection_settings, limits) as database:
        slow = [asyncio.create_task(database.value(SLEEP, seconds=4.0)) for _ in range(3)]
        await eventually(lambda: database.observe().pool.in_use == 3)
        start = time.monotonic()
        asked = (database.value(ECHO, x="x") for _ in range(50))
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        took = time.monotonic() - start
        assert took < limits.pool_timeout_seconds + 3
        assert all(isinstance(outcome, Overloaded) for outcome in outcomes)
        await asyncio.gather(*slow)
        assert await database.value(ECHO, x="x") == "x"
    assert (
        1 <= lines.getvalue().count("database.pool_exhausted") <= 1 + int(took - limits.pool_timeout_seconds)
    )


async def test_closing_waits_for_nobody_longer_than_a_command(proxied: Database, proxy: Proxy):
    reading = asyncio.create_task(proxied.value(SLEEP, seconds=1.0))
    await asyncio.sleep(0.05)
    proxy.freeze()
    start = time.monotonic()
    await proxied.close()
    assert time.monotonic() - start < QUICK.command_timeout_seconds + 5
    with pytest.raises(RequestError):
        await reading
    proxy.thaw()


def test_out_of_file_descriptors_is_recognised():
    import errno

    from src.services.faults import diagnose

    with contextlib.ExitStack() as stack:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        with pytest.raises(OSError, match="Too many open files") as caught:
            for _ in range(200):
                stack.enter_context(socket.socket())
    assert caught.value.errno == errno.EMFILE
    assert diagnose(caught.value).reason == "out-of-file-descriptors"
