"""The benchmark's own promises: what it counts, what it compares, and that nobody's stall hides."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks import crowd, picture, report
from benchmarks.clocks import cpu_seconds, family
from benchmarks.load import COUNTED, Plan, run
from benchmarks.measuring import RESULTS
from benchmarks.profiling import layer_of
from benchmarks.statements import statements

REQUEST = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


def sample(server: str, number: int, **figures: float) -> dict[str, Any]:
    return {"server": server, "operation": "read", "way": "32", "round": number, **figures}


def test_a_ratio_is_of_pairs_from_the_same_round() -> None:
    # The machine was half as fast in the second round: the medians of each alone would say 1.5.
    samples = [
        sample("ours", 0, server_us=100.0),
        sample("ours", 1, server_us=200.0),
        sample("ours", 2, server_us=300.0),
        sample("floor", 0, server_us=50.0),
        sample("floor", 1, server_us=100.0),
        sample("floor", 2, server_us=100.0),
    ]
    assert report.ratios(samples, "server_us", "floor", operation="read", way="32") == (2.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("found", "at_least", "word"),
    [(1.5, False, "met"), (1.51, False, "missed"), (1.5, True, "met"), (1.49, True, "missed")],
)
def test_a_target_is_met_by_the_median_that_reaches_it(found: float, at_least: bool, word: str) -> None:
    said = report.verdict("CPU", report.Spread(found, 0.0, 9.0), 1.5, at_least=at_least)
    assert said[-1] == word


@contextmanager
def answering(status: bytes, stall_at: int, seconds: float) -> Iterator[tuple[int, list[bytes]]]:
    """A server in a thread that answers every request, and stands still once for all of them."""
    seen: list[bytes] = []
    transports: list[Any] = []

    class Server(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            transports.append(transport)

        def data_received(self, data: bytes) -> None:
            seen.append(data)
            if len(seen) == stall_at:
                time.sleep(seconds)
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\n{}")

    ready: queue.Queue[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = queue.Queue()

    async def serve() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        server = await loop.create_server(Server, "127.0.0.1", 0)
        ready.put((loop, stop, server.sockets[0].getsockname()[1]))
        await stop.wait()
        server.close()
        for transport in transports:
            # What is still to be sent is for nobody: closing would wait for it, and the loop ends here.
            transport.abort()
        await asyncio.sleep(0.05)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    loop, stop, port = ready.get(timeout=30)
    try:
        yield port, seen
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def plan(port: int, **changes: Any) -> Plan:
    usual: dict[str, Any] = {
        "requests": [REQUEST],
        "status": 200,
        "connections": 2,
        "seconds": 1.0,
        "rate": None,
        "warm_up_seconds": 0.0,
        "warm_up_requests": 0,
        "first_number": 0,
        "seed": 1,
    }
    return Plan(port=port, server=os.getpid(), database=os.getpid(), **{**usual, **changes})


def test_at_a_fixed_rate_a_stall_is_met_by_every_request_that_was_due_in_it() -> None:
    with answering(b"200 OK", stall_at=20, seconds=0.5) as (port, _):
        window = run(plan(port, rate=200.0))
    # A closed loop of two connections would have met it twice. A hundred were due while it lasted.
    assert len([seconds for seconds in window.latencies if seconds > 0.2]) > 20
    assert len(window.latencies) + sum(window.errors.values()) == 200


def test_of_a_crowd_each_is_served_or_refused_or_leaves_when_it_takes_too_long() -> None:
    asked = {"rate": 100.0, "connections": 50}
    with answering(b"200 OK", stall_at=0, seconds=0) as (port, _):
        served = crowd.run(plan(port, **asked), 60.0, None)
    assert served.served
    assert served.health
    assert not (served.refused)
    assert not (served.gave_up)
    assert not (served.errors)
    with answering(b"503 No\r\nRetry-After: 1", stall_at=0, seconds=0) as (port, _):
        refused = crowd.run(plan(port, **asked), 60.0, None)
    assert refused.refused
    assert not refused.served
    # Whoever was refused rests with his connection, so there are not enough for everybody.
    assert refused.unheard
    with answering(b"200 OK", stall_at=30, seconds=0.7) as (port, _):
        stalled = crowd.run(plan(port, **asked), 0.1, None)
    assert stalled.gave_up


def test_a_wrong_status_is_an_error_and_no_request_that_was_served() -> None:
    with answering(b"500 No", stall_at=0, seconds=0) as (port, _):
        window = run(plan(port, seconds=0.1))
    assert window.latencies == []
    assert window.errors["500"] == sum(window.errors.values()) > 0


def test_a_request_that_has_to_be_new_is_never_sent_twice() -> None:
    with answering(b"200 OK", stall_at=0, seconds=0) as (port, seen):
        run(plan(port, seconds=0.1, requests=[b"GET /" + COUNTED + b" HTTP/1.1\r\n\r\n"]))
    assert len(set(seen)) == len(seen) > 1


def test_the_cpu_of_a_process_is_counted_and_its_sleep_is_not() -> None:
    before = cpu_seconds(os.getpid())
    time.sleep(0.2)
    between = cpu_seconds(os.getpid())
    while time.process_time() < 0.1 + between:
        pass
    after = cpu_seconds(os.getpid())
    assert after - between >= 0.1
    assert between >= before
    assert family(os.getpid())[0] == os.getpid()


def test_what_is_shown_was_worked_out_from_the_samples() -> None:
    result = json.loads((RESULTS / "results.json").read_text())
    assert (RESULTS / "results.txt").read_text() == report.text(result)
    assert (RESULTS / "picture.svg").read_text() == picture.draw(result)


def test_a_sample_of_the_stack_belongs_to_the_innermost_layer_that_is_known() -> None:
    stack = "main (src/server/worker.py:1);app (fastapi/routing.py:2);row (src/services/database.py:3)"
    assert layer_of(stack) == "database, pool"
    assert layer_of(f"{stack};fetchrow (asyncpg/connection.py:4);encode (json/encoder.py:5)") == "asyncpg"
    assert layer_of("something (else.py:1)") == "other"


def test_every_parameter_of_a_statement_is_given_to_pgbench() -> None:
    for sql in statements().values():
        assert not re.search(r"\$\d", sql)
        # What pgbench would take for a variable is one.
        assert set(re.findall(r"(?<!:):([A-Za-z]\w*)", sql)) <= {"n", "i"}
