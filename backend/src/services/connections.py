"""The budget of connections: one small pool, a fair queue in front of it, and one healer behind it.

Whoever wants a connection waits in the order of arrival. When the database is lost, nobody hammers it: a
single healer tries to reach it, everybody else waits for its verdict up to `recovery_wait_seconds` after the
loss, and is turned away at once from then on.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import asyncpg

from ..config.logging import get_logger
from ..errors import ConfigurationError, Overloaded, Unavailable
from . import hosts
from .faults import Diagnosis, as_refusal, as_request_error, diagnose
from .line import Forsaken, Line, NoProspect
from .vitality import PoolObservation, Vitality

if TYPE_CHECKING:
    from ..config.database import ConnectionSettings, Pooler
    from .metrics import DatabaseMetrics

    Connection = asyncpg.Connection[Any]
else:
    Connection = asyncpg.Connection

log = get_logger(__name__)

# Seconds between two attempts of the healer until an outage is so old: eager while callers may still wait for it. Rarer
# where the credentials are refused: whoever counts failed logins may lock the door.
_PAUSES = ((3.0, 0.05, 0.14), (30.0, 0.12, 0.6), (float("inf"), 1.0, 1.0))
# What one attempt of the healer may take: short ones notice a healed network soon, long ones suit a slow link.
_PATIENCE = (1.0, 2.0, 5.0)
# After a cancelled or unanswered statement the server is asked to stop it; then the connection is closed.
_DISCARD_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds a process works within. Times are in seconds; `Settings` documents each."""

    pool_size: int = 4
    pool_timeout_seconds: float = 2.0
    connect_timeout_seconds: float = 5.0
    command_timeout_seconds: float = 5.0
    statement_timeout_seconds: float = 4.0
    lock_timeout_seconds: float = 2.0
    recovery_wait_seconds: float = 1.5
    check_interval_seconds: float = 1.0


class Connections:
    """Opens, lends and takes back connections."""

    def __init__(
        self,
        settings: ConnectionSettings,
        limits: Limits,
        vitality: Vitality,
        metrics: DatabaseMetrics | None,
    ) -> None:
        self.settings = settings
        self.limits = limits
        self.vitality = vitality
        self.pooler = settings.pooler
        self.server_version: str | None = None
        self.read_only = False
        self._greet: Callable[[Connection], Awaitable[None]] = _no_greeting
        self._metrics = metrics
        # Those that wait for somebody, the one used last at the end; and all of ours, lent or idle, and whether one may
        # be lent again: not when it was open before a loss.
        self._idle: list[Connection] = []
        self._ours: dict[Connection, bool] = {}
        self._reached = False
        self.line = Line(limits.pool_size, limits.pool_timeout_seconds)
        self._healer: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._last_exhaustion_log = float("-inf")
        self._host = 0
        self._closing = False

    async def open(self, greet: Callable[[Connection], Awaitable[None]]) -> None:
        """Starts the healer and waits for the outcome of its first attempt.

        Raises `DatabaseRefused`, and `ConfigurationError` when a certificate file cannot be read; no others.

        `greet` runs on the first connection of every recovery, before anybody else gets one.
        """
        self._greet = greet
        tried = asyncio.Event()
        self._healer = asyncio.create_task(self._heal(tried), name="database-healer")
        await tried.wait()
        if self._healer.done():
            await self._healer

    async def close(self) -> None:
        """Waits for lent connections up to one command timeout, then closes all of them."""
        self._closing = True
        if self._healer is not None:
            self._healer.cancel()
            await asyncio.gather(self._healer, return_exceptions=True)
        if self._background:
            await asyncio.wait(self._background, timeout=_DISCARD_SECONDS)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.command_timeout_seconds):
                await self.line.emptied()
                await asyncio.gather(*(one.close() for one in self._ours), return_exceptions=True)
        for connection in self._ours:
            connection.terminate()

    # -- lending ---------------------------------------------------------------------------------------------

    def take(self) -> Connection | None:
        """A connection, where one waits for somebody and nothing stands in the way; else there is `acquire`."""
        if self.line.full or self._closing or self.vitality.outage_since is not None:
            return None
        connection = self._take_idle()
        self.line.inside += connection is not None
        if connection is not None and self._metrics is not None:
            self._metrics.wait(0.0)
        return connection

    async def acquire(self, deadline: float) -> Connection:
        """A connection to an open socket, in the order of arrival.

        Raises `Overloaded` when none comes free within `pool_timeout_seconds`, or will, `Unavailable` when the database
        cannot be reached. Nothing has been sent when it raises.
        """
        started = time.monotonic()
        while True:
            if self._closing:
                raise Unavailable("stopping", "The service is stopping.")
            if (since := self.vitality.outage_since) is not None:
                await self._admit(since, deadline)
            try:
                # Waiting for the healer has a bound of its own, so this one begins here.
                await self.line.enter(deadline - time.monotonic())
            except Forsaken:
                raise Overloaded("client-gone") from None
            except NoProspect:
                self._log_exhaustion()
                raise Overloaded("pool-exhausted") from None
            try:
                connection = self._take_idle() or await self._open_connection(deadline)
            except BaseException as error:
                self.line.leave()
                if not isinstance(error, Exception):
                    raise
                await self._could_not_connect(error, deadline)
            else:
                if self._metrics is not None:
                    self._metrics.wait(time.monotonic() - started)
                return connection

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
            del self._ours[connection]
        return None

    def release(self, connection: Connection) -> None:
        """Gives a connection back that answered everything it was asked, outside any transaction."""
        if connection.is_closed() or connection.is_in_transaction() or not self._ours.get(connection):
            self.discard(connection)
            return
        self._idle.append(connection)
        self.line.leave()

    def discard(self, connection: Connection) -> None:
        """Takes a connection back that saw trouble: it is closed, in the background, and never lent again."""

        async def close() -> None:
            try:
                # asyncpg has asked the server to cancel what runs; this waits for that, then closes.
                await connection.close(timeout=_DISCARD_SECONDS)
            except Exception as error:
                log.debug("connection.discarded", reason=diagnose(error).reason)
                connection.terminate()
            finally:
                self._ours.pop(connection, None)
                self.line.leave()

        task = asyncio.create_task(close(), name="database-discard")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    @property
    def idle_available(self) -> bool:
        """Whether a caller would get its turn at once."""
        return not self.line.full

    def lost(self, diagnosis: Diagnosis, *, waited_seconds: float | None = None) -> None:
        """A lent connection was lost. A statement unanswered for a command timeout (None), or for longer than the
        server itself allows it, means a dead server; one with less time, or a closed socket, does not yet."""
        if self._closing:
            return
        enough = min(self.limits.statement_timeout_seconds, 0.9 * self.limits.command_timeout_seconds)
        if diagnosis.reason == "timeout" and (waited_seconds is None or waited_seconds >= enough):
            self.vitality.failure(diagnosis.reason, "traffic")
        else:
            self.vitality.suspect(diagnosis.reason)
        self._start_healing()

    def unanswered(self, reason: str) -> None:
        """A health check got no answer."""
        self.vitality.failure(reason, "probe")
        self._start_healing()

    def observe(self) -> PoolObservation:
        opened = sum(not connection.is_closed() for connection in self._ours)
        return PoolObservation(self.limits.pool_size, opened, self.line.inside, self.line.waiting)

    async def _admit(self, since: float, deadline: float) -> None:
        until = min(deadline, since + self.limits.recovery_wait_seconds)
        if not await self.vitality.wait_restored(until):
            raise Unavailable(self.vitality.reason or "connecting")

    def _log_exhaustion(self) -> None:
        now = time.monotonic()
        if now - self._last_exhaustion_log >= 1.0:
            self._last_exhaustion_log = now
            log.warning("database.pool_exhausted", size=self.limits.pool_size, waiting=self.line.waiting)

    async def _could_not_connect(self, error: Exception, deadline: float) -> None:
        """Returns when it is worth another try, raises what the caller is to be told otherwise."""
        diagnosis = diagnose(error)
        self._count(diagnosis)
        others_live = self.observe().open > 0
        if diagnosis.reason in ("too-many-connections", "out-of-file-descriptors") and others_live:
            # The server is there, only this further connection was refused: wait for one of ours.
            if time.monotonic() + 0.1 > deadline:
                raise Overloaded(diagnosis.reason) from None
            await asyncio.sleep(random.uniform(0.02, 0.1))  # noqa: S311 - jitter, not a secret
            return
        self.vitality.failure(diagnosis.reason, "connect")
        self._start_healing()
        if diagnosis.fatal or time.monotonic() >= deadline:
            raise as_request_error(diagnosis, sent=False, writing=False) from None

    def _count(self, diagnosis: Diagnosis) -> None:
        if self._metrics is not None:
            self._metrics.error(diagnosis.reason)

    def _doubt_all(self) -> None:
        """Nobody gets a connection again that was open before a loss: the idle ones end now, the others when they are
        given back."""
        for connection in self._idle:
            del self._ours[connection]
            connection.terminate()
        self._idle.clear()
        self._ours = dict.fromkeys(self._ours, False)

    # -- healing ---------------------------------------------------------------------------------------------

    def _start_healing(self) -> None:
        if self._closing or (self._healer is not None and not self._healer.done()):
            return
        self._doubt_all()
        # Not in the context of the request that met the loss, whose id its log lines would carry.
        self._healer = asyncio.create_task(self._heal(), name="database-healer", context=Context())

    async def _heal(self, tried: asyncio.Event | None = None) -> None:
        """Tries until the database is reached. `tried` is set after the first attempt, which may be refused."""
        attempt, pause, began = 0, 0.0, time.monotonic()
        while not self._closing:
            first = tried is not None and not tried.is_set()
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311 - jitter
            patience = min(_PATIENCE[attempt % len(_PATIENCE)], self.limits.connect_timeout_seconds)
            attempt += 1
            try:
                await self._reach(self.limits.connect_timeout_seconds if first else patience)
            except Exception as error:
                diagnosis = diagnose(error)
                self._count(diagnosis)
                self.vitality.failure(diagnosis.reason, "connect")
                age = time.monotonic() - began
                pause = next(pauses[diagnosis.fatal] for until, *pauses in _PAUSES if age <= until)
                if first and isinstance(error, ConfigurationError):
                    raise  # a certificate file that cannot be read: the message names it
                if first and diagnosis.fatal:
                    raise as_refusal(diagnosis) from None
                if attempt == 1:
                    log.warning("database.down", reason=diagnosis.reason)
                if diagnosis.reason == "unexpected":
                    log.exception("database.healer_met_a_defect")
            else:
                if attempt > 1 or first:
                    log.info("database.up", attempts=attempt, server_version=self.server_version)
                return
            finally:
                if tried is not None:
                    tried.set()

    async def _reach(self, patience: float) -> None:
        """One attempt: connect, greet, and declare the outage over."""
        until = time.monotonic() + patience
        async with asyncio.timeout(patience):
            if not self._reached:
                if self.settings.pooler == "auto":
                    self.pooler = await self._sound(until)
                self._reached = True
            if self.idle_available:
                # The connection stays open, so the first caller finds it so.
                await self.line.enter(patience)
                try:
                    connection = self._take_idle() or await self._open_connection(until)
                except BaseException:
                    self.line.leave()
                    raise
                try:
                    await self._greet(connection)
                except BaseException:
                    self.discard(connection)
                    raise
                self.release(connection)
            else:
                # Every slot is held by a caller that still waits for an answer: look past them.
                connection = await self._connect(until)
                try:
                    await self._greet(connection)
                finally:
                    connection.terminate()
        self.vitality.restore("connect")

    async def _sound(self, until: float) -> Pooler:
        """Whether a pooler stands between: the process id the connection was given is then not the backend's."""
        connection = await self._dial(until, statement_cache_size=0)
        try:
            backend = await connection.fetchval("SELECT pg_backend_pid()")
            return "none" if backend == connection.get_server_pid() else "transaction"
        finally:
            connection.terminate()

    async def _dial(self, until: float, **arguments: Any) -> Connection:
        left = max(min(self.limits.connect_timeout_seconds, until - time.monotonic()), 0.001)
        connection, self._host = await hosts.connect(self.settings, left, begin=self._host, **arguments)
        return connection

    async def _open_connection(self, until: float) -> Connection:
        """One more for the pool; whoever calls has a place in the line for it."""
        connection = await self._connect(until)
        self._ours[connection] = True
        return connection

    async def _connect(self, until: float) -> Connection:
        limits = self.limits
        arguments: dict[str, Any] = {}
        if self.pooler == "none":
            # A pooler refuses these at start-up, so behind one the role's own settings have to do.
            arguments["server_settings"] = {
                "statement_timeout": str(round(limits.statement_timeout_seconds * 1000)),
                "lock_timeout": str(round(limits.lock_timeout_seconds * 1000)),
                "idle_in_transaction_session_timeout": "30000",
                **self.settings.server_settings,
            }
        connection = await self._dial(
            until,
            **arguments,
            command_timeout=limits.command_timeout_seconds,
            # Without tracking, a pooler hands us another backend, where our prepared statement does not exist.
            statement_cache_size=0 if self.pooler == "transaction" else 256,
            max_cached_statement_lifetime=0,
        )
        _keep_alive(connection)
        reported = connection.get_settings()
        self.server_version = reported.server_version
        self.read_only = "on" in (
            getattr(reported, "in_hot_standby", "off"),
            getattr(reported, "default_transaction_read_only", "off"),
        )
        return connection


async def _no_greeting(_: Connection) -> None:
    """Before `open` there is nothing to look at."""


def _keep_alive(connection: Connection) -> None:
    """Lets the kernel find a connection whose peer vanished, without a byte of ours in the stream."""
    transport = connection._transport  # type: ignore[attr-defined]
    raw: socket.socket | None = transport.get_extra_info("socket")
    if raw is None or raw.family not in (socket.AF_INET, socket.AF_INET6):
        return
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
