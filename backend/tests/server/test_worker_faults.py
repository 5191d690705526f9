"""The product in real processes, while what no request can cause is caused: a blocked loop, no descriptor left,
a drain that overruns.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest

from asking import TASKS, Caller, served
from postgres_server import PostgresServer
from src.embedded.roles import APPLICATION
from src.services.signing import SigningKeys, new_key, seeds
from supervised import SCRIPT, Service
from waiting import PATIENCE, eventually

KEY = new_key()


@pytest.fixture
def product(tmp_path: Path, app_database_url: str, database_url: str) -> Iterator[Callable[..., Service]]:
    """`product(**settings)`: the product under its supervisor, not yet started."""
    made: list[Service] = []

    def make(**settings: Any) -> Service:
        given = {
            "database_url": app_database_url,
            "database_migration_url": database_url,
            "signing_keys": KEY,
        }
        environment = {"TEST_APP": "product"}
        made.append(Service(tmp_path, given | settings, environment, SCRIPT))
        return made[-1]

    yield make
    for one in made:
        one.close()


def client_of(one: Service) -> httpx.AsyncClient:
    host, port = one.address
    return httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=PATIENCE)


async def test_p4_a_blocked_event_loop_is_a_warning_in_health_and_a_number_in_the_metrics(
    product: Callable[..., Service],
) -> None:
    one = product().start().serving()
    async with client_of(one) as client:

        async def lag() -> dict[str, Any]:
            (check,) = (await client.get("/health")).json()["checks"]["event_loop:lag"]
            return check

        async def is_told() -> bool:
            return float((await lag()).get("observedValue") or 0) > 2

        async def is_forgotten() -> bool:
            return not await is_told()

        assert (await client.post("/block", params={"seconds": 3})).text == "blocked"
        await eventually(is_told)
        answer = await client.get("/health")
        said = answer.json()
        (check,) = said["checks"]["event_loop:lag"]
        assert (answer.status_code, said["status"], check["status"]) == (200, "warn", "warn")
        assert "blocked" in check["output"]
        numbers = (await client.get("/metrics")).text
        total, short = (
            float(line.rpartition(" ")[2])
            for name in ('le="+Inf"', 'le="1.0"')
            for line in numbers.splitlines()
            if line.startswith("groundwork_event_loop_lag_seconds_bucket{" + name)
        )
        assert total > short
        # What it was is told for ten seconds, and no longer.
        await asyncio.sleep(10)
        await eventually(is_forgotten)


async def test_r2_without_a_file_descriptor_it_says_503_and_it_recovers(
    product: Callable[..., Service],
) -> None:
    one = product(keep_alive_seconds=300)
    one.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))).serving()
    lines = b'{"title":"a"}\n'

    async with client_of(one) as client:
        ana = Caller(client, SigningKeys(seeds(KEY)))
        kept = (await ana.create("before"))["id"]

        async def imported() -> int:
            headers = {"content-type": "application/x-ndjson"}
            return (await ana("POST", f"{TASKS}/import", content=lines, headers=headers)).status_code

        assert await imported() == 200
        assert (await client.post("/descriptors")).text.endswith("EMFILE")
        logged = len(one.log.splitlines())
        # On connections that are there: what needs a file is 503, what needs none is answered.
        assert await imported() == 503
        assert (await client.get("/livez")).status_code == 200
        assert (await ana("GET", f"{TASKS}/{kept}")).status_code in (200, 503)
        # Nobody new gets in, and nobody waits for long: the kernel or we end the connection, or it is heard later.
        waiting = [asyncio.create_task(ask_anew(one)) for _ in range(100)]
        await asyncio.sleep(2)
        assert (await client.get("/livez")).status_code == 200
        assert (await client.delete("/descriptors")).text == "0"
        answered = await asyncio.gather(*waiting)
        assert set(answered) <= {200, None}
        # Nothing is left of it: newcomers are heard, files are opened.
        assert [await ask_anew(one) for _ in range(5)] == [200] * 5
        assert await imported() == 200
        assert (await client.get("/readyz")).status_code == 200
        assert [task["title"] for task in await ana.all()].count("a") == 2
    # Told, and not flooded: less than a line for each that was turned away.
    assert len(one.log.splitlines()) - logged < 60
    assert "Traceback" not in one.log


async def ask_anew(one: Service) -> int | None:
    """The status that a newcomer is answered, or None when the connection ends without one."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        reader, writer = await asyncio.open_connection(*one.address)
        try:
            writer.write(b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            return int((await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)).split()[1])
        finally:
            writer.transport.abort()
    return None


MANY = 500


@pytest.mark.parametrize("how", ["import", "batch", "one"])
async def test_r6_a_drain_that_overruns_leaves_all_of_a_write_or_nothing(
    postgres: PostgresServer, database_url: str, how: str
) -> None:
    """The write waits for a lock in its middle when its time is up; then the lock goes, and its fate is looked at."""
    name = database_url.rsplit("/", 1)[1]
    operator = await asyncpg.connect(database_url)
    ids = [str(uuid4()) for _ in range(MANY)]
    with served(
        database_url=postgres.url_for(name, role=APPLICATION),
        database_migration_url=database_url,
        database_lock_timeout_seconds="60",
        database_statement_timeout_seconds="70",
        database_command_timeout_seconds="75",
        shutdown_timeout_seconds="1",
        signing_keys=KEY,
    ) as service:
        async with httpx.AsyncClient(base_url=service.address, timeout=PATIENCE) as client:
            ana = Caller(client, SigningKeys(seeds(KEY)))
            first = await ana.create("before")
            transaction = operator.transaction()
            await transaction.start()
            # A row that the write would make in its middle, or has to change at its end, belongs to somebody else.
            await operator.execute(
                "INSERT INTO tasks (user_id, id, title) VALUES ($1, $2, 'other')", ana.id, ids[MANY // 2]
            )
            await operator.execute("UPDATE tasks SET title = 'held' WHERE id = $1", first["id"])
            if how == "import":
                body = b"".join(json.dumps({"id": one, "title": "new"}).encode() + b"\n" for one in ids)
                headers = {"content-type": "application/x-ndjson"}
                asked = ana("POST", f"{TASKS}/import", content=body, headers=headers)
            elif how == "batch":
                operations: list[dict[str, Any]] = [
                    {"op": "create", "task": {"title": "new"}} for _ in range(99)
                ]
                operations.append({"op": "update", "id": first["id"], "task": {"title": "new"}})
                asked = ana("POST", f"{TASKS}/batch", json={"operations": operations})
            else:
                asked = ana("PATCH", f"{TASKS}/{first['id']}", json={"title": "new"})
            write = asyncio.create_task(asked)
            while not await operator.fetchval(
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND database IS NOT DISTINCT FROM database"
            ):
                assert not write.done(), (await write).text
                await asyncio.sleep(0.02)
            os.kill(service.pid, signal.SIGTERM)
            answer = await write
            await transaction.rollback()
            assert answer.status_code in (503, 504)
            deadline = time.monotonic() + PATIENCE
            others = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()"
            while await operator.fetchval(others, name):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            await eventually(lambda: '"cancelled":true' in service.log, lambda: service.log)
    new = await operator.fetchval("SELECT count(*) FROM tasks WHERE title = 'new'")
    await operator.close()
    whole = {"import": MANY, "batch": 100, "one": 1}[how]
    # 503 says that nothing was written; 504 that it may have been, as a whole.
    assert new in ((0,) if answer.status_code == 503 else (0, whole))
