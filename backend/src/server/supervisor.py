"""The process that is started, signalled and waited for: it opens the port and keeps workers behind it.

It has no event loop and answers no request. It starts the embedded PostgreSQL when asked to, binds the
listening sockets, starts workers (`python -m src.server`) on them, replaces those that die, and ends them in
order. docs/decisions/0001-process-model.md says why.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import SecretStr

from ..cli import banner, output
from ..config.logging import configure, get_logger
from ..config.settings import Settings, as_environment
from ..embedded.processes import die_with_parent
from ..errors import ConfigurationError, GroundworkError
from . import sockets
from .control import (
    ADMIN_LISTENERS,
    CANCEL_SECONDS,
    CLOSE_SECONDS,
    EMBEDDED,
    LINGER_SECONDS,
    LINK,
    LISTENERS,
    SERVING,
    Leave,
)
from .surroundings import Sources, metrics_directory, raise_descriptor_limit, signals_as_bytes

if TYPE_CHECKING:
    from ..embedded.server import EmbeddedPostgres

WORKER_COMMAND: Final = (sys.executable, "-P", "-m", "src.server")
START_ATTEMPTS: Final = 3
"""How many starts in a row may fail before the supervisor gives up, when nobody else serves."""

_IMPORT_ROOT = Path(__file__).resolve().parents[2]
_LONGEST_PAUSE_SECONDS = 30.0
_STEADY_SECONDS = 10.0
_WATCH_SECONDS = 0.5
_KILL_MARGIN_SECONDS = 1.0

log = get_logger("groundwork.supervisor")


@dataclass(eq=False, slots=True)
class _Worker:
    """One process. `told` is the most urgent word it has been given, 0 for none."""

    slot: _Slot
    process: subprocess.Popen[bytes]
    link: socket.socket
    started_at: float
    serving: bool = False
    told: int = 0
    kill_at: float | None = None

    @property
    def pid(self) -> int:
        return self.process.pid


@dataclass(eq=False, slots=True)
class _Slot:
    """A place for one worker, with the queue of connections that is its own."""

    number: int
    worker: _Worker | None = None
    failed_starts: int = 0
    short_lives: int = 0
    start_at: float | None = None


def run(
    settings: Settings,
    *,
    embedded: bool,
    reload: bool,
    workers: int,
    worker_command: Sequence[str] = WORKER_COMMAND,
) -> int:
    """Serve until told to stop; gives the exit code: 0 stopped, 1 failed, 3 configuration or credentials."""
    configure(settings.log_level, settings.log_format)
    with contextlib.ExitStack() as stack:
        wakeup = stack.enter_context(signals_as_bytes())
        raise_descriptor_limit()
        try:
            postgres: EmbeddedPostgres | None = None
            if embedded:
                from ..embedded.server import EmbeddedPostgres

                postgres = stack.enter_context(EmbeddedPostgres(settings.data_directory))
            if reload:
                workers = 1
            listeners = sockets.bind(settings.host, settings.port, queues=workers)
            admin = sockets.bind_admin(settings.admin_host, settings.admin_port)
        except GroundworkError as error:
            output.say(str(error))
            return int(getattr(error, "exit_code", 1))
        supervisor = _Supervisor(settings, postgres, listeners, admin, worker_command, wakeup, watch=reload)
        stack.callback(supervisor.close)
        if workers > 1:
            supervisor.metrics_directory = stack.enter_context(metrics_directory())
        return supervisor.run()


class _Supervisor:
    """Opened by `run`, closed by `close`. One thread, one selector: links, signals, and the clock."""

    def __init__(
        self,
        settings: Settings,
        postgres: EmbeddedPostgres | None,
        listeners: list[socket.socket],
        admin: list[socket.socket],
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
            # Whoever edits a file waits for it, and no load balancer does.
            changes["drain_grace_seconds"] = 0.0
        self._settings = settings.model_copy(update=changes)
        # What the command line and we decided. The rest a worker reads for itself, so that one that is started
        # later sees what has changed since in .env and in the files of secrets.
        decided = {name for name in type(settings).model_fields if settings.origin(name) == "command"}
        values = as_environment(self._settings)
        self._decided = {name.upper(): values.get(name.upper(), "") for name in decided | set(changes)}
        self._slots = [_Slot(number) for number in range(len(listeners))]
        self._all: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeup, selectors.EVENT_READ)
        self._exit_code: int | None = None
        self._announced = False
        self._renewing: list[_Slot] = []
        self._replacement: _Worker | None = None
        self._sources = Sources(_IMPORT_ROOT / "src") if watch else None
        self._look_at = 0.0
        # A terminal that closes sends SIGHUP to stop its programs; an operator sends it to renew a service.
        self._in_terminal = sys.stdin is not None and sys.stdin.isatty()

    def run(self) -> int:
        # One first: a bad configuration then speaks once, and only one migrates.
        self._slots[0].start_at = 0.0
        while True:
            self._do_what_is_due()
            if self._exit_code is not None and not self._all:
                return self._exit_code
            for key, _ in self._selector.select(self._seconds_to_next()):
                if key.data is None:
                    self._obey(self._wakeup.recv(4096))
                else:
                    self._hear(key.data)
            self._reap()

    def close(self) -> None:
        """End what is still there after an error of ours; on the usual way nothing is."""
        for worker in self._all:
            worker.process.kill()
            worker.process.wait()
        for listener in [*self._listeners, *self._admin]:
            listener.close()
        self._selector.close()

    # Time

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        for worker in self._all:
            if worker.kill_at is not None and now >= worker.kill_at:
                log.error("worker.killed-as-too-slow", pid=worker.pid)
                worker.process.kill()
                worker.kill_at = None
        if self._exit_code is not None:
            return
        if self._postgres is not None:
            self._keep_postgres(self._postgres, now)
        for slot in self._slots:
            if slot.start_at is not None and now >= slot.start_at:
                slot.start_at = None
                slot.worker = self._start(slot)
        if self._sources is not None and now >= self._look_at:
            self._look_at = now + _WATCH_SECONDS
            if changed := self._sources.changed():
                log.info("source.changed", file=str(changed))
                self._restart_changed()

    def _seconds_to_next(self) -> float | None:
        due = [worker.kill_at for worker in self._all if worker.kill_at is not None]
        if self._exit_code is None:
            due += [slot.start_at for slot in self._slots if slot.start_at is not None]
            if self._sources is not None:
                due.append(self._look_at)
            if self._postgres_at is not None:
                due.append(self._postgres_at)
        return max(0.0, min(due) - time.monotonic()) if due else None

    # Workers

    def _start(self, slot: _Slot) -> _Worker:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        number = slot.number
        queues = [self._listeners[number], *self._listeners[:number], *self._listeners[number + 1 :]]
        try:
            process = subprocess.Popen(  # noqa: S603 - a constant, or a test's own
                self._command,
                env={**self._environment(), LINK: _numbers([theirs]), LISTENERS: _numbers(queues),
                     ADMIN_LISTENERS: _numbers(self._admin)},
                pass_fds=[theirs.fileno(), *(queue.fileno() for queue in [*queues, *self._admin])],
                stdin=subprocess.DEVNULL,
                # Ctrl-C goes to the terminal's whole foreground group. Workers hear of it from us, once.
                process_group=0,
                # Before its first line is read: a worker that still imports must not outlive us either.
                preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509 - one thread
            )  # fmt: skip
        finally:
            theirs.close()
        worker = _Worker(slot, process, ours, time.monotonic())
        self._all.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _environment(self) -> dict[str, str]:
        """What workers read their settings from."""
        environment = {**os.environ, **self._decided}
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

    def _hear(self, worker: _Worker) -> None:
        try:
            said = worker.link.recv(16)
        except OSError:
            said = b""
        if not said:
            # It ended, or is about to: `_reap` learns how.
            self._selector.unregister(worker.link)
        elif said.startswith(SERVING):
            worker.serving = True
            worker.slot.failed_starts = 0
            log.debug(
                "worker.serving", pid=worker.pid, seconds=round(time.monotonic() - worker.started_at, 3)
            )
            if self._exit_code is None:
                self._serving(worker)

    def _serving(self, worker: _Worker) -> None:
        if not self._announced:
            self._announced = True
            addresses = [listener.getsockname() for listener in [self._listeners[0], *self._admin]]
            banner.show(self._settings, addresses, self._postgres)
        for slot in self._slots:
            if slot.worker is None and slot.start_at is None and slot.failed_starts == 0:
                slot.start_at = 0.0
        if worker is self._replacement:
            old, worker.slot.worker, self._replacement = worker.slot.worker, worker, None
            worker.slot.start_at = None  # The old one may have fallen meanwhile.
            if old is not None:
                self._tell(old, Leave.RETIRE)
            else:
                self._renew_next()

    def _tell(self, worker: _Worker, how: Leave) -> None:
        if worker.told >= how:
            return
        worker.told = how
        if worker.serving:
            with contextlib.suppress(OSError):
                worker.link.send(bytes([how]))
        else:
            worker.process.terminate()
        grace = 0.0
        if how <= Leave.DRAIN:
            grace = self._settings.drain_grace_seconds if how == Leave.DRAIN else LINGER_SECONDS
        drain = self._settings.shutdown_timeout_seconds if how < Leave.HURRY else 0.0
        bound = grace + drain + CANCEL_SECONDS + CLOSE_SECONDS + _KILL_MARGIN_SECONDS
        worker.kill_at = time.monotonic() + bound

    def _reap(self) -> None:
        for worker in [worker for worker in self._all if worker.process.poll() is not None]:
            if not worker.serving and worker.link in self._selector.get_map():
                self._hear(worker)  # It may have served and ended since we last looked.
            self._all.remove(worker)
            with contextlib.suppress(KeyError):
                self._selector.unregister(worker.link)
            worker.link.close()
            if self.metrics_directory is not None:
                self._forget_gauges(self.metrics_directory, worker.pid)
            if self._exit_code is None:
                self._ended(worker)

    def _ended(self, worker: _Worker) -> None:
        slot, code = worker.slot, worker.process.returncode
        if worker is self._replacement:
            self._replacement = None
            self._renewing.clear()
            log.error("workers.not-renewed", ended=_how(code))
        elif slot.worker is not worker:
            self._renew_next()  # A retired one has gone.
        else:
            slot.worker = None
            if self._sources is not None and not worker.told and not worker.serving:
                log.error("worker.waits-for-change", ended=_how(code))
            elif worker.told:
                slot.start_at = 0.0  # Its source has changed.
            elif worker.serving:
                self._replace_fallen(slot, worker, code)
            else:
                self._after_failed_start(slot, code)

    def _replace_fallen(self, slot: _Slot, worker: _Worker, code: int) -> None:
        steady = time.monotonic() - worker.started_at > _STEADY_SECONDS
        slot.short_lives = 0 if steady else slot.short_lives + 1
        pause = _pause(slot.short_lives)
        log.error("worker.ended", pid=worker.pid, ended=_how(code), pause_seconds=pause)
        slot.start_at = time.monotonic() + pause

    def _after_failed_start(self, slot: _Slot, code: int) -> None:
        if code == ConfigurationError.exit_code and not self._announced:
            self._stop(code, Leave.DRAIN)  # The worker has said why. Repeating mends nothing.
            return
        # Once we serve, a refusal is an outage: passwords are rotated while workers fall.
        slot.failed_starts += 1
        others = any(worker.serving and not worker.told for worker in self._all)
        if slot.failed_starts >= START_ATTEMPTS and not others:
            log.error("start.given-up", attempts=slot.failed_starts, ended=_how(code))
            self._stop(1, Leave.DRAIN)
            return
        pause = _pause(slot.failed_starts)
        log.error("worker.did-not-start", ended=_how(code), pause_seconds=pause)
        slot.start_at = time.monotonic() + pause

    def _forget_gauges(self, directory: Path, pid: int) -> None:
        """What a dead process had in use is in use no more; its counters stay in the sums."""
        for file in directory.glob(f"gauge_live*_{pid}.db"):
            file.unlink(missing_ok=True)

    # Orders

    def _obey(self, signals: bytes) -> None:
        for number in signals:
            if number == signal.SIGTERM:
                self._stop(0, Leave.DRAIN)
            elif number == signal.SIGINT:
                again = any(worker.told >= Leave.PROMPT for worker in self._all)
                self._stop(0, Leave.HURRY if again else Leave.PROMPT)
            elif number == signal.SIGQUIT:
                self._stop(0, Leave.HURRY)
            elif number == signal.SIGHUP and self._in_terminal:
                self._stop(0, Leave.PROMPT)
            elif number == signal.SIGHUP:
                self._renew()

    def _stop(self, exit_code: int, how: Leave) -> None:
        if self._exit_code is None:
            self._exit_code = exit_code
            # Workers hold the queues too. With our copies gone, the last worker to close them refuses newcomers
            # at once, instead of leaving them to wait for nobody.
            for listener in [*self._listeners, *self._admin]:
                listener.close()
        for worker in self._all:
            self._tell(worker, how)

    def _renew(self) -> None:
        """One new worker after the other, each serving before the one it replaces leaves."""
        if not self._renewing and self._replacement is None:
            log.info("workers.renewing", count=len(self._slots))
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
            self._tell(slot.worker, Leave.PROMPT)

    # PostgreSQL

    def _keep_postgres(self, postgres: EmbeddedPostgres, now: float) -> None:
        if postgres.running or (self._postgres_at is not None and now < self._postgres_at):
            return
        try:
            postgres.stop()
            postgres.start()
        except GroundworkError as error:
            self._postgres_failures += 1
            pause = _pause(self._postgres_failures)
            self._postgres_at = now + pause
            log.error(  # noqa: TRY400 - its message says all
                "postgres.did-not-start", detail=str(error), pause_seconds=pause
            )
        else:
            self._postgres_at, self._postgres_failures = None, 0
            log.warning("postgres.started-again")


def _numbers(sockets: list[socket.socket]) -> str:
    return ",".join(str(one.fileno()) for one in sockets)


def _pause(failures: int) -> float:
    return 0.0 if failures <= 0 else min(_LONGEST_PAUSE_SECONDS, 0.1 * 2.0**failures)


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
