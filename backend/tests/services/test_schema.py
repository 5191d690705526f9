"""Creating, moving and comparing the schema, on real servers, also when two do it at once or it fails half-way."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import asyncpg
import pytest
from alembic.script import ScriptDirectory

from clusters import postgres_15_binaries
from postgres_server import PostgresServer
from src.config.database import ConnectionSettings, parse
from src.config.logging import configure
from src.errors import DatabaseRefused, Unavailable
from src.migrations import catalogue
from src.services import schema

BACKEND = Path(__file__).parents[2]
CREATED = schema.SchemaChange(None, schema.head(), schema.known_revisions())
NOTHING_TO_DO = schema.SchemaChange(schema.head(), schema.head())


@pytest.fixture
def empty(empty_database_url: str) -> ConnectionSettings:
    return parse(empty_database_url)


@pytest.fixture
async def looker(empty_database_url: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A connection of somebody else's to the database under test."""
    connection = await asyncpg.connect(empty_database_url)
    yield connection
    await connection.close()


async def tables(connection: asyncpg.Connection[Any]) -> set[str]:
    rows = await connection.fetch(
        "SELECT schemaname || '.' || tablename AS name FROM pg_tables"
        " WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
    )
    return {row["name"] for row in rows}


OURS = {f"public.{table}" for table in (*catalogue.TABLES, "alembic_version")}


# There and back


async def test_the_tables_are_created_once(
    empty: ConnectionSettings, looker: asyncpg.Connection[Any]
) -> None:
    assert await schema.revision_of(looker) is None
    assert await schema.create_tables(empty) == CREATED
    assert await tables(looker) == OURS
    assert await schema.revision_of(looker) == schema.head()
    assert await schema.create_tables(empty) == NOTHING_TO_DO
    assert not NOTHING_TO_DO.changed
    assert CREATED.changed


async def test_down_and_up_again_gives_the_same_schema(
    empty: ConnectionSettings, looker: asyncpg.Connection[Any]
) -> None:
    await schema.create_tables(empty)
    before = await catalogue.observed(looker)
    change = await schema.downgrade(empty, "base")
    assert (change.before, change.after) == (schema.head(), None)
    assert await tables(looker) == {"public.alembic_version"}
    assert (await schema.downgrade(empty, "base")).steps == ()
    assert await schema.create_tables(empty) == CREATED
    assert await catalogue.observed(looker) == before


def test_the_revisions_are_a_line_that_ends_at_head() -> None:
    assert schema.known_revisions()[0] == "0001"
    assert schema.known_revisions()[-1] == schema.head()
    alembics = ScriptDirectory(str(Path(schema.__file__).parents[1] / "migrations"))
    assert alembics.get_current_head() == schema.head()
    assert [script.revision for script in alembics.walk_revisions()] == [*reversed(schema.known_revisions())]


async def test_a_newer_schema_is_left_alone(
    empty: ConnectionSettings, looker: asyncpg.Connection[Any]
) -> None:
    await schema.create_tables(empty)
    await looker.execute("UPDATE alembic_version SET version_num = 'from-the-future'")
    change = await schema.create_tables(empty)
    assert (change.after, change.changed) == ("from-the-future", False)


# Two at once


async def test_of_six_migrators_at_once_one_does_the_work(empty: ConnectionSettings) -> None:
    changes = await asyncio.gather(*(schema.create_tables(empty) for _ in range(6)))
    assert sorted(changes, key=lambda change: change.changed) == [NOTHING_TO_DO] * 5 + [CREATED]


async def test_of_three_processes_at_once_one_does_the_work(
    empty_database_url: str, looker: asyncpg.Connection[Any]
) -> None:
    program = (
        "import asyncio, sys\n"
        "from src.config.database import parse\n"
        "from src.services import schema\n"
        "print(len(asyncio.run(schema.create_tables(parse(sys.argv[1]))).steps))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, empty_database_url],
            cwd=BACKEND,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    printed = await asyncio.gather(*(asyncio.to_thread(process.communicate) for process in processes))
    assert sorted(output for output, _ in printed) == ["0\n", "0\n", f"{len(CREATED.steps)}\n"]
    assert await schema.revision_of(looker) == schema.head()


async def test_a_migrator_waits_for_another_one_and_says_so(
    empty: ConnectionSettings, looker: asyncpg.Connection[Any]
) -> None:
    said: list[str] = []
    holding = looker.transaction()
    await holding.start()
    await looker.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended('groundwork.schema.' || current_schema(), 0))"
    )
    with pytest.raises(Unavailable) as caught:
        await schema.create_tables(empty, on_wait=lambda: said.append("waiting"), wait_seconds=0.5)
    assert caught.value.reason == "migration-under-way"
    assert said == ["waiting"]
    assert await tables(looker) == set()
    waiting = asyncio.create_task(schema.create_tables(empty, on_wait=lambda: said.append("again")))
    while "again" not in said:
        await asyncio.sleep(0.02)
    await holding.rollback()
    assert await waiting == CREATED
    assert said == ["waiting", "again"]


async def test_neither_who_migrates_nor_who_waits_holds_up_an_index_build(
    empty: ConnectionSettings, looker: asyncpg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CREATE INDEX CONCURRENTLY waits for every older snapshot: one held with the lock would never go away."""
    await looker.execute("CREATE TABLE big (id int)")
    run, said = schema._run, list[str]()

    async def build_and_run(*arguments: Any) -> tuple[str, ...]:
        while not said:
            await asyncio.sleep(0.02)
        await asyncio.wait_for(looker.execute("CREATE INDEX CONCURRENTLY ON big (id)"), 60)
        return await run(*arguments)

    monkeypatch.setattr(schema, "_run", build_and_run)
    monkeypatch.setattr(schema, "_gate", asyncio.Lock)  # as if the two were two processes
    changes = await asyncio.gather(
        *(schema.create_tables(empty, on_wait=lambda: said.append("waiting")) for _ in range(2))
    )
    assert sorted(change.changed for change in changes) == [False, True]


async def test_the_lock_outlives_the_roles_time_outs(
    empty: ConnectionSettings, looker: asyncpg.Connection[Any]
) -> None:
    impatient = {"idle_in_transaction_session_timeout": "300ms", "statement_timeout": "300ms"}
    keeper = await asyncpg.connect(**empty.asyncpg_arguments() | {"server_settings": impatient})
    async with schema._exclusive(keeper, None, 1):
        await asyncio.sleep(0.7)
        assert await keeper.fetchval("SELECT 1") == 1
    await keeper.close()


# Failing


async def test_a_failure_half_way_leaves_nothing_behind(
    empty: ConnectionSettings, looker: asyncpg.Connection[Any]
) -> None:
    # The second of the migration's commands stumbles over it, the first has succeeded by then.
    await looker.execute("CREATE TABLE tasks (mine text)")
    with pytest.raises(DatabaseRefused) as caught:
        await schema.create_tables(empty)
    assert caught.value.reason == "schema-occupied"
    assert await tables(looker) == {"public.tasks"}
    assert await schema.revision_of(looker) is None
    await looker.execute("DROP TABLE tasks")
    assert await schema.create_tables(empty) == CREATED


async def test_a_table_in_use_is_waited_for_briefly_and_then_left_as_it_is(
    empty: ConnectionSettings, looker: asyncpg.Connection[Any]
) -> None:
    await schema.create_tables(empty)
    async with looker.transaction():
        await looker.execute("LOCK TABLE tasks IN ACCESS SHARE MODE")
        with pytest.raises(Unavailable) as caught:
            await schema.downgrade(empty, "base", lock_timeout_seconds=0.3)
    assert caught.value.reason == "lock-timeout"
    assert await tables(looker) == OURS
    assert await schema.revision_of(looker) == schema.head()


async def test_a_wrong_password_is_refused_for_good(empty: ConnectionSettings) -> None:
    with pytest.raises(DatabaseRefused):
        await schema.create_tables(replace(empty, password=None))


async def test_a_server_that_is_not_there_is_unavailable(empty: ConnectionSettings) -> None:
    with pytest.raises(Unavailable):
        await schema.create_tables(parse("postgresql://a:b@127.0.0.1:1/none?sslmode=disable"))


# Whose database it is


async def test_an_ordinary_role_with_an_odd_password_migrates(
    empty_database_url: str, looker: asyncpg.Connection[Any]
) -> None:
    role, secret = f"role_{uuid4().hex[:12]}", "p%@:/ é%(here)s"
    await looker.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{secret}'")
    database = await looker.fetchval("SELECT current_database()")
    await looker.execute(f"ALTER DATABASE {database} OWNER TO {role}")
    try:
        address = empty_database_url.split("@")[1]
        theirs = parse(f"postgresql://{role}:{quote(secret, safe='')}@{address}")
        assert await schema.create_tables(theirs) == CREATED
        assert await schema.differences(theirs) == []
    finally:
        await looker.execute(f"ALTER DATABASE {database} OWNER TO CURRENT_USER")
        await looker.execute(f"REASSIGN OWNED BY {role} TO CURRENT_USER; DROP ROLE {role}")


async def test_it_lives_in_the_first_schema_of_the_search_path(
    empty_database_url: str, empty: ConnectionSettings, looker: asyncpg.Connection[Any]
) -> None:
    """Beside another installation in `public`, which must be neither seen nor touched."""
    await schema.create_tables(empty)
    await looker.execute('CREATE SCHEMA "throw-away"')
    aside = parse(f"{empty_database_url}?options=-c%20search_path%3D%22throw-away%22,public")
    assert await schema.differences(aside) == [
        f"table {table} is missing" for table in sorted(catalogue.TABLES)
    ]
    assert await schema.create_tables(aside) == CREATED
    assert await schema.differences(aside) == []
    created = {name.replace("public", "throw-away") for name in OURS}
    assert await tables(looker) == OURS | created
    await schema.downgrade(empty, "base")
    assert await schema.differences(aside) == []
    assert await tables(looker) == {"public.alembic_version"} | created


async def test_a_search_path_that_leads_nowhere_is_said(empty_database_url: str) -> None:
    lost = parse(f"{empty_database_url}?options=-c%20search_path%3Dnowhere")
    with pytest.raises(Unavailable) as caught:
        await schema.create_tables(lost)
    assert caught.value.reason == "schema-missing"


# The catalogue


async def test_head_is_what_the_models_declare(
    empty: ConnectionSettings, looker: asyncpg.Connection[Any]
) -> None:
    """If this fails after a change of the models: write the migration, then print the file anew by
    `DATABASE_URL=... python -m src.migrations.catalogue > src/migrations/catalogue.json`."""
    declared = await catalogue.declared(lambda: asyncpg.connect(**empty.asyncpg_arguments()))
    assert catalogue.render(declared) == catalogue.FILE.read_text(encoding="ascii")
    assert await tables(looker) == set(), "looking at the declaration must leave nothing behind"
    await schema.create_tables(empty)
    assert await catalogue.observed(looker) == declared
    assert await schema.differences(empty) == []


@pytest.mark.debian
async def test_postgresql_15_says_it_in_the_same_words(
    private_postgres: Callable[..., PostgresServer],
) -> None:
    server = private_postgres(binaries=postgres_15_binaries(), options={"fsync": "off"})
    settings = parse(server.url)
    assert await catalogue.declared(lambda: asyncpg.connect(server.url)) == catalogue.expected()
    assert await schema.create_tables(settings) == CREATED
    assert await schema.differences(settings) == []
    await schema.downgrade(settings, "base")
    changes = await asyncio.gather(*(schema.create_tables(settings) for _ in range(3)))
    assert sorted(change.changed for change in changes) == [False, False, True]


BROKEN = [
    ("DROP INDEX ix_tasks_open", "index tasks.ix_tasks_open is missing"),
    (
        "ALTER TABLE tasks DROP CONSTRAINT ck_tasks_title_length",
        "constraint tasks.ck_tasks_title_length is missing",
    ),
    ("ALTER TABLE tasks DROP description", "column tasks.description is missing"),
    (
        "ALTER TABLE tasks ALTER title TYPE varchar(255)",
        "column tasks.title is 'character varying(255) NOT NULL'",
    ),
    ('ALTER TABLE users ALTER email TYPE text COLLATE "default"', "column users.email is 'text'"),
    ("ALTER TABLE tasks ALTER title DROP NOT NULL", "column tasks.title is 'text'"),
    ("ALTER TABLE tasks ALTER version SET DEFAULT 2", "column tasks.version is 'integer NOT NULL DEFAULT 2'"),
    ("ALTER TABLE tasks ALTER id DROP DEFAULT", "column tasks.id is 'uuid NOT NULL'"),
    ("ALTER TABLE tasks ADD extra text", "column tasks.extra is not declared: 'text'"),
    ("CREATE INDEX more ON tasks (title)", "index tasks.more is not declared"),
    ("ALTER TABLE users ADD CONSTRAINT more CHECK (true)", "constraint users.more is not declared"),
    (
        "ALTER TABLE tasks DROP CONSTRAINT ck_tasks_title_length,"
        " ADD CONSTRAINT ck_tasks_title_length CHECK (char_length(title) BETWEEN 1 AND 256)",
        "constraint tasks.ck_tasks_title_length is",
    ),
    (
        "ALTER TABLE tasks DROP CONSTRAINT ck_tasks_title_length,"
        " ADD CONSTRAINT ck_tasks_title_length CHECK (char_length(title) BETWEEN 1 AND 255) NOT VALID",
        "constraint tasks.ck_tasks_title_length is",
    ),
    (
        "ALTER TABLE tasks DROP CONSTRAINT fk_tasks_user_id,"
        " ADD CONSTRAINT fk_tasks_user_id FOREIGN KEY (user_id) REFERENCES users (id)",
        "constraint tasks.fk_tasks_user_id is 'FOREIGN KEY (user_id) REFERENCES users(id)'",
    ),
    (
        "ALTER TABLE tasks DROP CONSTRAINT pk_tasks, ADD CONSTRAINT pk_tasks PRIMARY KEY (id)",
        "constraint tasks.pk_tasks is 'PRIMARY KEY (id)'",
    ),
    ("ALTER TABLE tasks RENAME CONSTRAINT pk_tasks TO mine", "constraint tasks.mine is not declared"),
    (
        "DROP INDEX ix_tasks_open; CREATE INDEX ix_tasks_open ON tasks (user_id, created_at, id) WHERE is_completed",
        "index tasks.ix_tasks_open is",
    ),
    ("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_tasks_open'::regclass", "INVALID"),
    ("ALTER TABLE tasks SET UNLOGGED", "table tasks is 'table, unlogged, row-level security"),
    (
        "ALTER TABLE tasks DISABLE ROW LEVEL SECURITY",
        "table tasks is 'table, forced on its owner', declared as 'table, row-level security, forced on its owner'",
    ),
    (
        "ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY",
        "table tasks is 'table, row-level security', declared as",
    ),
    ("ALTER TABLE users DISABLE ROW LEVEL SECURITY", "table users is 'table', declared as"),
    ("DROP POLICY own_rows ON tasks", "policy tasks.own_rows is missing"),
    (
        "ALTER POLICY own_rows ON tasks USING (true)",
        "policy tasks.own_rows is 'all USING true WITH CHECK (user_id",
    ),
    ("ALTER POLICY own_rows ON tasks WITH CHECK (true)", "policy tasks.own_rows is 'all USING (user_id"),
    ("ALTER POLICY own_rows ON tasks TO groundwork_app", "policy tasks.own_rows is 'all for some roles"),
    (
        "CREATE POLICY more ON tasks FOR SELECT USING (true)",
        "policy tasks.more is not declared: 'r USING true'",
    ),
    ("GRANT TRUNCATE ON tasks TO groundwork_app", "grant on tasks to groundwork_app is"),
    (
        "REVOKE DELETE ON tasks FROM groundwork_app",
        "grant on tasks to groundwork_app is 'INSERT, SELECT, UPDATE'",
    ),
    ("REVOKE ALL ON tasks FROM groundwork_app", "grant on tasks to groundwork_app is missing"),
    ("GRANT SELECT ON tasks TO PUBLIC", "grant on tasks to everybody is not declared: 'SELECT'"),
    ("DROP TRIGGER remember_deleted ON users", "trigger users.remember_deleted is missing"),
    ("ALTER FUNCTION remember_deleted_user() SECURITY DEFINER", "function users.remember_deleted_user is"),
    (
        "CREATE OR REPLACE FUNCTION refuse_deleted_user() RETURNS trigger LANGUAGE plpgsql"
        " SET search_path = pg_catalog, pg_temp AS 'BEGIN RETURN NULL; END'",
        "function users.refuse_deleted_user is",
    ),
    ("ALTER TABLE tasks DISABLE TRIGGER ALL", "triggers of tasks is not declared: 'some are disabled'"),
    ("DROP TABLE tasks", "table tasks is missing"),
    ("DROP TABLE tasks; CREATE VIEW tasks AS SELECT 1 AS id", "table tasks is 'not a table'"),
    (
        "CREATE TRIGGER mine BEFORE UPDATE ON tasks FOR EACH ROW"
        " EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "trigger tasks.mine is not declared",
    ),
]


@pytest.mark.parametrize(("breaking", "said"), BROKEN, ids=[said for _, said in BROKEN])
async def test_what_differs_is_named(
    connection_settings: ConnectionSettings, breaking: str, said: str
) -> None:
    connection = await asyncpg.connect(**connection_settings.asyncpg_arguments())
    await connection.execute(breaking)
    found = await schema.differences(connection)
    assert any(said in sentence for sentence in found), found
    await connection.close()
    assert await schema.differences(connection_settings) == found


async def test_a_missing_table_is_one_sentence(connection_settings: ConnectionSettings) -> None:
    connection = await asyncpg.connect(**connection_settings.asyncpg_arguments())
    await connection.execute("DROP TABLE tasks")
    await connection.close()
    assert await schema.differences(connection_settings) == ["table tasks is missing"]


async def test_looking_for_differences_writes_nothing_and_needs_no_rights(
    connection_settings: ConnectionSettings,
) -> None:
    connection = await asyncpg.connect(**connection_settings.asyncpg_arguments())
    role = f"role_{uuid4().hex[:12]}"
    await connection.execute(f"CREATE ROLE {role}")
    try:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL ROLE {role}; SET LOCAL transaction_read_only = on")
            await connection.execute(
                "SET LOCAL timezone = 'Asia/Kolkata'; SET LOCAL quote_all_identifiers = on"
            )
            assert await schema.differences(connection) == []
            assert await connection.fetchval("SELECT pg_current_xact_id_if_assigned()::text") is None
    finally:
        await connection.execute(f"DROP ROLE {role}")
        await connection.close()


async def test_the_file_is_plain_and_sorted() -> None:
    text = catalogue.FILE.read_text(encoding="ascii")
    assert catalogue.render(json.loads(text)) == text


# Manners


async def test_alembic_speaks_through_logging_only(
    empty: ConnectionSettings, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = io.StringIO()
    configure("info", "json", lines)
    await schema.create_tables(empty)
    assert "Running upgrade" in lines.getvalue()
    assert "Context impl" not in lines.getvalue()
    assert capfd.readouterr() == ("", "")


def test_importing_the_migrations_does_nothing() -> None:
    program = "import src.migrations, src.migrations.env, src.migrations.catalogue, src.services.schema"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=BACKEND, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
