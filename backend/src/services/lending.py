"""A connection of the pool as SQLAlchemy may have it: for as long as a session needs it, and with nothing kept."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final
from uuid import UUID

from sqlalchemy.engine import Connection as SyncConnection

from ..errors import InternalFault
from ..models.isolation import SETTING
from .connections import Connection

OWNER: Final = "groundwork_owner"


def opening(
    owner: UUID | None, *, isolation: str | None = None, read_only: bool = False, deferrable: bool = False
) -> str:
    """What begins a transaction and says whose it is, in one simple query and so in one round trip.

    The setting ends with the transaction, so it reaches nobody else who is given the same backend.
    """
    words = ["BEGIN"]
    if isolation is not None:
        words += ["ISOLATION LEVEL", isolation.replace("_", " ").upper()]
    words += ["READ ONLY"] * read_only + ["DEFERRABLE"] * deferrable
    if owner is None:
        return " ".join(words)
    # A UUID prints as digits, letters and hyphens: nothing in it could end the literal.
    return f"{' '.join(words)}; SELECT set_config('{SETTING}', '{UUID(str(owner))}', true)"


def name_owner(session: SyncConnection) -> None:
    """Tells the connection that SQLAlchemy was lent whose transactions it begins, from its option `OWNER`."""
    owner = session.get_execution_options().get(OWNER)
    if owner is not None:
        lent: Any = session.connection.driver_connection
        lent.owner = owner


async def commit(connection: Connection) -> None:
    """COMMIT, and `InternalFault` where the server rolled back instead.

    It says "ROLLBACK" to a COMMIT, and no error, when a statement failed before and somebody passed over that.
    """
    if await connection.execute("COMMIT") != "COMMIT":
        raise InternalFault("commit-of-failed-transaction")


class Lent:
    """Closing gives the connection back by `give_back(connection, clean=...)`, terminating by `discard(connection)`.

    SQLAlchemy sets its JSON codecs on every connection it is given, and each setting wipes asyncpg's statement
    cache; our columns need none, so that is ignored.
    """

    __slots__ = ("_connection", "_discard", "_give_back", "_returned", "owner")

    def __init__(
        self,
        connection: Connection,
        give_back: Callable[..., Awaitable[None]],
        discard: Callable[[Connection], None],
    ) -> None:
        self._connection = connection
        self._give_back = give_back
        self._discard = discard
        self._returned = False
        self.owner: UUID | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def set_type_codec(self, *_: Any, **__: Any) -> None:
        pass

    def transaction(self, *, isolation: str | None, readonly: bool, deferrable: bool) -> _Transaction:
        begin = opening(self.owner, isolation=isolation, read_only=readonly, deferrable=deferrable)
        return _Transaction(self._connection, begin)

    def is_closed(self) -> bool:
        return self._returned or self._connection.is_closed()

    async def close(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109 - asyncpg's signature
        if self._returned:
            return
        self._returned = True
        # SQLAlchemy closes with a timeout only when it wants the connection gone.
        await self._give_back(self._connection, clean=timeout is None)

    def terminate(self) -> None:
        if not self._returned:
            self._returned = True
            self._discard(self._connection)


class _Transaction:
    """What SQLAlchemy asks of asyncpg's own, whose `commit` does not look at the server's answer."""

    __slots__ = ("_begin", "_connection")

    def __init__(self, connection: Connection, begin: str) -> None:
        self._connection = connection
        self._begin = begin

    async def start(self) -> None:
        await self._connection.execute(self._begin)

    async def commit(self) -> None:
        await commit(self._connection)

    async def rollback(self) -> None:
        await self._connection.execute("ROLLBACK")
