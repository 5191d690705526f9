"""The code's revision of the schema, as `Database` asks for it: is it there, and if not, bring it there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import schema
from .vitality import SchemaObservation

if TYPE_CHECKING:
    from ..config.database import ConnectionSettings
    from .connections import Connection


class CodeRevision:
    """What this code was written for. Migrations run on `connection`, which has to be a direct one."""

    def __init__(self, connection: ConnectionSettings) -> None:
        self._connection = connection
        self.expected = schema.head()
        self._known = frozenset(schema.known_revisions())

    async def migrate(self) -> None:
        await schema.create_tables(self._connection)

    async def inspect(self, connection: Connection) -> SchemaObservation:
        """A revision that this code does not know is taken for a newer one: old code runs on it."""
        found = await schema.revision_of(connection)
        if found == self.expected:
            return SchemaObservation("current", found, self.expected)
        if found is None or found in self._known:
            return SchemaObservation("behind", found, self.expected)
        return SchemaObservation("ahead", found, self.expected)
