"""Default privileges of other roles, as Supabase sets them for `anon`: they reach no table and no function of ours."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from clusters import postgres_15_binaries
from conftest import FAST
from src.config.database import ConnectionSettings, parse
from src.embedded.roles import APPLICATION
from src.embedded.server import EmbeddedPostgres
from src.migrations import catalogue
from src.models import TaskCreate
from src.services import schema, tasks
from src.services.database import Database
from src.services.tasks import Known

TABLES = (*catalogue.TABLES, "alembic_version")
OUTSIDERS = ("anon", "analyst", "by_column")


@dataclass(frozen=True)
class Cluster:
    """A database that `plain`, who is no superuser, owns and migrates, and a superuser's connection to it."""

    server: EmbeddedPostgres
    settings: ConnectionSettings
    looker: asyncpg.Connection[Any]


@pytest.fixture(params=["18", pytest.param("15", marks=pytest.mark.debian)])
async def cluster(
    request: pytest.FixtureRequest, private_postgres: Callable[..., EmbeddedPostgres]
) -> AsyncIterator[Cluster]:
    binaries = postgres_15_binaries() if request.param == "15" else None
    server = private_postgres(options=FAST, binaries=binaries)
    administration = await asyncpg.connect(server.url)
    await administration.execute("CREATE ROLE plain LOGIN PASSWORD 'pw'")
    await administration.execute("CREATE DATABASE theirs OWNER plain")
    await administration.close()
    looker = await asyncpg.connect(server.url_for("theirs"))
    for role in OUTSIDERS:
        await looker.execute(f"CREATE ROLE {role}")
    settings = parse(re.sub("//[^@]*@", "//plain:pw@", server.url_for("theirs"), count=1))
    yield Cluster(server, settings, looker)
    await looker.close()


async def give_by_default(looker: asyncpg.Connection[Any]) -> None:
    """As Supabase does for its own `postgres`."""
    for kind in ("TABLES", "FUNCTIONS", "SEQUENCES"):
        await looker.execute(
            f"ALTER DEFAULT PRIVILEGES FOR ROLE plain IN SCHEMA public GRANT ALL ON {kind} TO anon"
        )
    await looker.execute("ALTER DEFAULT PRIVILEGES FOR ROLE plain GRANT SELECT ON TABLES TO analyst, PUBLIC")


async def functions(looker: asyncpg.Connection[Any]) -> list[str]:
    rows = await looker.fetch(
        "SELECT oid::regprocedure::text AS name FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
    )
    return [row["name"] for row in rows]


def a_call(function: str) -> str:
    """With an argument of no value for each parameter; a trigger function takes none."""
    name, types = re.fullmatch(r"(\w+)\((.*)\)", function).groups()  # type: ignore[union-attr]
    return f"SELECT {name}({', '.join(f'NULL::{each}' for each in types.split(',') if each)})"


async def reached(looker: asyncpg.Connection[Any], role: str) -> set[str]:
    """What the role really selects from, and really calls."""
    found = set()
    attempts = {table: f"SELECT count(*) FROM {table}" for table in TABLES}
    attempts |= {function: a_call(function) for function in await functions(looker)}
    await looker.execute(f"SET ROLE {role}")
    for name, statement in attempts.items():
        try:
            await looker.execute(statement)
            found.add(name)
        except asyncpg.InsufficientPrivilegeError as error:
            # Of a function that was called, because it met a table that the role may not read.
            if name not in str(error).split() and "for function" not in str(error) and "(" in name:
                found.add(name)
        except asyncpg.PostgresError:
            found.add(name)
    await looker.execute("RESET ROLE")
    return found


async def rights_of_outsiders(looker: asyncpg.Connection[Any]) -> list[str]:
    """Every right of anybody but the owner and the application's role, on whatever is in the schema."""
    rows = await looker.fetch("""
        SELECT name || ': ' || a.privilege_type || ' to ' || a.grantee AS text
        FROM (SELECT relname::text AS name, relacl AS acl, relowner AS owner FROM pg_class
              WHERE relnamespace = 'public'::regnamespace
              UNION ALL
              SELECT c.relname || '.' || t.attname, t.attacl, c.relowner FROM pg_attribute t
              JOIN pg_class c ON c.oid = t.attrelid WHERE c.relnamespace = 'public'::regnamespace
              UNION ALL
              SELECT proname, coalesce(proacl, acldefault('f', proowner)), proowner FROM pg_proc
              WHERE pronamespace = 'public'::regnamespace) objects,
             aclexplode(acl) a
        WHERE a.grantee NOT IN (owner, 'groundwork_app'::regrole) ORDER BY 1
    """)
    return [row["text"] for row in rows]


async def works(cluster: Cluster) -> None:
    """The application's role does its work: a first write with a key, a batch, a list."""
    url = cluster.server.url_for("theirs", role=APPLICATION)
    async with Database(parse(url)) as database:
        ada = Known(uuid4(), f"{uuid4().hex}@example.com")
        key = tasks.IdempotencyKey.of("k", "create_task", b"{}", hours=24)
        made = await tasks.create(database, ada, TaskCreate(title="a"), idempotency=key)
        assert made.body in (await tasks.page(database, ada.user_id)).items
        await tasks.delete(database, ada, made.task_id)
    async with Database(cluster.settings) as database:
        await tasks.create(database, Known(uuid4()), TaskCreate(title="as the owner"))


async def test_what_is_migrated_under_default_privileges_is_closed_to_other_roles(cluster: Cluster) -> None:
    """If this fails for a new migration: what it makes has to be revoked, as migration 0005 does."""
    await give_by_default(cluster.looker)
    assert (await schema.create_tables(cluster.settings)).after == schema.head()
    assert await rights_of_outsiders(cluster.looker) == []
    assert len(await functions(cluster.looker)) == 14
    for role in OUTSIDERS:
        assert await reached(cluster.looker, role) == set()
    assert await schema.differences(cluster.settings) == []
    await works(cluster)


async def test_a_schema_that_was_open_to_other_roles_is_closed_by_the_upgrade(cluster: Cluster) -> None:
    """From 0004 with rows, with rights passed on and rights on columns; down and up again."""
    looker = cluster.looker
    await give_by_default(looker)
    await schema.create_tables(cluster.settings)
    await schema.downgrade(cluster.settings, "0004")
    for table in TABLES:
        await looker.execute(f"GRANT ALL ON {table} TO anon WITH GRANT OPTION")
        await looker.execute(f"SET ROLE anon; GRANT SELECT ON {table} TO analyst; RESET ROLE")
    await looker.execute("GRANT SELECT (email) ON users TO by_column")
    await looker.execute("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO anon")
    person = uuid4()
    await looker.execute(f"INSERT INTO users (id, email) VALUES ('{person}', 'ada@example.com')")
    await looker.execute(f"INSERT INTO tasks (user_id, title) VALUES ('{person}', 'kept')")
    assert await reached(looker, "anon") == {*TABLES, *await functions(looker)}
    assert set(TABLES) <= await reached(looker, "analyst")
    before = await looker.fetch("SELECT u.*, t.* FROM users u JOIN tasks t ON t.user_id = u.id")

    assert (await schema.create_tables(cluster.settings)).steps[0] == "0005"
    assert await rights_of_outsiders(looker) == []
    for role in OUTSIDERS:
        assert await reached(looker, role) == set()
    assert await looker.fetch("SELECT u.*, t.* FROM users u JOIN tasks t ON t.user_id = u.id") == before
    assert await schema.differences(cluster.settings) == []
    await works(cluster)

    await schema.downgrade(cluster.settings, "0004")
    assert "require_current(uuid,integer)" in await reached(looker, "analyst")
    await works(cluster)
    await schema.downgrade(cluster.settings, "base")
    await schema.create_tables(cluster.settings)
    assert await rights_of_outsiders(looker) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("GRANT SELECT ON tasks TO anon", "grant on tasks to anon is not declared: 'SELECT'"),
        ("GRANT SELECT (title) ON tasks TO anon", "grant on tasks to anon is not declared: 'SELECT(title)'"),
        ("GRANT ALL ON credentials TO anon", "grant on credentials to anon is not declared"),
        ("GRANT EXECUTE ON FUNCTION admit TO anon", "execute on admit by anon is not declared: 'EXECUTE'"),
        (
            "GRANT EXECUTE ON FUNCTION sweep_answers TO PUBLIC",
            "execute on sweep_answers by everybody is not declared",
        ),
        (
            "GRANT EXECUTE ON FUNCTION remember_deleted_user TO anon",
            "execute on remember_deleted_user by anon is not declared",
        ),
    ],
)
async def test_the_drift_check_names_the_rights_of_another_role(
    connection_settings: ConnectionSettings, given: str, said: str
) -> None:
    role = f"anon_{uuid4().hex[:12]}"
    connection = await asyncpg.connect(**connection_settings.asyncpg_arguments())
    await connection.execute(f"CREATE ROLE {role}")
    try:
        await connection.execute(given.replace("anon", role))
        (found,) = await schema.differences(connection)
        assert found.startswith(said.replace("anon", role))
    finally:
        await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        await connection.close()
