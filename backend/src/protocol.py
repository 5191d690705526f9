"""HTTP as it comes off the wire: uvicorn's httptools protocol, with bounds and with problems for answers.

What never becomes a request (a broken request line, two lengths, no Host, a head without end) is answered here, as
`application/problem+json` like everything else. Any uvicorn can be told to use it:
`uvicorn src.main:app --http src.protocol:HttpProtocol`. Without it uvicorn answers such input with a text/plain 400
and bounds no head.
"""

from __future__ import annotations

import os
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from .api import problems
from .config.logging import get_logger
from .errors import RequestError

MAX_HEAD_BYTES = 32 * 1024
"""The target, the headers and what stands between them."""
MAX_HEADERS = 100
_VERSIONS = ("1.1", "1.0")
# A socket that is closed over unread input is reset, and the reset may overtake the answer: read on for a while.
_LINGER_SECONDS = 1.0
_LINGER_BYTES = 1 << 20

log = get_logger("groundwork.http")


class Refusal(Exception):
    """Ends parsing from within one of its callbacks."""


class HttpProtocol(HttpToolsProtocol):
    """One connection. Refuses a head over its bounds with 431 and whatever is not HTTP with 400.

    Requests that came before a refused one are answered first; then the connection ends.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_bytes = 0
        self._in_head = False
        self._unframed_bytes = 0
        self._refusal: RequestError | None = None
        self._refused = False
        self._owed: bytes | None = None
        self._discarded_bytes = 0

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > _LINGER_BYTES:
                self.transport.close()
            return
        self._unset_keepalive_if_required()
        self._unframed_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Nothing is upgraded to here. The parser has stopped, so the answer is this connection's last.
            if self.cycle is not None:
                self.cycle.keep_alive = False
        except httptools.HttpParserError:
            self._refuse(self._refusal or problems.Malformed())
        else:
            # The parser keeps a header (or a trailer, or a chunk's extension) until it is complete.
            if self._unframed_bytes > MAX_HEAD_BYTES:
                self._refuse(problems.HeadersTooLarge())

    # What the parser says

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
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
        self._in_head = False
        self._unframed_bytes = 0
        version = self.parser.get_http_version()
        hosts = sum(name == b"host" for name, _ in self.headers)
        # RFC 9112, 3.2 and 6.1: one Host, and in HTTP/1.0 at most one and no chunks.
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        faulty = hosts != 1 if version == "1.1" else hosts > 1 or bool(codings)
        # The parser takes any list that ends in `chunked`, and would hand on a body that is still encoded.
        faulty = faulty or (bool(codings) and codings != [b"chunked"])
        if faulty or version not in _VERSIONS:
            raise Refusal
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unframed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unframed_bytes = 0
        super().on_message_complete()

    # What is answered

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
        if self._owed is not None and not self.pipeline:
            self._pay()
        super().on_response_complete()

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
        metrics = getattr(getattr(self.config.app, "state", None), "metrics", None)
        if metrics is not None:
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
