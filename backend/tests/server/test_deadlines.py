"""How long clients may take, on real sockets: the late ones are ended, and nobody else.

The bounds are short here. What is asserted is who is ended, in which way and why; never how fast.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from speaking import Answer, Line, serving
from src.api import problems
from src.server import protocol

SOON = {
    "header_timeout_seconds": 1.0,
    "body_timeout_seconds": 1.0,
    "keep_alive_seconds": 1.0,
    "send_timeout_seconds": 1.0,
    "min_bytes_per_second": 1000,
}
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers the length of the body; `/megabytes` answers sixteen of them at once, `/slow` in its own time."""
    read = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        read += len(message["body"])
        if not message["more_body"]:
            break
    if scope["path"] == "/slow":
        await asyncio.sleep(3)
    body = b"%d" % read if scope["path"] != "/megabytes" else b"x" * (16 << 20)
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def drip(line: Line, sent: bytes, seconds: float) -> list[Answer]:
    """One byte after the other until the server has had enough; gives what it says then."""
    answers = asyncio.create_task(line.answers(60))
    for byte in sent:
        if answers.done():
            break
        line.writer.write(bytes([byte]))
        await asyncio.wait((answers,), timeout=seconds)
    return await answers


def check(received: tuple[int, dict[str, str], bytes]) -> None:
    status, headers, body = received
    assert (status, headers["connection"]) == (408, "close")
    assert problems.Problem.model_validate_json(body).type == "/problems/too-slow"


async def test_r1_a_head_that_comes_byte_by_byte_is_408() -> None:
    async with serving(application, **SOON) as server:
        line = await server.line()
        (received,) = await drip(line, b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 20, 0.05)
        check(received)
        assert server.cut("slow-head") == 1


async def test_r1_a_head_that_stops_half_way_is_408() -> None:
    async with serving(application, **SOON) as server:
        line = await server.line()
        await line.say(b"GET / HTTP/1.1\r\nHos")
        (received,) = await line.answers()
        check(received)


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 60000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nfff0\r\n"]
)
async def test_r1_a_body_that_brings_too_little_is_408(framing: bytes) -> None:
    async with serving(application, **SOON) as server:
        line = await server.line()
        await line.say(POST + framing)
        (received,) = await drip(line, b"x" * 60_000, 0.02)
        check(received)
        assert server.cut("slow-body") == 1


async def test_r1_a_body_that_makes_progress_may_take_many_times_as_long() -> None:
    async with serving(application, **SOON) as server:
        line = await server.line()
        await line.say(POST + b"Content-Length: 50000\r\n\r\n")
        began = time.monotonic()
        for _ in range(50):
            await line.say(b"x" * 1000)
            await asyncio.sleep(0.08)
        assert time.monotonic() - began > 4 * SOON["body_timeout_seconds"] * 0.9
        ((status, _, body),) = await line.answers()
        assert (status, body) == (200, b"50000")


async def test_r1_what_says_nothing_and_what_says_nothing_more_is_closed_without_a_word() -> None:
    async with serving(application, **SOON) as server:
        silent, idle = await server.line(), await server.line()
        await idle.say(GET)
        assert (await idle.answer())[0] == 200
        assert await silent.rest() == await idle.rest() == b""
        assert (server.cut("silent"), server.cut("idle")) == (1, 1)


async def test_r1_a_connection_that_is_used_stays() -> None:
    async with serving(application, **SOON) as server:
        line = await server.line()
        for _ in range(10):
            await line.say(GET)
            assert (await line.answer())[0] == 200
            await asyncio.sleep(0.3)
        assert server.cut("idle") == 0


async def test_r1_who_waits_for_us_is_not_late() -> None:
    async with serving(application, **SOON) as server:
        line = await server.line()
        # The second request is there, and its turn comes late.
        await line.say(GET.replace(b" / ", b" /slow ") + POST + b"Content-Length: 3\r\n\r\nabc")
        assert [(status, body) for status, _, body in await line.answers()] == [(200, b"0"), (200, b"3")]


async def test_r1_who_was_told_to_wait_before_the_body_may_wait() -> None:
    reading = asyncio.Event()

    async def reluctant(scope: Any, receive: Any, send: Any) -> None:
        await reading.wait()
        await application(scope, receive, send)

    streamed = {"streamed_paths": frozenset({"/"})}
    async with serving(reluctant, more=streamed, **SOON) as server:
        line = await server.line()
        await line.say(POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        await asyncio.sleep(3)
        assert server.cut("slow-body") == 0
        reading.set()
        assert await line.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await line.say(b"abc")
        ((status, _, body),) = await line.answers()
        assert (status, body) == (200, b"3")


async def test_r1_who_does_not_take_the_answer_is_cut_and_the_memory_given_back() -> None:
    async with serving(application, **SOON) as server:
        line = await server.line()
        await line.say(GET.replace(b" / ", b" /megabytes "))
        while not server.cut("stalled"):
            await asyncio.sleep(0.05)
        assert len(await line.rest()) < 16 << 20
        while server.state.connections:
            await asyncio.sleep(0.05)


async def test_r1_who_takes_the_answer_slowly_gets_all_of_it() -> None:
    async with serving(application, **SOON | {"send_timeout_seconds": 3.0}) as server:
        line = await server.line()
        await line.say(GET.replace(b" / ", b" /megabytes "))
        taken = 0
        while piece := await line.reader.read(1 << 16):
            taken += len(piece)
            await asyncio.sleep(0.02)
            if taken > 16 << 20:
                break
        assert server.cut("stalled") == 0
        assert taken > 16 << 20


async def test_a_loop_that_was_blocked_holds_nothing_against_clients() -> None:
    async with serving(application, **SOON) as server:
        line = await server.line()
        await line.say(GET[:10])
        await asyncio.sleep(0.2)
        await line.say(GET[10:])
        time.sleep(3)  # The fault.
        assert (await line.answer())[0] == 200


async def test_with_too_many_connections_those_that_wait_longest_make_room() -> None:
    async with serving(application, **SOON | {"max_connections": 16, "keep_alive_seconds": 60}) as server:
        old = [await server.line() for _ in range(15)]
        for line in old:
            await line.say(GET)
            await line.answer()
        busy = await server.line()
        await busy.say(GET.replace(b" / ", b" /slow "))
        while len(server.state.connections) < 16:
            await asyncio.sleep(0.01)
        new = await server.line()
        await new.say(GET)
        assert (await new.answer())[0] == 200
        assert await old[0].rest() == b""
        assert server.cut("crowded") >= 1
        await old[-1].say(GET)
        assert (await old[-1].answer())[0] == 200
        assert (await busy.answer())[0] == 200


async def test_refused_connection_is_not_read_for_as_long_as_its_retry_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # No sweep before the other connections have been served, however busy the machine is.
    monkeypatch.setattr(protocol, "SWEEP_SECONDS", 3.0)
    seen: list[str] = []
    release = asyncio.Event()

    async def blocked(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        if scope["path"] == "/busy":
            await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async with serving(blocked, max_concurrent_requests=1) as server:
        busy = await server.line()
        await busy.say(b"GET /busy HTTP/1.1\r\nHost: a\r\n\r\n")
        while not seen:
            await asyncio.sleep(0.01)
        line = await server.line()
        await line.say(GET)
        assert (await line.answer())[0] == 503
        await line.say(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        await asyncio.sleep(0.2)
        other = await server.line()
        await other.say(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await other.answer())[0] == 200
        assert seen == ["/busy", "/livez"]
        assert (await line.answer())[0] == 200
        assert seen == ["/busy", "/livez", "/livez"]
        release.set()
        assert (await busy.answer())[0] == 200
