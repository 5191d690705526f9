"""The services as an operator runs them, and as the service runs them: bound by row-level security."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from clusters import Proxy
from src.config.database import ConnectionSettings, parse
from src.services.database import Database
from waiting import PATIENT


@pytest.fixture(params=["owner", "application"])
def either_url(request: pytest.FixtureRequest, database_url: str, app_database_url: str) -> str:
    return database_url if request.param == "owner" else app_database_url


@pytest.fixture
async def either(either_url: str) -> AsyncIterator[Database]:
    """An opened `Database` on a fresh migrated database, for either role in turn."""
    async with Database(parse(either_url), PATIENT) as opened:
        yield opened


@pytest.fixture
async def owner(database_url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection of the driver's own, as the role that owns the tables."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def app(app_database_url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """The same, as the role that the service connects as."""
    connection = await asyncpg.connect(app_database_url)
    yield connection
    await connection.close()


@pytest.fixture
def through_proxy(proxy: Proxy, database_url: str) -> ConnectionSettings:
    """A fresh migrated database, reached by way of `proxy`."""
    return parse(proxy.through(database_url))
