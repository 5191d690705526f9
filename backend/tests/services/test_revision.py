"""What the code says of the schema that it finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg
import pytest

from src.config.database import parse
from src.errors import DatabaseRefused
from src.services import schema
from src.services.database import Database
from src.services.revision import CodeRevision

if TYPE_CHECKING:
    from src.config.database import ConnectionSettings


async def test_a_revision_is_current_behind_or_ahead(connection_settings: ConnectionSettings) -> None:
    code = CodeRevision(connection_settings)
    connection = await asyncpg.connect(**connection_settings.asyncpg_arguments())
    try:
        assert (await code.inspect(connection)).status == "current"
        code.expected = "a later one"
        older = await code.inspect(connection)
        assert (older.status, older.found, older.expected) == ("behind", schema.head(), "a later one")
        code.expected = schema.head()
        await connection.execute("UPDATE alembic_version SET version_num = 'unheard of'")
        assert (await code.inspect(connection)).status == "ahead"
        await connection.execute("DROP TABLE alembic_version")
        none = await code.inspect(connection)
        assert (none.status, none.found) == ("behind", None)
    finally:
        await connection.close()


@pytest.mark.parametrize("revision", ["1a2b3c4d5e6f", "0001", schema.head()])
@pytest.mark.parametrize("migrate", [False, True], ids=["migrated elsewhere", "migrates"])
async def test_another_programs_alembic_version_is_not_ready(
    empty_database_url: str, revision: str, migrate: bool
) -> None:
    """Its revision may be any word, one of ours included; its tables may have our names' neighbours."""
    connection = await asyncpg.connect(empty_database_url)
    await connection.execute("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
    await connection.execute("CREATE TABLE users (id integer PRIMARY KEY, name text)")
    await connection.execute("INSERT INTO alembic_version VALUES ($1)", revision)
    try:
        settings = parse(empty_database_url)
        async with Database(settings, schema=CodeRevision(settings), migrate=migrate) as database:
            seen = await database.check()
        assert (seen.status, seen.ready, seen.schema.status) == ("up", False, "foreign")
        assert seen.reason == ("schema-occupied" if migrate else "schema-foreign")
        with pytest.raises(DatabaseRefused, match="another program") as caught:
            await schema.create_tables(settings)
        assert caught.value.reason == "schema-occupied"
    finally:
        await connection.close()
