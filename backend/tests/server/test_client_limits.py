"""What clients may hold: unfinished requests, bodies, unsent responses and connections, over raw sockets.

The limits are small here. What is asserted is which client is refused or closed, and that the others are served.
"""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from speaking import Line, Server, ended, serving
from src.api import problems
from src.api.cors import Cors
from src.config.logging import configure
from src.config.settings import load_settings
from src.server import protocol
from src.server.app_protocol import AppProtocol
from src.server.client_address import ClientAddresses, networks_of, unmapped

HOST = b"Host: a\r\n"
GET = b"GET /v1/tasks HTTP/1.1\r\n" + HOST
LIVEZ = b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n"
TOKENS = b"POST /v1/tokens HTTP/1.1\r\n" + HOST + b"Content-Length: 50\r\n"
MEGABYTES = 12 << 20
STREAMED = {"streamed_paths": frozenset({"/import"})}
HEAD_END = b"\r\n"


class Application:
    """Returns the client's address; `/large` returns twelve MiB, `/events` a stream, `/import` 401 without reading."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.state: Any = None
        self.end_stream = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.started.append(path)
        if path == "/events":
            kind = [(b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": kind})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            await self.end_stream.wait()
            await send({"type": "http.response.body", "body": b""})
            return
        body = scope["client"][0].encode() if path != "/large" else b"x" * MEGABYTES
        headers = [(b"content-length", b"%d" % len(body))]
        status = 401 if path == "/import" else 200
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.01)


async def ask(server: Server, request: bytes = LIVEZ) -> int:
    line = await server.line()
    await line.say(request)
    return (await line.answer())[0]


async def pending(server: Server, number: int, more: bytes = b"") -> list[Line]:
    """Connections that send the head of a request and never its body."""
    lines = [await server.line() for _ in range(number)]
    for line in lines:
        await line.say(TOKENS + more + HEAD_END)
    await until(lambda: sum(one.waits_for_body for one in server.state.connections) >= number)
    return lines


# Unfinished requests


async def test_requests_whose_bodies_never_come_cost_no_other_client_a_response() -> None:
    app = Application()
    async with serving(app, max_concurrent_requests=8) as server:
        await pending(server, 60)
        for _ in range(20):
            assert await ask(server, GET + HEAD_END) == 200
        assert "/v1/tokens" not in app.started


async def test_unfinished_requests_are_limited_per_client_and_finished_ones_are_not() -> None:
    async with serving(Application(), max_pending_requests_per_network=3) as server:
        refused, *lines = await pending(server, 3)
        lines.append(await server.line())
        await lines[-1].say(TOKENS + HEAD_END)
        ((status, headers, body),) = await refused.answers()
        assert (status, headers["connection"]) == (429, "close")
        assert problems.Problem.model_validate_json(body).type == "/problems/too-many-requests"
        # What arrives as a whole is never unfinished.
        assert await ask(server, TOKENS + HEAD_END + b"x" * 50) == 200
        for line in lines:
            await line.say(b"x" * 50)
            assert (await line.answer())[0] == 200
        await pending(server, 3)


async def test_client_at_the_address_of_slow_ones_is_served_when_its_body_follows_its_head() -> None:
    async with serving(Application(), max_pending_requests_per_network=8) as server:
        await pending(server, 8)
        for _ in range(20):
            line = await server.line()
            await line.say(TOKENS + HEAD_END)
            await asyncio.sleep(0.02)
            await line.say(b"x" * 50)
            assert (await line.answer())[0] == 200


async def test_unfinished_requests_behind_a_trusted_proxy_count_for_its_client() -> None:
    settings = {"max_pending_requests_per_network": 2, "trusted_proxies": "127.0.0.1"}
    async with serving(Application(), **settings) as server:
        one, other = b"X-Forwarded-For: 192.0.2.1\r\n", b"X-Forwarded-For: 192.0.2.2\r\n"
        slowest, _ = await pending(server, 2, one)
        await (await server.line()).say(TOKENS + one + HEAD_END)
        assert (await slowest.answer())[0] == 429
        await pending(server, 2, other)


async def test_untrusted_peer_that_forwards_is_never_refused_for_its_clients_and_warned_of_once() -> None:
    shown = io.StringIO()
    configure("info", "json", shown)
    async with serving(Application(), max_pending_requests_per_network=1) as server:
        await pending(server, 5, b"X-Forwarded-For: 192.0.2.1\r\n")
    assert shown.getvalue().count("forwarded_header.untrusted") == 1


async def test_buffered_bodies_over_their_bound_close_the_slowest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "MAX_BUFFERED_BODY_BYTES", 115_000)
    head = b"POST /v1/tasks HTTP/1.1\r\n" + HOST + b"Content-Length: 60000\r\n\r\n"
    async with serving(Application()) as server:
        slow, quick = await server.line(), await server.line()
        await slow.say(head + b"x" * 20_000)
        await asyncio.sleep(0.3)
        await quick.say(head + b"x" * 50_000)
        await until(lambda: sum(one.waits_for_body for one in server.state.connections) == 2)
        third = await server.line()
        await third.say(head + b"x" * 50_000)
        assert await slow.rest() == b""
        for line in (quick, third):
            await line.say(b"x" * 10_000)
            assert (await line.answer())[0] == 200


async def test_with_too_many_connections_late_bodies_make_room_before_idle_ones_and_probes_are_served() -> (
    None
):
    async with serving(Application(), max_connections=16, keep_alive_seconds=60) as server:
        idle = await server.line()
        await idle.say(LIVEZ)
        assert (await idle.answer())[0] == 200
        await pending(server, 15)
        await asyncio.sleep(1)
        for _ in range(8):
            assert await ask(server) == 200
        assert server.cut("crowded") >= 1
        await idle.say(LIVEZ)
        assert (await idle.answer())[0] == 200


@pytest.mark.parametrize("filler", [b"1;" + b"a" * 900 + b"\r\nx\r\n", b"01\r\nx\r\n"])
async def test_chunk_framing_is_no_progress_of_a_body(filler: bytes) -> None:
    bounds = {"body_timeout_seconds": 1.0, "min_bytes_per_second": 1000}
    async with serving(Application(), **bounds) as server:
        line = await server.line()
        await line.say(b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n")
        answers = asyncio.create_task(line.answers())
        while not answers.done():
            await line.say(filler)
            await asyncio.wait((answers,), timeout=0.05)
        ((status, _, _),) = await answers
        assert status == 408


# Refusals


async def test_length_over_the_limit_is_413_at_the_head_with_cors_headers() -> None:
    more = {"cors": Cors(["https://app.example.com"])}
    async with serving(Application(), more=more, max_body_bytes=2048) as server:
        line = await server.line()
        origin = b"Origin: https://app.example.com\r\n"
        await line.say(b"POST / HTTP/1.1\r\n" + HOST + origin + b"Content-Length: 2049\r\n\r\n")
        ((status, headers, _),) = await line.answers()
        assert (status, headers["connection"]) == (413, "close")
        assert headers["access-control-allow-origin"] == "https://app.example.com"


@pytest.mark.parametrize(
    ("rest", "status"),
    [
        (b"Accept: x\r\nX y\r\n\r\n", 400),
        (b"X: " + b"y" * 40_000 + b"\r\n\r\n", 431),
        (b"X: y", 408),
        (b"Transfer-Encoding: chunked\r\n\r\n" + (b"800\r\n" + b"x" * 2048 + b"\r\n") * 2, 413),
    ],
)
async def test_errors_of_the_protocol_carry_cors_headers(rest: bytes, status: int) -> None:
    more = {"cors": Cors(["https://app.example.com"])}
    async with serving(Application(), more=more, max_body_bytes=2048, header_timeout_seconds=1.0) as server:
        line = await server.line()
        await line.say(b"POST / HTTP/1.1\r\n" + HOST + b"Origin: https://app.example.com\r\n" + rest)
        (received,) = await line.answers()
        assert received[0] == status
        assert received[1]["access-control-allow-origin"] == "https://app.example.com"


async def test_response_before_the_end_of_its_body_ends_the_connection_after_a_bounded_discard() -> None:
    async with serving(Application(), more=STREAMED | {"body_limits": {"/import": 1 << 30}}) as server:
        line = await server.line()
        await line.say(b"POST /import HTTP/1.1\r\n" + HOST + b"Content-Length: 100000000\r\n\r\n")
        status, headers, _ = await line.answer()
        assert (status, headers["connection"]) == (401, "close")
        (connection,) = server.state.connections
        sent = 0
        while connection in server.state.connections and sent < 100_000_000:
            await line.say(b"x" * 100_000)
            sent += 100_000
        assert connection._discarded_bytes <= protocol.MAX_DISCARDED_BYTES + (256 << 10)
        await until(lambda: not server.state.connections)


# Responses


async def test_unsent_bytes_over_the_budget_close_those_that_do_not_read() -> None:
    budget = 20 << 20
    async with serving(Application(), max_unsent_bytes=budget, max_concurrent_requests=100) as server:
        for _ in range(12):
            line = await server.line()
            await line.say(b"GET /large HTTP/1.1\r\n" + HOST + HEAD_END)
        await until(lambda: server.cut("unsent") >= 8)
        unsent = sum(one.transport.get_write_buffer_size() for one in server.state.connections)
        assert unsent <= budget
        reader = await server.line()
        await reader.say(b"GET /large HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
        assert len(await reader.rest()) > MEGABYTES


async def test_unsent_bytes_stay_out_of_the_kernel_and_a_closed_reader_is_reset() -> None:
    loop = asyncio.get_running_loop()
    async with serving(Application(), send_timeout_seconds=1) as server:
        with socket.socket() as reader:
            reader.setblocking(False)
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
            await loop.sock_connect(reader, server.address)
            await loop.sock_sendall(reader, b"GET /large HTTP/1.1\r\n" + HOST + HEAD_END)
            await until(lambda: any(one.written for one in server.state.connections))
            await asyncio.sleep(0.2)
            (connection,) = server.state.connections
            assert connection.transport.get_write_buffer_size() > MEGABYTES - (1 << 20)
            await until(lambda: server.cut("stalled") == 1)
            with pytest.raises(ConnectionResetError):
                while await loop.sock_recv(reader, 1 << 20):
                    pass


async def test_response_is_in_progress_until_it_has_been_sent() -> None:
    async with serving(Application(), max_concurrent_requests=2) as server:
        readers = [await server.line() for _ in range(2)]
        for line in readers:
            await line.say(b"GET /large HTTP/1.1\r\n" + HOST + HEAD_END)
        await until(lambda: sum(one.flow.write_paused for one in server.state.connections) == 2)
        assert await ask(server, GET + HEAD_END) == 503
        assert await ask(server) == 200
        for line in readers:
            assert len((await line.answer())[2]) == MEGABYTES
        assert await ask(server, GET + HEAD_END) == 200


async def test_pipelined_request_does_not_start_before_the_response_in_front_of_it_has_been_sent() -> None:
    app = Application()
    async with serving(app) as server:
        line = await server.line()
        await line.say(b"GET /large HTTP/1.1\r\n" + HOST + HEAD_END + GET + HEAD_END)
        await until(lambda: any(one.flow.write_paused for one in server.state.connections))
        await asyncio.sleep(0.2)
        assert app.started == ["/large"]
        assert len((await line.answer())[2]) == MEGABYTES
        assert (await line.answer())[0] == 200


async def test_event_stream_counts_neither_as_a_request_in_progress_nor_as_stalled() -> None:
    app = Application()
    bounds: dict[str, Any] = {"send_timeout_seconds": 1.0, "keep_alive_seconds": 1.0}
    async with serving(app, max_concurrent_requests=1, **bounds) as server:
        stream = await server.line()
        await stream.say(b"GET /events HTTP/1.1\r\n" + HOST + HEAD_END)
        assert b"data: 1" in await stream.reader.readuntil(b"\n\n\r\n")
        assert await ask(server, GET + HEAD_END) == 200
        await asyncio.sleep(3)
        app.end_stream.set()
        assert await stream.reader.readuntil(b"0\r\n\r\n")
        assert server.cut("stalled") == 0


async def test_keep_alive_header_is_a_second_below_the_timeout() -> None:
    async with serving(Application(), keep_alive_seconds=75) as server:
        line = await server.line()
        await line.say(LIVEZ)
        _, headers, _ = await line.answer()
        assert (headers["connection"], headers["keep-alive"]) == ("keep-alive", "timeout=74")


# Addresses


async def test_ipv4_client_of_a_dual_stack_socket_has_its_ipv4_address() -> None:
    app = Application()
    app.state = SimpleNamespace(settings=load_settings(trusted_proxies="127.0.0.1"))
    listener = socket.socket(socket.AF_INET6)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("::", 0))
    config = uvicorn.Config(app, http=AppProtocol, log_config=None, lifespan="off")
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: AppProtocol(config=config, server_state=state, app_state={}), sock=listener
    )
    try:
        for forwarded, expected in (
            (b"", b"127.0.0.1"),
            (b"X-Forwarded-For: ::ffff:192.0.2.1\r\n", b"192.0.2.1"),
        ):
            line = Line(*await asyncio.open_connection("127.0.0.1", listener.getsockname()[1]))
            await line.say(GET + forwarded + b"Connection: close\r\n\r\n")
            received = await line.answers()
            line.writer.transport.abort()
            assert [body for _, _, body in received] == [expected]
    finally:
        await ended(server, state)


@pytest.mark.parametrize(
    ("trusted", "hops", "values", "expected"),
    [
        (["10.0.0.0/8"], 1, [b"192.0.2.9, 192.0.2.1"], "192.0.2.1"),
        (["10.0.0.0/8"], 1, [b"192.0.2.9, 192.0.2.1, 10.0.0.2"], "192.0.2.1"),
        (["10.0.0.1"], 2, [b"192.0.2.9, 192.0.2.1, 172.16.0.1"], "192.0.2.1"),
        (["10.0.0.1"], 3, [b"192.0.2.1"], "192.0.2.1"),
        (["10.0.0.1"], 1, [b"192.0.2.9", b"192.0.2.1"], "192.0.2.1"),
        (["10.0.0.1"], 1, [b"192.0.2.1:443"], "192.0.2.1"),
        (["10.0.0.1"], 1, [b"[2001:db8::1]:443"], "2001:db8::1"),
        (["10.0.0.1"], 1, [b"192.0.2.1, unknown"], "10.0.0.1"),
        (["10.0.0.1"], 1, [b""], "10.0.0.1"),
    ],
)
def test_forwarded_client_is_the_entry_that_the_trusted_proxies_vouch_for(
    trusted: list[str], hops: int, values: list[bytes], expected: str
) -> None:
    addresses = ClientAddresses(trusted, hops)
    assert addresses.is_trusted("10.0.0.1")
    assert addresses.resolve(("10.0.0.1", 1), values)[0] == expected


def test_networks_of_a_client_are_its_address_or_its_prefixes() -> None:
    assert networks_of("192.0.2.1") == (("192.0.2.1", 1),)
    assert networks_of("2001:db8:1:2::3") == (("2001:db8:1:2::/64", 1), ("2001:db8:1::/48", 4))
    assert networks_of("unknown") == ()
    assert unmapped("::ffff:192.0.2.1") == "192.0.2.1"
    assert unmapped("2001:db8::1") == "2001:db8::1"
