"""Every counter, gauge and histogram, declared once.

A `Metrics` has its own registry, so several applications can live in one process. With several workers
prometheus-client keeps the numbers in memory-mapped files that every worker reads: it chooses that mode from
`PROMETHEUS_MULTIPROC_DIR` when it is first imported, so whoever starts workers sets it before they begin.
Counters and histograms are then sums over the workers, and each gauge says below how workers are combined.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client import values as prometheus_values
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector

from ..config.log_writer import dropped_lines

if TYPE_CHECKING:
    from .vitality import Observation

REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STATEMENT_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
WAIT_BUCKETS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
CHECK_BUCKETS = (0.00001, 0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)
LAG_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
HEALTH_STATES = ("starting", "up", "asleep", "down")
LAG_INTERVAL_SECONDS = 0.5
LAG_SAMPLES = 20
_OPEN_METRICS = "application/openmetrics-text"


class DatabaseMetrics(Protocol):
    """What the database service tells about its work. Names and kinds are fixed sets, never input."""

    def wait(self, seconds: float) -> None: ...
    def statement(self, name: str, seconds: float, outcome: str) -> None: ...
    def error(self, kind: str) -> None: ...
    def retry(self, name: str) -> None: ...


class Lag(NamedTuple):
    """The worst event-loop delay of the last ten seconds, and when it was last measured (None: not yet)."""

    seconds: float | None
    at: datetime | None


class _Workers(MultiProcessCollector):
    def collect(self) -> Any:
        # A worker makes its file a moment before it gives it its size, and the library stumbles over the empty one.
        files = []
        for path in Path(self._path).glob("*.db"):
            with contextlib.suppress(FileNotFoundError):  # Those of a dead worker are taken away.
                if path.stat().st_size:
                    files.append(str(path))
        return self.merge(files, accumulate=True)  # type: ignore[no-untyped-call]


class Metrics:
    """Every number of the service, declared once, in a registry of its own; `render` gives them as text."""

    def __init__(self, version: str) -> None:
        # A `_created` series beside every counter doubles the text and is not there with several workers.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        # In multiprocess mode the numbers of all workers come from the files, not from this registry.
        self.multiprocess: bool = prometheus_values.ValueClass._multiprocess
        if not self.multiprocess:
            ProcessCollector(registry=registry)

        self._requests = Counter(
            "http_requests_total",
            "Requests answered, by route template.",
            ("method", "route", "status"),
            registry=registry,
        )
        self._request_seconds = Histogram(
            "http_request_duration_seconds",
            "Seconds from a request's arrival to its last byte, by route template.",
            ("method", "route"),
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self._pool_wait = Histogram(
            "groundwork_pool_wait_seconds",
            "Seconds spent waiting for a database connection.",
            buckets=WAIT_BUCKETS,
            registry=registry,
        )
        self._statement_seconds = Histogram(
            "groundwork_database_statement_seconds",
            "Seconds of one statement, its repeats included.",
            ("statement", "outcome"),
            buckets=STATEMENT_BUCKETS,
            registry=registry,
        )
        self._errors = Counter(
            "groundwork_database_errors_total",
            "Database errors, by kind.",
            ("kind",),
            registry=registry,
        )
        self._retries = Counter(
            "groundwork_database_retries_total",
            "Statements and transactions that were sent again.",
            ("statement",),
            registry=registry,
        )
        self._check_seconds = Histogram(
            "groundwork_health_check_duration_seconds",
            "Seconds of one health check.",
            ("check", "outcome"),
            buckets=CHECK_BUCKETS,
            registry=registry,
        )
        self._cut = Counter(
            "groundwork_connections_cut_total",
            "Connections of clients that were ended by a bound, by which.",
            ("reason",),
            registry=registry,
        )
        self._log_dropped = Counter(
            "groundwork_log_lines_dropped_total",
            "Log lines that were lost because their sink blocked or refused them.",
            registry=registry,
        )
        self._log_dropped_counted = 0
        self._lag_seconds = Histogram(
            "groundwork_event_loop_lag_seconds",
            "Seconds by which the event loop woke late, sampled twice a second.",
            buckets=LAG_BUCKETS,
            registry=registry,
        )

        def gauge(name: str, text: str, labels: tuple[str, ...] = (), *, workers: str = "livesum") -> Gauge:
            return Gauge(name, text, labels, registry=registry, multiprocess_mode=workers)  # type: ignore[arg-type]

        self._pool_size = gauge("groundwork_pool_size", "Connections the pools may hold; sum of the workers.")
        self._pool_open = gauge("groundwork_pool_open", "Connections that are open; sum of the workers.")
        self._pool_in_use = gauge("groundwork_pool_in_use", "Connections at work; sum of the workers.")
        self._pool_waiting = gauge("groundwork_pool_waiting", "Callers in the queue; sum of the workers.")
        self._state = gauge(
            "groundwork_health_state", "How many workers see the database in this state.", ("state",)
        )
        self._ready = gauge("groundwork_ready", "1 when every worker is ready, else 0.", workers="livemin")
        self._evidence_age = gauge(
            "groundwork_health_evidence_age_seconds",
            "Seconds since anything was known of the database, or since the start; the oldest worker.",
            workers="livemax",
        )
        self._build = gauge(
            "groundwork_build_info",
            "1; the labels say what is running.",
            ("version", "python"),
            workers="livemax",
        )
        self._build.labels(version, platform.python_version()).set(1)

        self._created = time.monotonic()
        self._lags: deque[float] = deque(maxlen=LAG_SAMPLES)
        self._lag_at: datetime | None = None
        # `labels()` validates and locks; the sets of values are small and fixed, so each child is kept.
        self._request_children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._statement_children: dict[tuple[str, str], Histogram] = {}

    # The database's words (DatabaseMetrics).

    def wait(self, seconds: float) -> None:
        self._pool_wait.observe(seconds)

    def statement(self, name: str, seconds: float, outcome: str) -> None:
        key = (name, outcome)
        child = self._statement_children.get(key)
        if child is None:
            child = self._statement_children[key] = self._statement_seconds.labels(name, outcome)
        child.observe(seconds)

    def error(self, kind: str) -> None:
        self._errors.labels(kind).inc()

    def retry(self, name: str) -> None:
        self._retries.labels(name).inc()

    # The middleware's and the health endpoints' words.

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts one answered request. `route` is a template, `method` a known word: bounded sets."""
        key = (method, route, status)
        children = self._request_children.get(key)
        if children is None:
            children = (
                self._requests.labels(method, route, str(status)),
                self._request_seconds.labels(method, route),
            )
            self._request_children[key] = children
        children[0].inc()
        children[1].observe(seconds)

    def cut(self, reason: str) -> None:
        """Counts a client's connection that was ended; `reason` is one of few words."""
        self._cut.labels(reason).inc()

    @contextmanager
    def checking(self, check: str) -> Iterator[Callable[[str], None]]:
        """Times one health check; the body says its outcome, `pass`, `warn` or `fail` (raising: `error`)."""
        outcome = "error"

        def conclude(word: str) -> None:
            nonlocal outcome
            outcome = word

        started = time.perf_counter()
        try:
            yield conclude
        finally:
            self._check_seconds.labels(check, outcome).observe(time.perf_counter() - started)

    def lag(self) -> Lag:
        return Lag(max(self._lags) if self._lags else None, self._lag_at)

    def observe(self, observation: Observation) -> None:
        """Sets every gauge from what the database knows of itself; nothing is sent to the database."""
        pool = observation.pool
        self._pool_size.set(pool.size)
        self._pool_open.set(pool.open)
        self._pool_in_use.set(pool.in_use)
        self._pool_waiting.set(pool.waiting)
        for state in HEALTH_STATES:
            self._state.labels(state).set(state == observation.status)
        self._ready.set(observation.ready)
        age = observation.evidence_age_seconds
        self._evidence_age.set(time.monotonic() - self._created if age is None else age)

    def _count_dropped_log_lines(self) -> None:
        dropped = dropped_lines()
        self._log_dropped.inc(dropped - self._log_dropped_counted)
        self._log_dropped_counted = dropped

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition text and its content type, in the dialect that the scraper's Accept asks for."""
        self._count_dropped_log_lines()
        # The library parses versions that a client made up, and fails on some; which dialect is all we let it say.
        offered = {part.partition(";")[0].strip() for part in accept.split(",")}
        encode, content_type = choose_encoder(_OPEN_METRICS if _OPEN_METRICS in offered else "")
        if not self.multiprocess:
            return encode(self.registry), content_type
        registry = CollectorRegistry()
        _Workers(registry)  # type: ignore[no-untyped-call]
        return encode(registry), content_type

    async def sample(self, observe: Callable[[], Observation]) -> None:
        """Measures the event loop's lag for ever; with several workers, keeps this one's gauges fresh too."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_INTERVAL_SECONDS
            await asyncio.sleep(LAG_INTERVAL_SECONDS)
            late = max(0.0, loop.time() - due)
            self._lags.append(late)
            self._lag_at = datetime.now(UTC)
            self._lag_seconds.observe(late)
            if self.multiprocess:
                self._count_dropped_log_lines()
                self.observe(observe())
