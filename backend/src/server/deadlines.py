"""How long clients may take and how many may come: one look over all connections, twice a second.

A timer for each request would cost every request. Connections note when they began to wait, and this looks at
what they noted: whoever is late is ended at most two looks after the deadline.
"""

from __future__ import annotations

import asyncio
import enum
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..api import problems

if TYPE_CHECKING:
    from uvicorn.protocols.http.flow_control import FlowControl

    from ..config.settings import Settings
    from ..errors import RequestError
    from ..services.metrics import Metrics
    from .admission import Door
    from .exchange import Exchange

LOOK_SECONDS: Final = 0.5
# What a process needs beside its clients' connections: the database's, files of imports, the loop's own.
_DESCRIPTORS_OF_OURS: Final = 64
# Room is made for many at once, this share of all, or each newcomer would pay for a look at everybody.
_ROOM: Final = 16


@dataclass(frozen=True, slots=True)
class Bounds:
    """Times in seconds; `Settings` documents each."""

    head_seconds: float = 5.0
    body_seconds: float = 5.0
    stall_seconds: float = 30.0
    bytes_per_second: int = 1024
    keep_alive_seconds: float = 5.0
    connections: int = 4096

    @classmethod
    def of(cls, settings: Settings) -> Bounds:
        return cls(
            settings.header_timeout_seconds,
            settings.body_timeout_seconds,
            settings.send_timeout_seconds,
            settings.min_bytes_per_second,
            settings.keep_alive_seconds,
            settings.max_connections,
        )


class Watch:
    """Looks at the connections for as long as there are any. Times are the loop's own, so clock steps do not count."""

    def __init__(self, connections: Iterable[Timed], bounds: Bounds, metrics: Metrics | None) -> None:
        self.bounds = bounds
        self.metrics = metrics
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._due: float | None = None
        self._was_late = False
        self._most = min(bounds.connections, _descriptors_for_clients())

    def begin(self, number: int) -> None:
        """A connection was made, the `number`th of those that are open."""
        if self._due is None:
            self._next()
        if number > self._most:
            self._make_room()

    def count(self, reason: str) -> None:
        """Counts a connection that was ended for `reason`, one of few words."""
        if self.metrics is not None:
            self.metrics.cut(reason)

    def _next(self) -> None:
        self._due = self._loop.time() + LOOK_SECONDS
        self._loop.call_at(self._due, self._look)

    def _look(self) -> None:
        assert self._due is not None
        now = self._loop.time()
        late = now - self._due
        connections = tuple(self._connections)
        skipped = False
        if late > LOOK_SECONDS:
            # It was us who did nothing: what clients have sent meanwhile is not even read yet.
            for connection in connections:
                connection.excuse(late)
            skipped = not self._was_late
        if not skipped:
            for connection in connections:
                connection.look(now)
        self._was_late = skipped
        if connections:
            self._next()
        else:
            self._due = None

    def _make_room(self) -> None:
        waiting = [(since, one) for one in self._connections if (since := one.waiting_since) is not None]
        waiting.sort(key=lambda entry: entry[0])
        # The newcomer is the last of them: it goes when nobody else waits.
        for _, connection in waiting[: max(1, min(max(_ROOM, self._most // _ROOM), len(waiting) // 2))]:
            connection.cut("crowded")


class Awaits(enum.Enum):
    """What a connection still has to receive of the request that it is reading."""

    NOTHING = 0
    HEAD = 1
    BODY = 2


class Timed(asyncio.Protocol):
    """A connection with what it notes of its client's time: the part of a protocol that looks at it.

    The protocol says what it `awaits`, `since` when, and how many bytes it has `received`; `stretch` is None wherever
    a body begins.
    """

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    flow: FlowControl
    cycle: Exchange | None
    watch: Watch
    door: Door

    def __init__(self) -> None:
        self.awaits = Awaits.NOTHING
        # Whether the connection ends with what is owed to it: nothing that comes is read any more.
        self.refused = False
        self.since = 0.0
        self.received = 0
        # The time and the bytes at which the body's present stretch began.
        self.stretch: tuple[float, int] | None = None
        # Bytes that the client has not taken, since when it took none, and by when a finished answer has to be gone.
        self._unsent = 0
        self._untouched_since = 0.0
        self._gone_by: float | None = None
        self._held_until: float | None = None

    def refuse(self, error: RequestError) -> None:
        """Says why, and ends the connection."""
        raise NotImplementedError

    @property
    def waiting_since(self) -> float | None:
        """Since when we wait for the rest of a head, or for anything at all; None while there is a request."""
        if self.awaits is Awaits.BODY or self.transport.is_closing():
            return None
        if self.cycle is not None and not self.cycle.response_complete:
            return None
        return self._untouched_since if self._unsent else self.since

    def look(self, now: float) -> None:
        """Ends the connection when its client is late. Nobody waits for what we ourselves hold up."""
        if self._held_until is not None:
            # As long as its Retry-After says, or until the door is open again.
            if now >= self._held_until or not self.door.is_closed():
                self._held_until = None
                self.since = now
                self.flow.resume_reading()
        elif self._leaves_its_answers(now):
            self.cut("stalled")
        elif self.refused or self.transport.is_closing():
            return
        elif self.flow.read_paused:
            self.since, self.stretch = now, None
        elif self.awaits is Awaits.HEAD:
            if now - self.since > self.watch.bounds.head_seconds:
                self.watch.count("slow-head")
                self.refuse(problems.TooSlow())
        elif self.awaits is Awaits.BODY:
            if self._sends_too_slowly(now):
                self.watch.count("slow-body")
                self.refuse(problems.TooSlow())
        elif self._unsent:
            self.since = now
        elif self.cycle is None:
            if now - self.since > self.watch.bounds.head_seconds:
                self.cut("silent")
        elif self.cycle.response_complete and now - self.since > self.watch.bounds.keep_alive_seconds:
            # Without a word: it would be taken for the answer to a request that is on its way (RFC 9110, 15.5.9).
            self.cut("idle")

    def _sends_too_slowly(self, now: float) -> bool:
        """Whether a stretch of time has ended in which too little of the body came."""
        bounds = self.watch.bounds
        if self.stretch is None or (self.cycle is not None and self.cycle.waiting_for_100_continue):
            self.stretch = now, self.received
            return False
        began, received = self.stretch
        if now - began < bounds.body_seconds:
            return False
        self.stretch = now, self.received
        return self.received - received < bounds.bytes_per_second * bounds.body_seconds

    def _leaves_its_answers(self, now: float) -> bool:
        """Whether nothing of an answer was taken for long, or a finished one leaves too slowly."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent:
            self._unsent, self._gone_by = 0, None
            return False
        if not self._unsent or unsent < self._unsent:
            self._untouched_since = now
        self._unsent = unsent
        bounds = self.watch.bounds
        if self.cycle is None or self.cycle.response_complete:
            if self._gone_by is None:
                self._gone_by = now + bounds.stall_seconds + unsent / bounds.bytes_per_second
            if now > self._gone_by:
                return True
        return now - self._untouched_since > bounds.stall_seconds

    def pause_writing(self) -> None:
        self.flow.pause_writing()

    def resume_writing(self) -> None:
        # The client has taken most of what there was, and more may be written before anybody looks again.
        self._unsent = 0
        self.flow.resume_writing()

    def hold(self, seconds: float) -> None:
        """Reads nothing of a client that was asked to wait, for as long or until the door is open again."""
        self.since = self.loop.time()
        self._held_until = self.since + seconds
        self.flow.pause_reading()

    def excuse(self, seconds: float) -> None:
        """Does not count a time in which nothing was read or sent because we did not get to it."""
        self.since += seconds
        self._untouched_since += seconds
        self.stretch = None

    def cut(self, reason: str) -> None:
        self.watch.count(reason)
        if self._unsent:
            # Closing would wait until the rest is taken.
            self.transport.abort()
        else:
            self.transport.close()


def _descriptors_for_clients() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft - min(_DESCRIPTORS_OF_OURS, soft // 2)
