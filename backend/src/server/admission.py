"""Admission control: the one place that refuses requests because the worker is overloaded.

Without it requests would wait in the event loop, where they are not counted, and each would be begun before the
earlier ones are finished. So at most `MAX_STARTS_PER_TURN` requests start in one turn of the event loop, and none while
the pool queue is long enough to keep every database connection busy. The others wait here in the order of arrival;
those whose client disconnects are dropped. A request that would wait here for half of the pool timeout is refused.
Probes are always admitted.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from ..config.logging import get_logger

MAX_STARTS_PER_TURN: Final = 32
"""About twenty milliseconds of work, which bounds how long a probe waits for the event loop."""
MAX_POOL_WAITERS_PER_CONNECTION: Final = 8
"""Length of the pool queue, per connection, from which on no request starts; enough that no connection is idle."""
# The part of the timeout that a request may wait here; the rest is for its work and for errors of the estimate.
_SHARE_OF_TIMEOUT: Final = 0.5
# The estimate is used once requests have waited for so many seconds; the newest interval has this weight.
_MIN_OBSERVED_SECONDS: Final = 0.25
_NEWEST_WEIGHT: Final = 1 / 16
# `Retry-After` grows by a second for each so many refusals a second.
_REFUSALS_PER_EXTRA_SECOND: Final = 400.0
_MAX_RETRY_AFTER_SECONDS: Final = 8

log = get_logger("groundwork.http")


class PoolQueue(Protocol):
    """The queue in front of the database connections, as far as admission reads it."""

    places: int
    on_leaving: Callable[[], object] | None

    @property
    def waiting(self) -> int: ...

    def forsake(self, caller: asyncio.Task[Any]) -> None: ...


class Waiting(Protocol):
    """A request that waits for its start."""

    disconnected: bool


class AdmissionController:
    """Decides when requests start and which are refused; one for each worker.

    `in_progress` returns the number of requests in progress, which `max_concurrent_requests` bounds;
    `retry_after_seconds` is what refused clients are told.
    """

    def __init__(
        self,
        in_progress: Callable[[], int],
        max_concurrent_requests: float = float("inf"),
        timeout_seconds: float = float("inf"),
        pool_queue: PoolQueue | None = None,
    ) -> None:
        self.retry_after_seconds = 1
        self._loop = asyncio.get_running_loop()
        self._in_progress = in_progress
        self._max_concurrent_requests = max_concurrent_requests
        self._max_wait_seconds = timeout_seconds * _SHARE_OF_TIMEOUT
        self._pool_queue = pool_queue
        self._waiting: deque[tuple[Waiting, Callable[[], None]]] = deque()
        # When the queue became non-empty, when a request last started, and the mean interval between two starts.
        self._waiting_since = self._started_at = 0.0
        self._interval = 0.0
        self._starts_this_turn = 0
        self._refusals_per_second = 0.0
        self._refusals = 0
        self._logged_at = float("-inf")

    def is_overloaded(self) -> bool:
        """Whether a request that arrives now is to be refused."""
        waiting = len(self._waiting)
        if self._in_progress() + waiting >= self._max_concurrent_requests:
            return True
        return (
            waiting > 0
            and waiting * self._interval > self._max_wait_seconds
            and time.perf_counter() - self._waiting_since > _MIN_OBSERVED_SECONDS
        )

    def try_start(self) -> bool:
        """Whether a request may start at once; counts it if so."""
        started = self._starts_this_turn
        if self._waiting or started >= MAX_STARTS_PER_TURN:
            return False
        queue = self._pool_queue
        if queue is not None and MAX_POOL_WAITERS_PER_CONNECTION * queue.places - queue.waiting <= started:
            return False
        if not started:
            self._loop.call_soon(self._end_turn)
        self._starts_this_turn = started + 1
        return True

    def enqueue(self, request: Waiting, start: Callable[[], None]) -> None:
        """Calls `start` when the earlier requests have started, unless the client of `request` has disconnected."""
        self._waiting.append((request, start))
        if len(self._waiting) == 1:
            self._waiting_since = self._started_at = time.perf_counter()
            self._interval = 0.0
            self._continue_later()

    def cancel_waiter(self, task: asyncio.Task[Any]) -> None:
        """Takes a request whose client has disconnected out of the pool queue."""
        if self._pool_queue is not None:
            self._pool_queue.forsake(task)

    def record_refusal(self) -> None:
        """Counts a refusal. Logs once a second: a line for each would be a load of its own."""
        self._refusals += 1
        now = time.perf_counter()
        if now - self._logged_at < 1.0:
            return
        log.warning("requests.refused", count=self._refusals, under_way=self._in_progress())
        rate = self._refusals / (now - self._logged_at)
        self._refusals_per_second += (rate - self._refusals_per_second) / 2
        # Each refusal takes time from the work, so many of them spread out over more seconds.
        extra = int(self._refusals_per_second / _REFUSALS_PER_EXTRA_SECOND)
        self.retry_after_seconds = min(1 + extra, _MAX_RETRY_AFTER_SECONDS)
        self._refusals, self._logged_at = 0, now

    def _end_turn(self) -> None:
        self._starts_this_turn = 0

    def _room(self) -> int:
        """The number of requests that may still start in this turn."""
        room = MAX_STARTS_PER_TURN - self._starts_this_turn
        if (queue := self._pool_queue) is not None:
            most = MAX_POOL_WAITERS_PER_CONNECTION * queue.places
            room = min(room, most - queue.waiting - self._starts_this_turn)
        return max(room, 0)

    def _continue_later(self) -> None:
        self._loop.call_soon(self._continue)

    def _continue(self) -> None:
        """Starts some of the waiting requests."""
        room = self._room()
        started = 0
        while started < room and self._waiting:
            request, start = self._waiting.popleft()
            if not request.disconnected:
                started += 1
                start()
        if started:
            now = time.perf_counter()
            # Several starts at once weigh as much as the same number one after the other.
            newest = (now - self._started_at) / started
            self._interval += (newest - self._interval) * min(started * _NEWEST_WEIGHT, 1.0)
            self._started_at = now
            if not self._starts_this_turn:
                self._loop.call_soon(self._end_turn)
            self._starts_this_turn += started
        if not self._waiting:
            return
        if not room and self._pool_queue is not None and self._pool_queue.waiting:
            # The pool queue calls back when its next waiter leaves.
            self._pool_queue.on_leaving = self._continue_later
        else:
            self._continue_later()
