"""One statement on a connection, by the shortest way that asyncpg has.

`Connection.fetchrow` goes through five of asyncpg's own functions to the protocol: it looks whether the connection is
open, guards it against two at a time, looks for loggers, and counts down the time that finding the statement took.
Our caller holds the connection alone and has looked, and the protocol itself refuses a closed or busy one, stops a
statement whose time is over, and asks the server to stop one whose caller went away. So a statement that the
connection has prepared before goes to the protocol at once: 28 us of CPU instead of 38 for a read, round trip
included. Everything else goes asyncpg's own way.

These are asyncpg's private parts, of the version that is pinned; `tests/services/test_asking.py` holds them to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import asyncpg

if TYPE_CHECKING:
    from .connections import Connection


async def rows_of(
    connection: Connection, sql: str, arguments: tuple[Any, ...], most: int, seconds: float
) -> list[asyncpg.Record]:
    """The first `most` rows, all of them for 0. Outside a transaction; raises what asyncpg raises."""
    inside: Any = connection
    prepared = inside._stmt_cache.get((sql, asyncpg.Record, False))
    if prepared is not None:
        try:
            rows: list[asyncpg.Record] = await inside._protocol.bind_execute(
                prepared, arguments, "", most, False, seconds
            )
        except asyncpg.InvalidCachedStatementError:
            # A table has changed, and nothing was run. asyncpg forgets what it had prepared, and prepares it anew.
            pass
        else:
            return rows
    if most == 1:
        row = await connection.fetchrow(sql, *arguments, timeout=seconds)
        return [] if row is None else [row]
    return await connection.fetch(sql, *arguments, timeout=seconds)
