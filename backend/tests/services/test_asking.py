"""asyncpg's private parts, as `services.asking` uses them: what they do for us, and what they refuse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from src.services.asking import rows_of

ONE = "SELECT $1::text || 'b' AS said"


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    opened = await asyncpg.connect(database_url)
    yield opened
    await opened.close(timeout=5)


async def test_what_was_prepared_goes_to_the_protocol_at_once(connection: asyncpg.Connection[Any]) -> None:
    asked: list[str] = []

    def note(record: asyncpg.connection.LoggedQuery) -> None:
        asked.append(record.query)

    connection.add_query_logger(note)  # asyncpg's own way, and no other, tells of what it does
    for _ in range(3):
        assert [tuple(row) for row in await rows_of(connection, ONE, ("a",), 1, 5)] == [("ab",)]
    await asyncio.sleep(0)
    assert asked == [ONE]


@pytest.mark.parametrize("most", [0, 1])
async def test_as_many_rows_as_were_wanted(connection: asyncpg.Connection[Any], most: int) -> None:
    for _ in range(2):
        for count in (0, 3):
            rows = await rows_of(connection, "SELECT generate_series(1, $1::int)", (count,), most, 5)
            assert [row[0] for row in rows] == [1, 2, 3][:count][: most or None]


async def test_a_table_that_has_changed_is_read_as_it_is_now(
    connection: asyncpg.Connection[Any], database_url: str
) -> None:
    await connection.execute("CREATE TABLE changing AS SELECT 1::integer AS number")
    sql = "SELECT number FROM changing"
    assert (await rows_of(connection, sql, (), 1, 5))[0][0] == 1
    other = await asyncpg.connect(database_url)
    await other.execute("ALTER TABLE changing ALTER COLUMN number TYPE text USING 'it was ' || number")
    await other.close()
    for _ in range(2):
        assert (await rows_of(connection, sql, (), 1, 5))[0][0] == "it was 1"


async def test_without_prepared_statements_each_goes_its_own_way(database_url: str) -> None:
    connection = await asyncpg.connect(database_url, statement_cache_size=0)
    for _ in range(2):
        assert (await rows_of(connection, ONE, ("a",), 1, 5))[0]["said"] == "ab"
    await connection.close()


async def test_a_value_of_the_wrong_kind_breaks_nothing(connection: asyncpg.Connection[Any]) -> None:
    for _ in range(2):
        with pytest.raises(asyncpg.DataError):
            await rows_of(connection, ONE, (1,), 1, 5)
        assert len(await rows_of(connection, ONE, ("a",), 1, 5)) == 1


async def test_a_statement_whose_time_is_over_is_stopped(connection: asyncpg.Connection[Any]) -> None:
    sql = "SELECT pg_sleep($1::float)::text"
    await rows_of(connection, sql, (0.0,), 1, 5)
    with pytest.raises(TimeoutError):
        await rows_of(connection, sql, (60.0,), 1, 0.05)
    # The server was asked to stop it, or this would be refused until it ends.
    assert len(await rows_of(connection, sql, (0.0,), 1, 30)) == 1


async def test_a_caller_who_goes_away_takes_the_statement_along(connection: asyncpg.Connection[Any]) -> None:
    sql = "SELECT pg_sleep($1::float)::text"
    await rows_of(connection, sql, (0.0,), 1, 5)
    asking = asyncio.create_task(rows_of(connection, sql, (60.0,), 1, 60))
    await asyncio.sleep(0.05)
    with pytest.raises(asyncpg.InterfaceError):
        await rows_of(connection, sql, (0.0,), 1, 5)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert len(await rows_of(connection, sql, (0.0,), 1, 30)) == 1


async def test_a_closed_connection_refuses(connection: asyncpg.Connection[Any]) -> None:
    await rows_of(connection, ONE, ("a",), 1, 5)
    await connection.close()
    with pytest.raises(asyncpg.InterfaceError):
        await rows_of(connection, ONE, ("a",), 1, 5)
