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
from . import sockets, systemd
from .control import (
    ACCEPT_WHEN_READY,
    ADMIN_LISTENER_FD,
    CANCEL_SECONDS,
    CLOSE_SECONDS,
    CONTROL_FD,
    EMBEDDED,
    KILL_MARGIN_SECONDS,
    LINGER_SECONDS,
    LISTENER_FD,
    READY,
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
_RENEWAL_SECONDS = 60.0
# A pass that begins this much late: the supervisor itself was stopped, or the machine.
_LATE_SECONDS = 1.0

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
    heard_at: float
    serving: bool = False
    ready: bool = False
    hung: bool = False
    shutdown: int = 0
    kill_at: float | None = None

    @property
    def pid(self) -> int:
        return self.process.pid


@dataclass(eq=False, slots=True)
class _Slot:
    """The place of one worker."""

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
    workers = 1 if reload else workers
    notifier = systemd.Notifier()
    activated = systemd.activated_sockets()
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
            listeners = _listeners(settings, activated)
            metrics = stack.enter_context(metrics_directory()) if workers > 1 else None
        except GroundworkError as error:
            return log_refusal(error)
        supervisor = _Supervisor(
            _resolved(settings, listeners, workers, postgres, reload=reload, activated=bool(activated)),
            postgres, listeners, metrics, announce, notifier, worker_command, wakeup, watch=reload,
        )  # fmt: skip
        stack.callback(supervisor.close)
        log.info("service.starting", workers=workers)
        exit_code = supervisor.run()
        log.info("service.stopped", exit_code=exit_code)
        return exit_code


def _listeners(settings: Settings, activated: dict[str, socket.socket]) -> dict[str, socket.socket]:
    """The listening sockets by the variable that passes them on: those of socket activation, or bound here."""
    admin = activated.pop("admin", None) if settings.admin_port is not None else None
    public = next(iter(activated.values()), None)
    found = {
        LISTENER_FD: sockets.bind(settings.host, settings.port)
        if public is None
        else sockets.check_activated(public)
    }
    if admin is not None:
        found[ADMIN_LISTENER_FD] = sockets.check_activated(admin)
    elif settings.admin_port is not None:
        found[ADMIN_LISTENER_FD] = sockets.bind(settings.admin_host, settings.admin_port, prefix="ADMIN_")
    return found


def _resolved(
    settings: Settings,
    listeners: dict[str, socket.socket],
    workers: int,
    postgres: EmbeddedPostgres | None,
    *,
    reload: bool,
    activated: bool,
) -> tuple[Settings, dict[str, str]]:
    """The settings as they turned out, and the environment variables that give them to the workers.

    Only what the command line and the supervisor decided is passed on. Workers load the rest themselves, so that one
    started later sees changes in .env and in files of secrets.
    """
    changes: dict[str, Any] = {"port": listeners[LISTENER_FD].getsockname()[1], "workers": workers}
    if ADMIN_LISTENER_FD in listeners:
        changes["admin_port"] = listeners[ADMIN_LISTENER_FD].getsockname()[1]
    if postgres is not None:
        # Workers are bound by row-level security; only migrations run as the owner of the tables.
        changes["database_url"] = SecretStr(postgres.application_url)
        changes["database_migration_url"] = SecretStr(postgres.url)
    if reload:
        # A developer waits for the restart, and no load balancer does.
        changes["drain_grace_seconds"] = 0.0
    elif activated:
        # The proxy's connections have to learn of the restart: each response says `Connection: close` meanwhile.
        changes["drain_grace_seconds"] = max(LINGER_SECONDS, settings.drain_grace_seconds)
    resolved = settings.model_copy(update=changes)
    names = changes.keys() | {
        name for name in type(settings).model_fields if settings.origin(name) == "command"
    }
    values = as_environment(resolved)
    return resolved, {name.upper(): values.get(name.upper(), "") for name in names}


class _Supervisor:
    """Opened by `run`, closed by `close`. One thread, one selector: control channels, signals and the clock."""

    def __init__(
        self,
        resolved: tuple[Settings, dict[str, str]],
        postgres: EmbeddedPostgres | None,
        listeners: dict[str, socket.socket],
        metrics: Path | None,
        announce: Announce,
        notifier: systemd.Notifier,
        worker_command: Sequence[str],
        wakeup: socket.socket,
        *,
        watch: bool,
    ) -> None:
        self._settings, self._overrides = resolved
        self._postgres = postgres
        self._postgres_at: float | None = None
        self._postgres_failures = 0
        self._listeners = listeners
        self._metrics = metrics
        self._announce = announce
        self._notifier = notifier
        self._notify_at = 0.0
        self._command = tuple(worker_command)
        self._wakeup = wakeup
        self._slots = [_Slot(number) for number in range(self._settings.workers)]
        self._all: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeup, selectors.EVENT_READ)
        self._exit_code: int | None = None
        self._announced = False
        # A renewal: the slots still to do, the new worker, and whether it has to be ready.
        self._renewal: list[_Slot] | None = None
        self._replacement: _Worker | None = None
        self._must_be_ready = False
        self._renewal_queued = False
        self._sources = SourceWatcher(_IMPORT_ROOT / "src") if watch else None
        self._next_poll = 0.0
        # A debugger stops the worker of a developer for longer than any heartbeat.
        self._heartbeat = float("inf") if watch else self._settings.worker_heartbeat_seconds
        # A terminal that closes sends SIGHUP to stop its programs; an operator sends it to renew a service.
        self._in_terminal = sys.stdin is not None and sys.stdin.isatty()

    def run(self) -> int:
        # One worker first: a bad configuration is then reported once, and only one migrates.
        self._slots[0].start_at = 0.0
        while True:
            self._run_due()
            if self._exit_code is not None and not self._all:
                return self._exit_code
            timeout = self._seconds_to_next()
            latest = time.monotonic() + (float("inf") if timeout is None else timeout) + _LATE_SECONDS
            for key, _ in self._selector.select(timeout):
                if key.data is None:
                    self._handle_signals(self._wakeup.recv(4096))
                else:
                    self._receive(key.data)
            self._reap()
            if (now := time.monotonic()) > latest:
                # The supervisor was stopped, or busy: that a worker was not heard proves nothing.
                for worker in self._all:
                    worker.heard_at = now

    def close(self) -> None:
        """Kill the workers that are left after an unexpected error of the supervisor; usually there are none."""
        for worker in self._all:
            worker.process.kill()
            worker.process.wait()
        for listener in self._listeners.values():
            listener.close()
        self._selector.close()

    # The clock

    def _run_due(self) -> None:
        now = time.monotonic()
        if self._notifier.watchdog_seconds is not None and now >= self._notify_at:
            self._notify_at = now + self._notifier.watchdog_seconds
            self._notifier.notify(WATCHDOG="1")
        for worker in self._all:
            if worker.kill_at is not None and now >= worker.kill_at:
                worker.kill_at = None
                worker.process.kill()
                log.error("worker.shutdown_timeout", worker_pid=worker.pid)
            elif self._is_watched(worker) and now >= worker.heard_at + self._heartbeat:
                worker.hung = True
                worker.process.kill()
                log.error("worker.heartbeat_timeout", worker_pid=worker.pid, seconds=self._heartbeat)
        if self._exit_code is not None:
            return
        if self._replacement is not None and now >= self._replacement.started_at + _RENEWAL_SECONDS:
            self._abandon_renewal(f"not ready within {_RENEWAL_SECONDS:g} s")
        if self._postgres is not None:
            self._keep_postgres_running(self._postgres, now)
        for slot in self._slots:
            if slot.start_at is not None and now >= slot.start_at:
                slot.start_at = None
                slot.worker = self._start(slot)
        if self._sources is not None and now >= self._next_poll:
            self._next_poll = now + _RELOAD_POLL_SECONDS
            if changed := self._sources.changed():
                self._restart_changed()
                log.info("source.changed", file=str(changed))

    def _is_watched(self, worker: _Worker) -> bool:
        """Whether heartbeats are expected: from the first one until the worker is told to shut down."""
        return worker.serving and not worker.shutdown and not worker.hung

    def _seconds_to_next(self) -> float | None:
        due = [worker.kill_at for worker in self._all if worker.kill_at is not None]
        due += [worker.heard_at + self._heartbeat for worker in self._all if self._is_watched(worker)]
        if self._notifier.watchdog_seconds is not None:
            due.append(self._notify_at)
        if self._exit_code is None:
            due += [slot.start_at for slot in self._slots if slot.start_at is not None]
            if self._replacement is not None:
                due.append(self._replacement.started_at + _RENEWAL_SECONDS)
            if self._sources is not None:
                due.append(self._next_poll)
            if self._postgres_at is not None:
                due.append(self._postgres_at)
        earliest = min(due, default=float("inf"))
        return None if earliest == float("inf") else max(0.0, earliest - time.monotonic())

    # Workers

    def _start(self, slot: _Slot, *, accept_when_ready: bool = False) -> _Worker:
        channel, worker_end = socket.socketpair()
        channel.setblocking(False)
        passed = {**self._listeners, CONTROL_FD: worker_end}
        try:
            process = subprocess.Popen(  # noqa: S603 - a constant, or a test's own
                self._command,
                env={
                    **self._environment(),
                    WORKER_NUMBER: str(slot.number),
                    **({ACCEPT_WHEN_READY: "1"} if accept_when_ready else {}),
                    **{name: str(one.fileno()) for name, one in passed.items()},
                },
                pass_fds=[one.fileno() for one in passed.values()],
                stdin=subprocess.DEVNULL,
                # Ctrl-C goes to the terminal's whole foreground group. The supervisor alone receives it.
                process_group=0,
                # Before its first line is read: a worker that still imports must not outlive the supervisor.
                preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509 - one thread
            )
        finally:
            worker_end.close()
        worker = _Worker(slot, process, channel, time.monotonic(), time.monotonic())
        self._all.append(worker)
        self._selector.register(channel, selectors.EVENT_READ, worker)
        return worker

    def _environment(self) -> dict[str, str]:
        """The environment of the workers, from which they load their settings."""
        environment = {**os.environ, **self._overrides}
        # `-P` keeps a directory called src in the working directory from being imported instead.
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(_IMPORT_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        )
        environment.pop(EMBEDDED, None)
        if self._postgres is not None:
            environment[EMBEDDED] = "1"
        # Read by prometheus-client when it is imported. One worker needs no files.
        environment.pop("PROMETHEUS_MULTIPROC_DIR", None)
        if self._metrics is not None:
            environment["PROMETHEUS_MULTIPROC_DIR"] = str(self._metrics)
        return environment

    def _receive(self, worker: _Worker) -> None:
        try:
            message = worker.control.recv(64)
        except OSError:
            message = b""
        if not message:
            # It exited, or is about to: `_reap` learns how.
            self._selector.unregister(worker.control)
            return
        worker.heard_at = time.monotonic()
        worker.ready = message.endswith(READY)
        if not worker.serving:
            worker.serving = True
            worker.slot.failed_starts = 0
            if self._exit_code is None:
                self._handle_serving()
            seconds = round(worker.heard_at - worker.started_at, 3)
            log.debug("worker.started", worker_pid=worker.pid, seconds=seconds)
        if worker is self._replacement and (worker.ready or not self._must_be_ready):
            self._promote(worker)

    def _handle_serving(self) -> None:
        for slot in self._slots:
            if slot.worker is None and slot.start_at is None and slot.failed_starts == 0:
                slot.start_at = 0.0
        if not self._announced:
            self._announced = True
            facts = self._facts()
            self._notifier.ready(f"Serving on {facts['service']}")
            self._announce(self._settings, facts)

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
        worker.kill_at = (
            time.monotonic() + grace + drain + CANCEL_SECONDS + CLOSE_SECONDS + KILL_MARGIN_SECONDS
        )

    def _reap(self) -> None:
        for worker in [worker for worker in self._all if worker.process.poll() is not None]:
            if not worker.serving and worker.control in self._selector.get_map():
                self._receive(worker)  # It may have served and exited since the last pass.
            self._all.remove(worker)
            with contextlib.suppress(KeyError):
                self._selector.unregister(worker.control)
            worker.control.close()
            if self._metrics is not None:
                remove_gauges(self._metrics, worker.pid)
            if self._exit_code is None:
                self._handle_exit(worker)

    def _handle_exit(self, worker: _Worker) -> None:
        slot, code = worker.slot, worker.process.returncode
        if worker is self._replacement:
            self._replacement = None
            self._abandon_renewal(_exit_reason(code))
        elif slot.worker is not worker:
            self._renew_next()  # It was replaced.
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
        stable = time.monotonic() - worker.started_at > _STABLE_SECONDS
        slot.short_lives = 0 if stable else slot.short_lives + 1
        backoff = _backoff(slot.short_lives)
        slot.start_at = time.monotonic() + backoff
        reason = "no heartbeat" if worker.hung else _exit_reason(code)
        log.error("worker.restarted", worker_pid=worker.pid, reason=reason, backoff_seconds=backoff)

    def _handle_failed_start(self, slot: _Slot, code: int) -> None:
        if code == ConfigurationError.exit_code and not self._announced:
            self._stop(code, Shutdown.GRACEFUL)  # The worker has logged the reason. A retry changes nothing.
            return
        # Once the service runs, a refusal is an outage: passwords are rotated while workers die.
        slot.failed_starts += 1
        others = any(worker.serving and not worker.shutdown for worker in self._all)
        if slot.failed_starts >= MAX_START_ATTEMPTS and not others:
            self._stop(1, Shutdown.GRACEFUL)
            log.error("startup.failed", attempts=slot.failed_starts, reason=_exit_reason(code))
            return
        backoff = _backoff(slot.failed_starts)
        slot.start_at = time.monotonic() + backoff
        log.error("worker.start_failed", reason=_exit_reason(code), backoff_seconds=backoff)

    def _facts(self) -> dict[str, Any]:
        """Where the service is reached and what it stands on; never a password."""
        url, *admin = (sockets.url_of(listener.getsockname()) for listener in self._listeners.values())
        internal_url = admin[0] if admin else url
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

    # Shutdown

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
            elif number == signal.SIGHUP and self._exit_code is None:
                self._renew()

    def _stop(self, exit_code: int, how: Shutdown) -> None:
        first = self._exit_code is None
        if first:
            self._exit_code = exit_code
            # Workers hold the sockets too. Once the last of them has closed its copy, the kernel refuses connections
            # at once, instead of queueing them for a supervisor that never accepts.
            for listener in self._listeners.values():
                listener.close()
        for worker in self._all:
            self._shut_down(worker, how)
        self._notifier.stopping()
        if first:
            log.info("service.draining", exit_code=exit_code)

    # Renewal: one new worker after the other; the old one leaves when the new one can do what it could

    def _renew(self) -> None:
        if self._renewal is not None:
            self._renewal_queued = True
            log.info("workers.renewal_queued")
            return
        self._renewal = [slot for slot in self._slots if slot.worker is not None]
        self._notifier.reloading()
        self._renew_next()
        log.info("workers.renewal_started", count=len(self._slots))

    def _renew_next(self) -> None:
        if self._renewal is None or self._replacement is not None:
            return
        if self._renewal:
            slot = self._renewal.pop(0)
            self._must_be_ready = slot.worker is not None and slot.worker.ready
            self._replacement = self._start(slot, accept_when_ready=self._must_be_ready)
        else:
            self._finish_renewal("Serving; workers renewed")
            log.info("workers.renewed", count=len(self._slots))

    def _promote(self, worker: _Worker) -> None:
        slot, self._replacement = worker.slot, None
        old, slot.worker = slot.worker, worker
        slot.start_at = None  # The old one may have died meanwhile.
        if old is None:
            self._renew_next()
        else:
            self._shut_down(old, Shutdown.ROLLING)

    def _abandon_renewal(self, reason: str) -> None:
        """Keep the old workers."""
        if self._replacement is not None:
            replacement, self._replacement = self._replacement, None
            self._shut_down(replacement, Shutdown.FAST)
        self._finish_renewal(f"Serving; the last reload failed: {reason}")
        log.error("workers.renewal_failed", reason=reason)

    def _finish_renewal(self, status: str) -> None:
        self._renewal = None
        self._notifier.ready(status)
        if self._renewal_queued:
            self._renewal_queued = False
            self._renew()

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


def _backoff(failures: int) -> float:
    return 0.0 if failures <= 0 else min(_MAX_BACKOFF_SECONDS, 0.1 * 2.0**failures)


def _exit_reason(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
