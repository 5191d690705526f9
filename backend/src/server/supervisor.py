"""The supervisor: binds the port and keeps WORKERS worker processes behind it.

One thread with a selector and no event loop; it serves no request. It starts the embedded PostgreSQL when asked to,
binds the listening sockets, starts the workers (`python -m src.server`), replaces those that die, and shuts them down
in order. docs/decisions/0001-process-model.md gives the reasons.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import SecretStr

from ..config.logging import WORKER_NUMBER, configure_service, get_logger, log_refusal
from ..config.settings import Settings, as_environment, require_database
from ..embedded.lifetime import die_with_parent
from ..errors import ConfigurationError, GroundworkError
from . import sockets
from .control import (
    ADMIN_LISTENER_FDS,
    CANCEL_SECONDS,
    CLOSE_SECONDS,
    CONTROL_FD,
    EMBEDDED,
    LINGER_SECONDS,
    LISTENER_FDS,
    SERVING,
    Shutdown,
)
from .metrics_directory import metrics_directory, remove_gauges
from .reloader import SourceWatcher
from .signals import signals_as_bytes

if TYPE_CHECKING:
    from ..embedded.server import EmbeddedPostgres

WORKER_COMMAND: Final = (sys.executable, "-P", "-m", "src.server")
MAX_START_ATTEMPTS: Final = 3
"""Failed starts in a row after which the supervisor gives up, when no other worker serves."""

_IMPORT_ROOT = Path(__file__).resolve().parents[2]
_MAX_BACKOFF_SECONDS = 30.0
_STABLE_SECONDS = 10.0
_RELOAD_POLL_SECONDS = 0.5
_KILL_MARGIN_SECONDS = 1.0

log = get_logger("groundwork.supervisor")

Announce = Callable[[Settings, dict[str, Any]], None]


def log_ready(settings: Settings, facts: dict[str, Any]) -> None:
    """Announce that the service is ready as one event; the command line passes a banner for terminals instead."""
    log.info("service.ready", **facts, workers=settings.workers)


@dataclass(eq=False, slots=True)
class _Worker:
    """One worker process. `shutdown` is the most urgent order sent to it, 0 for none."""

    slot: _Slot
    process: subprocess.Popen[bytes]
    control: socket.socket
    started_at: float
    serving: bool = False
    shutdown: int = 0
    kill_at: float | None = None

    @property
    def pid(self) -> int:
        return self.process.pid


@dataclass(eq=False, slots=True)
class _Slot:
    """The place of one worker, with its own queue of connections."""

    number: int
    worker: _Worker | None = None
    failed_starts: int = 0
    short_lives: int = 0
    start_at: float | None = None


def run(
    settings: Settings,
    *,
    embedded: bool,
    embedded_port: int | None = None,
    reload: bool,
    workers: int,
    announce: Announce = log_ready,
    worker_command: Sequence[str] = WORKER_COMMAND,
) -> int:
    """Serve until a signal stops it. Returns the exit code: 0 stopped, 1 failed, 3 configuration or credentials."""
    configure_service(settings)
    with contextlib.ExitStack() as stack:
        wakeup = stack.enter_context(signals_as_bytes())
        sockets.raise_descriptor_limit()
        try:
            postgres: EmbeddedPostgres | None = None
            if embedded:
                from ..embedded.server import EmbeddedPostgres

                postgres = EmbeddedPostgres(settings.data_directory, port=embedded_port)
                if embedded_port is not None:
                    postgres.location.require_own_user()
                stack.enter_context(postgres)
            if reload:
                workers = 1
            listeners = sockets.bind(settings.host, settings.port, queues=workers)
            admin = sockets.bind_admin(settings.admin_host, settings.admin_port)
        except GroundworkError as error:
            return log_refusal(error)
        supervisor = _Supervisor(
            settings, postgres, listeners, admin, announce, worker_command, wakeup, watch=reload
        )
        stack.callback(supervisor.close)
        if workers > 1:
            supervisor.metrics_directory = stack.enter_context(metrics_directory())
        log.info("service.starting", workers=workers)
        exit_code = supervisor.run()
        log.info("service.stopped", exit_code=exit_code)
        return exit_code


class _Supervisor:
    """Opened by `run`, closed by `close`. One thread, one selector: control channels, signals and the clock."""

    def __init__(
        self,
        settings: Settings,
        postgres: EmbeddedPostgres | None,
        listeners: list[socket.socket],
        admin: list[socket.socket],
        announce: Announce,
        worker_command: Sequence[str],
        wakeup: socket.socket,
        *,
        watch: bool,
    ) -> None:
        self.metrics_directory: Path | None = None
        self._postgres = postgres
        self._postgres_at: float | None = None
        self._postgres_failures = 0
        self._listeners = listeners
        self._admin = admin
        self._announce = announce
        self._command = tuple(worker_command)
        self._wakeup = wakeup
        port = listeners[0].getsockname()[1]
        changes: dict[str, Any] = {"port": port, "workers": len(listeners)}
        if admin:
            changes["admin_port"] = admin[0].getsockname()[1]
        if postgres is not None:
            # Workers are bound by row-level security; only migrations run as the owner of the tables.
            changes["database_url"] = SecretStr(postgres.application_url)
            changes["database_migration_url"] = SecretStr(postgres.url)
        if watch:
            # A developer waits for the restart, and no load balancer does.
            changes["drain_grace_seconds"] = 0.0
        self._settings = settings.model_copy(update=changes)
        # What the command line and the supervisor decided. Workers load the rest themselves, so that one started
        # later sees changes in .env and in files of secrets.
        overridden = {name for name in type(settings).model_fields if settings.origin(name) == "command"}
        values = as_environment(self._settings)
        self._overrides = {name.upper(): values.get(name.upper(), "") for name in overridden | set(changes)}
        self._slots = [_Slot(number) for number in range(len(listeners))]
        self._all: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeup, selectors.EVENT_READ)
        self._exit_code: int | None = None
        self._announced = False
        self._renewing: list[_Slot] = []
        self._replacement: _Worker | None = None
        self._sources = SourceWatcher(_IMPORT_ROOT / "src") if watch else None
        self._next_poll = 0.0
        # A terminal that closes sends SIGHUP to stop its programs; an operator sends it to renew a service.
        self._in_terminal = sys.stdin is not None and sys.stdin.isatty()

    def run(self) -> int:
        # One first: a bad configuration then speaks once, and only one migrates.
        self._slots[0].start_at = 0.0
        while True:
            self._run_due()
            if self._exit_code is not None and not self._all:
                return self._exit_code
            for key, _ in self._selector.select(self._seconds_to_next()):
                if key.data is None:
                    self._handle_signals(self._wakeup.recv(4096))
                else:
                    self._receive(key.data)
            self._reap()

    def close(self) -> None:
        """End what is still there after an error of ours; on the usual way nothing is."""
        for worker in self._all:
            worker.process.kill()
            worker.process.wait()
        for listener in [*self._listeners, *self._admin]:
            listener.close()
        self._selector.close()

    # The clock

    def _run_due(self) -> None:
        now = time.monotonic()
        for worker in self._all:
            if worker.kill_at is not None and now >= worker.kill_at:
                log.error("worker.shutdown_timeout", pid=worker.pid)
                worker.process.kill()
                worker.kill_at = None
        if self._exit_code is not None:
            return
        if self._postgres is not None:
            self._keep_postgres_running(self._postgres, now)
        for slot in self._slots:
            if slot.start_at is not None and now >= slot.start_at:
                slot.start_at = None
                slot.worker = self._start(slot)
        if self._sources is not None and now >= self._next_poll:
            self._next_poll = now + _RELOAD_POLL_SECONDS
            if changed := self._sources.changed():
                log.info("source.changed", file=str(changed))
                self._restart_changed()

    def _seconds_to_next(self) -> float | None:
        due = [worker.kill_at for worker in self._all if worker.kill_at is not None]
        if self._exit_code is None:
            due += [slot.start_at for slot in self._slots if slot.start_at is not None]
            if self._sources is not None:
                due.append(self._next_poll)
            if self._postgres_at is not None:
                due.append(self._postgres_at)
        return max(0.0, min(due) - time.monotonic()) if due else None

    # Workers

    def _start(self, slot: _Slot) -> _Worker:
        channel, worker_end = socket.socketpair()
        channel.setblocking(False)
        number = slot.number
        queues = [self._listeners[number], *self._listeners[:number], *self._listeners[number + 1 :]]
        try:
            process = subprocess.Popen(  # noqa: S603 - a constant, or a test's own
                self._command,
                env={**self._environment(), CONTROL_FD: _numbers([worker_end]), LISTENER_FDS: _numbers(queues),
                     ADMIN_LISTENER_FDS: _numbers(self._admin), WORKER_NUMBER: str(number)},
                pass_fds=[worker_end.fileno(), *(queue.fileno() for queue in [*queues, *self._admin])],
                stdin=subprocess.DEVNULL,
                # Ctrl-C goes to the terminal's whole foreground group. Workers hear of it from us, once.
                process_group=0,
                # Before its first line is read: a worker that still imports must not outlive us either.
                preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509 - one thread
            )  # fmt: skip
        finally:
            worker_end.close()
        worker = _Worker(slot, process, channel, time.monotonic())
        self._all.append(worker)
        self._selector.register(channel, selectors.EVENT_READ, worker)
        return worker

    def _environment(self) -> dict[str, str]:
        """What workers read their settings from."""
        environment = {**os.environ, **self._overrides}
        # `-P` keeps a directory called src in the caller's working directory from being taken for ours.
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(_IMPORT_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        )
        environment.pop(EMBEDDED, None)
        if self._postgres is not None:
            environment[EMBEDDED] = "1"
        # Read by prometheus-client when it is imported. One worker needs no files.
        environment.pop("PROMETHEUS_MULTIPROC_DIR", None)
        if self.metrics_directory is not None:
            environment["PROMETHEUS_MULTIPROC_DIR"] = str(self.metrics_directory)
        return environment

    def _receive(self, worker: _Worker) -> None:
        try:
            message = worker.control.recv(16)
        except OSError:
            message = b""
        if not message:
            # It ended, or is about to: `_reap` learns how.
            self._selector.unregister(worker.control)
        elif message.startswith(SERVING):
            worker.serving = True
            worker.slot.failed_starts = 0
            log.debug(
                "worker.started", pid=worker.pid, seconds=round(time.monotonic() - worker.started_at, 3)
            )
            if self._exit_code is None:
                self._handle_serving(worker)

    def _handle_serving(self, worker: _Worker) -> None:
        if not self._announced:
            self._announced = True
            self._announce(self._settings, self._facts())
        for slot in self._slots:
            if slot.worker is None and slot.start_at is None and slot.failed_starts == 0:
                slot.start_at = 0.0
        if worker is self._replacement:
            old, worker.slot.worker, self._replacement = worker.slot.worker, worker, None
            worker.slot.start_at = None  # The old one may have fallen meanwhile.
            if old is not None:
                self._shut_down(old, Shutdown.ROLLING)
            else:
                self._renew_next()

    def _shut_down(self, worker: _Worker, how: Shutdown) -> None:
        if worker.shutdown >= how:
            return
        worker.shutdown = how
        if worker.serving:
            with contextlib.suppress(OSError):
                worker.control.send(bytes([how]))
        else:
            worker.process.terminate()
        grace = 0.0
        if how <= Shutdown.GRACEFUL:
            grace = self._settings.drain_grace_seconds if how == Shutdown.GRACEFUL else LINGER_SECONDS
        drain = self._settings.shutdown_timeout_seconds if how < Shutdown.FORCED else 0.0
        bound = grace + drain + CANCEL_SECONDS + CLOSE_SECONDS + _KILL_MARGIN_SECONDS
        worker.kill_at = time.monotonic() + bound

    def _reap(self) -> None:
        for worker in [worker for worker in self._all if worker.process.poll() is not None]:
            if not worker.serving and worker.control in self._selector.get_map():
                self._receive(worker)  # It may have served and ended since we last looked.
            self._all.remove(worker)
            with contextlib.suppress(KeyError):
                self._selector.unregister(worker.control)
            worker.control.close()
            if self.metrics_directory is not None:
                remove_gauges(self.metrics_directory, worker.pid)
            if self._exit_code is None:
                self._handle_exit(worker)

    def _handle_exit(self, worker: _Worker) -> None:
        slot, code = worker.slot, worker.process.returncode
        if worker is self._replacement:
            self._replacement = None
            self._renewing.clear()
            log.error("workers.renewal_failed", reason=_exit_reason(code))
        elif slot.worker is not worker:
            self._renew_next()  # A retired one has gone.
        else:
            slot.worker = None
            if self._sources is not None and not worker.shutdown and not worker.serving:
                log.error("worker.waiting_for_change", reason=_exit_reason(code))
            elif worker.shutdown:
                slot.start_at = 0.0  # Its source has changed.
            elif worker.serving:
                self._restart_worker(slot, worker, code)
            else:
                self._handle_failed_start(slot, code)

    def _restart_worker(self, slot: _Slot, worker: _Worker, code: int) -> None:
        steady = time.monotonic() - worker.started_at > _STABLE_SECONDS
        slot.short_lives = 0 if steady else slot.short_lives + 1
        backoff = _backoff(slot.short_lives)
        log.error("worker.restarted", pid=worker.pid, reason=_exit_reason(code), backoff_seconds=backoff)
        slot.start_at = time.monotonic() + backoff

    def _handle_failed_start(self, slot: _Slot, code: int) -> None:
        if code == ConfigurationError.exit_code and not self._announced:
            self._stop(code, Shutdown.GRACEFUL)  # The worker has message why. Repeating mends nothing.
            return
        # Once we serve, a refusal is an outage: passwords are rotated while workers fall.
        slot.failed_starts += 1
        others = any(worker.serving and not worker.shutdown for worker in self._all)
        if slot.failed_starts >= MAX_START_ATTEMPTS and not others:
            log.error("startup.failed", attempts=slot.failed_starts, reason=_exit_reason(code))
            self._stop(1, Shutdown.GRACEFUL)
            return
        backoff = _backoff(slot.failed_starts)
        log.error("worker.start_failed", reason=_exit_reason(code), backoff_seconds=backoff)
        slot.start_at = time.monotonic() + backoff

    def _facts(self) -> dict[str, Any]:
        """Where the service is reached and what it stands on; never a password."""
        url = sockets.url_of(self._listeners[0].getsockname())
        internal_url = sockets.url_of([*self._listeners, *self._admin][-1].getsockname())
        facts = {
            "service": url,
            "docs": f"{url}/docs",
            "health": f"{internal_url}/health",
            "metrics": f"{internal_url}/metrics",
        }
        if self._settings.database_url is not None:
            facts["database"] = require_database(self._settings).redacted()
        if self._postgres is not None:
            facts["data"] = str(self._postgres.data_path)
        return facts

    # Shutdown and renewal

    def _handle_signals(self, signals: bytes) -> None:
        for number in signals:
            if number == signal.SIGTERM:
                self._stop(0, Shutdown.GRACEFUL)
            elif number == signal.SIGINT:
                again = any(worker.shutdown >= Shutdown.FAST for worker in self._all)
                self._stop(0, Shutdown.FORCED if again else Shutdown.FAST)
            elif number == signal.SIGQUIT:
                self._stop(0, Shutdown.FORCED)
            elif number == signal.SIGHUP and self._in_terminal:
                self._stop(0, Shutdown.FAST)
            elif number == signal.SIGHUP:
                self._renew()

    def _stop(self, exit_code: int, how: Shutdown) -> None:
        if self._exit_code is None:
            self._exit_code = exit_code
            log.info("service.draining", exit_code=exit_code)
            # Workers hold the queues too. With our copies gone, the last worker to close them refuses newcomers
            # at once, instead of leaving them to wait for nobody.
            for listener in [*self._listeners, *self._admin]:
                listener.close()
        for worker in self._all:
            self._shut_down(worker, how)

    def _renew(self) -> None:
        """One new worker after the other, each serving before the one it replaces leaves."""
        if not self._renewing and self._replacement is None:
            log.info("workers.renewal_started", count=len(self._slots))
            self._renewing = [slot for slot in self._slots if slot.worker is not None]
            self._renew_next()

    def _renew_next(self) -> None:
        if self._replacement is None and self._renewing:
            self._replacement = self._start(self._renewing.pop(0))

    def _restart_changed(self) -> None:
        [slot] = self._slots
        if slot.worker is None:
            slot.start_at = 0.0
        else:
            self._shut_down(slot.worker, Shutdown.FAST)

    # PostgreSQL

    def _keep_postgres_running(self, postgres: EmbeddedPostgres, now: float) -> None:
        if postgres.running or (self._postgres_at is not None and now < self._postgres_at):
            return
        try:
            postgres.stop()
            postgres.start()
        except GroundworkError as error:
            self._postgres_failures += 1
            backoff = _backoff(self._postgres_failures)
            self._postgres_at = now + backoff
            log.error(  # noqa: TRY400 - its message says all
                "postgres.start_failed", detail=str(error), backoff_seconds=backoff
            )
        else:
            self._postgres_at, self._postgres_failures = None, 0
            log.warning("postgres.restarted")


def _numbers(sockets: list[socket.socket]) -> str:
    return ",".join(str(one.fileno()) for one in sockets)


def _backoff(failures: int) -> float:
    return 0.0 if failures <= 0 else min(_MAX_BACKOFF_SECONDS, 0.1 * 2.0**failures)


def _exit_reason(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
