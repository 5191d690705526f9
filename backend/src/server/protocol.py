"""HTTP/1.1: uvicorn's httptools protocol with limits, timeouts, error documents and one write for each response.

`HttpProtocol` is one connection, `RequestResponseCycle` one request with its response, `ServerContext` what all
connections of a worker share, `TimeoutSweeper` the periodic check of their deadlines. Nothing here depends on the
application: what it has to provide is in `Collaborators`.

A request starts when its body has arrived: until then it costs a connection and the bytes received, and neither counts
as a request in progress nor holds anything that other requests need. Bodies of `streamed_paths` are the exception: the
application reads them as they come, after it has authenticated the client.
"""

from __future__ import annotations

import asyncio
import enum
import re
import resource
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, cast
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ..config.logging import get_logger
from .admission import AdmissionController, PoolQueue
from .client_address import ClientAddresses, networks_of, unmapped

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp, Message
    from uvicorn.server import ServerState

    from ..config.settings import Settings

MAX_HEAD_BYTES: Final = 32 * 1024
"""The request target, the headers and their separators."""
MAX_HEADERS: Final = 100
MAX_PIPELINED: Final = 64
"""Requests that may wait on one connection for the responses to those before them."""
MAX_BUFFERED_BODY_BYTES: Final = 64 << 20
"""Bodies, in the whole worker, of requests that have not started."""
MAX_DISCARDED_BYTES: Final = 1 << 20
"""What is read of a connection after its last response, so that a reset does not overtake the response."""
DISCARD_SECONDS: Final = 1.0
SWEEP_SECONDS: Final = 0.5
# A transport reports unsent bytes from here on; with uvicorn's 64 KiB 1,024 connections could hold 64 MiB unreported.
_UNSENT_HIGH_WATER: Final = 16 << 10
# What the kernel takes of a response before the client's window has room; otherwise up to 4 MiB for each connection
# (`tcp_wmem`), which nothing here would count.
_KERNEL_UNSENT_BYTES: Final = 128 << 10
_RESET: Final = struct.pack("ii", 1, 0)
# What a process needs beside its clients' connections: the database's, files of imports, the event loop's own.
_RESERVED_DESCRIPTORS: Final = 64
# Connections are closed in batches of this share of all, so that not each new one costs a look at every other.
_EVICTION_SHARE: Final = 16
# A body that lags behind MIN_BYTES_PER_SECOND by so much is closed before idle connections are.
_LATE_SECONDS: Final = 0.5
# A body whose length has more digits than this is not read for the sake of the connection alone.
_SHORT_LENGTH_DIGITS: Final = 4
_VERSIONS: Final = {"1.1": b" HTTP/1.1\r\n", "1.0": b" HTTP/1.0\r\n"}
_NO_BODY: Final = frozenset({204, 304})
# What no header may hold (RFC 9110, 5.5): a line's end within one would begin another.
_CONTROLS: Final = bytes(code for code in (*range(32), 127) if code != ord("\t"))
# RFC 3986, 3.2.2: an IP literal or a registered name, and a port.
_HOST: Final = re.compile(
    rb"(?:\[(?:[0-9A-Fa-f:.]+|[vV][0-9A-Fa-f]+\.[A-Za-z0-9._~!$&'()*+,;=:-]+)\]"
    rb"|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(?::[0-9]*)?"
)
_EVENT_STREAM: Final = b"text/event-stream"
_TCP_FAMILIES: Final = frozenset({socket.AF_INET, socket.AF_INET6})
_SCHEMES: Final = frozenset({b"http", b"https"})

Headers = list[tuple[bytes, bytes]]

log = get_logger("groundwork.http")


class HttpError(NamedTuple):
    """An error that the protocol itself responds with; `reason` is a slug for logs."""

    status: int
    reason: str = ""
    detail: str | None = None
    retry_after_seconds: int | None = None


BAD_REQUEST: Final = HttpError(400)
TIMED_OUT: Final = HttpError(408)
BODY_TOO_LARGE: Final = HttpError(413)
HEAD_TOO_LARGE: Final = HttpError(431)
PIPELINE_FULL: Final = HttpError(429, "pipeline-full", "Too many requests wait on this connection.", 1)
TOO_MANY_PENDING: Final = HttpError(
    429, "too-many-pending", "Too many requests of this network are waiting for their bodies.", 5
)


class _RequestRefused(Exception):
    """Stops the parser from within one of its callbacks; the connection has the error."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds; `Settings` documents each. `max_body_bytes` None: the application reads every body."""

    header_timeout_seconds: float = 5.0
    body_timeout_seconds: float = 5.0
    send_timeout_seconds: float = 30.0
    min_bytes_per_second: int = 1024
    keep_alive_seconds: float = 5.0
    max_connections: int = 4096
    max_body_bytes: int | None = None
    max_unsent_bytes: int = 64 << 20
    max_pending_requests_per_network: int = 256

    @classmethod
    def from_settings(cls, settings: Settings) -> Limits:
        return cls(
            settings.header_timeout_seconds,
            settings.body_timeout_seconds,
            settings.send_timeout_seconds,
            settings.min_bytes_per_second,
            settings.keep_alive_seconds,
            settings.max_connections,
            settings.max_body_bytes,
            settings.max_unsent_bytes,
            settings.max_pending_requests_per_network,
        )


def _plain_error(error: HttpError, method: str, headers: Headers) -> tuple[Headers, bytes]:
    body = STATUS_LINE[error.status][9:-2]
    return [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))], body


@dataclass(frozen=True, slots=True)
class Collaborators:
    """What the application provides to the protocol.

    `render_error` returns the headers and the body of an error response, and logs and counts it; `method` and
    `headers` are the request's as far as they were read. `count_closed` counts a connection that was closed, by reason.
    `body_limits` are the limits of paths that differ from `Limits.max_body_bytes`. `whole_response` names the ASGI
    extension and message for a response in one piece.
    """

    render_error: Callable[[HttpError, str, Headers], tuple[Headers, bytes]] = _plain_error
    count_closed: Callable[[str], None] = lambda reason: None
    describe_exception: Callable[[BaseException], str] = repr
    probe_paths: frozenset[str] = frozenset()
    body_limits: Mapping[str, int] = field(default_factory=dict)
    streamed_paths: frozenset[str] = frozenset()
    whole_response: str = ""
    addresses: ClientAddresses = field(default_factory=ClientAddresses)
    max_concurrent_requests: float = float("inf")
    pool_queue: PoolQueue | None = None
    pool_timeout_seconds: float = float("inf")


class ServerContext:
    """What the connections of a worker share."""

    def __init__(self, state: ServerState, limits: Limits, collaborators: Collaborators) -> None:
        self.limits = limits
        self.collaborators = collaborators
        self.connections = cast("set[HttpProtocol]", state.connections)
        self.tasks = state.tasks
        self.default_headers = DefaultHeaders(state, limits.keep_alive_seconds)
        self.sweeper = TimeoutSweeper(self)
        self.admission = AdmissionController(
            self.requests_in_progress,
            collaborators.max_concurrent_requests,
            collaborators.pool_timeout_seconds,
            collaborators.pool_queue,
        )
        whole = collaborators.whole_response
        self.extensions: dict[str, dict[str, Any]] = {whole: {}} if whole else {}
        # A request starts in this context, not in that of the request whose end let it start.
        self.variables = copy_context()
        # Connections whose transport reports unsent bytes, and those of them whose response is complete.
        self.unsent: set[HttpProtocol] = set()
        self.leaving: set[HttpProtocol] = set()
        self.streams: set[asyncio.Task[None]] = set()
        self.buffered_body_bytes = 0
        self.pending_by_network: dict[str, set[HttpProtocol]] = {}
        self._warned_of_proxy = False

    def requests_in_progress(self) -> int:
        """Started and not finished, or finished and not sent; streams do not count."""
        return len(self.tasks) - len(self.streams) + len(self.leaving)

    def limit_unsent_bytes(self) -> None:
        """Closes connections while more than `max_unsent_bytes` are unsent: those that would take longest to send."""
        total = sum(one.transport.get_write_buffer_size() for one in self.unsent)
        if total <= self.limits.max_unsent_bytes:
            return
        now = asyncio.get_running_loop().time()
        for connection in sorted(self.unsent, key=lambda one: one.seconds_to_send(now), reverse=True):
            total -= connection.transport.get_write_buffer_size()
            connection.close("unsent")
            if total <= self.limits.max_unsent_bytes:
                return

    def limit_buffered_bodies(self) -> None:
        """Closes the slowest unfinished bodies while all bodies together are over their bound."""
        if self.buffered_body_bytes <= MAX_BUFFERED_BODY_BYTES:
            return
        now = asyncio.get_running_loop().time()
        pending = [one for one in self.connections if one.waits_for_body]
        pending.sort(key=lambda one: one.seconds_behind(now), reverse=True)
        for connection in pending:
            connection.close("slow-body")
            if self.buffered_body_bytes <= MAX_BUFFERED_BODY_BYTES:
                return

    def warn_of_untrusted_proxy(self, peer: str) -> None:
        """Logs once that forwarded addresses are ignored."""
        if not self._warned_of_proxy:
            self._warned_of_proxy = True
            log.warning("forwarded_header.untrusted", peer=peer, remedy="Add its address to TRUSTED_PROXIES.")


class DefaultHeaders:
    """The headers of every response, encoded; uvicorn renews their list once a second, for the date.

    `closes` is whether they end the connection. `keep_alive` is added to responses after which the connection stays:
    its timeout is a second below the real one, so that no request is sent on a connection that is just being closed.
    """

    def __init__(self, state: ServerState, keep_alive_seconds: float) -> None:
        self.closes = False
        seconds = int(keep_alive_seconds) - 1
        self.keep_alive = (
            b"connection: keep-alive\r\nkeep-alive: timeout=%d\r\n" % seconds if seconds > 0 else b""
        )
        self._state = state
        self._list: Headers | None = None
        self._encoded = b""

    def encoded(self) -> bytes:
        headers = self._state.default_headers
        if headers is not self._list:
            self._list = headers
            self._encoded = b"".join([b"%b: %b\r\n" % pair for pair in headers if pair[0] != b"connection"])
            self.closes = any(name == b"connection" and b"close" in value for name, value in headers)
        return self._encoded


class TimeoutSweeper:
    """Checks the deadlines of all connections twice a second, while there are any.

    A timer for each request would cost every request. Times are the loop's own, so clock steps do not count.
    """

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._due: float | None = None
        self._was_late = False
        self._max_connections = min(context.limits.max_connections, _descriptors_for_clients())

    def connection_opened(self) -> None:
        """Starts the sweeps; with too many connections it closes some."""
        if self._due is None:
            self._schedule()
        if len(self._context.connections) > self._max_connections:
            self._evict()

    def _schedule(self) -> None:
        self._due = self._loop.time() + SWEEP_SECONDS
        self._loop.call_at(self._due, self._sweep)

    def _sweep(self) -> None:
        assert self._due is not None
        now = self._loop.time()
        late = now - self._due
        connections = tuple(self._context.connections)
        skipped = False
        if late > SWEEP_SECONDS:
            # The loop itself was blocked: what clients have sent meanwhile has not been read yet.
            for connection in connections:
                connection.extend_deadlines(late)
            skipped = not self._was_late
        if not skipped:
            for connection in connections:
                connection.check_deadlines(now)
        self._was_late = skipped
        if connections:
            self._schedule()
        else:
            self._due = None

    def _evict(self) -> None:
        now = self._loop.time()
        ranked = [
            (rank, connection)
            for connection in self._context.connections
            if (rank := connection.eviction_rank(now)) is not None
        ]
        ranked.sort(key=lambda entry: entry[0])
        # The new connection is the last of those that wait: it goes when there is nothing else to close.
        batch = min(max(_EVICTION_SHARE, self._max_connections // _EVICTION_SHARE), len(ranked) // 2)
        for _, connection in ranked[: max(1, batch)]:
            connection.close("crowded")


class ReadState(enum.Enum):
    """What a connection is receiving."""

    IDLE = 0
    HEAD = 1
    BODY = 2


class HttpProtocol(HttpToolsProtocol):
    """One connection. Responds with 431 to heads over the limits, 400 to what is not HTTP, 408 to slow clients.

    Responses are sent in the order of the requests; after an error response the connection ends.
    """

    cycle: RequestResponseCycle

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        context: ServerContext,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop or asyncio.get_running_loop())
        self.context = context
        self._asgi = {"version": self.asgi_version, "spec_version": "2.3"}
        self.read_state = ReadState.IDLE
        self.since = 0.0
        """Loop time since which the connection waits for its client."""
        self.written = 0
        """Bytes handed to the transport."""
        self._error = BAD_REQUEST
        # The cycle whose turn it is, until its response has been sent, and those that follow it.
        self._active: RequestResponseCycle | None = None
        self._queue: deque[RequestResponseCycle] = deque()
        # Reading: the bytes that hold the current request line, where to look for it, bytes since the last framing.
        self._raw: bytes | bytearray = b""
        self._line_at = 0
        self._unframed_bytes = 0
        self._last_host = b""
        self._ignores_upgrade = self._replays_head = False
        self._networks: tuple[tuple[str, int], ...] = ()
        self._counted_pending = False
        # Windows in which a minimum has to arrive, or be sent: when each began, and the state of its count.
        self._body_bytes = 0
        self._body_window: tuple[float, int] | None = None
        self._send_window: tuple[float, int, int] | None = None
        self._unsent_since: tuple[float, int] = (0.0, 0)
        self._paused_until: float | None = None
        self._discarding = False
        self._discarded_bytes = 0

    # Connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.transport.set_write_buffer_limits(high=_UNSENT_HIGH_WATER)
        if (peer := self._socket()) is not None:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _KERNEL_UNSENT_BYTES)
        if self.client is not None:
            self.client = (unmapped(self.client[0]), self.client[1])
        self.since = self.loop.time()
        self.context.sweeper.connection_opened()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        self.flow.resume_writing()
        if exc is None:
            self.transport.close()
        self.parser = cast(Any, None)
        self._end_pending()
        self.context.unsent.discard(self)
        self.context.leaving.discard(self)
        for cycle in (*self._queue, *((self._active,) if self._active is not None else ())):
            cycle.release_body()
            if not cycle.response_complete:
                cycle.disconnected = True
            cycle.notify()
            if cycle.task is not None and not cycle.task.done():
                self.context.admission.cancel_waiter(cycle.task)
        # Each of them refers to the connection; without this only the garbage collector would free them.
        self.cycle = cast(Any, None)
        self._active = None
        self._queue.clear()

    def _socket(self) -> socket.socket | None:
        """The connection's TCP socket; None for any other transport."""
        found: socket.socket | None = self.transport.get_extra_info("socket")
        return found if found is not None and found.family in _TCP_FAMILIES else None

    def shutdown(self) -> None:
        """Ends the connection after the response in progress; uvicorn calls this when it stops."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self.cycle.keep_alive = False

    def close(self, reason: str) -> None:
        """Closes the connection without a response, and counts it."""
        self.context.collaborators.count_closed(reason)
        self.context.unsent.discard(self)
        for cycle in (*self._queue, *((self._active,) if self._active is not None else ())):
            cycle.release_body()
        if self.transport.get_write_buffer_size():
            # Closing would wait until the client has taken the rest: that here, and that in the kernel.
            if (peer := self._socket()) is not None:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()
        else:
            self.transport.close()

    # Reading

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            self._discard(len(data))
        elif len(data) <= MAX_HEAD_BYTES or self.read_state is ReadState.BODY:
            self._parse(data)
        else:
            for start in range(0, len(data), MAX_HEAD_BYTES):
                if self._discarding:
                    self._discard(len(data) - start)
                    return
                self._parse(data[start : start + MAX_HEAD_BYTES])

    def _parse(self, data: bytes) -> None:
        if self.read_state is ReadState.HEAD:
            if not isinstance(self._raw, bytearray):
                self._raw = bytearray(self._raw)
            self._raw += data
        else:
            self._raw = data
            # Where the request line is expected: at the beginning, or anywhere behind the rest of a body.
            self._line_at = 0 if self.read_state is ReadState.IDLE else -1
        self._unframed_bytes += len(data)
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            if not self._discarding:
                self.send_error_and_close(self._error)
            return
        # The parser keeps a header (or a trailer, or a chunk's extension) until it is complete.
        if self._unframed_bytes > MAX_HEAD_BYTES:
            self.send_error_and_close(HEAD_TOO_LARGE)
        elif self.read_state is ReadState.BODY:
            self._raw = b""
            self._begin_pending()
        elif self.read_state is ReadState.IDLE:
            self._raw = b""

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Reads on after an offer to upgrade, which no request here accepts, with a new parser.

        The old one takes what follows the head for another protocol. The new one gets a head with the same framing.
        """
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        if self._ignores_upgrade:
            self._ignores_upgrade = False
            framing = next(
                pair for pair in self.headers if pair[0] in (b"content-length", b"transfer-encoding")
            )
            self._replays_head = True
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%b: %b\r\n\r\n" % framing)
        if rest:
            try:
                self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as upgrade:
                self._ignore_upgrade(rest[upgrade.args[0] :])

    def _discard(self, size: int) -> None:
        self._discarded_bytes += size
        if self._discarded_bytes > MAX_DISCARDED_BYTES:
            self.transport.close()

    # Parser callbacks

    def on_message_begin(self) -> None:
        if self._replays_head:
            return
        self.url = b""
        self.headers = []
        self.scope = cast(
            Any,
            {
                "type": "http",
                "asgi": self._asgi,
                "http_version": "1.1",
                "server": self.server,
                "client": self.client,
                "scheme": self.scheme,
                "root_path": self.root_path,
                "headers": self.headers,
                "state": self.app_state.copy(),
                "extensions": self.context.extensions,
            },
        )
        self.read_state = ReadState.HEAD
        self._error = BAD_REQUEST
        self.since = self.loop.time()

    def on_url(self, url: bytes) -> None:
        if not self._replays_head:
            self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers come after the request may have started, so they do not become headers.
        if self.read_state is ReadState.HEAD:
            # The parser leaves the blanks behind a value, which are no part of it (RFC 9110, 5.5).
            self.headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """Checks the head and makes the request's cycle; it starts here, with its body, or after earlier responses."""
        if self._replays_head:
            self._replays_head = False
            return
        self.read_state = ReadState.BODY
        self._body_window = None
        headers = self.headers
        # What was received is an upper bound of the head's size.
        if self._unframed_bytes > MAX_HEAD_BYTES or len(headers) > MAX_HEADERS:
            self._check_size()
        self._unframed_bytes = 0
        version = self.parser.get_http_version()
        method = self.parser.get_method()
        named = dict(headers)
        self._check_head(method, version, named)
        parsed = httptools.parse_url(self.url)
        path = parsed.path.decode("ascii")
        if "%" in path:
            path = unquote(path)
        scope = cast("dict[str, Any]", self.scope)
        scope["method"] = method.decode("ascii")
        scope["http_version"] = version
        scope["path"] = self.root_path + path
        scope["raw_path"] = self.root_path.encode("ascii") + parsed.path
        scope["query_string"] = parsed.query or b""
        if self.client is not None and (b"x-forwarded-for" in named or b"x-forwarded-proto" in named):
            self._resolve_client(scope)
        length = named.get(b"content-length", b"0").lstrip(b"0")
        chunked = b"transfer-encoding" in named
        cycle = RequestResponseCycle(self, keep_alive=version == "1.1" and self.parser.should_keep_alive())
        collaborators = self.context.collaborators
        cycle.is_probe = path in collaborators.probe_paths
        limit = collaborators.body_limits.get(path, self.context.limits.max_body_bytes)
        cycle.is_buffered = limit is not None and path not in collaborators.streamed_paths
        cycle.body_limit = limit
        if len(self._queue) >= MAX_PIPELINED:
            self._refuse(PIPELINE_FULL)
        if chunked or length:
            if limit is not None and length and (len(length) > 19 or int(length) > limit):
                self._refuse(BODY_TOO_LARGE)
            expects = named.get(b"expect", b"").lower() == b"100-continue" and version == "1.1"
            cycle.waiting_for_100_continue = expects
            if (chunked or expects or len(length) > _SHORT_LENGTH_DIGITS) and not cycle.is_probe:
                self._check_admission()
            self._ignores_upgrade = self.parser.should_upgrade()
        self.cycle = cycle
        if self._active is not None:
            self._queue.append(cycle)
            self.flow.pause_reading()
            return
        self._active = cycle
        if not cycle.is_buffered or cycle.waiting_for_100_continue:
            self._begin_turn(cycle)

    def _check_size(self) -> None:
        """Refuses a head over the limits."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._refuse(HEAD_TOO_LARGE)

    def _check_head(self, method: bytes, version: str, named: dict[bytes, bytes]) -> None:
        """Refuses what RFC 9112 forbids and the parser accepts."""
        headers = self.headers
        ending = _VERSIONS.get(version, b"")
        if not ending or method == b"CONNECT":
            self._refuse(BAD_REQUEST)
        # The parser skips blanks in the request line, and accepts RTSP/1.0 and ICE/1.0.
        line = b"%b %b%b" % (method, self.url, ending)
        found = self._raw.find(line, max(self._line_at, 0))
        if found < 0 or (self._line_at == 0 and found and self._raw[:found].strip(b"\r\n")):
            self._refuse(BAD_REQUEST)
        self._line_at = found + len(line)
        # 3.2 and 6.1: one Host (in HTTP/1.0 at most one), no chunks in HTTP/1.0.
        host = named.get(b"host")
        if host is None:
            if version == "1.1":
                self._refuse(BAD_REQUEST)
        elif host != self._last_host:
            if not _HOST.fullmatch(host):
                self._refuse(BAD_REQUEST)
            self._last_host = host
        if len(named) != len(headers) and [name for name, _ in headers].count(b"host") > 1:
            self._refuse(BAD_REQUEST)
        if b"transfer-encoding" in named:
            codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
            # The parser takes any list that ends in `chunked`, and would pass on a body that is still encoded.
            if version != "1.1" or codings != [b"chunked"]:
                self._refuse(BAD_REQUEST)

    def _resolve_client(self, scope: dict[str, Any]) -> None:
        """Replaces the peer by what trusted proxies say of the client."""
        assert self.client is not None
        addresses = self.context.collaborators.addresses
        forwarded = [value for name, value in self.headers if name == b"x-forwarded-for"]
        if addresses.is_trusted(self.client[0]):
            if forwarded:
                scope["client"] = addresses.resolve(self.client, forwarded)
            for name, value in self.headers:
                if name == b"x-forwarded-proto" and value.strip() in _SCHEMES:
                    scope["scheme"] = value.strip().decode("ascii")
        elif forwarded:
            self.context.warn_of_untrusted_proxy(self.client[0])

    def _refuse(self, error: HttpError) -> NoReturn:
        """Ends the request that is being read, from within a callback of the parser."""
        self._error = error
        raise _RequestRefused

    def _check_admission(self) -> None:
        """Refuses a long body before it is read where the request would be refused afterwards."""
        admission = self.context.admission
        if self._active is None and admission.is_overloaded():
            admission.record_refusal()
            self._refuse(HttpError(503, retry_after_seconds=admission.retry_after_seconds))

    def on_body(self, body: bytes) -> None:
        self._unframed_bytes = 0
        self._body_bytes += len(body)
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return
        cycle.body += body
        if cycle.is_buffered:
            assert cycle.body_limit is not None
            if len(cycle.body) > cycle.body_limit:
                self._refuse(BODY_TOO_LARGE)
            cycle.hold_body(len(body))
        else:
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.notify()

    def on_message_complete(self) -> None:
        self._unframed_bytes = 0
        if self._ignores_upgrade:
            return
        self.read_state = ReadState.IDLE
        if self._counted_pending:
            self._end_pending()
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return
        cycle.more_body = False
        cycle.notify()
        if cycle.is_buffered and cycle is self._active:
            self._start(cycle)

    # Unfinished requests

    def _begin_pending(self) -> None:
        """Counts a request whose body has not arrived with its head.

        Where its network has too many, the slowest of them is refused: a client that shares the address with an
        attacker sends its body at once.
        """
        cycle = self.cycle
        if self._counted_pending or cycle is None or not cycle.is_buffered or cycle.response_complete:
            return
        self._counted_pending = True
        self._networks = self._counted_networks()
        limit = self.context.limits.max_pending_requests_per_network
        now = self.loop.time()
        for network, multiple in self._networks:
            pending = self.context.pending_by_network.setdefault(network, set())
            pending.add(self)
            if len(pending) > limit * multiple:
                max(pending, key=lambda one: one.seconds_behind(now)).send_error_and_close(TOO_MANY_PENDING)

    def _counted_networks(self) -> tuple[tuple[str, int], ...]:
        """The client's networks; none for a proxy, because its clients would pay for one another."""
        client = self.scope["client"]
        if client is None:
            return ()
        if client is self.client and (
            any(name == b"x-forwarded-for" for name, _ in self.headers)
            or self.context.collaborators.addresses.is_trusted(client[0])
        ):
            return ()
        return networks_of(client[0])

    def _end_pending(self) -> None:
        by_network = self.context.pending_by_network
        for network, _ in self._networks:
            pending = by_network.get(network, set())
            pending.discard(self)
            if not pending:
                by_network.pop(network, None)
        self._networks = ()
        self._counted_pending = False

    # Starting and finishing requests

    def _begin_turn(self, cycle: RequestResponseCycle, *, pipelined: bool = False) -> None:
        """Starts the request, or goes on reading its body."""
        if cycle.error is not None:
            cycle.respond_with_error(cycle.error)
        elif not cycle.is_buffered or not cycle.more_body:
            self._start(cycle, pipelined=pipelined)
        else:
            self.flow.resume_reading()
            if cycle.waiting_for_100_continue:
                cycle.waiting_for_100_continue = False
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _start(self, cycle: RequestResponseCycle, *, pipelined: bool = False) -> None:
        admission = self.context.admission
        # A pipelined request was accepted with the one before it, and its connection does nothing else.
        if not cycle.is_probe and not pipelined and admission.is_overloaded():
            admission.record_refusal()
            seconds = admission.retry_after_seconds
            cycle.respond_with_error(HttpError(503, retry_after_seconds=seconds))
            self._pause_reading_for(seconds)
        elif admission.try_start() or cycle.is_probe:
            self._run(cycle)
        else:
            admission.enqueue(cycle, lambda: self._run(cycle))

    def _run(self, cycle: RequestResponseCycle) -> None:
        cycle.release_body()
        context = self.context
        cycle.task = task = self.loop.create_task(
            cycle.run_asgi(cast(Any, self.app)), context=context.variables.copy()
        )
        context.tasks.add(task)

    def on_response_complete(self) -> None:
        """Begins the next request's turn, or waits until the response has been sent."""
        cycle = self._active
        self.server_state.total_requests += 1
        if cycle is None or self.transport.is_closing():
            return
        if self.flow.write_paused:
            self.context.leaving.add(self)
        if not cycle.keep_alive:
            if cycle.more_body or cycle.error is not None:
                self._discard_and_close()
            else:
                self.transport.close()
        elif not self.flow.write_paused:
            self._next_turn()

    def _next_turn(self) -> None:
        self._active = None
        if self._queue:
            self._active = self._queue.popleft()
            self._begin_turn(self._active, pipelined=True)
        else:
            self.flow.resume_reading()
        if self.read_state is ReadState.IDLE:
            self.since = self.loop.time()

    def _pause_reading_for(self, seconds: float) -> None:
        """Reads nothing of a refused client for as long as its `Retry-After`, or until the overload has ended."""
        if not self.transport.is_closing():
            self.since = self.loop.time()
            self._paused_until = self.since + seconds
            self.flow.pause_reading()

    def _discard_and_close(self) -> None:
        """Closes after a bounded discard: a socket closed over unread input is reset, which can lose the response."""
        self._discarding = True
        self._end_pending()
        self.flow.resume_reading()
        if self.transport.is_closing():
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(DISCARD_SECONDS, self.transport.close)

    def send_error_and_close(self, error: HttpError) -> None:
        """Responds with an error, after the responses to earlier requests, and ends the connection."""
        self._discarding = True
        self._end_pending()
        if self.read_state is ReadState.IDLE:
            # Not even the first line of a head could be read.
            self.headers = []
            self.scope = cast(Any, {"type": "http", "headers": self.headers})
        cycle = self.cycle
        if cycle is None or cycle.scope is not self.scope:
            # The faulty request has no cycle yet.
            cycle = RequestResponseCycle(self, keep_alive=False)
            self.cycle = cycle
            if self._active is None:
                self._active = cycle
            else:
                self._queue.append(cycle)
        elif cycle.response_complete:
            self._discard_and_close()
            return
        cycle.keep_alive = False
        cycle.error = error
        cycle.release_body()
        if cycle is not self._active:
            return
        if cycle.response_started:
            cycle.disconnected = True
            cycle.notify()
            self._discard_and_close()
        else:
            cycle.respond_with_error(error)

    # Deadlines

    @property
    def waits_for_body(self) -> bool:
        """Whether a request has not started because its body has not arrived."""
        return (
            self.read_state is ReadState.BODY
            and not self._discarding
            and self.cycle is not None
            and self.cycle.is_buffered
            and not self.transport.is_closing()
        )

    def seconds_behind(self, now: float) -> float:
        """By how much a body lags behind the least rate."""
        return now - self.since - len(self.cycle.body) / self.context.limits.min_bytes_per_second

    def seconds_to_send(self, now: float) -> float:
        """An estimate of how long the client would need for the unsent bytes.

        Zero for a response that has just been written: its client had no time to read yet.
        """
        since, sent_before = self._unsent_since
        unsent = self.transport.get_write_buffer_size()
        sent = self.written - unsent - sent_before
        return unsent * (now - since) / (sent + _KERNEL_UNSENT_BYTES)

    def eviction_rank(self, now: float) -> tuple[int, float] | None:
        """The order in which connections are closed when there are too many; None while a request is in progress."""
        if self.transport.is_closing():
            return None
        if self in self.context.unsent and (self._discarding or self in self.context.leaving):
            return 2, -self.seconds_to_send(now)
        if self.waits_for_body and (self._active is None or self._active is self.cycle):
            behind = self.seconds_behind(now)
            return (0, -behind) if behind > _LATE_SECONDS else (2, -behind)
        if self._discarding or (self._active is None and self.read_state is not ReadState.BODY):
            return 1, self.since
        return None

    def check_deadlines(self, now: float) -> None:
        """Ends the connection when its client is late; time in which the server does not read does not count."""
        limits = self.context.limits
        if self._paused_until is not None:
            if now >= self._paused_until or not self.context.admission.is_overloaded():
                self._paused_until = None
                self.since = now
                self.flow.resume_reading()
        elif self._sends_too_slowly(now):
            self.close("stalled")
        elif self._discarding or self.transport.is_closing():
            return
        elif self.flow.read_paused:
            self.since, self._body_window = now, None
        elif self.read_state is ReadState.HEAD:
            if now - self.since > limits.header_timeout_seconds:
                self.context.collaborators.count_closed("slow-head")
                self.send_error_and_close(TIMED_OUT)
        elif self.read_state is ReadState.BODY:
            if self._receives_too_slowly(now):
                self.context.collaborators.count_closed("slow-body")
                self.send_error_and_close(TIMED_OUT)
        elif self._send_window is not None:
            self.since = now
        elif self.cycle is None:
            if now - self.since > limits.header_timeout_seconds:
                self.close("silent")
        elif self._active is None and now - self.since > limits.keep_alive_seconds:
            # Without a response: it would be taken for that to a request which is on its way (RFC 9110, 15.5.9).
            self.close("idle")

    def _receives_too_slowly(self, now: float) -> bool:
        """Whether a window has ended in which too little of the body, without its framing, has arrived."""
        limits = self.context.limits
        if self._body_window is None or (self.cycle is not None and self.cycle.waiting_for_100_continue):
            self._body_window = now, self._body_bytes
            return False
        began, before = self._body_window
        if now - began < limits.body_timeout_seconds:
            return False
        self._body_window = now, self._body_bytes
        return self._body_bytes - before < limits.min_bytes_per_second * limits.body_timeout_seconds

    def _sends_too_slowly(self, now: float) -> bool:
        """Whether a window has ended in which the client took too little of what was unsent when it began."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent or (self._active is not None and self._active.is_stream):
            self._send_window = None
            return False
        limits = self.context.limits
        sent = self.written - unsent
        if self._send_window is None:
            self._send_window = now, sent, unsent
            return False
        began, sent_before, unsent_before = self._send_window
        if now - began < limits.send_timeout_seconds:
            return False
        self._send_window = now, sent, unsent
        return sent - sent_before < min(
            unsent_before, limits.min_bytes_per_second * limits.send_timeout_seconds
        )

    def extend_deadlines(self, seconds: float) -> None:
        """Adds time in which the event loop was blocked."""
        self.since += seconds
        self._body_window = self._send_window = None

    # Flow control

    def pause_writing(self) -> None:
        self.flow.pause_writing()
        if self not in self.context.unsent:
            unsent = self.transport.get_write_buffer_size()
            self._unsent_since = self.loop.time(), self.written - unsent
            self.context.unsent.add(self)
        self.context.limit_unsent_bytes()

    def resume_writing(self) -> None:
        self.flow.resume_writing()
        self.context.unsent.discard(self)
        if self in self.context.leaving:
            self.context.leaving.discard(self)
            if not self.transport.is_closing() and not self._discarding:
                self._next_turn()


class RequestResponseCycle(httptools_impl.RequestResponseCycle):
    """One request and its response: uvicorn's cycle, with one write for the head and the first part of the body.

    `send` raises RuntimeError for messages out of order, for headers that would break the response, and for a body of
    another length than was announced.
    """

    def __init__(self, protocol: HttpProtocol, *, keep_alive: bool) -> None:
        # Not uvicorn's constructor: with an event for each request it costs 2 us.
        self.protocol = protocol
        self.context = protocol.context
        self.scope = protocol.scope
        self.transport = protocol.transport
        self.flow = protocol.flow
        self.on_response = protocol.on_response_complete
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = False
        self.disconnected = False
        self.body = bytearray()
        self.more_body = True
        self.response_started = False
        self.response_complete = False
        self.chunked_encoding: bool | None = None
        self.expected_content_length = 0
        self.task: asyncio.Task[None] | None = None
        self.is_probe = self.is_buffered = self.is_stream = False
        self.body_limit: int | None = None
        self.error: HttpError | None = None
        self._held_bytes = 0
        # Whether `receive` has something to return, and what it waits for otherwise.
        self._has_news = False
        self._event: asyncio.Event | None = None
        # The head, until it is sent with the first part of the body.
        self._head: bytes | None = None

    def notify(self) -> None:
        """Lets `receive` return: more of the body has arrived, or its end, or the client has disconnected."""
        self._has_news = True
        if self._event is not None:
            self._event.set()

    async def receive(self) -> Any:
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.waiting_for_100_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            if not self._has_news:
                if self._event is None:
                    self._event = asyncio.Event()
                self._event.clear()
                await self._event.wait()
            self._has_news = False
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        message = {"type": "http.request", "body": bytes(self.body), "more_body": self.more_body}
        self.body.clear()
        return message

    def hold_body(self, size: int) -> None:
        """Counts bytes of a body that is buffered until the request starts."""
        self._held_bytes += size
        self.context.buffered_body_bytes += size
        self.context.limit_buffered_bodies()

    def release_body(self) -> None:
        self.context.buffered_body_bytes -= self._held_bytes
        self._held_bytes = 0

    async def run_asgi(self, app: ASGIApp) -> None:  # type: ignore[override]
        try:
            await app(cast(Any, self.scope), cast(Any, self.receive), cast(Any, self.send))
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                text = self.context.collaborators.describe_exception(error)
                log.error("application.raised", exception=text)  # noqa: TRY400 - no values in it
            await self._fail()
        else:
            if not self.response_complete and not self.disconnected:
                log.error("application.incomplete_response")
                await self._fail()
        finally:
            self.on_response = _ignore
            if self.task is not None:
                self.context.tasks.discard(self.task)
                self.context.streams.discard(self.task)

    async def _fail(self) -> None:
        """Responds with 500; a response that was begun stays incomplete, and the client sees that."""
        if self.response_started:
            self.transport.close()
        elif not self.disconnected:
            await self.send_500_response()

    def respond_with_error(self, error: HttpError) -> None:
        """Responds in place of the application."""
        method = self.scope.get("method", "OTHER")
        headers = self.scope["headers"] if self.scope is self.protocol.scope else []
        rendered, body = self.context.collaborators.render_error(error, method, cast(Headers, headers))
        # Whatever the application still sends goes nowhere.
        self.disconnected = True
        self.respond(error.status, rendered, body)

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        self._start_response(status, headers)
        self._send_body(body, more=False)

    async def send(self, message: Message) -> None:  # type: ignore[override]
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        kind = message["type"]
        if self.response_complete:
            raise RuntimeError(f"Unexpected ASGI message {kind!r}: the response is complete.")
        if self.response_started != (kind == "http.response.body"):
            raise RuntimeError(f"Unexpected ASGI message {kind!r}.")
        if kind == "http.response.body":
            self._send_body(message.get("body", b""), more=message.get("more_body", False))
            return
        self._start_response(message["status"], message.get("headers", ()))
        if kind == self.context.collaborators.whole_response:
            self._send_body(message["body"], more=False)

    def _start_response(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Encodes the head."""
        self.response_started = True
        self.waiting_for_100_continue = False
        defaults = self.context.default_headers
        encoded, closes = defaults.encoded(), defaults.closes
        own = b"".join([b"%b: %b\r\n" % pair for pair in headers])
        if len(own) - len(own.translate(None, _CONTROLS)) != 2 * len(headers):
            raise RuntimeError("A header holds a control character.")
        said = framed = False
        for name, value in headers:
            if name == b"content-length":
                self.expected_content_length = int(value)
                framed = True
            elif name == b"transfer-encoding":
                self.chunked_encoding = framed = True
            elif name == b"connection" and b"close" in value.lower():
                closes = said = True
            elif name == b"content-type" and value.startswith(_EVENT_STREAM):
                self._become_stream()
        framing = b"\r\n"
        if not framed and status not in _NO_BODY and self.scope.get("method") != "HEAD":
            self.chunked_encoding = self.scope.get("http_version") != "1.0"
            if self.chunked_encoding:
                framing = b"transfer-encoding: chunked\r\n\r\n"
            else:
                # HTTP/1.0 has no chunks: the end of the connection is the end of the body.
                self.expected_content_length = -1
        if closes or not self.keep_alive or self.more_body:
            # A response before the end of its request's body ends the connection: the rest is not worth reading.
            self.keep_alive = False
            if not said:
                framing = b"connection: close\r\n" + framing
        else:
            framing = defaults.keep_alive + framing
        self._head = b"%b%b%b%b" % (STATUS_LINE[status], encoded, own, framing)

    def _become_stream(self) -> None:
        """A stream of events lasts as long as its client listens: it is not a request in progress, nor ever slow."""
        self.is_stream = True
        if self.task is not None:
            self.context.streams.add(self.task)

    def _send_body(self, body: bytes, *, more: bool) -> None:
        if self.scope.get("method") == "HEAD":
            body, self.expected_content_length = b"", 0
        elif self.chunked_encoding:
            size = len(body)
            body = b"%x\r\n%b\r\n" % (size, body) if size else b""
            if not more:
                body += b"0\r\n\r\n"
        elif self.expected_content_length >= 0:
            if len(body) > self.expected_content_length:
                raise RuntimeError("The body is longer than its Content-Length.")
            self.expected_content_length -= len(body)
            if not more and self.expected_content_length:
                raise RuntimeError("The body is shorter than its Content-Length.")
        if self._head is not None:
            body, self._head = self._head + body, None
        self.protocol.written += len(body)
        if not more:
            self.response_complete = True
            self.notify()
        self.transport.write(body)
        if not more:
            self.on_response()


def _ignore() -> None:
    """What a finished cycle has in place of its connection's method, so that neither keeps the other alive."""


def _descriptors_for_clients() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft - min(_RESERVED_DESCRIPTORS, soft // 2)
