"""Two workers as they are deployed, on a real PostgreSQL, while one of them is killed or stopped in mid-write.

P1 and P2 of docs/reliability.md, and that the metrics tell one truth however many workers there are and were.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import asyncpg
import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from asking import TASKS, Caller, Served, served
from conftest import Administrator
from postgres_server import PostgresServer
from src.config.settings import load_settings
from src.embedded.roles import APPLICATION
from src.services.signing import SigningKeys, new_key, seeds
from waiting import eventually

KEY = new_key()
if TYPE_CHECKING:
    Operator = asyncpg.Connection[asyncpg.Record]


@pytest.fixture(scope="module")
def own_database(postgres: PostgresServer, administrator: Administrator, template: str) -> Iterator[str]:
    """The name of a migrated database for the whole module: each test brings a person who never existed before."""
    name = f"test_{uuid4().hex[:16]}"
    administrator.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    yield name
    administrator.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture(scope="module")
def service(postgres: PostgresServer, own_database: str) -> Iterator[Served]:
    """Who waits for a lock here does so for as long as the test wants."""
    with served(
        database_url=postgres.url_for(own_database, role=APPLICATION),
        database_migration_url=postgres.url_for(own_database),
        database_lock_timeout_seconds="60",
        database_statement_timeout_seconds="70",
        database_command_timeout_seconds="75",
        database_pool_timeout_seconds="60",
        signing_keys=KEY,
        workers="2",
        drain_grace_seconds="0",
        log_level="debug",
    ) as started:
        yield started


@pytest.fixture
async def operator(postgres: PostgresServer, own_database: str) -> AsyncIterator[Operator]:
    connection = await asyncpg.connect(postgres.url_for(own_database))
    yield connection
    await connection.close()


@pytest.fixture
async def ana(service: Served) -> AsyncIterator[Caller]:
    """Somebody each of whose requests comes on a connection of its own, and so meets either worker."""
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=service.address, timeout=80, limits=limits) as client:
        await eventually(lambda: two_are_there(client), lambda: service.log)
        yield Caller(client, SigningKeys(seeds(KEY)))


async def two_are_there(client: httpx.AsyncClient) -> bool:
    """Whether two workers serve, and nobody else is counted who has fallen."""
    seen = await figures(client)
    return (
        seen["groundwork_pool_size"] == 2 * load_settings().database_pool_size
        and seen["groundwork_ready"] == 1
    )


async def kill(service: Served, worker: int, client: httpx.AsyncClient) -> None:
    """Kills this worker, and returns once there are two again."""
    os.kill(worker, signal.SIGKILL)
    await is_replaced(service, worker, client)


async def is_replaced(service: Served, worker: int, client: httpx.AsyncClient) -> None:
    """Returns once there are two without this one, and what it had open is counted no more."""

    async def replaced() -> bool:
        return worker not in workers(service) and len(workers(service)) == 2 and await two_are_there(client)

    await eventually(replaced, lambda: service.log)


def workers(service: Served) -> set[int]:
    found: set[int] = set()
    for child in psutil.Process(service.pid).children():
        # It may end between being found and being asked.
        with suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.add(child.pid)
    return found


async def one_that_waits(operator: Operator) -> int:
    """A worker whose statement waits for a lock: PostgreSQL knows its port, and the kernel whose port that is."""
    ports: set[int] = set()

    async def somebody_does() -> bool:
        await operator.execute("SELECT pg_stat_clear_snapshot()")  # A transaction looks only once otherwise.
        waiting = await operator.fetch(
            "SELECT client_port FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
            "AND backend_type = 'client backend' AND datname = current_database()"
        )
        ports.update(row["client_port"] for row in waiting)
        return bool(ports)

    await eventually(somebody_does, lambda: "nobody waits")
    (pid,) = {
        each.pid
        for each in psutil.net_connections("tcp4")
        if each.pid and each.laddr and each.laddr.port in ports
    } - {os.getpid()}
    return pid


@asynccontextmanager
async def key_taken(operator: Operator, caller: Caller, key: str) -> AsyncIterator[None]:
    """Inside, whoever brings this key waits in the middle of its statement for what becomes of another's."""
    transaction = operator.transaction()
    await transaction.start()
    await operator.execute(
        "INSERT INTO idempotency_keys (user_id, key, request_hash, status) "
        "VALUES ($1, $2, decode(repeat('00', 32), 'hex'), 201)",
        caller.id,
        key,
    )
    try:
        yield
    finally:
        await transaction.rollback()


async def stored(operator: Operator, caller: Caller) -> list[str]:
    rows = await operator.fetch("SELECT title FROM tasks WHERE user_id = $1 ORDER BY title", caller.id)
    return [row["title"] for row in rows]


async def resolved(caller: Caller, title: str, patience: float = 20.0) -> dict[str, Any]:
    """Creates a task as a careful client does: whatever happens, the same key is sent until there is an answer."""
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline, f"{title} was never resolved"
        try:
            async with asyncio.timeout(patience):
                answer = await caller("POST", json={"title": title}, headers={"idempotency-key": title})
        except (httpx.TransportError, TimeoutError):
            continue
        if answer.status_code == 201:
            made: dict[str, Any] = answer.json()
            return made
        assert answer.status_code in (503, 504), answer.text
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("fate", ["committed", "rolled back"])
async def test_p1_a_worker_killed_in_mid_write_is_replaced_and_the_key_resolves_what_it_did(
    service: Served, ana: Caller, operator: Operator, fate: str
) -> None:
    """Killed while PostgreSQL holds its statement up: the worker never learns what became of it, nor its client."""
    await ana.create("before")
    async with key_taken(operator, ana, "once"):
        asked = asyncio.create_task(ana("POST", json={"title": "once"}, headers={"idempotency-key": "once"}))
        killed = await one_that_waits(operator)
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            await asked
        # The other one goes on meanwhile, and the supervisor makes the two whole again.
        for _ in range(20):
            assert [task["title"] for task in await ana.all()] == ["before"]
        await is_replaced(service, killed, ana.client)
        if fate == "rolled back":
            await operator.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE wait_event_type = 'Lock' AND datname = current_database()"
            )
    expected = {"committed": ["before", "once"], "rolled back": ["before"]}[fate]

    async def settled() -> bool:
        return await stored(operator, ana) == expected

    # Nobody was told: only PostgreSQL knows whether it was done. The same key asks, and does it if it was not.
    await eventually(settled, lambda: fate)
    answer = await ana("POST", json={"title": "once"}, headers={"idempotency-key": "once"}, expect=201)
    assert ("idempotency-replayed" in answer.headers) == (fate == "committed")
    assert await stored(operator, ana) == ["before", "once"]
    assert '"reason":"killed by SIGKILL"' in service.log


async def test_p1_workers_killed_one_after_the_other_under_load_lose_and_double_nothing(
    service: Served, ana: Caller, operator: Operator
) -> None:
    done = asyncio.Event()
    acknowledged: dict[str, str] = {}

    async def create() -> None:
        while not done.is_set():
            title = uuid4().hex
            acknowledged[title] = (await resolved(ana, title))["id"]

    clients = [asyncio.create_task(create()) for _ in range(8)]
    for _ in range(3):
        before = len(acknowledged)
        while len(acknowledged) < before + 40:
            await asyncio.sleep(0.01)
        await kill(service, min(workers(service)), ana.client)
    done.set()
    await asyncio.gather(*clients)
    rows = await operator.fetch("SELECT title, id FROM tasks WHERE user_id = $1", ana.id)
    assert sorted((row["title"], str(row["id"])) for row in rows) == sorted(acknowledged.items())


async def test_p2_a_worker_stopped_for_five_seconds_has_no_effect_on_the_data(
    service: Served, ana: Caller, operator: Operator
) -> None:
    done = asyncio.Event()
    acknowledged: dict[str, str] = {}
    shared = await ana.create("0")
    changes = [shared["version"]]

    async def create() -> None:
        while not done.is_set():
            title = uuid4().hex
            # Less patient than the stop is long: the same key is on its way twice.
            acknowledged[title] = (await resolved(ana, title, patience=2.0))["id"]

    async def change() -> None:
        """Each change names the version that it has seen; 412 says that another was faster, or we ourselves."""
        while not done.is_set():
            seen = await ana("GET", f"{TASKS}/{shared['id']}", expect=(200, 503))
            if seen.status_code == 503:
                continue
            title = str(int(seen.json()["title"]) + 1)
            answer = await ana(
                "PATCH",
                f"{TASKS}/{shared['id']}",
                json={"title": title},
                headers={"if-match": seen.headers["etag"]},
                expect=(200, 412, 503, 504),
            )
            if answer.status_code == 200:
                changes.append(answer.json()["version"])

    async with key_taken(operator, ana, "first"):
        first = asyncio.create_task(resolved(ana, "first", patience=2.0))
        frozen = await one_that_waits(operator)
        os.kill(frozen, signal.SIGSTOP)
    clients = [asyncio.create_task(work()) for work in (*[create] * 6, *[change] * 3)]
    try:
        await asyncio.sleep(5)
        await eventually(lambda: len(acknowledged) > 20)  # By the other one.
    finally:
        os.kill(frozen, signal.SIGCONT)
    acknowledged["first"] = (await first)["id"]
    before = len(acknowledged)
    while len(acknowledged) < before + 40:
        await asyncio.sleep(0.01)
    done.set()
    await asyncio.gather(*clients)
    rows = await operator.fetch("SELECT title, id, version FROM tasks WHERE user_id = $1", ana.id)
    found = {str(row["id"]): row for row in rows}
    counted = found.pop(shared["id"])
    # Each step was made once, on what was there: no version was given twice, and none was passed over.
    assert len(set(changes)) == len(changes)
    assert int(counted["title"]) == counted["version"] - 1
    assert set(changes) <= set(range(1, counted["version"] + 1))
    assert sorted((row["title"], each) for each, row in found.items()) == sorted(acknowledged.items())
    # Nobody took it for dead.
    assert frozen in workers(service)


# Metrics


async def figures(client: httpx.AsyncClient) -> dict[str, float]:
    """Each series' value, under its name and the values of its labels."""
    try:
        text = (await client.get("/metrics")).text
    except httpx.TransportError:  # Of a worker that is being killed.
        return await figures(client)
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def reads(seen: dict[str, float]) -> float:
    """How many single tasks were read with success."""
    return sum(
        value
        for name, value in seen.items()
        if name.split()[0] == "http_requests_total"
        and {"GET", f"{TASKS}/{{task_id}}", "200"} <= set(name.split())
    )


async def are_counted(client: httpx.AsyncClient, goal: float) -> None:
    """Returns once so many reads are counted, whichever worker is asked: each counts what it has answered already."""

    async def all_of_them() -> bool:
        return reads(await figures(client)) >= goal

    await eventually(all_of_them)
    assert {reads(await figures(client)) for _ in range(10)} == {goal}


async def test_metrics_are_the_sum_of_both_workers_and_keep_what_a_killed_one_counted(
    service: Served, ana: Caller
) -> None:
    path = f"{TASKS}/{(await ana.create())['id']}"
    before = reads(await figures(ana.client))

    async def read_sixty() -> None:
        await asyncio.gather(*(ana("GET", path, expect=200) for _ in range(60)))

    await read_sixty()
    await are_counted(ana.client, before + 60)
    for times in (2, 3):
        await kill(service, min(workers(service)), ana.client)
        await read_sixty()
        await are_counted(ana.client, before + 60 * times)

    async def at_rest() -> bool:
        seen = await figures(ana.client)
        return (seen["groundwork_health_state up"], seen["groundwork_pool_in_use"]) == (2, 0)

    # What is open now is the living ones': the dead have left no connection behind in the sums.
    await eventually(at_rest)
    seen = await figures(ana.client)
    assert (
        seen["groundwork_pool_open"] <= seen["groundwork_pool_size"] == 2 * load_settings().database_pool_size
    )
