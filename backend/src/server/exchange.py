"""One request and its answer, as a connection holds them: what ASGI calls `receive` and `send`.

It stands in the place of uvicorn's cycle, because that costs every request: it sends the head of an answer and its
body by two system calls, looks at each header with two regular expressions, and makes an event for a body even where
none comes. Here an answer leaves with one write as soon as its first piece is there, which is what ASGI asks of a
server (the head waits for the first body message). `backend/benchmarks/NOTES.md` has what it saves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from ..api.middleware import WHOLE, traceback_of
from ..config.logging import get_logger

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Scope
    from uvicorn.server import ServerState

    from .protocol import HttpProtocol

EXTENSIONS: Final[dict[str, dict[str, Any]]] = {WHOLE: {}}

# What no header may hold (RFC 9110, 5.5): a line's end within one would begin another.
_CONTROLS: Final = bytes(code for code in (*range(32), 127) if code != ord("\t"))
_NO_BODY: Final = frozenset({204, 304})

log = get_logger("groundwork.http")


class Usual:
    """The headers of every answer of a server, as they are sent; `closes` says that they end the connection.

    uvicorn makes the list anew once a second, for its date: until then they are joined once.
    """

    def __init__(self, server_state: ServerState) -> None:
        self.closes = False
        self._state = server_state
        self._list: list[tuple[bytes, bytes]] | None = None
        self._joined = b""

    def joined(self) -> bytes:
        headers = self._state.default_headers
        if headers is not self._list:
            self._list = headers
            self._joined = b"".join([b"%b: %b\r\n" % pair for pair in headers])
            self.closes = any(name == b"connection" and b"close" in value for name, value in headers)
        return self._joined


class Rest:
    """Tells a connection of the body of a request whose head it knows already, and of nothing behind it."""

    def __init__(self, connection: HttpProtocol) -> None:
        self._connection = connection
        self.on_body = connection.on_body

    def on_message_begin(self) -> None:
        if self._connection.refused:
            raise ValueError("There is no next request.")

    def on_message_complete(self) -> None:
        self._connection.on_message_complete()
        self._connection.refused = True


class Exchange:
    """`body` is what has come of the request's body and was not taken yet; `more_body` says that there will be more.

    `send` raises RuntimeError for messages out of order, for headers that would break the answer, and for a body of
    another length than was announced.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "_event",
        "_head",
        "_left",
        "_news",
        "body",
        "disconnected",
        "keep_alive",
        "more_body",
        "response_complete",
        "response_started",
        "scope",
        "task",
        "waiting_for_100_continue",
    )

    def __init__(self, connection: HttpProtocol, scope: Scope, *, keep_alive: bool, waits: bool) -> None:
        self._connection = connection
        self.scope = scope
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = waits
        self.task: asyncio.Task[None] | None = None
        self.disconnected = False
        self.body = bytearray()
        self.more_body = True
        # Whether something has happened that `receive` has not told yet.
        self._news = False
        self._event: asyncio.Event | None = None
        self.response_started = False
        self.response_complete = False
        # The head, until it is sent; the bytes of the body that were announced and have not come; chunks instead.
        self._head: bytes | None = None
        self._left = 0
        self._chunked = False

    def wake(self) -> None:
        """Something has happened: more of the body, its end, or the end of it all."""
        self._news = True
        if self._event is not None:
            self._event.set()

    def begin_anew(self) -> None:
        """The body has not ended, as was said: all of it is still to come. Before anybody has heard."""
        self.more_body, self._news = True, False

    async def run(self, app: ASGIApp) -> None:
        try:
            await app(self.scope, self.receive, self.send)
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                log.error("application.raised", exception=traceback_of(error))  # noqa: TRY400 - no values in it
            await self._fail()
        else:
            if not self.response_complete and not self.disconnected:
                log.error("application.left-its-answer-unfinished")
                await self._fail()
        finally:
            self._connection.tasks.discard(self.task)

    async def _fail(self) -> None:
        """Says 500 where nothing has been said yet; what was begun stays unfinished, for the client to see."""
        if self.response_started:
            self._connection.transport.close()
        elif not self.disconnected:
            text = (b"content-type", b"text/plain; charset=utf-8")
            await self.send(
                {
                    "type": "http.response.start",
                    "status": 500,
                    "headers": [text, (b"content-length", b"21"), (b"connection", b"close")],
                }
            )
            await self.send({"type": "http.response.body", "body": b"Internal Server Error"})

    async def receive(self) -> Message:
        connection = self._connection
        if self.waiting_for_100_continue and not connection.transport.is_closing():
            connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        if not self.disconnected and not self.response_complete:
            connection.flow.resume_reading()
            if not self._news:
                if self._event is None:
                    self._event = asyncio.Event()
                self._event.clear()
                await self._event.wait()
            self._news = False
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        message = {"type": "http.request", "body": bytes(self.body), "more_body": self.more_body}
        self.body.clear()
        return message

    async def send(self, message: Message) -> None:
        flow = self._connection.flow
        if flow.write_paused and not self.disconnected:
            await flow.drain()
        if self.disconnected:
            return
        kind = message["type"]
        if self.response_complete:
            raise RuntimeError(f"Unexpected ASGI message {kind!r}: the answer is complete.")
        if self.response_started != (kind == "http.response.body"):
            raise RuntimeError(f"Unexpected ASGI message {kind!r}.")
        if kind == "http.response.body":
            self._write(message.get("body", b""), more=message.get("more_body", False))
            return
        self._begin(message["status"], message.get("headers", ()))
        if kind == WHOLE:
            self._write(message["body"], more=False)

    def _begin(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Puts the head together."""
        self.response_started = True
        self.waiting_for_100_continue = False
        usual = self._connection.usual
        always, closes = usual.joined(), usual.closes
        said = b"".join([b"%b: %b\r\n" % pair for pair in headers])
        if len(said) - len(said.translate(None, _CONTROLS)) != 2 * len(headers):
            raise RuntimeError("A header holds a control character.")
        framed = False
        for name, value in headers:
            if name == b"content-length":
                self._left = int(value)
                framed = True
            elif name == b"transfer-encoding":
                self._chunked = framed = True
            elif name == b"connection" and b"close" in value.lower():
                closes = True
        ends = b"\r\n"
        if not framed and status not in _NO_BODY and self.scope["method"] != "HEAD":
            self._chunked = True
            ends = b"transfer-encoding: chunked\r\n\r\n"
        if closes:
            self.keep_alive = False
        elif not self.keep_alive:
            ends = b"connection: close\r\n" + ends
        self._head = STATUS_LINE[status] + always + said + ends

    def _write(self, body: bytes, *, more: bool) -> None:
        if self.scope["method"] == "HEAD":
            body, self._left = b"", 0
        elif self._chunked:
            size = len(body)
            body = b"%x\r\n%b\r\n" % (size, body) if size else b""
            if not more:
                body += b"0\r\n\r\n"
        else:
            self._left -= len(body)
            if self._left < 0:
                raise RuntimeError("The body is longer than its Content-Length.")
        if not more and self._left:
            raise RuntimeError("The body is shorter than its Content-Length.")
        if self._head is not None:
            body, self._head = self._head + body, None
        connection = self._connection
        connection.transport.write(body)
        if not more:
            self.response_complete = True
            self.wake()
            if not self.keep_alive and self.more_body:
                # Closed over the rest of the body it would be reset, and the reset may overtake the answer.
                connection.refused = True
                connection.pay()
            elif not self.keep_alive:
                connection.transport.close()
            connection.on_response_complete()
