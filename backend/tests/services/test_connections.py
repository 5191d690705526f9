"""What is lent, to whom, and what is never lent again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from src.config.database import ConnectionSettings
from src.errors import Unavailable
from src.services.connections import Connections, Limits
from src.services.faults import diagnose
from src.services.vitality import Vitality
from waiting import eventually


async def nothing(_: Any) -> None:
    """No greeting."""


@pytest.fixture
async def two(connection_settings: ConnectionSettings) -> AsyncIterator[Connections]:
    connections = Connections(connection_settings, Limits(pool_size=2), Vitality(), None)
    await connections.open(nothing)
    yield connections
    await connections.close()


def soon() -> float:
    return time.monotonic() + 60


async def test_what_was_used_last_is_lent_first_and_nothing_is_opened_without_need(two: Connections) -> None:
    first = await two.acquire(soon())
    second = await two.acquire(soon())
    two.release(first)
    two.release(second)
    assert await two.acquire(soon()) is second
    assert await two.acquire(soon()) is first
    assert two.observe().open == 2
    two.release(first)
    two.release(second)


async def test_a_connection_given_back_in_a_transaction_is_closed_instead_of_lent(two: Connections) -> None:
    left = await two.acquire(soon())
    await left.execute("BEGIN")
    two.release(left)
    fresh, another = await two.acquire(soon()), await two.acquire(soon())
    assert left not in (fresh, another)
    assert left.is_closed()
    assert not fresh.is_in_transaction()
    two.release(fresh)
    two.release(another)


async def test_a_connection_that_the_server_ended_while_nobody_had_it_is_not_lent(
    two: Connections, postgres: Any
) -> None:
    ended = await two.acquire(soon())
    two.release(ended)
    other = await asyncpg.connect(postgres.url)
    await other.execute("SELECT pg_terminate_backend($1, 5000)", ended.get_server_pid())
    await other.close()
    await eventually(ended.is_closed)
    assert two.observe().open == 0
    lent = await two.acquire(soon())
    assert lent is not ended
    assert await lent.fetchval("SELECT 1") == 1
    two.release(lent)


async def test_after_a_loss_nothing_is_lent_again_that_was_open_before(two: Connections) -> None:
    lent, idle = await two.acquire(soon()), await two.acquire(soon())
    two.release(idle)
    two.lost(diagnose(ConnectionResetError()))
    assert idle.is_closed()
    # It answers all the same, and the loss was another's: nobody knows whose server it speaks to.
    assert await lent.fetchval("SELECT 1") == 1
    two.release(lent)
    fresh, another = await two.acquire(soon()), await two.acquire(soon())
    assert {lent, idle}.isdisjoint({fresh, another})
    assert lent.is_closed()
    two.release(fresh)
    two.release(another)


async def test_while_it_heals_there_are_never_more_connections_than_places(two: Connections) -> None:
    async def work() -> None:
        connection = await two.acquire(soon())
        assert two.observe().open <= 2
        await connection.fetchval("SELECT pg_sleep(0.01)")
        two.release(connection)

    for _ in range(5):
        two.lost(diagnose(ConnectionResetError()))
        await asyncio.gather(*(work() for _ in range(20)))
    assert two.observe().open <= 2
    assert two.observe().in_use == 0


async def test_closing_waits_for_what_is_lent_and_lends_nothing_more(
    connection_settings: ConnectionSettings,
) -> None:
    connections = Connections(connection_settings, Limits(pool_size=2), Vitality(), None)
    await connections.open(nothing)
    lent = await connections.acquire(soon())
    closing = asyncio.create_task(connections.close())
    await asyncio.sleep(0.1)
    assert not closing.done()
    with pytest.raises(Unavailable):
        await connections.acquire(soon())
    assert await lent.fetchval("SELECT 1") == 1
    connections.release(lent)
    await closing
    assert lent.is_closed()
