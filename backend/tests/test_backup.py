"""Backup and restore, by the commands of docs/operations.md on real clusters."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from conftest import FAST
from src.config.database import parse
from src.embedded.location import wheel_binaries
from src.embedded.roles import APPLICATION
from src.embedded.server import EmbeddedPostgres
from src.errors import Unavailable
from src.migrations import catalogue
from src.models import TaskCreate
from src.models.isolation import ROLE
from src.services import schema, tasks
from src.services.database import Database
from src.services.tasks import Known

OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
TABLES = (*catalogue.TABLES, "alembic_version")
ADA = uuid4()
SOURCE, RESTORED = "production", "groundwork_restored"
FILL = """
INSERT INTO users (id, email) SELECT $1::uuid, 'ada@example.com'
UNION ALL SELECT gen_random_uuid(), i || '@example.com' FROM generate_series(1, 50) i;
"""
ROWS = (
    "INSERT INTO tasks (user_id, title, description)"
    " SELECT id, E'tab\\t line\\n quote\\\\ \u20ac \U0001f600 ' || i, repeat('x', i)"
    " FROM users, generate_series(1, 20) i",
    "INSERT INTO idempotency_keys (user_id, key, request_hash, response, status)"
    " SELECT id, 'k', sha256(id::text::bytea), '{}', 201 FROM users",
    "INSERT INTO credentials (user_id, recipe, verifier) SELECT id, 'r', sha256(id::text::bytea) FROM users",
    "INSERT INTO sessions (id, user_id, current_hash, expires_at, ends_at)"
    " SELECT gen_random_uuid(), id, sha256('a'), now() + interval '1 day', now() + interval '1 day' FROM users",
    "DELETE FROM users WHERE email LIKE '1%'",
)


def url_as(server: EmbeddedPostgres, role: str, database: str) -> str:
    return re.sub("//[^@]*@", f"//{role}:pw@", server.url_for(database), count=1)


class Commands:
    """What the document says to type, by the names of its marks."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        found = re.findall(
            r"^<!-- backup: (\w+) -->\n```sh\n(.*?)^```", OPERATIONS.read_text(), re.MULTILINE | re.DOTALL
        )
        self.by_name = dict(found)
        assert list(self.by_name) == ["role", "dump", "roles", "restore"]

    def run(
        self, name: str, change: tuple[str, str] = ("", ""), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """With each `change[0]` replaced by `change[1]`."""
        text = self.by_name[name]
        assert change[0] in text
        passwords = dict.fromkeys(("BACKUP_PASSWORD", "APP_PASSWORD", "OWNER_PASSWORD"), "pw")
        path = f"{wheel_binaries()}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text.replace(*change) if change[0] else text],
            cwd=self.directory,
            env={"PATH": path, "HOME": str(self.directory), **passwords, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


@pytest.fixture
async def source(private_postgres: Callable[..., EmbeddedPostgres]) -> EmbeddedPostgres:
    """A cluster with the database of an owner who is no superuser, and rows in every table."""
    server = private_postgres(options=FAST)
    administration = await asyncpg.connect(server.url_for("postgres"))
    await administration.execute("CREATE ROLE groundwork_owner LOGIN PASSWORD 'pw'")
    await administration.execute(f"CREATE DATABASE {SOURCE} OWNER groundwork_owner")
    await administration.close()
    await schema.create_tables(parse(url_as(server, "groundwork_owner", SOURCE)))
    filling = await asyncpg.connect(server.url_for(SOURCE))
    await filling.execute(FILL.replace("$1", f"'{ADA}'"))
    for statement in ROWS:
        await filling.execute(statement)
    await filling.close()
    return server


@pytest.fixture
async def empty_cluster(private_postgres: Callable[..., EmbeddedPostgres]) -> EmbeddedPostgres:
    """A cluster that has no role of ours."""
    server = private_postgres(options=FAST)
    administration = await asyncpg.connect(server.url_for("postgres"))
    await administration.execute(f"DROP ROLE {APPLICATION}; DROP ROLE {ROLE}")
    await administration.close()
    return server


async def rows(url: str) -> dict[str, list[Any]]:
    connection = await asyncpg.connect(url)
    found = {table: await connection.fetch(f"SELECT t::text FROM {table} t ORDER BY 1") for table in TABLES}
    await connection.close()
    return found


async def test_what_the_document_dumps_and_restores_is_every_row_and_serves(
    commands: Commands, source: EmbeddedPostgres, empty_cluster: EmbeddedPostgres
) -> None:
    done = await asyncio.to_thread(commands.run, "role", ADMIN_URL=source.url_for(SOURCE))
    assert done.returncode == 0, done.stderr
    done = await asyncio.to_thread(
        commands.run, "dump", BACKUP_URL=url_as(source, "groundwork_backup", SOURCE)
    )
    before = await rows(source.url_for(SOURCE))
    assert all(before.values())
    assert (done.returncode, done.stdout) == (0, f"{len(before['tasks'])}\n"), done.stderr

    target = {
        "ADMIN_URL": empty_cluster.url_for("postgres"),
        "OWNER_URL": url_as(empty_cluster, "groundwork_owner", RESTORED),
    }
    for name in ("roles", "restore"):
        done = await asyncio.to_thread(commands.run, name, **target)
        assert done.returncode == 0, done.stderr
    assert await rows(empty_cluster.url_for(RESTORED)) == before
    assert await schema.differences(parse(target["OWNER_URL"])) == []
    async with Database(parse(url_as(empty_cluster, "app", RESTORED))) as database:
        assert (await tasks.page(database, ADA)).items.count('"id"') == 20
        assert (await tasks.page(database, uuid4())).items == "[]"
        await tasks.create(database, Known(uuid4()), TaskCreate(title="new"))


async def test_b1_a_dump_that_row_level_security_would_empty_is_refused(
    commands: Commands, source: EmbeddedPostgres
) -> None:
    for url, said in (
        (url_as(source, "groundwork_owner", SOURCE), "row-level security policy"),
        (source.url_for(SOURCE, role=APPLICATION), "permission denied"),
    ):
        done = await asyncio.to_thread(commands.run, "dump", BACKUP_URL=url)
        assert done.returncode != 0
        assert said in done.stderr
    # This one ends well by itself, without a task: the document's second line finds it.
    done = await asyncio.to_thread(
        commands.run,
        "dump",
        ("pg_dump --format", "pg_dump --enable-row-security --format"),
        BACKUP_URL=url_as(source, "groundwork_owner", SOURCE),
    )
    assert (done.returncode, done.stdout) == (1, "0\n"), done.stderr


async def test_b2_a_restore_without_roles_leaves_nothing_and_without_grants_serves_nothing(
    commands: Commands, source: EmbeddedPostgres, empty_cluster: EmbeddedPostgres
) -> None:
    done = await asyncio.to_thread(commands.run, "dump", BACKUP_URL=source.url_for(SOURCE))
    assert done.returncode == 0, done.stderr
    administration = await asyncpg.connect(empty_cluster.url_for("postgres"))
    await administration.execute("CREATE ROLE groundwork_owner LOGIN PASSWORD 'pw'")
    owner_url = url_as(empty_cluster, "groundwork_owner", RESTORED)
    target = {"ADMIN_URL": empty_cluster.url_for("postgres"), "OWNER_URL": owner_url}
    done = await asyncio.to_thread(commands.run, "restore", **target)
    assert done.returncode != 0
    assert "groundwork_app" in done.stderr
    connection = await asyncpg.connect(empty_cluster.url_for(RESTORED))
    assert await connection.fetch("SELECT FROM pg_class WHERE relnamespace = 'public'::regnamespace") == []
    await connection.close()

    await administration.execute(f"DROP DATABASE {RESTORED}")
    await administration.execute("DROP ROLE groundwork_owner")
    await administration.close()
    assert (await asyncio.to_thread(commands.run, "roles", **target)).returncode == 0
    done = await asyncio.to_thread(commands.run, "restore", ("pg_restore", "pg_restore --no-acl"), **target)
    assert done.returncode == 0, done.stderr
    found = await schema.differences(parse(owner_url))
    assert "execute on change_account by everybody is not declared: 'EXECUTE'" in found
    assert "grant on tasks to groundwork_app is missing" in found
    async with Database(parse(url_as(empty_cluster, "app", RESTORED))) as database:
        with pytest.raises(Unavailable):
            await tasks.page(database, ADA)
