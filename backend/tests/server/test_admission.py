"""The door: who would be served too late is turned away before any work, and who has left is not worked for.

What is asserted is who begins, in which order, and who is told what; never how fast.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from speaking import Server, serving
from src.api import problems
from src.api.cors import Cors
from src.server.admission import (
    MAX_POOL_WAITERS_PER_CONNECTION,
    MAX_STARTS_PER_TURN,
    AdmissionController,
)
from src.services.line import Forsaken, Line

GET = b"GET /v1/tasks HTTP/1.1\r\nHost: a\r\n"


def controller(queue: Line | None = None, *, in_progress: int = 0, most: int = 10_000, timeout: float = 60.0):
    return AdmissionController(lambda: in_progress, most, timeout, queue)


def request(path: str = "/v1/tasks") -> Any:
    return SimpleNamespace(disconnected=False, scope={"path": path})


def come(
    to: AdmissionController, begun: list[int], numbers: range, work: Callable[[], object] | None = None
) -> list[Any]:
    """One request for each number, which is noted in `begun` when it begins."""

    def start(number: int) -> Callable[[], None]:
        def begin() -> None:
            begun.append(number)
            if work is not None:
                work()

        return begin

    came = [(request(), start(number)) for number in numbers]
    for one, begin in came:
        if to.try_start():
            begin()
        else:
            to.enqueue(one, begin)
    return [one for one, _ in came]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0)


async def test_few_requests_begin_in_one_turn_of_the_loop_and_the_others_in_the_order_of_arrival() -> None:
    begun = list[int]()
    came = MAX_STARTS_PER_TURN * 3 + 5
    come(controller(), begun, range(came))
    turns = [len(begun)]
    while len(begun) < came:
        await asyncio.sleep(0)
        turns.append(len(begun))
    assert begun == list(range(came))
    assert (
        max(after - before for before, after in zip([0, *turns], turns, strict=False)) <= MAX_STARTS_PER_TURN
    )


async def test_nothing_begins_while_enough_stand_in_the_line_and_each_that_leaves_lets_one_begin() -> None:
    line, begun = Line(2, 60), list[int]()
    await line.enter(60)
    await line.enter(60)
    most = MAX_POOL_WAITERS_PER_CONNECTION * line.places
    standing = [asyncio.create_task(line.enter(60)) for _ in range(most)]
    await asyncio.sleep(0)
    come(controller(line), begun, range(5))
    for _ in range(20):
        await asyncio.sleep(0)
    assert begun == []
    line.leave()
    await until(lambda: bool(begun))
    for _ in range(20):
        await asyncio.sleep(0)
    # Nobody stepped into the line, so one place there is free for each turn: it is the door's to fill.
    assert begun[0] == 0
    for _ in range(most + 1):
        line.leave()
        await asyncio.sleep(0)
    await until(lambda: len(begun) == 5)
    assert begun == list(range(5))
    await asyncio.gather(*standing)


async def test_a_request_whose_client_has_left_is_never_begun() -> None:
    begun = list[int]()
    came = come(controller(), begun, range(MAX_STARTS_PER_TURN * 2))
    for one in came[MAX_STARTS_PER_TURN::2]:
        one.disconnected = True
    await until(lambda: len(begun) == MAX_STARTS_PER_TURN * 3 // 2)
    for _ in range(20):
        await asyncio.sleep(0)
    assert begun == [*range(MAX_STARTS_PER_TURN), *range(MAX_STARTS_PER_TURN + 1, MAX_STARTS_PER_TURN * 2, 2)]


async def test_the_door_closes_where_the_wait_would_take_half_of_the_patience_and_opens_again() -> None:
    begun = list[int]()
    one = controller(timeout=1.0)
    come(one, begun, range(MAX_STARTS_PER_TURN * 10), work=lambda: time.sleep(0.005))
    assert not one.is_overloaded(), "a burst is not judged by its first steps"
    async with asyncio.timeout(60):
        while not one.is_overloaded():
            # Five milliseconds each, and more come than begin: whoever comes now would wait for a second and more.
            come(one, begun, range(MAX_STARTS_PER_TURN), work=lambda: time.sleep(0.005))
            await asyncio.sleep(0)
    await until(lambda: not one.is_overloaded())


async def test_requests_in_progress_at_the_limit_are_overload() -> None:
    assert controller(in_progress=3, most=3).is_overloaded()
    assert not controller(in_progress=2, most=3).is_overloaded()


# Over sockets


class Closed:
    """An application that answers nothing until it is let go; one such request closes the door for others."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.asked: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope["path"])
        if scope["path"] != "/livez":
            await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


async def fill(server: Server, app: Closed) -> Any:
    busy = await server.line()
    await busy.say(GET + b"\r\n")
    await until(lambda: bool(app.asked))
    return busy


async def test_r4_who_is_turned_away_at_the_door_is_told_as_the_application_would_and_is_counted() -> None:
    app = Closed()
    more = {"cors": Cors(["https://app.example.com"])}
    async with serving(app, more=more, max_concurrent_requests=1) as server:
        busy = await fill(server, app)
        line = await server.line()
        await line.say(GET + b"X-Request-ID: mine\r\nOrigin: https://app.example.com\r\n\r\n")
        status, headers, body = await line.answer()
        problem = problems.Problem.model_validate_json(body)
        assert (status, problem.type, problem.status) == (503, "/problems/overloaded", 503)
        assert problem.request_id == headers["x-request-id"] == "mine"
        assert headers["retry-after"] == "1"
        assert headers["content-type"] == "application/problem+json"
        assert headers["access-control-allow-origin"] == "https://app.example.com"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["connection"] == "keep-alive"
        told = set()
        for _ in range(5):
            other = await server.line()
            await other.say(GET + b'X-Request-ID: "}\r\n\r\n')
            _, headers, body = await other.answer()
            assert problems.Problem.model_validate_json(body).request_id == headers["x-request-id"]
            told.add(headers["x-request-id"])
        assert len(told) == 5
        probe = await server.line()
        await probe.say(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await probe.answer())[0] == 200
        assert app.asked == ["/v1/tasks", "/livez"]
        labels = {"method": "GET", "route": "unmatched", "status": "503"}
        assert server.metrics.registry.get_sample_value("http_requests_total", labels) == 6
        app.go.set()
        assert (await busy.answer())[0] == 200
        # Each of them may ask again, on the connection that he has.
        await line.say(GET + b"\r\n")
        assert (await line.answer())[0] == 200


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/tasks HTTP/1.1\r\nHost: a\r\nContent-Length: 60000\r\n\r\n",
        b"POST /v1/tasks HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/tasks HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n",
        GET + b"Connection: close\r\n\r\n",
        b"GET /v1/tasks HTTP/1.0\r\n\r\n",
    ],
    ids=["long body", "chunks", "waits to be asked", "close", "1.0"],
)
async def test_r4_a_connection_that_cannot_go_on_is_told_so_and_ends_when_it_is_turned_away(
    head: bytes,
) -> None:
    app = Closed()
    async with serving(app, max_concurrent_requests=1) as server:
        await fill(server, app)
        line = await server.line()
        await line.say(head)
        ((status, headers, _),) = await line.answers()
        assert (status, headers["connection"]) == (503, "close")
        assert len(app.asked) == 1
        app.go.set()


async def test_r4_a_short_body_that_is_turned_away_is_read_past_and_the_next_request_is_answered() -> None:
    app = Closed()
    async with serving(app, max_concurrent_requests=1) as server:
        busy = await fill(server, app)
        line = await server.line()
        await line.say(b"POST /v1/tasks HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n12345")
        assert (await line.answer())[0] == 503
        app.go.set()
        assert (await busy.answer())[0] == 200
        await line.say(b"HEAD /v1/tasks HTTP/1.1\r\nHost: a\r\n\r\n")
        await line.say(b"HEAD /v1/tasks HTTP/1.1\r\nHost: a\r\n\r\n")
        for _ in range(2):
            assert (await line.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        assert app.asked == ["/v1/tasks"] * 3


async def test_r4_who_is_turned_away_while_he_asks_for_a_head_gets_no_body() -> None:
    app = Closed()
    async with serving(app, max_concurrent_requests=1) as server:
        await fill(server, app)
        line = await server.line()
        await line.say(b"HEAD /v1/tasks HTTP/1.1\r\nHost: a\r\n\r\n")
        head = await line.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        app.go.set()
        await line.say(GET + b"\r\n")
        assert (await line.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


async def test_r4_a_pipelined_request_is_never_answered_before_the_one_in_front_of_it() -> None:
    app = Closed()
    async with serving(app, max_concurrent_requests=1) as server:
        busy = await fill(server, app)
        await busy.say(GET + b"\r\n")
        await asyncio.sleep(0.1)
        app.go.set()
        assert [(await busy.answer())[0] for _ in range(2)] == [200, 200]


async def test_r4_whose_client_hangs_up_while_he_stands_in_the_line_does_not_take_a_turn() -> None:
    line = Line(1, 60)
    outcomes = list[str]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await line.enter(60)
        except Forsaken:
            outcomes.append("forsaken")
        else:
            outcomes.append("served")
            line.leave()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    await line.enter(60)
    async with serving(app, more={"database": SimpleNamespace(line=line)}) as server:
        leaving, staying = await server.line(), await server.line()
        for one in (leaving, staying):
            await one.say(GET + b"\r\n")
        await until(lambda: line.waiting == 2)
        leaving.writer.close()
        await until(lambda: outcomes == ["forsaken"])
        line.leave()
        assert (await staying.answer())[0] == 200
    assert outcomes == ["forsaken", "served"]


async def test_retry_after_grows_with_the_rate_of_refusals_and_falls_again() -> None:
    one = controller()
    assert one.retry_after_seconds == 1
    async with asyncio.timeout(60):
        while one.retry_after_seconds == 1:
            for _ in range(2_000):
                one.record_refusal()
            await asyncio.sleep(0.1)
        assert one.retry_after_seconds <= 8
        # A client that is refused alone a while later is told a second again.
        while one.retry_after_seconds > 1:
            await asyncio.sleep(1.05)
            one.record_refusal()


async def test_request_that_fails_or_whose_client_disconnects_makes_room_for_the_next() -> None:
    inside = list[str]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/boom":
            raise RuntimeError("broken on purpose")
        inside.append(scope["path"])
        await receive()
        await receive()

    async with serving(app, max_concurrent_requests=1) as server:
        for number in range(1, 4):
            broken = await server.line()
            await broken.say(b"GET /boom HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await broken.answer())[0] == 500
            slow = await server.line()
            await slow.say(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
            await until(lambda number=number: len(inside) == number)
            refused = await server.line()
            await refused.say(GET + b"\r\n")
            assert (await refused.answer())[0] == 503
            slow.writer.transport.abort()
            await until(lambda: not server.state.tasks)
