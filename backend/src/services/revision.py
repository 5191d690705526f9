"""The code's revision of the schema, as `Database` asks for it: is it there, and if not, bring it there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config.logging import get_logger
from . import schema
from .isolation import standing
from .vitality import SchemaObservation

if TYPE_CHECKING:
    from ..config.database import ConnectionSettings
    from .connections import Connection


log = get_logger(__name__)


class CodeRevision:
    """What this code was written for. Migrations run on `connection`, which has to be a direct one."""

    def __init__(self, connection: ConnectionSettings) -> None:
        self._connection = connection
        self.expected = schema.head()
        self._known = frozenset(schema.known_revisions())
        self._role_seen = False

    async def migrate(self) -> None:
        await schema.create_tables(self._connection)

    async def inspect(self, connection: Connection) -> SchemaObservation:
        """Compare the stored revision with the code's.

        An unknown revision is taken for a newer one, on which old code runs, unless the tables are missing: then
        `alembic_version` belongs to another program, and every statement would fail.
        """
        found = await schema.revision_of(connection)
        # Tables do not vanish behind a current revision, so a known one is looked at once.
        if (found not in self._known or not self._role_seen) and await schema.is_foreign(connection, found):
            return SchemaObservation("foreign", found, self.expected)
        if found == self.expected:
            await self._look_at_role(connection)
            return SchemaObservation("current", found, self.expected)
        if found is None or found in self._known:
            return SchemaObservation("behind", found, self.expected)
        return SchemaObservation("ahead", found, self.expected)

    async def _look_at_role(self, connection: Connection) -> None:
        """Says once that the service connects as a role for which row-level security is no wall."""
        if self._role_seen:
            return
        self._role_seen = True
        found = await standing(connection)
        if found.weakness is not None:
            log.warning(
                "isolation.role-not-bound",
                role=found.name,
                because=found.weakness,
                remedy="python -m src verify",
            )
