"""D7 of docs/reliability.md: a disk that is full, which is a small file system of the test's own; root may mount it.

Full for the tables alone, PostgreSQL goes on and refuses what needs room. Full for its log of changes too, it ends
itself rather than acknowledge what it cannot keep, and comes back when there is room.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import asyncpg
import pytest

from asking import TASKS, Caller, people, problem
from conftest import open_directory
from postgres_server import PostgresServer, give_away
from src.config.database import parse
from src.embedded.roles import APPLICATION
from src.services import schema
from waiting import eventually

if TYPE_CHECKING:
    from tests.api.conftest import MakeApp, Serve

pytestmark = pytest.mark.root

MEGABYTE = 1024 * 1024


class Disk:
    """A file system in memory that holds so much and no more."""

    def __init__(self, path: Path, megabytes: int) -> None:
        self.path = path
        self._ballast = path / "ballast"
        options = f"size={megabytes}m,mode=0755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
        give_away(path)

    def fill(self) -> None:
        """Another program takes all that is left."""
        with self._ballast.open("wb", buffering=0) as file:
            for piece in (MEGABYTE, 4096):
                try:
                    while file.write(b"\0" * piece) == piece:
                        pass
                except OSError:
                    continue
        assert os.statvfs(self.path).f_bavail == 0

    def free(self) -> None:
        self._ballast.unlink()

    def close(self) -> None:
        subprocess.run(["umount", str(self.path)], check=True)


@pytest.fixture
def disk() -> Iterator[Callable[[int], Disk]]:
    """`disk(64)`: a file system of 64 MB. Ask for it before the server that lives on it."""
    with open_directory() as directory:
        made: list[Disk] = []

        def make(megabytes: int) -> Disk:
            made.append(Disk(directory, megabytes))
            return made[-1]

        yield make
        for one in made:
            one.close()


def long_text() -> str:
    """What PostgreSQL cannot press together."""
    return secrets.token_hex(4000)


@asynccontextmanager
async def serving(
    server: PostgresServer, name: str, make_app: MakeApp, serve: Serve
) -> AsyncIterator[Caller]:
    await schema.create_tables(parse(server.url_for(name)))
    app = make_app(
        database_url=server.url_for(name, role=APPLICATION),
        database_migration_url=server.url_for(name),
        database_recovery_wait_seconds=0.5,
    )
    async with people(serve, app) as (ana, _):
        yield ana


async def stored(ana: Caller) -> dict[str, str]:
    return {task["id"]: task["description"] for task in await ana.all()}


async def test_d7_on_a_full_disk_writes_are_503_and_reads_go_on_until_there_is_room(
    disk: Callable[[int], Disk],
    private_postgres: Callable[..., PostgresServer],
    make_app: MakeApp,
    serve: Serve,
) -> None:
    small = disk(48)
    server = private_postgres()
    place = small.path / "tables"
    place.mkdir(mode=0o700)
    server.location.chown(place)
    operator = await asyncpg.connect(server.url)
    await operator.execute(f"CREATE TABLESPACE small LOCATION '{place}'")
    await operator.execute("CREATE DATABASE on_small TABLESPACE small")
    async with serving(server, "on_small", make_app, serve) as ana:
        acknowledged: dict[str, str] = {}

        async def create(**more: Any) -> Any:
            text = long_text()
            answer = await ana("POST", json={"title": "x", "description": text}, expect=(201, 503), **more)
            if answer.status_code == 201:
                acknowledged[answer.json()["id"]] = text
            return answer

        for _ in range(20):
            await create()
        assert len(acknowledged) == 20
        small.fill()
        for _ in range(2000):
            if (await create()).status_code == 503:
                break
        # A page that has room takes a short one still. What is certain is that there is an end.
        one = f"{TASKS}/{next(iter(acknowledged))}"
        refused = 0
        for number in range(20):
            keyed = {"idempotency-key": f"k{number}"}
            for answer in (
                await create(),
                await create(headers=keyed),
                await ana("PUT", f"{TASKS}/{uuid4()}", json={"title": "x", "description": long_text()}),
            ):
                assert answer.status_code == 503
                assert problem(answer) == "refused"
                assert place.name not in answer.text
                refused += 1
            assert (await ana("GET", one, expect=200)).json()["description"] == acknowledged[
                one[len(TASKS) + 1 :]
            ]
            assert len((await ana("GET", expect=200)).json()["items"]) > 10
        assert refused == 60
        assert (await ana.client.get("/readyz")).status_code == 200
        assert (await ana.client.get("/livez")).status_code == 200
        assert await stored(ana) == acknowledged
        small.free()
        answer = await create(headers={"idempotency-key": "k0"})
        assert answer.status_code == 201
        assert "idempotency-replayed" not in answer.headers  # What was refused with it was not done.
        assert await stored(ana) == acknowledged
        await operator.close()
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await eventually(lambda: reads(ana))
        assert await stored(ana) == acknowledged


async def has_ended(server: PostgresServer) -> bool:
    return not server.running


async def reads(ana: Caller) -> bool:
    return (await ana("GET", expect=(200, 503))).status_code == 200


async def test_d7_without_room_for_its_log_postgresql_ends_itself_and_loses_nothing_that_was_acknowledged(
    disk: Callable[[int], Disk],
    private_postgres: Callable[..., PostgresServer],
    make_app: MakeApp,
    serve: Serve,
) -> None:
    small = disk(192)
    # Without segments in stock, so that it needs room soon.
    options = {"min_wal_size": "32MB", "max_wal_size": "32MB", "wal_recycle": "off"}
    server = private_postgres(directory=small.path / "data", options=options)
    async with serving(server, "groundwork", make_app, serve) as ana:
        acknowledged: dict[str, str] = {}
        unknown: dict[str, str] = {}

        async def create(key: str, text: str) -> int:
            body, keyed = {"title": "x", "description": text}, {"idempotency-key": key}
            answer = await ana("POST", json=body, headers=keyed, expect=(201, 503, 504))
            if answer.status_code == 201:
                acknowledged[answer.json()["id"]] = text
                unknown.pop(key, None)
            else:
                unknown[key] = text
            return answer.status_code

        for number in range(20):
            assert await create(f"before-{number}", long_text()) == 201
        small.fill()
        operator = await asyncpg.connect(server.url)
        for number in range(100):
            await create(f"full-{number}", "short")
            try:
                # As so many writes would do: what comes next needs a new segment.
                await operator.execute("SELECT pg_switch_wal()")
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                break
        operator.terminate()
        await eventually(lambda: has_ended(server))
        # It could not go on, and starting again by itself needs room as well.
        assert "PANIC" in server.log_path.read_text(errors="replace")
        assert "No space left on device" in server.log_path.read_text(errors="replace")
        assert await create("down", long_text()) == 503
        assert (await ana.client.get("/livez")).status_code == 200
        assert (await ana.client.get("/readyz")).status_code == 503
        small.free()
        await asyncio.to_thread(server.stop)  # As the supervisor does, which waits for room in the same way.
        await asyncio.to_thread(server.start)
        await eventually(lambda: reads(ana))
        for key, text in list(unknown.items()):
            assert await create(key, text) == 201
        assert await stored(ana) == acknowledged
        assert (await ana.client.get("/readyz")).status_code == 200
