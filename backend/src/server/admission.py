"""The door in front of the application: whom it would serve too late is turned away before any work is done for him.

Where the processor is what is short, requests would wait in the event loop, where nobody sees them, and each would be
begun before the last was finished. So few begin in a turn of the loop, and none while enough stand in the line in front
of the database already. The others wait here: in the order of arrival, counted, dropped when their clients leave,
and for so long only as a client has patience. Probes go past them.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..api import problems
from ..api.middleware import METHODS, ON_EVERY_ANSWER, PROBES, SANE_REQUEST_ID
from ..config.logging import get_logger
from ..errors import Overloaded

if TYPE_CHECKING:
    from ..api.cors import Cors
    from ..config.settings import Settings
    from ..services.database import Database
    from ..services.line import Line
    from ..services.metrics import Metrics

BEGINNINGS: Final = 32
"""Requests that begin in one turn of the loop: some twenty milliseconds of work, and so what a probe waits for."""
STANDING: Final = 8
"""Callers in the line for each connection, from which on nothing more is begun: enough that none is ever idle."""
# How much of anybody's patience may go by here: the rest is for the work itself, and for estimates that err.
_SHARE: Final = 0.5
# The pace is judged once it was seen for so many seconds; the newest of it counts for so much.
_SEEN_SECONDS: Final = 0.25
_NEWEST: Final = 1 / 16
_ID: Final = "-id-"
# With so many refusals a second whoever is refused is asked to stay away for a second longer, and so on.
_REFUSALS: Final = 400.0
_LONGEST_REST: Final = 8
_PROBES: Final = frozenset(path.encode() for path in PROBES)

log = get_logger("groundwork.http")


class Request(Protocol):
    """A request as the server has it."""

    disconnected: bool
    scope: Any


class Door:
    """One for a worker. `tasks` are the requests under way and `most` bounds them; `line` is in front of the database.

    `rest_seconds` is for how long those who are turned away are asked to stay away.

    Nobody is let in who would wait here for half of `patience_seconds`.
    """

    def __init__(
        self,
        tasks: Collection[Any],
        most: int,
        patience_seconds: float,
        line: Line | None,
        metrics: Metrics | None,
        cors: Cors | None,
    ) -> None:
        self._metrics = metrics
        self._cors = cors
        self._loop = asyncio.get_running_loop()
        self._tasks = tasks
        self._most = most
        self._bound = patience_seconds * _SHARE
        self._line = line
        self._waiting: deque[tuple[Request, Callable[[], None]]] = deque()
        # Since when somebody has waited here all the time, when the last began, and the seconds between two beginnings.
        self._since = self._began_at = 0.0
        self._gap = 0.0
        self._begun = 0
        self.rest_seconds = 1
        self._refusals_a_second = 0.0
        self._turned_away = 0
        self._told_at = float("-inf")
        self._prefix = os.urandom(8).hex().encode()
        self._count = itertools.count(1)
        self._prepare()

    def _prepare(self) -> None:
        """What all refusals have in common."""
        error = Overloaded("too-many-requests", retry_after_seconds=self.rest_seconds)
        before, after = problems.body_of(error, _ID).split(_ID.encode())
        self._body = before, after
        fixed = {**problems.headers_of(error), "content-type": problems.MEDIA_TYPE}
        self._head = b"".join(
            [f"{name}: {value}\r\n".encode("ascii") for name, value in fixed.items()]
            + [b"%b: %b\r\n" % pair for pair in ON_EVERY_ANSWER]
        )

    @classmethod
    def of(cls, state: Any, tasks: Collection[Any]) -> Door:
        """For the application with this state; one without ours has no bounds."""
        settings: Settings | None = getattr(state, "settings", None)
        database: Database | None = getattr(state, "database", None)
        return cls(
            tasks,
            sys.maxsize if settings is None else settings.max_concurrent_requests,
            float("inf") if settings is None else settings.database_pool_timeout_seconds,
            None if database is None else database.line,
            getattr(state, "metrics", None),
            getattr(state, "cors", None),
        )

    def is_closed(self, target: bytes = b"") -> bool:
        """Whether a request for `target` is to be turned away. Probes never are."""
        waiting = len(self._waiting)
        if len(self._tasks) + waiting < self._most and not (waiting and self._waits_too_long(waiting)):
            return False
        return target.partition(b"?")[0] not in _PROBES

    def _waits_too_long(self, waiting: int) -> bool:
        return waiting * self._gap > self._bound and time.perf_counter() - self._since > _SEEN_SECONDS

    def lets_begin(self) -> bool:
        """Whether a request may begin at once, and counts it; most of them may."""
        begun = self._begun
        if self._waiting or begun >= BEGINNINGS:
            return False
        line = self._line
        if line is not None and STANDING * line.places - line.waiting <= begun:
            return False
        if not begun:
            self._loop.call_soon(self._end_turn)
        self._begun = begun + 1
        return True

    def begin(self, request: Request, start: Callable[[], None]) -> None:
        """Calls `start`, now or when those before have begun; never for a client that has left meanwhile."""
        if request.scope["path"] in PROBES or self.lets_begin():
            start()
            return
        self._waiting.append((request, start))
        if len(self._waiting) == 1:
            self._since = self._began_at = time.perf_counter()
            self._gap = 0.0
            self._go_on_later()

    def _end_turn(self) -> None:
        self._begun = 0

    def _room(self) -> int:
        """How many may begin in what is left of this turn."""
        room = BEGINNINGS - self._begun
        if self._line is not None:
            room = min(room, STANDING * self._line.places - self._line.waiting - self._begun)
        return max(room, 0)

    def _go_on_later(self) -> None:
        self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Begins some of those who wait."""
        room = self._room()
        begun = 0
        while begun < room and self._waiting:
            request, start = self._waiting.popleft()
            if not request.disconnected:
                begun += 1
                start()
        if begun:
            now = time.perf_counter()
            # So many beginnings at once weigh as much as one after the other.
            self._gap += ((now - self._began_at) / begun - self._gap) * min(begun * _NEWEST, 1.0)
            self._began_at = now
            if not self._begun:
                self._loop.call_soon(self._end_turn)
            self._begun += begun
        if not self._waiting:
            return
        if not room and self._line is not None and self._line.waiting:
            # Whoever waits in the line has somebody before him who will leave.
            self._line.on_leaving = self._go_on_later
        else:
            self._go_on_later()

    def forsake(self, task: asyncio.Task[Any]) -> None:
        """The client of `task` has left: if it still waits in the line, it need not."""
        if self._line is not None:
            self._line.forsake(task)

    def refusal(
        self,
        method: bytes,
        headers: Sequence[tuple[bytes, bytes]],
        usual: Sequence[tuple[bytes, bytes]],
        *,
        keep: bool,
    ) -> bytes:
        """The whole answer to a request that is turned away, put together from what is there already. Counts it.

        `headers` are the request's, `usual` those of every answer of the server.
        """
        request_id = b""
        for name, value in headers:
            if name == b"x-request-id" and SANE_REQUEST_ID.fullmatch(value):
                request_id = value
        if not request_id:
            request_id = b"%b-%x" % (self._prefix, next(self._count))
        before, after = self._body
        said = [
            b"HTTP/1.1 503 Service Unavailable\r\n",
            *(b"%b: %b\r\n" % pair for pair in usual if keep or pair[0] != b"connection"),
            b"content-length: %d\r\nx-request-id: %b\r\n"
            % (len(before) + len(request_id) + len(after), request_id),
            self._head,
        ]
        if self._cors is not None:
            said += [b"%b: %b\r\n" % pair for pair in self._cors.headers({"headers": headers})]
        if not keep:
            said.append(b"connection: close\r\n")
        said.append(b"\r\n")
        if method != b"HEAD":
            # An id that was kept holds nothing that JSON would have to escape.
            said += [before, request_id, after]
        self._count_refusal(method.decode("ascii"))
        return b"".join(said)

    def _count_refusal(self, method: str) -> None:
        """One log line a second for all of them: a line for each would be a load of its own."""
        if self._metrics is not None:
            self._metrics.request(method if method in METHODS else "OTHER", "unmatched", 503, 0.0)
        self._turned_away += 1
        now = time.perf_counter()
        if now - self._told_at >= 1.0:
            log.warning("requests.turned_away", count=self._turned_away, under_way=len(self._tasks))
            self._spread_out(self._turned_away / (now - self._told_at))
            self._turned_away, self._told_at = 0, now

    def _spread_out(self, refusals_a_second: float) -> None:
        """Each refusal takes from the work: the more there are, the longer those refused are to stay away."""
        self._refusals_a_second += (refusals_a_second - self._refusals_a_second) / 2
        rest = min(1 + int(self._refusals_a_second / _REFUSALS), _LONGEST_REST)
        if rest != self.rest_seconds:
            self.rest_seconds = rest
            self._prepare()
