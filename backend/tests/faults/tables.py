"""The tables as they are at the end, read as PostgreSQL's superuser, whom no policy binds."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

import asyncpg

from src.embedded.roles import APPLICATION

from .checker import Row
from .contract import content_of
from .stage import Stage

Keys = dict[tuple[str, str], str | None]


async def of(connection: asyncpg.Connection[asyncpg.Record], users: Iterable[str]) -> tuple[list[Row], Keys]:
    """All tasks of these users, and all keys with the task that each made."""
    ids = [UUID(user) for user in users]
    rows = await connection.fetch(
        "SELECT user_id, id, title, description, is_completed, version FROM tasks WHERE user_id = ANY($1)",
        ids,
    )
    found = [
        Row(
            str(row["user_id"]),
            str(row["id"]),
            row["title"],
            row["version"],
            content_of(row["title"])
            == {
                "title": row["title"],
                "description": row["description"],
                "is_completed": row["is_completed"],
            },
        )
        for row in rows
    ]
    kept = await connection.fetch(
        "SELECT user_id, key, task_id FROM idempotency_keys WHERE user_id = ANY($1)", ids
    )
    keys = {
        (str(row["user_id"]), row["key"]): None if row["task_id"] is None else str(row["task_id"])
        for row in kept
    }
    return found, keys


async def count(connection: asyncpg.Connection[asyncpg.Record]) -> int:
    found: int = await connection.fetchval("SELECT count(*) FROM tasks")
    return found


async def seen_by_nobody(stage: Stage) -> dict[str, int]:
    """How many rows of each table the service's role sees when it names no owner: the second wall lets none through."""
    connection = await stage.connect(APPLICATION)
    try:
        return {
            table: await connection.fetchval(f"SELECT count(*) FROM {table}")
            for table in ("users", "tasks", "idempotency_keys", "deleted_users")
        }
    finally:
        await connection.close()
