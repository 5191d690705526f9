"""HTTP as it comes off the wire: uvicorn's httptools protocol, with bounds and with problems for answers.

What never becomes a request (a broken request line, two lengths, no Host, a head without end, one that takes for
ever) is answered here, as `application/problem+json` like everything else. Any uvicorn can be told to use it:
`uvicorn src.main:app --http src.protocol:HttpProtocol`. Without it uvicorn answers such input with a text/plain 400,
bounds no head, and waits for slow clients without end.
"""

from __future__ import annotations

import asyncio
import enum
import os
from collections.abc import Iterable
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from .admission import Door
from .api import problems
from .api.middleware import TURNED_AWAY
from .config.logging import get_logger
from .deadlines import Bounds, Watch
from .errors import RequestError, TooManyRequests

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


class Awaits(enum.Enum):
    """What a connection still has to receive of the request that it is reading."""

    NOTHING = 0
    HEAD = 1
    BODY = 2


class HttpProtocol(HttpToolsProtocol):
    """One connection. Refuses a head over its bounds with 431, whatever is not HTTP with 400, and who is slow with 408.

    Requests that came before a refused one are answered first; then the connection ends.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_bytes = 0
        self._awaits = Awaits.NOTHING
        self._unframed_bytes = 0
        self._refusal: RequestError | None = None
        self._refused = False
        self._owed: bytes | None = None
        self._discarded_bytes = 0
        self._watch, self._door = _kept_of(self)
        self._task: asyncio.Task[None] | None = None
        # Whether the request that is being read was turned away: what is left of it goes nowhere.
        self._turned_away = False
        self._received = 0
        self._since = 0.0
        # The time and the bytes at which the body's present stretch began.
        self._stretch: tuple[float, int] | None = None
        # Bytes that the client has not taken, since when it took none, and by when a finished answer has to be gone.
        self._unsent = 0
        self._untouched_since = 0.0
        self._gone_by: float | None = None
        self._held_until: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._since = self.loop.time()
        self._watch.begin(len(self.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._task is not None and not self._task.done():
            # Nobody is left to hear of what it would still begin.
            self._door.forsake(self._task)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > _LINGER_BYTES:
                self.transport.close()
            return
        self._received += len(data)
        self._unframed_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Nothing is upgraded to here. The parser has stopped, so the answer is this connection's last.
            if self.cycle is not None:
                self.cycle.keep_alive = False
        except httptools.HttpParserError:
            if not self._refused:
                self._refuse(self._refusal or problems.Malformed())
        else:
            # The parser keeps a header (or a trailer, or a chunk's extension) until it is complete.
            if self._unframed_bytes > MAX_HEAD_BYTES:
                self._refuse(problems.HeadersTooLarge())

    # How long the client takes

    @property
    def waiting_since(self) -> float | None:
        """Since when we wait for the rest of a head, or for anything at all; None while there is a request."""
        if self._awaits is Awaits.BODY or self.transport.is_closing():
            return None
        if self.cycle is not None and not self.cycle.response_complete:
            return None
        return self._untouched_since if self._unsent else self._since

    def look(self, now: float) -> None:
        """Ends the connection when its client is late. Nobody waits for what we ourselves hold up."""
        if self._held_until is not None:
            # As long as its Retry-After says, or until the door is open again.
            if now >= self._held_until or not self._door.is_closed():
                self._held_until = None
                self._since = now
                self.flow.resume_reading()
        elif self._leaves_its_answers(now):
            self.cut("stalled")
        elif self._refused or self.transport.is_closing():
            return
        elif self.flow.read_paused:
            self._since, self._stretch = now, None
        elif self._awaits is Awaits.HEAD:
            if now - self._since > self._watch.bounds.head_seconds:
                self._watch.count("slow-head")
                self._refuse(problems.TooSlow())
        elif self._awaits is Awaits.BODY:
            if self._sends_too_slowly(now):
                self._watch.count("slow-body")
                self._refuse(problems.TooSlow())
        elif self._unsent:
            self._since = now
        elif self.cycle is None:
            if now - self._since > self._watch.bounds.head_seconds:
                self.cut("silent")
        elif self.cycle.response_complete and now - self._since > self._watch.bounds.keep_alive_seconds:
            # Without a word: it would be taken for the answer to a request that is on its way (RFC 9110, 15.5.9).
            self.cut("idle")

    def _sends_too_slowly(self, now: float) -> bool:
        """Whether a stretch of time has ended in which too little of the body came."""
        bounds = self._watch.bounds
        if self._stretch is None or self.cycle.waiting_for_100_continue:
            self._stretch = now, self._received
            return False
        began, received = self._stretch
        if now - began < bounds.body_seconds:
            return False
        self._stretch = now, self._received
        return self._received - received < bounds.bytes_per_second * bounds.body_seconds

    def _leaves_its_answers(self, now: float) -> bool:
        """Whether nothing of an answer was taken for long, or a finished one leaves too slowly."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent:
            self._unsent, self._gone_by = 0, None
            return False
        if not self._unsent or unsent < self._unsent:
            self._untouched_since = now
        self._unsent = unsent
        bounds = self._watch.bounds
        if self.cycle is None or self.cycle.response_complete:
            if self._gone_by is None:
                self._gone_by = now + bounds.stall_seconds + unsent / bounds.bytes_per_second
            if now > self._gone_by:
                return True
        return now - self._untouched_since > bounds.stall_seconds

    def resume_writing(self) -> None:
        # The client has taken most of what there was, and more may be written before anybody looks again.
        self._unsent = 0
        super().resume_writing()

    def excuse(self, seconds: float) -> None:
        """Does not count a time in which nothing was read or sent because we did not get to it."""
        self._since += seconds
        self._untouched_since += seconds
        self._stretch = None

    def cut(self, reason: str) -> None:
        self._watch.count(reason)
        if self._unsent:
            # Closing would wait until the rest is taken.
            self.transport.abort()
        else:
            self.transport.close()

    # What the parser says

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._turned_away = False
        self._head_bytes = 0
        self._awaits = Awaits.HEAD
        self._since = self.loop.time()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._awaits is not Awaits.HEAD:
            # A trailer. It comes after the request was handed on, so it may not become one of its headers.
            return
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._refusal = problems.HeadersTooLarge()
            raise Refusal

    def on_headers_complete(self) -> None:
        self._awaits = Awaits.BODY
        self._stretch = None
        self._unframed_bytes = 0
        version = self.parser.get_http_version()
        hosts, codings = 0, []
        for name, value in self.headers:
            if name == b"host":
                hosts += 1
            elif name == b"transfer-encoding":
                codings.append(value.lower())
        # RFC 9112, 3.2 and 6.1: one Host, and in HTTP/1.0 at most one and no chunks.
        faulty = hosts != 1 if version == "1.1" else hosts > 1 or bool(codings)
        # The parser takes any list that ends in `chunked`, and would hand on a body that is still encoded.
        faulty = faulty or (bool(codings) and codings != [b"chunked"])
        if faulty or version not in _VERSIONS:
            raise Refusal
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refusal = TooManyRequests("pipeline-full", "Too many requests wait on this connection.")
            raise Refusal
        if self._door.is_closed(self.url) and (self.cycle is None or self.cycle.response_complete):
            # Answers come in the order of the requests: where another is under way, the application answers this one.
            self._turn_away()
        else:
            super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self._door.lets_begin():
            self._begin(cycle, app)
        else:
            self._door.begin(cycle, lambda: self._begin(cycle, app))

    def _begin(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._task = task = self.loop.create_task(cycle.run_asgi(app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def on_body(self, body: bytes) -> None:
        self._unframed_bytes = 0
        if not self._turned_away:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._unframed_bytes = 0
        self._awaits = Awaits.NOTHING
        if not self._turned_away:
            super().on_message_complete()

    # What is answered

    def _turn_away(self) -> None:
        """Answers from here, with nothing of the request looked at but its head."""
        method, headers = self.parser.get_method(), self.headers
        keep = self.parser.should_keep_alive() and self.parser.get_http_version() != "1.0"
        # A long body is not worth reading, so its connection ends.
        if self.expect_100_continue or any(name in _LONG and len(value) > 4 for name, value in headers):
            keep = False
        answer = self._door.refusal(method, headers, self.server_state.default_headers, keep=keep)
        if not keep:
            self._refused, self._owed = True, answer
            self._pay()
            raise Refusal
        self.transport.write(answer)
        self._turned_away = True
        self._awaits = Awaits.NOTHING
        # It has no cycle, and so nobody waits for it.
        self.scope = None if self.cycle is None else self.cycle.scope
        self.server_state.total_requests += 1
        self._hold()

    def _hold(self) -> None:
        """Whoever does not wait as he was asked would keep us busy with turning him away."""
        self._since = self.loop.time()
        self._held_until = self._since + self._door.rest_seconds
        self.flow.pause_reading()

    def _refuse(self, error: RequestError) -> None:
        """Says why, once everything that was asked before has been answered, and ends the connection."""
        self._refused = True
        self._owed = self._answer(error)
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and cycle.scope is self.scope:
            # The faulty request is already with the application, or waits for its turn: its body will not come.
            queued = [waiting for waiting in self.pipeline if waiting[0] is cycle]
            if queued:
                self.pipeline.remove(queued[0])
                return
            if cycle.response_started:
                self._owed = None
            cycle.disconnected = True
            cycle.message_event.set()
        elif cycle is not None and not cycle.response_complete:
            return
        self._pay()

    def on_response_complete(self) -> None:
        """Starts the next request that waits. Unlike uvicorn's it sets no timer, and reads on when none waits."""
        if self._owed is not None and not self.pipeline:
            self._pay()
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        if not self.pipeline:
            if TURNED_AWAY in self.cycle.scope["state"]:
                self._hold()
            else:
                self.flow.resume_reading()
        if self._awaits is Awaits.NOTHING:
            self._since = self.loop.time()

    def _pay(self) -> None:
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
        if (metrics := self._watch.metrics) is not None:
            metrics.request("OTHER", "unmatched", error.status, 0.0)
        log.info(
            "request",
            method="OTHER",
            route="unmatched",
            status=error.status,
            duration_ms=0.0,
            problem=error.slug,
            request_id=request_id,
        )
        return b"".join((STATUS_LINE[error.status], *said, b"\r\n", body))


def _kept_of(connection: HttpProtocol) -> tuple[Watch, Door]:
    """The one watch and the one door of a server's connections, made with the first of them."""
    kept = vars(connection.server_state)
    if "watch_and_door" not in kept:
        app: Any = connection.app
        while not hasattr(app, "state") and hasattr(app, "app"):
            app = app.app  # uvicorn's own wrappers
        state = getattr(app, "state", None)
        settings = getattr(state, "settings", None)
        bounds = Bounds() if settings is None else Bounds.of(settings)
        connections = cast(Iterable[HttpProtocol], connection.connections)
        watch = Watch(connections, bounds, getattr(state, "metrics", None))
        kept["watch_and_door"] = watch, Door.of(state, connection.tasks)
    return cast(tuple[Watch, Door], kept["watch_and_door"])
