"""What the code says of the schema that it finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg

from src.services import schema
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
