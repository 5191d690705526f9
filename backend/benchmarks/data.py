"""The data: the same rows for every server, each in a database of its own, on a PostgreSQL of our own.

1,000 people with 100 tasks each, and ten with 5,000, among whom pages lie deep. Rows lie in the order of time, so
that the tasks of one person are spread over the table as life spreads them.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import asyncpg

from src.embedded.roles import NAME
from src.embedded.server import EmbeddedPostgres
from tests.postgres_server import PostgresServer

USERS: Final = 1_000
TASKS_EACH: Final = 100
HEAVY_USERS: Final = 10
HEAVY_TASKS_EACH: Final = 5_000
TEMPLATE: Final = "filled"

OPTIONS: Final = {
    # fsync and synchronous_commit stay on. What would come and go by itself is kept out of the windows.
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "max_wal_size": "8GB",
    "max_connections": "900",
    "shared_buffers": "512MB",
}

_PEOPLE: Final = """
INSERT INTO users (id, email, created_at, updated_at)
SELECT md5('user' || n)::uuid, 'user' || n || '@example.com', at, at
FROM (SELECT n, '2026-01-01Z'::timestamptz + n * interval '1 second' AS at
      FROM generate_series($1::int, $2::int) AS n) AS made
"""

_TASKS: Final = """
INSERT INTO tasks (user_id, id, title, description, is_completed, created_at, updated_at)
SELECT md5('user' || n)::uuid,
       (substr(stamp, 1, 8) || '-' || substr(stamp, 9, 4) || '-7' || substr(mark, 1, 3)
        || '-8' || substr(mark, 4, 3) || '-' || substr(mark, 7, 12))::uuid,
       'Task ' || i || ' of ' || n || ': water the plants',
       CASE WHEN i % 3 > 0
            THEN 'The ferns in the hall want little, the ' || substr(mark, 1, 6)
                 || ' on the balcony a lot; look under the leaves too.' END,
       i % 4 = 0, at, at
FROM (SELECT n, i, at, md5(n || '-' || i) AS mark,
             lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') AS stamp
      FROM (SELECT n, i, '2026-02-01Z'::timestamptz + i * interval '1 minute' + n * interval '10 ms' AS at
            FROM generate_series($1::int, $2::int) AS n, generate_series(1, $3::int) AS i) AS moments) AS made
ORDER BY at
"""


@dataclass(frozen=True)
class Task:
    """A stored task as far as requests name it."""

    user_id: UUID
    id: UUID
    created_at: str


@dataclass(frozen=True)
class Data:
    """`tasks` by their owner, the newest first; the heavy ones apart."""

    tasks: dict[UUID, list[Task]]
    heavy: dict[UUID, list[Task]]


@contextmanager
def postgres(where: Path, options: dict[str, str] | None = None) -> Iterator[EmbeddedPostgres]:
    """A started server whose data lie in `where`, and are new if there are none."""
    with PostgresServer(where, options={**OPTIONS, **(options or {})}) as server:
        yield server


def migrate(server: EmbeddedPostgres, database: str) -> None:
    """As an operator does it."""
    variables = {**clean_environment(), "DATABASE_URL": server.url_for(database), "LOG_LEVEL": "error"}
    subprocess.run(
        [sys.executable, "-m", "src", "migrate", "up"],
        env=variables,
        cwd=Path(__file__).resolve().parents[1],
        stdout=subprocess.DEVNULL,
        check=True,
    )


def clean_environment() -> dict[str, str]:
    """The caller's, without any setting of the service."""
    from src.config.settings import Settings

    names = {name.upper() for name in Settings.model_fields}
    return {name: value for name, value in os.environ.items() if name.upper() not in names}


def fill(
    server: EmbeddedPostgres,
    users: int = USERS,
    each: int = TASKS_EACH,
    heavy: int = HEAVY_USERS,
    heavy_each: int = HEAVY_TASKS_EACH,
    *,
    database: str = TEMPLATE,
    most_told: int = USERS,
) -> Data:
    """Makes the database anew, and tells what is in it: of the heavy users all, of the others the first few."""

    async def work() -> Data:
        await _recreate(server, database, f'"{NAME}"')
        await asyncio.to_thread(migrate, server, database)
        connection = await asyncpg.connect(server.url_for(database))
        try:
            await connection.execute("SET synchronous_commit = off")
            await connection.execute(_PEOPLE, 1, users + heavy)
            await connection.execute(_TASKS, 1, users, each)
            await connection.execute(_TASKS, users + 1, users + heavy, heavy_each)
            await connection.execute("VACUUM (FREEZE, ANALYZE)")
            await connection.execute("CHECKPOINT")
            rows = await connection.fetch(
                "SELECT t.user_id, t.id, to_json(t.created_at) #>> '{}' AS created_at,"
                " split_part(u.email, '@', 1) AS name"
                " FROM tasks t JOIN users u ON u.id = t.user_id"
                " WHERE u.id = ANY (SELECT md5('user' || n)::uuid FROM generate_series(1, $1::int) AS n"
                "                   WHERE n <= $2::int OR n > $3::int)"
                " ORDER BY t.user_id, t.created_at DESC, t.id DESC",
                users + heavy,
                most_told,
                users,
            )
        finally:
            await connection.close()
        data = Data({}, {})
        for row in rows:
            number = int(row["name"].removeprefix("user"))
            of = data.tasks if number <= users else data.heavy
            of.setdefault(row["user_id"], []).append(Task(row["user_id"], row["id"], row["created_at"]))
        return data

    return asyncio.run(work())


def clone(server: EmbeddedPostgres, database: str) -> None:
    """`database` as `TEMPLATE` is. Nobody may be connected to either."""
    asyncio.run(_recreate(server, database, f'"{TEMPLATE}"'))


async def _recreate(server: EmbeddedPostgres, database: str, template: str) -> None:
    connection = await asyncpg.connect(server.url_for("postgres"))
    try:
        await connection.execute(f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')
        await connection.execute(f'CREATE DATABASE "{database}" TEMPLATE {template}')
    finally:
        await connection.close()


def tidy(server: EmbeddedPostgres, databases: list[str]) -> None:
    """Takes away what the writes before have left behind, and lets what is written reach the disk."""

    async def work() -> None:
        for database in databases:
            connection = await asyncpg.connect(server.url_for(database))
            try:
                await connection.execute("VACUUM (ANALYZE)")
            finally:
                await connection.close()
        connection = await asyncpg.connect(server.url_for("postgres"))
        try:
            await connection.execute("CHECKPOINT")
        finally:
            await connection.close()

    asyncio.run(work())


def rows_of(server: EmbeddedPostgres, database: str, owner: UUID) -> list[dict[str, Any]]:
    """The owner's tasks as they are stored, the newest first."""

    async def work() -> list[dict[str, Any]]:
        connection = await asyncpg.connect(server.url_for(database))
        try:
            found = await connection.fetch(
                "SELECT * FROM tasks WHERE user_id = $1 ORDER BY created_at DESC, id DESC", owner
            )
            return [dict(row) for row in found]
        finally:
            await connection.close()

    return asyncio.run(work())
