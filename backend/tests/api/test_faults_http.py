"""What the database, the network and the crowd can do, and what then is answered over HTTP. Every fault is caused.

The rows are those of docs/reliability.md. `asking.hold` looks at every answer: its form, and that Retry-After stands
where a repeat is safe and nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from asking import TASKS, Caller, people, problem, served
from clusters import Proxy
from postgres_server import PostgresServer
from src.config.database import parse
from src.config.settings import load_settings
from src.embedded.roles import APPLICATION
from src.services import schema
from src.services.signing import SigningKeys
from waiting import eventually

if TYPE_CHECKING:
    from tests.api.conftest import Log, MakeApp, Serve

    Operator = asyncpg.Connection[asyncpg.Record]


# Impatient, so that the tests are quick; the promises are written in terms of these.
QUICK = {
    "database_pool_size": 3,
    "database_pool_timeout_seconds": 0.6,
    "database_command_timeout_seconds": 2.5,
    "database_statement_timeout_seconds": 2.0,
    "database_lock_timeout_seconds": 0.5,
    "database_recovery_wait_seconds": 1.0,
}
# Patient, for what is promised to succeed however long a busy machine takes, and for whom a test wants to see waiting.
PATIENT = {
    "database_pool_timeout_seconds": 60.0,
    "database_command_timeout_seconds": 60.0,
    "database_statement_timeout_seconds": 50.0,
    "database_lock_timeout_seconds": 40.0,
    "database_recovery_wait_seconds": 50.0,
}


@asynccontextmanager
async def beside(database_url: str) -> AsyncIterator[Operator]:
    """A connection beside the service, as the owner of the tables."""
    connection = await asyncpg.connect(database_url)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def operator(database_url: str) -> AsyncIterator[Operator]:
    async with beside(database_url) as connection:
        yield connection


@pytest.fixture
def quick(make_app: MakeApp, app_database_url: str, database_url: str) -> FastAPI:
    return make_app(database_url=app_database_url, database_migration_url=database_url, **QUICK)


@pytest.fixture
async def ana(quick: FastAPI, serve: Serve) -> AsyncIterator[Caller]:
    async with people(serve, quick) as (opened, _):
        yield opened


@pytest.fixture
async def proxied(
    proxy: Proxy, make_app: MakeApp, serve: Serve, app_database_url: str, database_url: str
) -> AsyncIterator[Caller]:
    """Somebody in front of a service whose way to the database is the proxy."""
    app = make_app(
        database_url=proxy.through(app_database_url),
        database_migration_url=database_url,
        **{**QUICK, "database_pool_size": 1, "database_recovery_wait_seconds": 10.0},
        health_probes="passive",
    )
    async with people(serve, app) as (opened, _):
        # A connection's first use of a statement prepares it, and what is lost then was never done.
        for verb, path, more in WRITES:
            made = await opened("POST", json={"title": "warm"}, expect=201)
            await opened(verb, path.format(id=made.json()["id"]), **more, expect=(200, 201, 204))
        for task in await opened.all():
            await opened("DELETE", f"{TASKS}/{task['id']}", expect=204)
        yield opened


WRITES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", TASKS, {"json": {"title": "changed"}}),
    ("POST", TASKS, {"json": {"title": "changed"}, "headers": {"idempotency-key": "warm"}}),
    ("PATCH", TASKS + "/{id}", {"json": {"title": "changed"}}),
    ("PUT", TASKS + "/{id}", {"json": {"title": "changed"}}),
    ("DELETE", TASKS + "/{id}", {}),
]


async def waiting(operator: Operator, count: int = 1) -> None:
    """Returns once this many of the service's connections wait for a lock."""

    async def they_do() -> bool:
        await operator.execute("SELECT pg_stat_clear_snapshot()")  # A transaction looks only once otherwise.
        return (
            await operator.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
                "AND datname = current_database() AND pid <> pg_backend_pid()"
            )
            >= count
        )

    await eventually(they_do)


async def stored(operator: Operator, caller: Caller) -> list[str]:
    rows = await operator.fetch("SELECT title FROM tasks WHERE user_id = $1 ORDER BY title", caller.id)
    return [row["title"] for row in rows]


def is_unavailable(answer: httpx.Response, slug: str = "unavailable") -> None:
    assert answer.status_code == 503, answer.text
    assert problem(answer) == slug
    text = answer.text.lower()
    assert not any(
        word in text for word in ("tasks", "select", "update ", "postgres", "asyncpg", "permission")
    )


# Concurrency


async def test_x2_one_key_a_hundred_times_at_once_is_one_row_and_one_answer(
    operator: Operator, make_app: MakeApp, serve: Serve, app_database_url: str, database_url: str
) -> None:
    app = make_app(database_url=app_database_url, database_migration_url=database_url, **PATIENT)
    async with people(serve, app) as (bo, cy):
        keyed = {"idempotency-key": "one-key"}
        body = {"title": "once", "description": "é"}
        answers = await asyncio.gather(
            *(bo("POST", json=body, headers=keyed, expect=201) for _ in range(100))
        )
        assert (
            len({(answer.text, answer.headers["etag"], answer.headers["location"]) for answer in answers})
            == 1
        )
        assert sum(answer.headers.get("idempotency-replayed") == "true" for answer in answers) == 99
        assert await stored(operator, bo) == ["once"]

        reused = await bo("POST", json={"title": "another"}, headers=keyed, expect=422)
        assert problem(reused) == "idempotency-key-reused"
        # The same key of somebody else is another key.
        theirs = await cy("POST", json={"title": "theirs"}, headers=keyed, expect=201)
        assert "idempotency-replayed" not in theirs.headers
        assert await stored(operator, bo) == ["once"]
        assert await stored(operator, cy) == ["theirs"]
        # The answer stays what it was, whatever became of the task.
        await bo("DELETE", answers[0].headers["location"], expect=204)
        again = await bo("POST", json=body, headers=keyed, expect=201)
        assert again.text == answers[0].text
        assert await stored(operator, bo) == []


async def test_x3_of_two_updates_on_one_version_one_is_200_and_one_412(ana: Caller) -> None:
    for _ in range(20):
        made = await ana("POST", json={"title": "a"}, expect=201)
        one = made.headers["location"]
        condition = {"if-match": made.headers["etag"]}
        answers = await asyncio.gather(
            *(ana("PATCH", one, json={"title": title}, headers=condition) for title in ("left", "right"))
        )
        assert sorted(answer.status_code for answer in answers) == [200, 412]
        (winner,) = [answer for answer in answers if answer.status_code == 200]
        assert (await ana("GET", one)).text == winner.text
        assert winner.json()["version"] == 2


# Pool


async def test_l1_an_emptied_pool_is_503_within_its_wait_and_a_bad_token_is_401_at_once(
    operator: Operator, make_app: MakeApp, serve: Serve, app_database_url: str, database_url: str, log: Log
) -> None:
    # Who holds a connection holds it until everybody else has been told.
    bounds = {**PATIENT, "database_lock_timeout_seconds": 4.0, "database_pool_timeout_seconds": 0.6}
    app = make_app(
        database_url=app_database_url, database_migration_url=database_url, database_pool_size=3, **bounds
    )
    async with people(serve, app) as (ana, _):
        await l1(ana, operator, bounds["database_pool_timeout_seconds"], log)


async def l1(ana: Caller, operator: Operator, pool_timeout_seconds: float, log: Log) -> None:
    tasks = [await ana.create(str(number)) for number in range(3)]
    async with operator.transaction():
        await operator.execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
        held = [
            asyncio.create_task(ana("PATCH", f"{TASKS}/{task['id']}", json={"title": "x"})) for task in tasks
        ]
        await waiting(operator, 3)
        start = time.monotonic()
        asked = [asyncio.create_task(ana("GET")) for _ in range(20)]
        await asyncio.sleep(0)
        bad = await ana("GET", headers={"authorization": "Bearer nonsense"}, expect=401)
        assert bad.status_code == 401
        answers = await asyncio.gather(*asked)
        took = time.monotonic() - start
        assert took < pool_timeout_seconds + 4
        for answer in answers:
            is_unavailable(answer, problem(answer))
            assert problem(answer) in ("overloaded", "unavailable")
        assert "overloaded" in {problem(answer) for answer in answers}
        for answer in await asyncio.gather(*held):
            is_unavailable(answer)  # They met the lock's bound.
    assert log.text.count("database.pool_exhausted") <= 1 + int(took)
    assert len(await ana.all()) == 3
    assert await stored(operator, ana) == ["0", "1", "2"]


async def test_l2_a_thousand_clients_that_hang_up_leak_nothing(
    app_database_url: str, database_url: str, operator: Operator
) -> None:
    keys = SigningKeys.from_settings(load_settings())
    bounds = {name: str(seconds) for name, seconds in PATIENT.items()}
    with served(database_url=app_database_url, database_migration_url=database_url, **bounds) as service:
        host, _, port = service.address.removeprefix("http://").partition(":")
        async with httpx.AsyncClient(base_url=service.address, timeout=80) as client:
            ana = Caller(client, keys)
            task = await ana.create("steady")
            body = json.dumps({"title": "by one who left"}).encode()
            common = f"Host: x\r\nAuthorization: {ana.headers['authorization']}\r\n"
            create = f"POST {TASKS} HTTP/1.1\r\n{common}Content-Type: application/json\r\n"
            change = f"PATCH {TASKS}/{task['id']} HTTP/1.1\r\n{common}Content-Type: application/json\r\n"
            whole = f"Content-Length: {len(body)}\r\n\r\n".encode() + body
            said = [
                create.encode() + whole,
                change.encode() + whole,
                create.encode() + whole[:-5],
                f"GET {TASKS}?q=o&count=exact HTTP/1.1\r\n{common}\r\n".encode(),
                create.encode(),
            ]
            slots = asyncio.Semaphore(100)

            async def leave(number: int) -> None:
                async with slots:
                    _, writer = await asyncio.open_connection(host, int(port))
                    writer.write(said[number % len(said)])
                    await writer.drain()
                    await asyncio.sleep((number % 7) / 1000)
                    writer.transport.abort()

            await asyncio.gather(*(leave(number) for number in range(1000)))

            async def calm() -> bool:
                return (
                    await operator.fetchval(
                        "SELECT count(*) FROM pg_stat_activity WHERE usename = $1 AND state <> 'idle' "
                        "AND datname = current_database()",
                        APPLICATION,
                    )
                    == 0
                )

            await eventually(calm)
            # Every connection of the pool is there to be used, and used at once.
            answers = await asyncio.gather(*(ana("GET", f"{TASKS}/{task['id']}") for _ in range(40)))
            assert {answer.status_code for answer in answers} == {200}
            pool = (await client.get("/health")).json()["checks"]
            assert '"in_use": 0' in json.dumps(pool) or '"observedValue": 0' in json.dumps(pool)
            # What was begun was done or not done: each row is whole.
            for found in await ana.all():
                assert found["title"] in ("steady", "by one who left")

        async def no_more_are_open_than_the_pool_has() -> bool:
            open_connections: int = await operator.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE usename = $1 AND datname = current_database()",
                APPLICATION,
            )
            return open_connections <= load_settings().database_pool_size

        # A server's process ends a moment after its connection.
        await eventually(no_more_are_open_than_the_pool_has)
        assert '"level":"error"' not in service.log


# Database


@asynccontextmanager
async def on_own_server(
    server: PostgresServer, make_app: MakeApp, serve: Serve, **settings: Any
) -> AsyncIterator[Caller]:
    await schema.create_tables(parse(server.url))
    name = server.url.rsplit("/", 1)[1]
    app = make_app(
        database_url=server.url_for(name, role=APPLICATION), database_migration_url=server.url, **settings
    )
    async with people(serve, app) as (caller, _):
        yield caller


async def test_d1_an_immediate_restart_under_load_fails_no_read_and_loses_no_acknowledged_write(
    private_postgres: Callable[..., PostgresServer], make_app: MakeApp, serve: Serve
) -> None:
    server = private_postgres()
    async with on_own_server(server, make_app, serve, **PATIENT) as ana:
        task = await ana.create()
        done = asyncio.Event()
        reads: list[int] = []
        acknowledged: list[str] = []
        unknown = 0

        async def read() -> None:
            while not done.is_set():
                for path in (TASKS, f"{TASKS}/{task['id']}"):
                    reads.append((await ana("GET", path)).status_code)
                await asyncio.sleep(0.001)

        async def write() -> None:
            nonlocal unknown
            while not done.is_set():
                key = {"idempotency-key": uuid4().hex}
                for _ in range(100):
                    answer = await ana("POST", json={"title": key["idempotency-key"]}, headers=key)
                    if answer.status_code == 201:
                        acknowledged.append(key["idempotency-key"])
                        break
                    assert answer.status_code in (503, 504)
                    unknown += 1
                    await asyncio.sleep(0.05)
                await asyncio.sleep(0.002)

        workers = [asyncio.create_task(work()) for work in (*[read] * 8, *[write] * 3)]
        await asyncio.sleep(0.3)
        for _ in range(2):
            await asyncio.to_thread(server.stop, "immediate")
            await asyncio.to_thread(server.start)
            before = len(reads)
            while len(reads) < before + 60:
                await asyncio.sleep(0.01)
        done.set()
        await asyncio.gather(*workers)
        assert set(reads) == {200}
        found = sorted(each["title"] for each in await ana.all() if each["id"] != task["id"])
        assert found == sorted(acknowledged)  # Each once, and nothing else.


async def test_d4_a_connection_killed_in_mid_write_is_rolled_back_and_repeated_only_with_a_key(
    operator: Operator, make_app: MakeApp, serve: Serve, app_database_url: str, database_url: str
) -> None:
    app = make_app(database_url=app_database_url, database_migration_url=database_url, **PATIENT)
    async with people(serve, app) as (ana, _):
        await d4(ana, operator, database_url)


async def d4(ana: Caller, operator: Operator, database_url: str) -> None:
    task = await ana.create("before")
    kill = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
        "AND datname = current_database() AND pid <> pg_backend_pid()"
    )
    # A change waits for the row; its connection is ended; it is not sent again.
    async with operator.transaction():
        await operator.execute("SELECT FROM tasks WHERE id = $1 FOR UPDATE", task["id"])
        asked = asyncio.create_task(ana("PATCH", f"{TASKS}/{task['id']}", json={"title": "after"}))
        await waiting(operator)
        await operator.fetchval(kill)
    # The row is free at once: sent again, it would be done.
    answer = await asked
    assert answer.status_code in (503, 504)
    await asyncio.sleep(0.2)
    assert await stored(operator, ana) == ["before"]
    # One with a key waits for another's same key; its connection is ended; it is sent again by itself.
    async with beside(database_url) as blocker, blocker.transaction():
        await blocker.execute("SELECT set_config('app.user_id', $1, true)", str(ana.id))
        await blocker.execute(
            "INSERT INTO idempotency_keys (user_id, key, request_hash, status) "
            "VALUES ($1, 'k', decode(repeat('00', 32), 'hex'), 201)",
            ana.id,
        )
        keyed = {"idempotency-key": "k"}
        asked = asyncio.create_task(ana("POST", json={"title": "with a key"}, headers=keyed))
        await waiting(operator)
        await operator.fetchval(kill)
        await waiting(operator)
        await blocker.execute("DELETE FROM idempotency_keys WHERE key = 'k'")
    answer = await asked
    assert answer.status_code == 201
    assert await stored(operator, ana) == ["before", "with a key"]


async def test_d8_a_read_only_database_is_503_for_writes_while_reads_go_on(
    ana: Caller, operator: Operator
) -> None:
    task = await ana.create("before")
    one = f"{TASKS}/{task['id']}"
    name = await operator.fetchval("SELECT current_database()")

    async def switch(value: str) -> None:
        await operator.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = {value}')
        await operator.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    await switch("on")
    await eventually(lambda: succeeds(ana, one))
    for method, path, more in (
        ("POST", TASKS, {"json": {"title": "x"}}),
        ("POST", TASKS, {"json": {"title": "x"}, "headers": {"idempotency-key": "k"}}),
        ("PATCH", one, {"json": {"title": "x"}}),
        ("PUT", one, {"json": {"title": "x"}}),
        ("DELETE", one, {}),
    ):
        is_unavailable(await ana(method, path, **more), "refused")
    assert len(await ana.all()) == 1
    health = (await ana.client.get("/health")).json()
    assert health["status"] == "warn"
    await switch("off")
    await eventually(lambda: succeeds(ana, one))
    await ana("POST", json={"title": "x"}, headers={"idempotency-key": "k"}, expect=201)
    assert await stored(operator, ana) == ["before", "x"]


async def succeeds(caller: Caller, path: str) -> bool:
    return (await caller("GET", path)).status_code == 200


async def test_d9_a_lock_held_by_another_costs_no_more_than_the_lock_timeout(
    ana: Caller, operator: Operator
) -> None:
    task = await ana.create("before")
    one = f"{TASKS}/{task['id']}"
    async with operator.transaction():
        await operator.execute("SELECT FROM tasks WHERE id = $1 FOR UPDATE", task["id"])
        for method, more in (
            ("PATCH", {"json": {"title": "x"}}),
            ("PUT", {"json": {"title": "x"}}),
            ("DELETE", {}),
        ):
            start = time.monotonic()
            is_unavailable(await ana(method, one, **more))
            assert time.monotonic() - start < QUICK["database_lock_timeout_seconds"] + 4
        await ana("GET", one, expect=200)
    assert await stored(operator, ana) == ["before"]
    await ana("PATCH", one, json={"title": "after"}, expect=200)


async def test_d10_a_deadlock_is_repeated_and_both_succeed(
    make_app: MakeApp, serve: Serve, app_database_url: str, database_url: str, operator: Operator
) -> None:
    # A server looks for deadlocks once in a wait, after so long: the other one has come by then.
    name = await operator.fetchval("SELECT current_database()")
    await operator.execute(f"ALTER DATABASE \"{name}\" SET deadlock_timeout = '3s'")
    app = make_app(database_url=app_database_url, database_migration_url=database_url, **PATIENT)
    async with people(serve, app) as (ana, _):
        first, second = sorted([(await ana.create("a"))["id"], (await ana.create("b"))["id"]])
        # The other one is patient, so that the service's statement is the one that is given up.
        await operator.execute("SET deadlock_timeout = '30s'")
        async with operator.transaction():
            await operator.execute("UPDATE tasks SET title = 'other' WHERE id = $1", second)
            operations = [
                {"op": "update", "id": each, "task": {"title": "batch"}} for each in (first, second)
            ]
            asked = asyncio.create_task(ana("POST", f"{TASKS}/batch", json={"operations": operations}))
            await waiting(operator)
            await operator.execute("UPDATE tasks SET title = 'other' WHERE id = $1", first)
            await asyncio.sleep(0.1)
        answer = await asked
        assert answer.status_code == 200, answer.text
        assert await stored(operator, ana) == ["batch", "batch"]
        assert {task["version"] for task in await ana.all()} == {2}


async def test_d10_a_write_that_cannot_be_serialized_is_repeated_and_then_503(
    ana: Caller, operator: Operator
) -> None:
    task = await ana.create("before")
    one = f"{TASKS}/{task['id']}"
    await operator.execute("CREATE SEQUENCE attempts; GRANT USAGE ON attempts TO PUBLIC")
    await operator.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF nextval('attempts') % 3 <> 0 OR NEW.title = 'never' THEN "
        "RAISE EXCEPTION 'not now' USING ERRCODE = '40001'; END IF; RETURN NEW; END $$"
    )
    await operator.execute(
        "CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    changed = await ana("PATCH", one, json={"title": "after"}, expect=200)
    assert changed.json()["version"] == 2
    assert await operator.fetchval("SELECT last_value FROM attempts") == 3
    start = time.monotonic()
    is_unavailable(await ana("PATCH", one, json={"title": "never"}))
    is_unavailable(await ana("POST", json={"title": "never"}, headers={"idempotency-key": "k"}))
    assert time.monotonic() - start < 20
    assert 5 < await operator.fetchval("SELECT last_value FROM attempts") < 40
    assert await stored(operator, ana) == ["after"]


async def test_d11_a_revoked_right_is_503_and_names_no_table(
    ana: Caller, operator: Operator, log: Log
) -> None:
    task = await ana.create("before")
    one = f"{TASKS}/{task['id']}"
    await operator.execute("REVOKE ALL ON tasks FROM groundwork_app")
    for method, path, more in (
        ("GET", TASKS, {}),
        ("GET", one, {}),
        ("POST", TASKS, {"json": {"title": "x"}}),
        ("PATCH", one, {"json": {"title": "x"}}),
        ("PUT", one, {"json": {"title": "x"}}),
        ("DELETE", one, {}),
    ):
        is_unavailable(await ana(method, path, **more), "refused")
    # The log says which fault it was, so that somebody can mend it.
    assert {event["status"] for event in log.requests if event["route"].startswith(TASKS)} >= {503}
    await operator.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON tasks TO groundwork_app")
    assert await stored(operator, ana) == ["before"]
    await ana("GET", one, expect=200)


# Network


async def test_n5_a_reply_lost_after_the_commit_is_504_and_the_repeat_gives_the_same_id(
    proxied: Caller, proxy: Proxy, operator: Operator
) -> None:
    keyed = {"idempotency-key": "lost"}
    body = {"title": "once"}
    proxy.drop_replies()
    lost = await proxied("POST", json=body, headers=keyed, expect=504)
    assert problem(lost) == "outcome-unknown"
    assert lost.headers["retry-after"]

    async def is_there() -> bool:
        return "once" in await stored(operator, proxied)

    await eventually(is_there)
    proxy.heal()
    await eventually(lambda: succeeds(proxied, TASKS))
    again = await proxied("POST", json=body, headers=keyed, expect=201)
    assert again.headers["idempotency-replayed"] == "true"
    rows = await operator.fetch("SELECT id FROM tasks WHERE user_id = $1 AND title = 'once'", proxied.id)
    assert [str(row["id"]) for row in rows] == [again.json()["id"]]


@pytest.mark.parametrize(
    "write", [write for write in WRITES if "headers" not in write[2]], ids=lambda write: write[0]
)
@pytest.mark.parametrize("way", ["in silence", "by a reset"])
async def test_n5_without_a_key_a_lost_reply_is_504_without_retry_after_and_nothing_is_repeated(
    proxied: Caller, proxy: Proxy, operator: Operator, write: tuple[str, str, dict[str, Any]], way: str
) -> None:
    """Silence uses up all the time there is. A reset leaves enough to do it again, and it is not done."""
    method, path, more = write
    path = path.format(id=(await proxied.create("before"))["id"])
    await operator.execute("CREATE TABLE told (n int); GRANT INSERT ON told TO PUBLIC")
    await operator.execute(
        "CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql "
        "AS $$ BEGIN INSERT INTO told VALUES (1); RETURN NULL; END $$"
    )
    await operator.execute(
        "CREATE TRIGGER tell AFTER INSERT OR UPDATE OR DELETE ON tasks FOR EACH ROW EXECUTE FUNCTION tell()"
    )
    if way == "in silence":
        proxy.drop_replies()
    else:
        proxy.lose_replies(1)
    answer = await proxied(method, path, **more, expect=504)
    assert problem(answer) == "outcome-unknown"
    proxy.heal()
    await eventually(lambda: succeeds(proxied, TASKS))

    async def was_done() -> bool:
        return bool(await operator.fetchval("SELECT count(*) FROM told"))

    await eventually(was_done)
    await asyncio.sleep(0.3)
    assert await operator.fetchval("SELECT count(*) FROM told") == 1
    expected = {"POST": ["before", "changed"], "PATCH": ["changed"], "PUT": ["changed"], "DELETE": []}
    assert await stored(operator, proxied) == expected[method]


async def test_n5_a_connection_reset_after_a_keyed_commit_is_repeated_by_the_service_itself(
    proxied: Caller, proxy: Proxy, operator: Operator
) -> None:
    proxy.lose_replies(1)
    answer = await proxied("POST", json={"title": "once"}, headers={"idempotency-key": "k"}, expect=201)
    assert await stored(operator, proxied) == ["once"]
    assert answer.json()["id"]


async def test_n5_a_read_whose_reply_is_lost_is_503(proxied: Caller, proxy: Proxy) -> None:
    task = await proxied.create()
    proxy.drop_replies()
    for path in (TASKS, f"{TASKS}/{task['id']}"):
        is_unavailable(await proxied("GET", path))
    proxy.heal()
    await eventually(lambda: succeeds(proxied, TASKS))
