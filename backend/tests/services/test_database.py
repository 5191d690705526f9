"""The database service on a healthy PostgreSQL: statements, sessions, transactions, one budget of connections."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import sqlalchemy as sa
from sqlmodel import select, text
from sqlmodel.ext.asyncio.session import AsyncSession

from echoes import ECHO, SLEEP
from src.config.database import ConnectionSettings, PoolerSetting, parse
from src.errors import (
    Conflict,
    InternalFault,
    Invalid,
    NestedAcquisition,
    OutcomeUnknown,
    Overloaded,
    Refused,
    Unavailable,
)
from src.models import Task, User
from src.services.database import Database, Limits
from src.services.statements import Statement
from waiting import PATIENT, eventually

PID = Statement("test.pid", lambda: sa.select(sa.func.pg_backend_pid()), repeatable=True)
PREPARED = Statement(
    "test.prepared",
    lambda: sa.text(
        "SELECT count(*) FROM pg_prepared_statements WHERE statement NOT LIKE '%prepared_statements%'"
    ),
    repeatable=True,
)
SERIES = Statement(
    "test.series",
    lambda: sa.select(sa.func.generate_series(1, sa.bindparam("n", type_=sa.Integer)).label("i")),
    repeatable=True,
)
ADD_USER = Statement(
    "test.add_user",
    lambda: sa.insert(User).values(id=sa.bindparam("id"), email=sa.bindparam("email")).returning(User.id),
    repeatable=False,
)
COUNT_USERS = Statement("test.count", lambda: sa.select(sa.func.count()).select_from(User), repeatable=True)


@pytest.fixture
async def small(connection_settings: ConnectionSettings) -> AsyncIterator[Database]:
    """Two connections and little patience."""
    limits = Limits(
        pool_size=2, pool_timeout_seconds=0.2, lock_timeout_seconds=0.2, statement_timeout_seconds=0.5
    )
    async with Database(connection_settings, limits) as opened:
        yield opened


@pytest.fixture
async def patient(connection_settings: ConnectionSettings) -> AsyncIterator[Database]:
    """Two connections, and as much patience as a busy machine asks for."""
    async with Database(connection_settings, replace(PATIENT, pool_size=2)) as opened:
        yield opened


async def test_a_statement_gives_a_value_a_row_or_rows(database: Database):
    assert await database.value(ECHO, x="é") == "é"
    assert dict(await database.row(SERIES, n=3)) == {"i": 1}
    assert [row["i"] for row in await database.rows(SERIES, n=3)] == [1, 2, 3]
    assert await database.value(SERIES, n=0) is None
    assert await database.row(SERIES, n=0) is None
    assert await database.rows(SERIES, n=0) == []


async def test_a_missing_value_is_a_programming_error_and_takes_no_connection(database: Database):
    with pytest.raises(KeyError):
        await database.value(ECHO)
    assert database.observe().pool.in_use == 0


async def test_a_single_statement_write_is_committed_when_it_returns(database: Database, database_url: str):
    await database.value(ADD_USER, id=uuid4(), email="ana@example.com")
    other = await asyncpg.connect(database_url)
    assert await other.fetchval("SELECT count(*) FROM users") == 1
    await other.close()


async def test_a_uniqueness_violation_names_its_constraint_and_releases_the_connection(database: Database):
    await database.value(ADD_USER, id=uuid4(), email="ana@example.com")
    with pytest.raises(Conflict) as caught:
        await database.value(ADD_USER, id=uuid4(), email="ana@example.com")
    assert caught.value.constraint == "uq_users_email"
    assert database.observe().pool.in_use == 0


async def test_a_session_commits_at_its_end(database: Database):
    async with database.session() as session:
        session.add(User(email="ana@example.com"))
    assert await database.value(COUNT_USERS) == 1


async def test_a_session_rolls_back_on_any_error_and_gives_its_connection_back(database: Database):
    with pytest.raises(ValueError, match="mine"):
        async with database.session() as session:
            session.add(User(email="ana@example.com"))
            await session.flush()
            raise ValueError("mine")
    assert await database.value(COUNT_USERS) == 0
    assert database.observe().pool.in_use == 0


async def test_a_savepoint_inside_a_session_can_fail_alone(database: Database):
    async with database.session() as session:
        session.add(User(email="ana@example.com"))
        await session.flush()
        with pytest.raises(sa.exc.IntegrityError):
            async with session.begin_nested():
                session.add(User(email="ana@example.com"))
        session.add(User(email="bo@example.com"))
    assert await database.value(COUNT_USERS) == 2


async def test_a_read_only_session_refuses_to_write(database: Database):
    with pytest.raises(Refused) as caught:
        async with database.session(read_only=True) as session:
            session.add(User(email="ana@example.com"))
    assert caught.value.reason == "read-only"
    async with database.session(read_only=True) as session:
        assert (await session.exec(select(User))).all() == []


async def test_a_commit_that_fails_is_an_error_of_the_session(database: Database):
    await _make_commits_fail(database)
    with pytest.raises(Conflict):
        async with database.session() as session:
            session.add(User(email="ana@example.com"))
    with pytest.raises(Conflict):
        async with database.transaction() as connection:
            await connection.execute("INSERT INTO users (email) VALUES ('bo@example.com')")
    with pytest.raises(Conflict):
        await database.value(ADD_USER, id=uuid4(), email="cy@example.com")
    assert await database.value(COUNT_USERS) == 0


async def _make_commits_fail(database: Database) -> None:
    async with database.transaction() as connection:
        await connection.execute(
            """
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE unique_violation USING CONSTRAINT = 'at_commit'; END $$;
            CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON users
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()
            """
        )


async def test_a_transaction_commits_and_rolls_back(database: Database):
    async with database.transaction() as connection:
        await connection.execute("INSERT INTO users (email) VALUES ('ana@example.com')")
    with pytest.raises(RuntimeError):
        async with database.transaction() as connection:
            await connection.execute("INSERT INTO users (email) VALUES ('bo@example.com')")
            raise RuntimeError
    assert await database.value(COUNT_USERS) == 1


async def test_what_a_caller_sets_does_not_reach_the_next_one(small: Database):
    for opened in (small.transaction, small.session):
        async with opened() as access:
            await _execute(access, "SET statement_timeout = '77s'")
    async with small.transaction() as one:
        assert await one.fetchval("SHOW statement_timeout") == "500ms"
        assert await one.fetchval("SHOW timezone") == "UTC"


@pytest.mark.parametrize("outer", ["session", "transaction"])
@pytest.mark.parametrize("inner", ["value", "session", "transaction"])
async def test_asking_for_a_connection_while_holding_one_raises(database: Database, outer: str, inner: str):
    async with getattr(database, outer)():
        with pytest.raises(NestedAcquisition):
            if inner == "value":
                await database.value(ECHO, x="x")
            else:
                async with getattr(database, inner)():
                    pass
    # Afterwards, and in another task meanwhile, it is allowed.
    assert await database.value(ECHO, x="x") == "x"


async def test_a_hundred_callers_share_the_budget_and_none_exceeds_it(patient: Database, database_url: str):
    watcher = await asyncpg.connect(database_url)
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            now = await watcher.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            most = max(most, now)

    watching = asyncio.create_task(watch())
    answers = await asyncio.gather(*(patient.value(ECHO, x=str(i)) for i in range(100)))
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await watcher.close()
    assert answers == [str(i) for i in range(100)]
    assert most <= 2
    assert patient.observe().pool.open <= 2


async def test_callers_are_served_in_the_order_of_arrival(connection_settings: ConnectionSettings):
    async with Database(connection_settings, Limits(pool_size=1)) as database:
        order: list[int] = []

        async def ask(number: int) -> None:
            await database.value(ECHO, x="x")
            order.append(number)

        await asyncio.gather(*(ask(number) for number in range(20)))
    assert order == list(range(20))


async def test_an_emptied_pool_answers_overloaded_within_its_wait(connection_settings: ConnectionSettings):
    async with Database(connection_settings, Limits(pool_size=2, pool_timeout_seconds=0.2)) as database:
        holders = [asyncio.create_task(database.value(SLEEP, seconds=2.0)) for _ in range(2)]
        await eventually(lambda: database.observe().pool.in_use == 2)
        with pytest.raises(Overloaded) as caught:
            await database.value(ECHO, x="x")
        assert caught.value.retry_after_seconds == 1
        await asyncio.gather(*holders)
        assert await database.value(ECHO, x="x") == "x"


async def test_a_statement_over_its_timeout_is_unavailable_and_the_pool_stays_whole(small: Database):
    with pytest.raises(Unavailable) as caught:
        await small.value(SLEEP, seconds=5.0)
    assert caught.value.reason == "statement-timeout"
    assert small.observe().status == "up"
    assert await small.value(ECHO, x="x") == "x"


async def test_a_held_lock_costs_at_most_the_lock_timeout(small: Database):
    await small.value(ADD_USER, id=uuid4(), email="ana@example.com")
    lock = Statement("test.lock", lambda: sa.select(User.id).with_for_update(), repeatable=True)
    async with small.transaction() as connection:
        await connection.execute("SELECT id FROM users FOR UPDATE")
        other = asyncio.create_task(_in_fresh_context(small.value(lock)))
        with pytest.raises(Unavailable) as caught:
            await other
    assert caught.value.reason == "lock-timeout"


async def _in_fresh_context(work):
    import contextvars

    return await asyncio.get_running_loop().create_task(work, context=contextvars.Context())


async def test_deadlocks_are_repeated_as_a_whole_and_both_callers_succeed(database: Database):
    users = [uuid4(), uuid4()]
    for number, user in enumerate(users):
        await database.value(ADD_USER, id=user, email=f"u{number}@example.com")
    attempts = holding = 0
    both_hold_one = asyncio.Event()

    async def swap(first, second) -> None:
        async def work(connection) -> None:
            nonlocal attempts, holding
            attempts += 1
            await connection.execute("SELECT id FROM users WHERE id = $1 FOR UPDATE", first)
            holding += 1
            if holding == 2:
                both_hold_one.set()
            await both_hold_one.wait()
            await connection.execute("SELECT id FROM users WHERE id = $1 FOR UPDATE", second)

        await database.atomically(work)

    await asyncio.gather(swap(*users), swap(*reversed(users)))
    assert attempts == 3


async def test_a_commit_that_cannot_be_serialized_is_repeated_as_a_whole(database: Database):
    async with database.transaction() as connection:
        await connection.execute(
            """
            CREATE SEQUENCE commits;
            CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN
                IF nextval('commits') = 1 THEN RAISE serialization_failure; END IF; RETURN NULL;
            END $$;
            CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON users
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail_once()
            """
        )
    attempts = 0

    async def work(connection) -> None:
        nonlocal attempts
        attempts += 1
        await connection.execute("INSERT INTO users (email) VALUES ('ana@example.com')")

    await database.atomically(work)
    assert attempts == 2
    assert await database.value(COUNT_USERS) == 1


async def test_a_transaction_whose_failed_statement_was_passed_over_does_not_seem_committed(
    database: Database,
):
    with pytest.raises(InternalFault):
        async with database.transaction() as connection:
            await connection.execute("INSERT INTO users (email) VALUES ('ana@example.com')")
            with contextlib.suppress(asyncpg.PostgresError):
                await connection.execute("SELECT 1 / 0")
    assert await database.value(COUNT_USERS) == 0
    assert database.observe().pool.in_use == 0


async def test_a_session_whose_failed_statement_was_passed_over_does_not_seem_committed(database: Database):
    with pytest.raises(InternalFault):
        async with database.session() as session:
            await session.exec(text("INSERT INTO users (email) VALUES ('ana@example.com')"))
            with contextlib.suppress(sa.exc.DBAPIError):
                await session.exec(text("SELECT 1 / 0"))
    assert await database.value(COUNT_USERS) == 0
    assert database.observe().pool.in_use == 0


@pytest.mark.parametrize("kind", ["session", "transaction"])
async def test_what_a_session_or_transaction_heard_is_evidence(database: Database, kind: str):
    await asyncio.sleep(0.2)
    began = time.monotonic()
    async with getattr(database, kind)() as access:
        await _execute(access, "SELECT 1")
    seen = database.observe()
    assert seen.evidence == "traffic"
    assert seen.evidence_age_seconds <= time.monotonic() - began


async def test_cancelled_callers_leak_nothing(patient: Database, database_url: str):
    for _ in range(25):
        tasks = [asyncio.create_task(patient.value(SLEEP, seconds=0.3)) for _ in range(4)]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def cancelled_session() -> None:
        async with patient.session() as session:
            await session.exec(text("SELECT pg_sleep(1)"))

    task = asyncio.create_task(cancelled_session())
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await patient.value(ECHO, x="x") == "x"
    await eventually(lambda: patient.observe().pool.in_use == 0)
    watcher = await asyncpg.connect(database_url)

    async def nobody_is_in_a_transaction() -> bool:
        return not await watcher.fetch(
            "SELECT state FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND state LIKE 'idle in transaction%'"
        )

    # A server's process ends a moment after its connection.
    await eventually(nobody_is_in_a_transaction)
    await watcher.close()


@pytest.mark.parametrize("lent", ["statement", "transaction", "session"])
async def test_a_connection_whose_caller_was_cancelled_in_mid_statement_is_never_lent_again(
    connection_settings: ConnectionSettings, database_url: str, lent: str
):
    """What the server was asked to stop may meet the next caller's statement instead."""

    async def sleep(database: Database) -> None:
        if lent == "statement":
            await database.value(SLEEP, seconds=60)
        elif lent == "transaction":
            async with database.transaction() as connection:
                await connection.execute("SELECT pg_sleep(60)")
        else:
            async with database.session() as session:
                await session.exec(text("SELECT pg_sleep(60)"))

    async with Database(connection_settings, Limits(pool_size=1)) as database:
        for _ in range(3):
            pid = await database.value(PID)
            caller = asyncio.create_task(sleep(database))
            watcher = await asyncpg.connect(database_url)
            asleep = "SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = $1"
            while not await watcher.fetchval(asleep, pid):
                await asyncio.sleep(0.01)
            await watcher.close()
            caller.cancel()
            await asyncio.gather(caller, return_exceptions=True)
            assert await database.value(PID) != pid


@pytest.mark.parametrize(("pooler", "kept"), [("transaction", False), ("tracking", True), ("none", True)])
async def test_l3_told_of_a_pooler_that_follows_no_prepared_statements_we_leave_none_on_the_server(
    database_url: str, pooler: PoolerSetting, kept: bool
):
    """The next backend that such a pooler gives would not know them. `tests/services/test_pgbouncer.py` meets one."""
    async with Database(parse(database_url, pooler=pooler), Limits(pool_size=1)) as database:
        for _ in range(3):
            assert await database.value(ECHO, x="x") == "x"
        assert bool(await database.value(PREPARED)) is kept


async def test_a_connection_killed_between_two_reads_is_replaced_unnoticed(
    patient: Database, database_url: str
):
    for _ in range(10):
        pid = await patient.value(PID)
        killer = await asyncpg.connect(database_url)
        await killer.execute("SELECT pg_terminate_backend($1)", pid)
        await killer.close()
        assert await patient.value(ECHO, x="x") == "x"
    assert patient.observe().status == "up"


async def test_a_write_whose_connection_dies_under_it_is_outcome_unknown(
    patient: Database, database_url: str
):
    asleep = sa.select(sa.literal("ana@example.com")).where(sa.func.pg_sleep(40).isnot(None))
    slow_write = Statement(
        "test.slow_write",
        lambda: sa.insert(User).from_select(["email"], asleep, include_defaults=False),
        repeatable=False,
    )
    write = asyncio.create_task(patient.value(slow_write))
    await _kill_all(database_url, once_one_sleeps=True)
    with pytest.raises(OutcomeUnknown):
        await write
    assert await patient.value(COUNT_USERS) == 0


async def test_a_read_whose_connection_dies_under_it_is_repeated(patient: Database, database_url: str):
    read = asyncio.create_task(patient.value(SLEEP, seconds=2.0))
    await _kill_all(database_url, once_one_sleeps=True)
    assert await read is None


async def test_a_transaction_killed_before_its_commit_is_unavailable_and_rolled_back(
    patient: Database, database_url: str
):
    for opened in (patient.transaction, patient.session):
        with pytest.raises(Unavailable):
            async with opened() as access:
                await _execute(access, "INSERT INTO users (email) VALUES ('ana@example.com')")
                await _kill_all(database_url)
                await _execute(access, "SELECT 1")
    assert await patient.value(COUNT_USERS) == 0
    assert patient.observe().pool.in_use == 0


async def _execute(access: Any, statement: str) -> None:
    await (access.exec(text(statement)) if isinstance(access, AsyncSession) else access.execute(statement))


async def _kill_all(url: str, *, once_one_sleeps: bool = False) -> None:
    killer = await asyncpg.connect(url)

    async def one_sleeps() -> bool:
        asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
        return bool(await killer.fetchval(asleep))

    if once_one_sleeps:
        await eventually(one_sleeps)
    await killer.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await killer.close()


async def test_text_that_postgresql_cannot_hold_is_invalid(database: Database):
    with pytest.raises(Invalid):
        await database.value(ECHO, x="\x00")


async def test_hot_statements_survive_a_changed_column_type(database: Database, database_url: str):
    titles = Statement(
        "test.titles",
        lambda: sa.select(sa.cast(sa.func.coalesce(sa.func.json_agg(Task.title), sa.text("'[]'")), sa.Text)),
        repeatable=True,
    )
    assert await database.value(titles) == "[]"
    administrator = await asyncpg.connect(database_url)
    await administrator.execute("ALTER TABLE tasks ALTER COLUMN title TYPE varchar(255)")
    await administrator.close()
    assert await database.value(titles) == "[]"
    assert parse(database_url).database in database_url
