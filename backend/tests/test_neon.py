"""Against a live Neon project: `NEON_DATABASE_URL='postgresql://...' make test-neon`.

Everything happens in a schema of the test's own, which is dropped at the end; nothing else is touched. The same
test passes against any other PostgreSQL that the variable names.
"""

import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlmodel import select

from src.config.database import ConnectionSettings, parse
from src.models import Task, TaskCreate, TaskUpdate, User, UserCreate
from src.services import schema, tasks, users
from src.services.database import Database
from src.services.revision import CodeRevision

pytestmark = pytest.mark.neon

# Read while the tests are collected: a fixture takes every variable of ours out of the environment.
PASTED = os.environ.get("NEON_DATABASE_URL", "")


@pytest.fixture
async def direct() -> AsyncIterator[ConnectionSettings]:
    """The direct host, in a schema of our own."""
    connection = parse(PASTED, variable="NEON_DATABASE_URL").direct()
    name = f"groundwork_test_{uuid4().hex[:12]}"
    administrator = await asyncpg.connect(**connection.asyncpg_arguments())
    await administrator.execute(f'CREATE SCHEMA "{name}"')
    try:
        yield replace(connection, server_settings={**connection.server_settings, "search_path": name})
    finally:
        await administrator.execute(f'DROP SCHEMA "{name}" CASCADE')
        await administrator.close()


async def test_the_string_as_pasted_connects_and_is_verified_unless_it_is_local() -> None:
    connection = parse(PASTED, variable="NEON_DATABASE_URL")
    assert connection.tls.verified or connection.tls.mode == "disable"
    async with Database(connection) as database:
        assert database.observe().ready
        async with database.transaction(read_only=True) as raw:
            assert await raw.fetchval("SELECT 1") == 1


async def test_tables_are_created_and_users_and_tasks_live_their_lives(direct: ConnectionSettings) -> None:
    async with Database(direct, schema=CodeRevision(direct), passive=True) as database:
        await schema.create_tables(direct)
        assert await schema.differences(direct) == []
        owner = UUID(json.loads(await users.create(database, UserCreate(email="ana@example.com")))["id"])
        task = await tasks.create(database, tasks.Known(owner), TaskCreate(title="Buy milk"))
        change = await tasks.update(database, tasks.Known(owner), task.task_id, TaskUpdate(is_completed=True))
        done = json.loads(change.body)
        assert (done["is_completed"], done["version"]) == (True, 2)
        async with database.session() as session:
            assert (await session.exec(select(Task))).one().title == "Buy milk"
            await session.delete(await session.get_one(User, owner))
        assert (await tasks.page(database, owner)).items == "[]"
        assert (await database.check()).mode == "passive"
