"""S1 of docs/reliability.md: the code from before the newest migration, for real, while the schema goes on without it.

The old code is taken out of the repository's history: the last commit that did not have the newest migration.
"""

from __future__ import annotations

import asyncio
import io
import subprocess
import tarfile
import time
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from asking import BACKEND, TASKS, Caller, served
from postgres_server import PostgresServer
from src.config.database import parse
from src.embedded.roles import APPLICATION
from src.services import schema
from src.services.signing import SigningKeys, new_key, seeds

pytestmark = pytest.mark.slow

KEY = new_key()


def git(*words: str) -> bytes:
    asked = subprocess.run(["git", "-C", str(BACKEND), *words], capture_output=True)
    if asked.returncode:
        raise RuntimeError(
            "The code from before comes from the repository's history, and there is none here: clone it whole. "
            + asked.stderr.decode()
        )
    return asked.stdout


@pytest.fixture
def before(tmp_path: Path) -> tuple[Path, str]:
    """The `src` of the last commit without the newest migration, and the revision that it was made for."""
    newest = max((BACKEND / "src" / "migrations" / "versions").glob("[0-9]*.py"))
    added = git("log", "--diff-filter=A", "--format=%H", "-1", "--", str(newest)).decode().strip()
    with tarfile.open(fileobj=io.BytesIO(git("archive", f"{added}~1", "src"))) as archive:
        archive.extractall(tmp_path, filter="data")
    versions = sorted((tmp_path / "src" / "migrations" / "versions").glob("[0-9]*.py"))
    assert newest.name not in {each.name for each in versions}
    return tmp_path / "src", versions[-1].name.partition("_")[0]


async def live(caller: Caller, done: asyncio.Event, lives: list[str]) -> None:
    """Everything that can be done with a task. Whoever has no account yet gets one by the first of it."""
    while not done.is_set():
        title = uuid4().hex
        keyed = {"idempotency-key": title}
        made = await caller("POST", json={"title": title}, headers=keyed, expect=201)
        one = made.headers["location"]
        assert (await caller("POST", json={"title": title}, headers=keyed, expect=201)).text == made.text
        assert (await caller("GET", one, expect=200)).json()["title"] == title
        changed = await caller("PATCH", one, json={"description": "x"}, expect=200)
        condition = {"if-match": changed.headers["etag"]}
        await caller("PUT", one, json={"title": "put"}, headers=condition, expect=200)
        assert made.json()["id"] in {task["id"] for task in await caller.all()}
        operations = [{"op": "create", "task": {"title": "x"}}, {"op": "delete", "id": made.json()["id"]}]
        await caller("POST", f"{TASKS}/batch", json={"operations": operations}, expect=200)
        await caller("GET", one, expect=404)
        lives.append(title)
        caller = caller.stranger() if len(lives) % 3 == 0 else caller


async def test_s1_the_code_from_before_the_newest_migration_meets_no_error_while_it_runs_and_after(
    before: tuple[Path, str], postgres: PostgresServer, empty_database_url: str
) -> None:
    source, revision = before
    await schema.create_tables(parse(empty_database_url))
    await schema.downgrade(parse(empty_database_url), revision)
    app_url = postgres.url_for(empty_database_url.rsplit("/", 1)[1], role=APPLICATION)
    with served(
        source=source,
        database_url=app_url,
        database_migration_url=empty_database_url,
        signing_keys=KEY,
        # A migration keeps everybody waiting for a moment; how long is up to the machine, and not the matter here.
        database_lock_timeout_seconds="20",
        database_statement_timeout_seconds="25",
        database_command_timeout_seconds="30",
        database_pool_timeout_seconds="25",
    ) as service:
        async with httpx.AsyncClient(base_url=service.address, timeout=30) as client:
            done, lives = asyncio.Event(), []
            keys = SigningKeys(seeds(KEY))
            clients = [asyncio.create_task(live(Caller(client, keys), done, lives)) for _ in range(4)]

            async def more(count: int) -> None:
                goal, deadline = len(lives) + count, time.monotonic() + 60
                while len(lives) < goal:
                    for each in clients:
                        if each.done():
                            each.result()
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.02)

            try:
                await more(20)
                assert (await schema.create_tables(parse(empty_database_url))).changed
                await more(60)
            finally:
                done.set()
                ended = await asyncio.gather(*clients, return_exceptions=True)
                # Why one failed is said in the log, and in no answer.
                print("\n".join(line for line in service.log.splitlines() if '"problem"' in line))
            assert ended == [None] * 4
            # A schema that was right is looked at again once in a while, when there is time for it.
            deadline = time.monotonic() + 90
            while True:
                ready, health = await client.get("/readyz"), await client.get("/health")
                assert ready.status_code == 200
                check = health.json()["checks"]["schema:revision"][0]
                if check["observedValue"] == schema.head() or time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.5)
        assert (check["status"], check["observedValue"]) == ("warn", schema.head())
        assert '"level":"error"' not in service.log
