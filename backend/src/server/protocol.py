"""HTTP as it comes off the wire: uvicorn's protocol written anew, with bounds and with problems for answers.

What never becomes a request (a broken request line, two lengths, no Host, a head without end, one that takes for
ever) is answered here, as `application/problem+json` like everything else. Any uvicorn can be told to use it:
`uvicorn src.main:app --http src.server.protocol:HttpProtocol`. Without it uvicorn answers such input with a text/plain
400, bounds no head, and waits for slow clients without end.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Iterable
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl

from ..api import problems
from ..api.middleware import TURNED_AWAY
from ..config.logging import get_logger
from ..errors import RequestError, TooManyRequests
from .admission import Door
from .deadlines import Awaits, Bounds, Timed, Watch
from .exchange import EXTENSIONS, Exchange, Rest, Usual

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp, Scope
    from uvicorn.server import ServerState

MAX_HEAD_BYTES = 32 * 1024
"""The target, the headers and what stands between them."""
MAX_HEADERS = 100
MAX_PIPELINED = 64
"""Requests that may wait on one connection for the answers to those before them."""
_VERSIONS = ("1.1", "1.0")
# A socket that is closed over unread input is reset, and the reset may overtake the answer: read on for a while.
_LINGER_SECONDS = 1.0
_LINGER_BYTES = 1 << 20
# A body whose length has more than four digits is long, and so may one be in chunks.
_LONG = frozenset({b"content-length", b"transfer-encoding"})

log = get_logger("groundwork.http")


class Refusal(Exception):
    """Ends parsing from within one of its callbacks."""


class HttpProtocol(Timed):
    """One connection. Refuses a head over its bounds with 431, whatever is not HTTP with 400, and who is slow with 408.

    Requests that came before a refused one are answered first; then the connection ends.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """As uvicorn makes its protocols: one for each connection."""
        super().__init__()
        if not config.loaded:
            config.load()
        self.app: ASGIApp = cast(Any, config.loaded_app)
        self.loop = _loop or asyncio.get_running_loop()
        self.server_state = server_state
        self.connections: set[Any] = server_state.connections
        self.tasks = server_state.tasks
        self.watch, self.door, self.usual, self._context = _kept_of(self)
        self.parser = httptools.HttpRequestParser(self)
        # A second request may stand behind the one that ends the connection; it is not answered, and no error.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._root_path = config.root_path
        self._app_state = app_state
        self._asgi = {"version": config.asgi_version, "spec_version": "2.3"}
        self._server: tuple[str, int | None] | None = None
        self._client: tuple[str, int] | None = None
        self._scheme = "http"
        # The request that is being read.
        self.scope: Scope | None = None
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._unframed_bytes = 0
        self._waits_for_continue = False
        # Whether it was turned away: what is left of it goes nowhere.
        self._turned_away = False
        # The last that came, the one whose turn it is or was, and those that wait for the answers before theirs.
        self.cycle: Exchange | None = None
        self._answering: Exchange | None = None
        self._pipeline: deque[Exchange] = deque()
        self._refusal: RequestError | None = None
        self._owed: bytes | None = None
        self._discarded_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.flow = FlowControl(self.transport)
        self._server = get_local_addr(self.transport)
        self._client = get_remote_addr(self.transport)
        self._scheme = "https" if is_ssl(self.transport) else "http"
        self.connections.add(self)
        self.since = self.loop.time()
        self.watch.begin(len(self.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        self.flow.resume_writing()
        if exc is None:
            self.transport.close()
        self.parser = cast(Any, None)
        if (cycle := self._answering) is not None:
            if not cycle.response_complete:
                cycle.disconnected = True
            cycle.wake()
            if cycle.task is not None and not cycle.task.done():
                # Nobody is left to hear of what it would still begin.
                self.door.forsake(cycle.task)
        # They know the connection: were they known to it, both would stay until garbage is searched for.
        self.cycle = self._answering = None
        self._pipeline.clear()

    def data_received(self, data: bytes) -> None:
        if self.refused:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > _LINGER_BYTES:
                self.transport.close()
            return
        self.received += len(data)
        self._unframed_bytes += len(data)
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as stopped:
                self._read_on(data[stopped.args[0] :])
        except httptools.HttpParserError:
            if not self.refused:
                self.refuse(self._refusal or problems.Malformed())
        else:
            # The parser keeps a header (or a trailer, or a chunk's extension) until it is complete.
            if self._unframed_bytes > MAX_HEAD_BYTES:
                self.refuse(problems.HeadersTooLarge())

    def _read_on(self, data: bytes) -> None:
        """Nothing is upgraded to here, but the parser takes what follows, and so a body, for another protocol."""
        cycle = self.cycle
        if cycle is None or self._turned_away:
            return
        cycle.keep_alive = False
        if framing := [pair for pair in self._headers if pair[0] in _LONG]:
            cycle.begin_anew()
            self.awaits = Awaits.BODY
            self.parser = httptools.HttpRequestParser(Rest(self))
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%b: %b\r\n\r\n%b" % (*framing[0], data))

    def shutdown(self) -> None:
        """uvicorn asks this of every connection when it stops: the answer that is under way is the last."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self.cycle.keep_alive = False

    # What the parser says

    def on_message_begin(self) -> None:
        self._target = b""
        self._waits_for_continue = False
        self._headers = []
        self.scope = {
            "type": "http",
            "asgi": self._asgi,
            "server": self._server,
            "client": self._client,
            "scheme": self._scheme,
            "root_path": self._root_path,
            "headers": self._headers,
            "state": self._app_state.copy(),
            "extensions": EXTENSIONS,
        }
        self._turned_away = False
        self._head_bytes = 0
        self.awaits = Awaits.HEAD
        self.since = self.loop.time()

    def on_url(self, url: bytes) -> None:
        self._target += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.awaits is not Awaits.HEAD:
            # A trailer. It comes after the request was handed on, so it may not become one of its headers.
            return
        name = name.lower()
        self._headers.append((name, value))
        if name == b"expect" and value.lower() == b"100-continue":
            self._waits_for_continue = True
        self._count(len(name) + len(value) + 4)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES or len(self._headers) > MAX_HEADERS:
            self._refusal = problems.HeadersTooLarge()
            raise Refusal

    def on_headers_complete(self) -> None:
        self.awaits = Awaits.BODY
        self.stretch = None
        self._unframed_bytes = 0
        version = self.parser.get_http_version()
        names = [name for name, _ in self._headers]
        hosts = names.count(b"host")
        # RFC 9112, 3.2 and 6.1: one Host, and in HTTP/1.0 at most one and no chunks.
        faulty = hosts != 1 if version == "1.1" else hosts > 1
        if b"transfer-encoding" in names:
            codings = [value.lower() for name, value in self._headers if name == b"transfer-encoding"]
            # The parser takes any list that ends in `chunked`, and would hand on a body that is still encoded.
            faulty = faulty or version != "1.1" or codings != [b"chunked"]
        if faulty or version not in _VERSIONS:
            raise Refusal
        if len(self._pipeline) >= MAX_PIPELINED:
            self._refusal = TooManyRequests("pipeline-full", "Too many requests wait on this connection.")
            raise Refusal
        if self.door.is_closed(self._target) and (self.cycle is None or self.cycle.response_complete):
            # Answers come in the order of the requests: where another is under way, the application answers this one.
            self._turn_away()
            return
        self._hand_on(version)

    def _hand_on(self, version: str) -> None:
        parsed = httptools.parse_url(self._target)
        path = parsed.path.decode("ascii")
        if "%" in path:
            path = unquote(path)
        scope = self.scope
        assert scope is not None
        scope["method"] = self.parser.get_method().decode("ascii")
        scope["http_version"] = version
        scope["path"] = self._root_path + path
        scope["raw_path"] = self._root_path.encode("ascii") + parsed.path
        scope["query_string"] = parsed.query or b""
        former = self.cycle
        keep = version != "1.0" and self.parser.should_keep_alive()
        # Of HTTP/1.0 nobody would understand the go-ahead (RFC 9110, 10.1.1).
        waits = self._waits_for_continue and version != "1.0"
        self.cycle = Exchange(self, scope, keep_alive=keep, waits=waits)
        if former is None or former.response_complete:
            self._start(self.cycle)
        else:
            self.flow.pause_reading()
            self._pipeline.appendleft(self.cycle)

    def _start(self, cycle: Exchange) -> None:
        self._answering = cycle
        if self.door.lets_begin():
            self._begin(cycle)
        else:
            self.door.begin(cycle, lambda: self._begin(cycle))

    def _begin(self, cycle: Exchange) -> None:
        # This may be called from within another request, whose id and connection are not this one's.
        context = self._context.copy()
        cycle.task = task = self.loop.create_task(cycle.run(self.app), context=context)
        self.tasks.add(task)

    def on_body(self, body: bytes) -> None:
        self._unframed_bytes = 0
        cycle = self.cycle
        if self._turned_away or cycle is None or cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.wake()

    def on_message_complete(self) -> None:
        self._unframed_bytes = 0
        self.awaits = Awaits.NOTHING
        cycle = self.cycle
        if not self._turned_away and cycle is not None and not cycle.response_complete:
            cycle.more_body = False
            cycle.wake()

    # What is answered

    def _turn_away(self) -> None:
        """Answers from here, with nothing of the request looked at but its head."""
        method, headers = self.parser.get_method(), self._headers
        keep = self.parser.should_keep_alive() and self.parser.get_http_version() != "1.0"
        # A long body is not worth reading, so its connection ends.
        if (
            self._waits_for_continue
            or self.parser.should_upgrade()
            or any(name in _LONG and len(value) > 4 for name, value in headers)
        ):
            keep = False
        answer = self.door.refusal(method, headers, self.server_state.default_headers, keep=keep)
        if not keep:
            self.refused, self._owed = True, answer
            self.pay()
            raise Refusal
        self.transport.write(answer)
        self._turned_away = True
        self.awaits = Awaits.NOTHING
        # It has no cycle, and so nobody waits for it.
        self.scope = None if self.cycle is None else self.cycle.scope
        self.server_state.total_requests += 1
        self.hold(self.door.rest_seconds)

    def refuse(self, error: RequestError) -> None:
        """Says why, once everything that was asked before has been answered, and ends the connection."""
        self.refused = True
        self._owed = self._answer(error)
        cycle = self.cycle
        if cycle is not None and cycle.scope is self.scope:
            # The faulty request is already with the application, or waits for its turn: its body will not come.
            if cycle in self._pipeline:
                self._pipeline.remove(cycle)
                return
            if cycle.response_started:
                self._owed = None
            cycle.disconnected = True
            cycle.wake()
        elif cycle is not None and not cycle.response_complete:
            return
        self.pay()

    def on_response_complete(self) -> None:
        """Starts the next request that waits. Unlike uvicorn's it sets no timer, and reads on when none waits."""
        if self._owed is not None and not self._pipeline:
            self.pay()
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self._pipeline:
            self._start(self._pipeline.pop())
        if not self._pipeline:
            if self.cycle is not None and TURNED_AWAY in self.cycle.scope["state"]:
                self.hold(self.door.rest_seconds)
            else:
                self.flow.resume_reading()
        if self.awaits is Awaits.NOTHING:
            self.since = self.loop.time()

    def pay(self) -> None:
        if self.transport.is_closing():
            return
        if self._owed is not None:
            self.transport.write(self._owed)
            self._owed = None
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def _answer(self, error: RequestError) -> bytes:
        request_id = f"{os.urandom(8).hex()}-0"
        body = problems.body_of(error, request_id)
        headers = {
            **problems.headers_of(error),
            "content-type": problems.MEDIA_TYPE,
            "content-length": str(len(body)),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "x-request-id": request_id,
            "connection": "close",
        }
        said = [
            b"%b: %b\r\n" % pair for pair in self.server_state.default_headers if pair[0] != b"connection"
        ]
        said += [f"{name}: {value}\r\n".encode("ascii") for name, value in headers.items()]
        if (metrics := self.watch.metrics) is not None:
            metrics.request("OTHER", "unmatched", error.status, 0.0)
        facts = {"method": "OTHER", "route": "unmatched", "status": error.status, "duration_ms": 0.0}
        log.info("request", **facts, problem=error.slug, request_id=request_id)
        return b"".join((STATUS_LINE[error.status], *said, b"\r\n", body))


def _kept_of(connection: HttpProtocol) -> tuple[Watch, Door, Usual, Context]:
    """What a server's connections have in common, made with the first of them."""
    kept = vars(connection.server_state)
    if "in_common" not in kept:
        app: Any = connection.app
        while not hasattr(app, "state") and hasattr(app, "app"):
            app = app.app  # uvicorn's own wrappers
        state = getattr(app, "state", None)
        settings = getattr(state, "settings", None)
        bounds = Bounds() if settings is None else Bounds.of(settings)
        connections = cast(Iterable[HttpProtocol], connection.connections)
        watch = Watch(connections, bounds, getattr(state, "metrics", None))
        door, usual = Door.of(state, connection.tasks), Usual(connection.server_state)
        kept["in_common"] = watch, door, usual, copy_context()
    return cast(tuple[Watch, Door, Usual, Context], kept["in_common"])
