"""The role that the service connects as: how it comes to be, what it may do, and what happens without it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlmodel import select
from structlog.testing import capture_logs

from clusters import postgres_15_binaries
from postgres_server import PostgresServer
from remedies import run_statements
from src.config.database import parse
from src.config.settings import load_settings
from src.embedded.roles import APPLICATION
from src.errors import NotFound
from src.models import Task, TaskCreate, UserCreate
from src.models.isolation import OWNER_COLUMNS, ROLE
from src.services import schema, tasks, users
from src.services.database import Database
from src.services.revision import CodeRevision
from src.services.tasks import IdempotencyKey, Known
from src.verify import runner
from src.verify.check import CheckResult, Outcome

FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


async def isolation(url: str, migration_url: str | None = None) -> CheckResult:
    loaded = load_settings(database_url=url, database_migration_url=migration_url or url, port=1)
    report = await runner.run(lambda: loaded)
    (found,) = [run.result for run in report.runs if run.check.name == "isolation"]
    return found


# What it may do

FORBIDDEN = [
    "CREATE TABLE mine (x int)",
    "CREATE SCHEMA mine",
    "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "ALTER TABLE tasks ADD x int",
    "ALTER TABLE tasks DISABLE ROW LEVEL SECURITY",
    "ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY",
    "DROP POLICY own_rows ON tasks",
    "CREATE POLICY mine ON tasks USING (true)",
    "CREATE INDEX mine ON tasks (title)",
    "CREATE TRIGGER mine BEFORE INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION refuse_deleted_user()",
    "DROP TABLE tasks",
    "TRUNCATE tasks",
    "TRUNCATE users CASCADE",
    "BEGIN; LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE",
    "UPDATE alembic_version SET version_num = '0001'",
    "DELETE FROM deleted_users",
    "UPDATE users SET email = NULL",
    "UPDATE users SET token_epoch = 0, disabled_at = NULL",
    "SELECT verifier FROM credentials",
    "INSERT INTO credentials (user_id, recipe, verifier) VALUES (gen_random_uuid(), 'x', '')",
    "UPDATE credentials SET verifier = ''",
    "DELETE FROM credentials",
    "SELECT current_hash FROM sessions",
    "UPDATE sessions SET ends_at = 'infinity'",
    "DELETE FROM sessions",
    "UPDATE deleted_users SET deleted_at = now()",
    "INSERT INTO deleted_users (id) VALUES (gen_random_uuid())",
    "INSERT INTO users (email) VALUES ('mallory@example.com')",
    "SET ROLE groundwork",
    "SET SESSION AUTHORIZATION groundwork",
    "CREATE ROLE mine",
    f"ALTER ROLE {APPLICATION} BYPASSRLS",
    "GRANT SELECT ON tasks TO PUBLIC",
    "SET row_security = off; SELECT FROM tasks",
    "SELECT FROM pg_authid",
    "COPY tasks TO PROGRAM 'cat'",
]  # fmt: skip


@pytest.mark.parametrize("statement", FORBIDDEN)
async def test_the_role_may_not(app: asyncpg.Connection[Any], statement: str) -> None:
    # A grant without the right to grant is a warning and grants nothing.
    if statement.startswith("GRANT"):
        await app.execute(statement)
        assert not await app.fetchval("SELECT has_table_privilege('public', 'tasks', 'SELECT')")
        return
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await app.execute(statement)


async def test_the_role_owns_nothing_and_passes_by_nothing(app: asyncpg.Connection[Any]) -> None:
    for role in (ROLE, APPLICATION):
        row = await app.fetchrow(
            "SELECT rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolreplication, rolcanlogin,"
            " EXISTS (SELECT FROM pg_class WHERE relowner = r.oid) AS owns FROM pg_roles r WHERE rolname = $1",
            role,
        )
        assert row is not None
        assert [name for name, held in row.items() if held] == ([] if role == ROLE else ["rolcanlogin"])


async def test_nobodys_keys_addresses_and_traces_are_read(
    app_database: Database, app: asyncpg.Connection[Any]
) -> None:
    author = Known(uuid4(), "ada@example.com")
    key = IdempotencyKey.of("one", "create_task", b"{}")
    await tasks.create(app_database, author, TaskCreate(title="a"), idempotency=key)
    for person in (None, uuid4()):
        async with app.transaction():
            await app.execute("SELECT set_config('app.user_id', $1, true)", str(person or ""))
            for table in OWNER_COLUMNS:
                assert await app.fetchval(f"SELECT count(*) FROM {table}") == 0
            assert await app.execute("DELETE FROM idempotency_keys") == "DELETE 0"
    with pytest.raises(NotFound):
        await users.find(app_database, "ada@example.com")


async def test_a_setting_that_is_no_uuid_shows_no_row(app: asyncpg.Connection[Any]) -> None:
    with pytest.raises(asyncpg.InvalidTextRepresentationError):
        async with app.transaction():
            await app.execute("SELECT set_config('app.user_id', 'everybody', true)")
            await app.fetch("SELECT title FROM tasks")


async def test_an_account_can_be_made_read_and_deleted_by_itself(app_database: Database) -> None:
    made = await users.create(app_database, UserCreate(email="ada@example.com"))
    [user_id] = re.findall(r'"id":"([^"]+)"', made)
    assert await users.read(app_database, UUID(user_id)) == made
    await users.delete(app_database, Known(UUID(user_id)))
    with pytest.raises(NotFound):
        await users.read(app_database, UUID(user_id))


# How it comes to be


async def test_several_databases_of_a_cluster_make_it_at_once(
    private_postgres: Callable[..., PostgresServer],
) -> None:
    server = private_postgres(options=FAST)
    administration = await asyncpg.connect(server.url)
    await administration.execute(f"DROP ROLE {APPLICATION}; DROP ROLE {ROLE}")
    names = [f"one_of_{number}" for number in range(6)]
    for name in names:
        await administration.execute(f"CREATE DATABASE {name}")
    changes = await asyncio.gather(*(schema.create_tables(parse(server.url_for(name))) for name in names))
    assert [change.after for change in changes] == [schema.head()] * 6
    for name in names:
        assert await schema.differences(parse(server.url_for(name))) == []
    # It goes down and up in one of them and stays for the others.
    await schema.downgrade(parse(server.url_for(names[0])), "base")
    assert await schema.differences(parse(server.url_for(names[1]))) == []
    await schema.create_tables(parse(server.url_for(names[0])))
    assert await schema.differences(parse(server.url_for(names[0]))) == []
    await administration.close()


@pytest.fixture(params=["18", pytest.param("15", marks=pytest.mark.debian)])
async def without_role(
    request: pytest.FixtureRequest, private_postgres: Callable[..., PostgresServer]
) -> PostgresServer:
    """A cluster in which nobody has made the role, and `plain`, who owns a database and may make none."""
    binaries = postgres_15_binaries() if request.param == "15" else None
    server = private_postgres(options=FAST, binaries=binaries)
    administration = await asyncpg.connect(server.url)
    await administration.execute(f"DROP ROLE {APPLICATION}; DROP ROLE {ROLE}")
    await administration.execute("CREATE ROLE plain LOGIN PASSWORD 'pw'")
    await administration.execute("CREATE DATABASE theirs OWNER plain")
    await administration.close()
    return server


async def test_a_migrator_who_may_make_no_role_goes_on_and_is_told_what_is_missing(
    without_role: PostgresServer,
) -> None:
    plain = f"postgresql://plain:pw@127.0.0.1:{without_role.port}/theirs"
    with capture_logs() as logs:
        assert (await schema.create_tables(parse(plain))).after == schema.head()
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == [
        "isolation.role-not-made"
    ]
    assert await schema.differences(parse(plain)) == []
    # The service works as the owner, whom the policies of tasks bind; and says once what is wrong.
    revision = CodeRevision(parse(plain))
    with capture_logs() as logs:
        async with Database(parse(plain), schema=revision) as database:
            for _ in range(3):
                await database.check()
            ada, eve = Known(uuid4(), "ada@example.com"), Known(uuid4(), "eve@example.com")
            made = await tasks.create(database, ada, TaskCreate(title="a"))
            with pytest.raises(NotFound):
                await tasks.read(database, eve.user_id, made.task_id)
            async with database.session(owner=eve.user_id) as session:
                assert (await session.exec(select(Task))).all() == []
    said = [entry for entry in logs if entry["event"] == "isolation.role-not-bound"]
    assert [entry["because"] for entry in said] == ["owner of the tables"]

    # `verify` prints the SQL, and a role that may create roles.
    found = await isolation(plain)
    assert found.outcome is Outcome.WARNED
    assert "owner of the tables" in found.summary
    await run_statements(found.remedy, {"groundwork": without_role.url_for("theirs")}.__getitem__)
    app = f"postgresql://app:pw@127.0.0.1:{without_role.port}/theirs"
    assert (await isolation(app, plain)).outcome is Outcome.PASSED
    assert await schema.differences(parse(plain)) == []
    async with Database(parse(app)) as database:
        assert (await tasks.read(database, ada.user_id, made.task_id)).body == made.body


async def test_a_role_that_passes_by_is_warned_about_at_the_start_and_by_verify(
    database_url: str, owner: asyncpg.Connection[Any]
) -> None:
    role = f"role_{uuid4().hex[:12]}"
    await owner.execute(f"CREATE ROLE {role} LOGIN BYPASSRLS PASSWORD 'pw' IN ROLE {ROLE}")
    try:
        url = f"postgresql://{role}:pw@{database_url.rpartition('@')[2]}"
        with capture_logs() as logs:
            async with Database(parse(url), schema=CodeRevision(parse(url))) as database:
                await database.check()
        [said] = [entry for entry in logs if entry["event"] == "isolation.role-not-bound"]
        assert (said["role"], said["because"], said["log_level"]) == (role, "BYPASSRLS", "warning")
        found = await isolation(url)
        assert found.outcome is Outcome.WARNED
        statements = await run_statements(found.remedy, {"groundwork": database_url}.__getitem__)
        [login] = re.findall(r'CREATE ROLE "(\w+)" LOGIN', statements[-1])
        bound = f"postgresql://{login}:pw@{database_url.rpartition('@')[2]}"
        assert (await isolation(bound, database_url)).outcome is Outcome.PASSED
        await owner.execute(f"DROP ROLE {login}")
    finally:
        await owner.execute(f"DROP ROLE {role}")


async def test_the_role_of_the_service_is_no_reason_to_warn(app_database_url: str, database_url: str) -> None:
    revision = CodeRevision(parse(database_url))
    with capture_logs() as logs:
        async with Database(parse(app_database_url), schema=revision) as database:
            await database.check()
            assert database.observe().ready
    assert [entry for entry in logs if entry["log_level"] == "warning"] == []


BEFORE = (
    "INSERT INTO users (id, email) VALUES ($1, 'ada@example.com') RETURNING id::text",
    "INSERT INTO tasks (user_id, id, title) VALUES ($1, $1, 'a') RETURNING title",
    "SELECT title FROM tasks WHERE user_id = $1 AND id = $1",
    "UPDATE tasks SET title = 'b', version = version + 1 WHERE user_id = $1 AND id = $1 RETURNING title",
    "DELETE FROM tasks WHERE user_id = $1 AND id = $1 RETURNING id::text",
    "DELETE FROM users WHERE id = $1 RETURNING id::text",
)
"""How the code of revision 0001 spoke: it names its owner, and tells PostgreSQL nothing."""


async def test_s1_code_from_before_goes_on_working_for_a_role_that_no_policy_binds(
    owner: asyncpg.Connection[Any],
) -> None:
    """As whoever ran it until the migration: a superuser, or what Neon's console makes."""
    role = f"role_{uuid4().hex[:12]}"
    await owner.execute(f"CREATE ROLE {role} BYPASSRLS IN ROLE {ROLE}")
    for who in (role, "groundwork"):
        await owner.execute(f"SET ROLE {who}")
        person = uuid4()
        for statement in BEFORE:
            assert await owner.fetchval(statement, person) is not None, statement
        await owner.execute("RESET ROLE")
    await owner.execute(f"DROP ROLE {role}")


# What verify sees


@pytest.mark.parametrize("role", ["owner", "application"])
@pytest.mark.parametrize(
    "breach",
    [
        "ALTER TABLE tasks DISABLE ROW LEVEL SECURITY",
        "ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY",
        "ALTER TABLE users DISABLE ROW LEVEL SECURITY",
        "DROP POLICY own_rows ON idempotency_keys",
        "ALTER POLICY own_rows ON tasks USING (true)",
        "ALTER POLICY own_rows ON tasks WITH CHECK (true)",
        "CREATE POLICY more ON tasks USING (true)",
    ],
)
async def test_verify_fails_over_a_wall_that_has_a_hole(
    database_url: str, app_database_url: str, owner: asyncpg.Connection[Any], role: str, breach: str
) -> None:
    url = database_url if role == "owner" else app_database_url
    await owner.execute(breach)
    found = await isolation(url, database_url)
    assert found.outcome is Outcome.FAILED
    await run_statements(found.remedy, {"groundwork": database_url}.__getitem__)
    sound = Outcome.WARNED if role == "owner" else Outcome.PASSED
    assert (await isolation(url, database_url)).outcome is sound


async def test_verify_tries_for_a_foreign_row_for_real(
    monkeypatch: pytest.MonkeyPatch, database_url: str, app_database_url: str, owner: asyncpg.Connection[Any]
) -> None:
    """What no look at the catalogue would tell: here it is made blind."""
    before = await owner.fetchval("SELECT count(*) FROM users")
    assert (await isolation(app_database_url, database_url)).outcome is Outcome.PASSED
    await owner.execute("ALTER TABLE tasks DISABLE ROW LEVEL SECURITY")

    async def nothing(_: Any) -> list[str]:
        return []

    monkeypatch.setattr(schema, "differences", nothing)
    found = await isolation(app_database_url, database_url)
    assert found.outcome is Outcome.FAILED
    for verb in ("read", "changed", "deleted", "added"):
        assert verb in found.summary
    assert await owner.fetchval("SELECT count(*) FROM users") == before


# With the embedded PostgreSQL


async def fresh(server: PostgresServer) -> Database:
    """As `serve --embedded` starts a worker: the role connects before anything has been migrated."""
    revision = CodeRevision(parse(server.url))
    return Database(parse(server.application_url), schema=revision, migrate=True)


async def becomes_ready(database: Database) -> None:
    async with asyncio.timeout(60):
        while not (await database.check()).ready:
            await asyncio.sleep(0.05)


async def test_a_fresh_cluster_serves_the_role_once_the_migration_has_run(
    private_postgres: Callable[..., PostgresServer],
) -> None:
    server = private_postgres(options=FAST)
    async with await fresh(server) as database:
        await becomes_ready(database)
        author = Known(uuid4(), "ada@example.com")
        made = await tasks.create(database, author, TaskCreate(title="a"))
        assert (await tasks.read(database, author.user_id, made.task_id)).body == made.body
    assert (await isolation(server.application_url, server.url)).outcome is Outcome.PASSED


async def test_a_cluster_from_before_the_role_gets_it_and_keeps_its_rows(
    private_postgres: Callable[..., PostgresServer], tmp_path: Path
) -> None:
    server = private_postgres(options=FAST)
    await schema.create_tables(parse(server.url))
    author = Known(uuid4(), "ada@example.com")
    async with Database(parse(server.application_url)) as database:
        made = await tasks.create(database, author, TaskCreate(title="a"))
    await schema.downgrade(parse(server.url), "0001")
    connection = await asyncpg.connect(server.url)
    await connection.execute(
        f"DROP OWNED BY {APPLICATION}, {ROLE}; DROP ROLE {APPLICATION}; DROP ROLE {ROLE}"
    )
    await connection.close()
    server.stop()
    (server.location.home / "app-password").unlink()

    server.start()
    async with await fresh(server) as database:
        await becomes_ready(database)
        assert (await tasks.read(database, author.user_id, made.task_id)).body == made.body
    assert (await isolation(server.application_url, server.url)).outcome is Outcome.PASSED
