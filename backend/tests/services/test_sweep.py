"""Expired idempotency keys go, whoever they belong to, though row-level security binds the tables' owner too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from src.services import idempotency


@pytest.fixture
async def owner(database_url: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A connection as the owner of the tables, who is no superuser."""
    role = f"owner_{uuid4().hex[:8]}"
    connection = await asyncpg.connect(database_url)
    await connection.execute(f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA public TO {role}")
    for table in ("users", "tasks", "deleted_users", "idempotency_keys"):
        await connection.execute(f"ALTER TABLE {table} OWNER TO {role}")
    yield connection
    await connection.execute(f"RESET ROLE; REASSIGN OWNED BY {role} TO CURRENT_USER; DROP OWNED BY {role}")
    await connection.execute(f"DROP ROLE {role}")
    await connection.close()


async def test_expired_keys_of_every_user_go_and_younger_ones_stay(owner: asyncpg.Connection[Any]) -> None:
    people = [uuid4() for _ in range(3)]
    for user in people:
        await owner.execute("INSERT INTO users (id) VALUES ($1)", user)
        await owner.execute(
            "INSERT INTO idempotency_keys (user_id, key, request_hash, created_at)"
            " SELECT $1, age::text, sha256(''), now() - age * interval '1 hour'"
            " FROM unnest('{1, 23, 25, 100}'::int[]) AS age",
            user,
        )
    table_owner = await owner.fetchval("SELECT tableowner FROM pg_tables WHERE tablename = 'users'")
    await owner.execute(f"SET ROLE {table_owner}")
    assert await owner.fetchval("SELECT count(*) FROM idempotency_keys") == 0  # the second wall
    assert await idempotency.sweep(owner) == 6
    assert await idempotency.sweep(owner) == 0
    assert await idempotency.sweep(owner, hours=2) == 3
    await owner.execute("RESET ROLE")
    left = await owner.fetch("SELECT user_id, key FROM idempotency_keys")
    assert {(row["user_id"], row["key"]) for row in left} == {(user, "1") for user in people}


async def test_a_write_finds_old_keys_by_the_index_though_the_table_was_empty_before(
    database_url: str,
) -> None:
    connection = await asyncpg.connect(database_url)
    # Known to be empty: nothing costs less than to read all of it.
    await connection.execute("VACUUM ANALYZE idempotency_keys")
    async with connection.transaction():
        for _ in range(7):  # in the last ones by a plan that is kept
            await connection.execute(f"SELECT sweep_answers('{uuid4()}', 'k', now())")
        scans = "SELECT seq_scan FROM pg_stat_xact_user_tables WHERE relname = 'idempotency_keys'"
        assert await connection.fetchval(scans) == 0
    await connection.close()
