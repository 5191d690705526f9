"""Databases that tests get lent, one after another: making one costs more than most tests do.

What a test gives back is looked at first. One whose schema, rights and settings are as they were made, and whose
tables stayed small, is emptied and lent again; any other is dropped. So a test may still do with its own what it likes.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Final

import asyncpg

if TYPE_CHECKING:
    from conftest import Administrator
    from postgres_server import PostgresServer

# Where a schema, its rights and what a database is set to are written down.
_CATALOGUES: Final = (
    "pg_attrdef", "pg_attribute", "pg_cast", "pg_class", "pg_collation", "pg_constraint", "pg_default_acl",
    "pg_event_trigger", "pg_extension", "pg_foreign_server", "pg_index", "pg_largeobject_metadata", "pg_namespace",
    "pg_operator", "pg_policy", "pg_proc", "pg_publication", "pg_rewrite", "pg_statistic", "pg_statistic_ext",
    "pg_subscription", "pg_trigger", "pg_type",
)  # fmt: skip
_NOTED: Final = " UNION ALL ".join(
    [
        *(
            f"SELECT '{name}', count(*)::text, max(xmin::text::bigint)::text FROM {name}"
            for name in _CATALOGUES
        ),
        "SELECT 'revision', count(*)::text, max(version_num) FROM alembic_version",
        "SELECT 'settings', count(*)::text, '' FROM pg_db_role_setting"
        " JOIN pg_database ON pg_database.oid = setdatabase WHERE datname = current_database()",
        "SELECT 'database', concat_ws(' ', datacl, datconnlimit, datallowconn, datistemplate), '' FROM pg_database"
        " WHERE datname = current_database()",
        "SELECT 'prepared', count(*)::text, '' FROM pg_prepared_xacts WHERE database = current_database()",
    ]
)
# One that was analysed, or has grown past what a planner takes for an empty table, would be planned otherwise.
_TABLES: Final = """
    SELECT relname, reltuples < 1 AND pg_relation_size(oid) < 10 * 8192 AS is_small FROM pg_class
    WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname <> 'alembic_version'
"""
_OTHERS_TOLD_TO_END: Final = """
    SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


class Library:
    """Migrated databases, as many as are needed at once: `lend` gives the name of one, `take_back` ends its use."""

    def __init__(self, postgres: PostgresServer, administrator: Administrator, template: str) -> None:
        self._postgres = postgres
        self._administrator = administrator
        self._template = template
        self._free: list[str] = []
        self._as_made: list[asyncpg.Record] | None = None

    def lend(self) -> str:
        if self._free:
            return self._free.pop()
        name = f"test_{uuid.uuid4().hex[:16]}"
        self._administrator.execute(f'CREATE DATABASE "{name}" TEMPLATE "{self._template}"')
        if self._as_made is None:
            self._as_made = self._administrator.run(self._state(name))
        return name

    def take_back(self, name: str) -> None:
        if self._administrator.run(self._emptied(name)):
            self._free.append(name)
        else:
            self._administrator.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def close(self) -> None:
        for name in self._free:
            self._administrator.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    async def _state(self, name: str) -> list[asyncpg.Record]:
        connection = await asyncpg.connect(self._postgres.url_for(name))
        try:
            return list(await connection.fetch(_NOTED))
        finally:
            await connection.close()

    async def _emptied(self, name: str) -> bool:
        """Whether it is as it was made again; nobody is connected to it then."""
        try:
            connection = await asyncpg.connect(self._postgres.url_for(name))
        except asyncpg.PostgresError:
            return False
        try:
            while await connection.fetchval(_OTHERS_TOLD_TO_END):
                await asyncio.sleep(0.002)
            if await connection.fetch(_NOTED) != self._as_made:
                return False
            tables = await connection.fetch(_TABLES)
            if not all(table["is_small"] for table in tables):
                return False
            # Without its triggers and keys, a row goes without asking for the others.
            deletes = "".join(f'DELETE FROM "{table["relname"]}";' for table in tables)
            await connection.execute(f"SET session_replication_role = replica; {deletes}")
        except asyncpg.PostgresError:
            return False
        finally:
            await connection.close()
        return True
