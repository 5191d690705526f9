"""How long clients may take and how many may come: one look over all connections, twice a second.

A timer for each request would cost every request. Connections note when they began to wait, and this looks at
what they noted: whoever is late is ended at most two looks after the deadline.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from .config.settings import Settings
    from .services.metrics import Metrics

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
            settings.request_head_seconds,
            settings.request_body_seconds,
            settings.response_stall_seconds,
            settings.min_bytes_per_second,
            settings.keep_alive_seconds,
            settings.max_connections,
        )


class Watched(Protocol):
    """A connection. `waiting_since` is when it began to wait for its client, or None while it has a request."""

    def look(self, now: float) -> None: ...
    def excuse(self, seconds: float) -> None: ...
    def cut(self, reason: str) -> None: ...
    @property
    def waiting_since(self) -> float | None: ...


class Watch:
    """Looks at the connections for as long as there are any. Times are the loop's own, so clock steps do not count."""

    def __init__(self, connections: Iterable[Watched], bounds: Bounds, metrics: Metrics | None) -> None:
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


def _descriptors_for_clients() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft - min(_DESCRIPTORS_OF_OURS, soft // 2)
