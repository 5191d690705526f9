"""What an ASGI application says becomes one answer on the wire, and what would break it is never sent."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from speaking import answers_in, ended, serving
from src.api.middleware import WHOLE
from src.server.app_protocol import AppProtocol
from src.server.protocol import RequestResponseCycle

Application = Callable[[Any, Any, Any], Awaitable[None]]
Said = Callable[..., Awaitable[bytes]]
GET = b"GET /a%20b?c=d HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
LENGTH = [(b"content-length", b"5")]


class Counting:
    """The real transport, and how often something was written to it."""

    def __init__(self, transport: asyncio.Transport, sizes: list[int]) -> None:
        self._transport = transport
        self._sizes = sizes

    def write(self, data: bytes) -> None:
        self._sizes.append(len(data))
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@pytest.fixture
def writes() -> list[int]:
    """The size of each write of the server."""
    return []


@pytest.fixture
async def said(writes: list[int]) -> AsyncIterator[Said]:
    """Serves an application, sends bytes to it on one connection, and gives all that comes until it is closed."""
    opened: list[tuple[asyncio.Server, ServerState]] = []

    class Counted(AppProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(Counting(transport, writes))  # type: ignore[arg-type]

    async def speak(application: Application, asked: bytes = LAST, *, closing: bool = False) -> bytes:
        config = uvicorn.Config(application, http=AppProtocol, log_config=None, lifespan="off")
        config.load()
        state = ServerState()
        state.default_headers = [(b"date", b"today"), *([(b"connection", b"close")] if closing else [])]
        server = await asyncio.get_running_loop().create_server(
            lambda: Counted(config=config, server_state=state, app_state={"kept": 1}), "127.0.0.1", 0
        )
        opened.append((server, state))
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            writer.write(asked)
            return await asyncio.wait_for(reader.read(), 60)
        finally:
            writer.transport.abort()

    yield speak
    for server, state in opened:
        await ended(server, state)


def saying(*messages: dict[str, Any]) -> Application:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    return application


def start(headers: list[tuple[bytes, bytes]], status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(content: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


async def test_head_and_body_leave_with_one_write(said: Said, writes: list[int]) -> None:
    answer = await said(saying(start(LENGTH), body(b"hello")))
    assert answer == (
        b"HTTP/1.1 200 OK\r\ndate: today\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello"
    )
    assert writes == [len(answer)]


async def test_a_whole_answer_is_the_same_bytes_as_one_in_two_messages(said: Said) -> None:
    whole = {"type": WHOLE, "status": 200, "headers": LENGTH, "body": b"hello"}
    assert await said(saying(whole)) == await said(saying(start(LENGTH), body(b"hello")))
    head = LAST.replace(b"GET", b"HEAD")
    assert await said(saying(whole), head) == await said(saying(start(LENGTH), body(b"hello")), head)


async def test_the_application_is_told_that_whole_answers_are_taken(said: Said) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        told.append(scope)
        await saying(start(LENGTH), body(b"hello"))(scope, receive, send)

    told: list[Any] = []
    await said(application, GET + LAST)
    assert WHOLE in told[0]["extensions"]
    assert (told[0]["path"], told[0]["raw_path"], told[0]["query_string"]) == ("/a b", b"/a%20b", b"c=d")
    assert (told[0]["method"], told[0]["scheme"], told[0]["http_version"]) == ("GET", "http", "1.1")
    assert told[0]["state"] == {"kept": 1}
    assert told[0]["state"] is not told[1]["state"]


async def test_a_piece_leaves_when_it_is_there(said: Said, writes: list[int]) -> None:
    answer = await said(saying(start([]), body(b"one", more=True), body(b"", more=True), body(b"two")))
    assert answer.endswith(b"transfer-encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
    assert len(writes) >= 2


async def test_http_1_0_client_gets_no_chunks(said: Said) -> None:
    answer = await said(
        saying(start([]), body(b"one", more=True), body(b"two")), LAST.replace(b"1.1", b"1.0")
    )
    assert b"transfer-encoding" not in answer
    assert answer.endswith(b"connection: close\r\n\r\nonetwo")


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_without_a_body_announces_none(said: Said, status: int) -> None:
    answer = await said(saying(start([], status), body(b"")))
    assert b"transfer-encoding" not in answer
    assert answer.endswith(b"\r\n\r\n")


async def test_a_head_announces_what_its_get_would_bring(said: Said) -> None:
    answer = await said(saying(start(LENGTH), body(b"hello")), LAST.replace(b"GET", b"HEAD"))
    assert b"content-length: 5\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("name", ["answer", "server", "client"])
async def test_the_connection_ends_where_one_side_says_so(said: Said, name: str) -> None:
    headers = [*LENGTH, *([(b"connection", b"close")] if name == "answer" else [])]
    asked = LAST if name == "client" else GET + GET
    answer = await said(saying(start(headers), body(b"hello")), asked, closing=name == "server")
    assert answer.count(b"HTTP/1.1 200") == 1
    assert answer.count(b"connection: close\r\n") == 1


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x", b"a\r\nset-cookie: b")],
        [(b"x", b"a\nb")],
        [(b"x", b"a\x00b")],
        [(b"x", b"a\x7f")],
        [(b"x\r\ny", b"a")],
        [(b"x", b"a\r")],
    ],
)
async def test_a_header_that_would_break_the_answer_is_never_sent(said: Said, headers: Any) -> None:
    answer = await said(saying(start([*headers, *LENGTH]), body(b"hello")))
    assert answer == b""


async def test_a_tab_in_a_header_is_allowed(said: Said) -> None:
    assert b"x: a\tb\r\n" in await said(saying(start([(b"x", b"a\tb"), *LENGTH]), body(b"hello")))


@pytest.mark.parametrize(
    ("messages", "sent"),
    [
        ((start(LENGTH), body(b"hell")), b""),
        ((start(LENGTH), body(b"hello!")), b""),
        ((start(LENGTH), body(b"hello!", more=True)), b""),
        ((start(LENGTH), body(b"hell", more=True), body(b"o!")), b"hell"),
        ((start(LENGTH), start(LENGTH)), b""),
        ((start(LENGTH),), b""),
        ((start(LENGTH), body(b"he", more=True)), b"he"),
    ],
)
async def test_an_answer_that_cannot_be_finished_ends_its_connection(
    said: Said, messages: tuple[dict[str, Any], ...], sent: bytes
) -> None:
    answer = await said(saying(*messages), GET + GET)
    assert answer.count(b"HTTP/1.1") <= 1
    assert answer.partition(b"\r\n\r\n")[2] == sent


@pytest.mark.parametrize("messages", [(), (body(b"hello"),)])
async def test_an_application_that_says_nothing_is_answered_for(
    said: Said, messages: tuple[dict[str, Any], ...]
) -> None:
    [(status, headers, content)] = answers_in(await said(saying(*messages), GET))
    assert (status, content) == (500, b"Internal Server Error")
    assert headers["connection"] == "close"


async def test_what_is_said_after_the_end_is_an_error_and_changes_nothing(said: Said) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await saying(start(LENGTH), body(b"hello"))(scope, receive, send)
        try:
            await send(body(b"more"))
        except RuntimeError as error:
            raised.append(error)

    raised: list[RuntimeError] = []
    answer = await said(application)
    assert answer.endswith(b"\r\n\r\nhello")
    async with asyncio.timeout(60):
        while not raised:
            await asyncio.sleep(0.01)


async def test_two_who_wait_are_both_told_that_it_is_over(said: Said) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["more_body"] is False
        waiting = [asyncio.create_task(receive()) for _ in range(2)]
        await asyncio.sleep(0)
        await saying(start(LENGTH), body(b"hello"))(scope, receive, send)
        told.extend([(await one)["type"] for one in waiting])

    told: list[str] = []
    await said(application)
    async with asyncio.timeout(60):
        # They are told after the answer has gone, and the client may have read it first.
        while len(told) < 2:
            await asyncio.sleep(0.01)
    assert told == ["http.disconnect", "http.disconnect"]


async def test_a_body_comes_in_pieces_and_once(said: Said) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            pieces.append(message["body"])
            more = message["more_body"]
        await saying(start(LENGTH), body(b"hello"))(scope, receive, send)

    pieces: list[bytes] = []
    content = bytes(range(256)) * 1024
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(content)
    assert (await said(application, head + content)).endswith(b"hello")
    assert b"".join(pieces) == content


async def test_a_client_that_waits_for_a_go_ahead_gets_it_when_its_body_is_wanted(said: Said) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/wanted":
            await receive()
        await saying(start([*LENGTH, (b"connection", b"close")]), body(b"hello"))(scope, receive, send)

    head = b"POST /%b HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nab"
    assert (await said(application, head % b"wanted")).startswith(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200"
    )
    assert (await said(application, head % b"unwanted")).startswith(b"HTTP/1.1 200")
    # In HTTP/1.0 there is no such thing.
    old = (head % b"wanted").replace(b"HTTP/1.1", b"HTTP/1.0")
    assert (await said(application, old)).startswith(b"HTTP/1.1 200")


async def test_who_is_answered_hears_that_the_client_has_left_also_where_more_was_asked_behind() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        paths.append(scope["path"])
        assert (await receive())["more_body"] is False
        told.append((await receive())["type"])
        ended.set()

    paths, told = list[str](), list[str]()
    begun, ended = asyncio.Event(), asyncio.Event()
    async with serving(application) as server, asyncio.timeout(60):
        line = await server.line()
        await line.say(GET + LAST)
        await begun.wait()
        line.writer.transport.abort()
        await ended.wait()
    assert (paths, told) == (["/a b"], ["http.disconnect"])


async def test_a_connection_that_has_ended_leaves_no_work_for_the_garbage_collector() -> None:
    def alive() -> int:
        return sum(type(one) in (RequestResponseCycle, AppProtocol) for one in gc.get_objects())

    async with serving(saying(start(LENGTH), body(b"hello"))) as server, asyncio.timeout(60):
        gc.collect()
        before = alive()
        gc.disable()
        try:
            for _ in range(8):
                line = await server.line()
                await line.say(GET + LAST)
                assert (await line.rest()).count(b"hello") == 2
            while alive() > before:
                await asyncio.sleep(0.01)
        finally:
            gc.enable()


async def test_a_request_knows_nothing_of_the_one_whose_end_let_it_begin(said: Said) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        found.append(known.get())
        known.set(scope["path"])
        await saying(start(LENGTH), body(b"hello"))(scope, receive, send)

    known, found = ContextVar("known", default="nothing"), list[str]()
    await said(application, GET + GET + LAST)
    assert found == ["nothing", "nothing", "nothing"]


async def test_an_answer_that_does_not_wait_for_the_body_is_not_lost_over_the_rest_of_it(said: Said) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 300000\r\n\r\n"
    answer = await said(saying(start(LENGTH), body(b"hello")), head + b"x" * 300_000)
    assert answer.endswith(b"\r\n\r\nhello")
