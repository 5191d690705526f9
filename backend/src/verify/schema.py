"""Checks of the schema: its revision, whether it can be migrated, and what differs from the models."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

import asyncpg

from ..config.command_line import command
from ..config.settings import migration_connection
from ..models.isolation import OWNER_COLUMNS
from ..services import hosts, schema
from .check import CheckContext, CheckResult, failed, passed, statements_as, warned
from .roles import quoted, roles

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_IDENTITY = """
SELECT current_user::text AS role, current_schema()::text AS schema,
       has_schema_privilege(current_schema(), 'CREATE') AS may_create,
       coalesce((SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_class c
                 JOIN pg_namespace n ON n.oid = c.relnamespace
                 WHERE n.nspname = current_schema() AND c.relname = 'tasks'), true) AS owns,
       current_setting('default_transaction_read_only') = 'on' OR pg_is_in_recovery() AS read_only,
       concat_ws(' ', current_database(), current_schema(), pg_postmaster_start_time()) AS place
"""


async def revision(context: CheckContext) -> CheckResult:
    async with context.connection.transaction(readonly=True):
        found = await schema.revision_of(context.connection)
        foreign = await schema.is_foreign(context.connection, found)
    expected = schema.head()
    if foreign:
        (row,) = await context.fetch("SELECT current_database()::text AS name")
        able = (await roles(context)).database_owner
        return failed(
            f"{found}, of another program",
            "alembic_version belongs to another program: the tables of Groundwork are not there.",
            f"{statements_as(able, 'CREATE SCHEMA groundwork')}\n"
            "Then add ?options=-c%20search_path%3Dgroundwork to DATABASE_URL (and to DATABASE_MIGRATION_URL), "
            f"or name an empty database instead of {row['name']}; then: {command('migrate up')}",
        )
    if found == expected:
        return passed(f"{found} (current)")
    if found is None:
        return failed("no schema", "The tables do not exist in this database.", command("migrate up"))
    if found in schema.known_revisions():
        return failed(
            f"{found}, behind {expected}", "The schema is older than the code.", command("migrate up")
        )
    return warned(
        f"{found}, unknown",
        f"A newer version of Groundwork made this schema; this one knows {expected}.",
        "Run the version of the code that belongs to the schema.",
    )


async def migration(context: CheckContext) -> CheckResult:
    """Connect as migrations do: to DATABASE_MIGRATION_URL, or to DATABASE_URL without its pooler."""
    (service,) = await context.fetch(_IDENTITY)
    named = context.settings.database_migration_url is not None
    async with _connected(context) as connection:
        row = await connection.fetchrow(_IDENTITY)
        assert row is not None
        found = await schema.revision_of(connection)
    url = "DATABASE_MIGRATION_URL" if named else "DATABASE_URL"
    name = f'role "{row["role"]}" of {url}'
    if row["schema"] is None:
        able = (await roles(context)).database_owner if service["schema"] else service["role"]
        return failed(
            f"{name}: no schema",
            "The search_path names no schema that exists.",
            statements_as(able, f"CREATE SCHEMA {quoted('groundwork')}")
            + "\nOr take options=-c search_path out of the URL.",
        )
    if row["read_only"]:
        return failed(
            f"{name}: read-only",
            "Migrations need a database that can be written.",
            f"Name the primary in {url}.",
        )
    if row["place"] != service["place"]:
        return failed(
            f"{name}: another database",
            "DATABASE_MIGRATION_URL and DATABASE_URL reach different servers, databases or schemas.",
            "Name the same database in both: migrations would change another one than the service uses.",
            exit_code=3,
        )
    if row["may_create"] and row["owns"]:
        return passed(f"{name} can migrate")
    if not named and found == schema.head():
        return passed(f"{name} cannot migrate, nothing is due; DATABASE_MIGRATION_URL is not set")
    able = await roles(context)
    if not row["owns"]:
        return failed(
            f"{name} does not own the tables",
            f'Migrations change tables that belong to role "{able.table_owner}".',
            f'Name role "{able.table_owner}" in DATABASE_MIGRATION_URL.',
        )
    return failed(
        f"{name} may not create tables",
        f'It lacks the right CREATE on schema "{row["schema"]}" (since PostgreSQL 15, public grants it to nobody).',
        statements_as(
            able.schema_owner,
            f"GRANT USAGE, CREATE ON SCHEMA {quoted(row['schema'])} TO {quoted(row['role'])}",
        ),
    )


@contextlib.asynccontextmanager
async def _connected(context: CheckContext) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection, _ = await hosts.connect(
        migration_connection(context.settings),
        context.connect_timeout_seconds,
        command_timeout=context.settings.database_command_timeout_seconds,
        statement_cache_size=0,
    )
    try:
        async with connection.transaction(readonly=True):
            yield connection
    finally:
        with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            await connection.close(timeout=1.0)


_FOREIGN_PRIVILEGE = re.compile(r"(grant|execute) on .* is not declared")


async def tables(context: CheckContext) -> CheckResult:
    async with context.connection.transaction(readonly=True):
        await context.limit_lock_wait()
        found = await schema.differences(context.connection)
    # The check of grantees reports the privileges of other roles, with the statements that revoke them.
    differences = [line for line in found if not _FOREIGN_PRIVILEGE.match(line)]
    if differences:
        return failed(
            f"{len(differences)} difference(s)",
            "\n".join(differences),
            "No migration repairs these: change them by hand, or restore a backup. "
            f"To see them again: {command('migrate check')}",
        )
    names = [f"'{name}'::regclass" for name in OWNER_COLUMNS]
    ours = f"({', '.join(names)})"
    (count,) = await context.fetch(
        "SELECT count(*) AS tables, "  # noqa: S608 - constants
        f"(SELECT count(*) FROM pg_constraint WHERE conrelid IN {ours}) AS rules, "
        f"(SELECT count(*) FROM pg_index WHERE indrelid IN {ours}) AS indexes, "
        f"(SELECT count(*) FROM pg_policy WHERE polrelid IN {ours}) AS policies "
        f"FROM pg_class WHERE oid IN {ours}"
    )
    return passed(
        f"{count['tables']} tables, {count['rules']} constraints, {count['indexes']} indexes, "
        f"{count['policies']} policies, as declared"
    )
