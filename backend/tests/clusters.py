"""What stands around PostgreSQL in the tests: a proxy that misbehaves, certificates, PgBouncer, PostgreSQL 15.

    from clusters import Authority, PgBouncer, Proxy, Thief, postgres_15_binaries, resolving

Everything runs in threads or processes of its own and is used through plain calls, from sync and async tests.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import trustme

from postgres_server import PostgresServer, end_process, free_port, postgres_answers
from proxies import Proxy, Thief, Traffic, at
from src.embedded import location, processes
from src.embedded.lifetime import die_with_parent
from src.embedded.roles import APPLICATION, NAME

__all__ = [
    "Authority",
    "PgBouncer",
    "Proxy",
    "Thief",
    "Traffic",
    "at",
    "postgres_15_binaries",
    "resolving",
    "tracking_settings",
]


# PostgreSQL 15


def postgres_15_binaries() -> Path:
    """Debian's PostgreSQL 15, which unlike the wheel's 18 is built with TLS. For tests marked `debian`."""
    found = Path("/usr/lib/postgresql/15/bin")
    if not (found / "postgres").exists():
        raise RuntimeError(
            "PostgreSQL 15 is missing: apt-get install postgresql-15 (`make test-all` does it as root)."
        )
    return found


# Names


@contextlib.contextmanager
def resolving(names: Mapping[str, str]) -> Iterator[None]:
    """Inside, this process resolves each of `names` to the given address; all other names as ever."""
    original = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **named: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        return original(names.get(name, host), *arguments, **named)

    socket.getaddrinfo = getaddrinfo
    try:
        yield
    finally:
        socket.getaddrinfo = original


# Certificates


class Authority:
    """A certificate authority of the test's own. Files go into `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca = trustme.CA()
        self._issued = 0

    @property
    def root_path(self) -> Path:
        """The root certificate, for `sslrootcert=`."""
        path = self.directory / "root.crt"
        if not path.exists():
            self.ca.cert_pem.write_to_path(str(path))
        return path

    def issue(self, *names: str, owner: location.Account | None = None) -> tuple[Path, Path]:
        """Certificate (with chain) and key for host names or addresses; the key is 0600 and `owner`'s."""
        self._issued += 1
        issued = self.ca.issue_cert(*names, common_name=names[0])
        certificate = self.directory / f"{self._issued}.crt"
        key = self.directory / f"{self._issued}.key"
        certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        certificate.chmod(0o644)
        key.touch(mode=0o600)
        key.write_bytes(issued.private_key_pem.bytes())
        if owner is not None:
            os.chown(key, owner.uid, owner.gid)
        return certificate, key

    def server_context(self, *names: str, require_client: bool = False) -> ssl.SSLContext:
        """What a `Proxy(tls=...)` shows to its clients."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.issue(*names))
        if require_client:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.root_path)
        return context

    def server_options(self, server: PostgresServer, *names: str, clients: bool = False) -> dict[str, str]:
        """Settings that make a PostgreSQL built with TLS (Debian's) use it: `private_postgres(prepare=...)`."""
        certificate, key = self.issue(*names, owner=server.location.account)
        options = {"ssl": "on", "ssl_cert_file": str(certificate), "ssl_key_file": str(key)}
        if clients:
            options["ssl_ca_file"] = str(self.root_path)
        return options


# PgBouncer


PGBOUNCER = os.environ.get("GROUNDWORK_PGBOUNCER", "pgbouncer")
"""Another than the one on the PATH may be named: Debian 12 has 1.18, which tracks no prepared statements."""

_TRACKING_SINCE = (1, 21)


def _pgbouncer() -> str | None:
    return shutil.which(PGBOUNCER, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def tracking_settings() -> list[dict[str, str]]:
    """The settings by which the PgBouncer at hand tracks prepared statements, as Neon's does; none if it is too old."""
    executable = _pgbouncer()
    if executable is None:
        return []
    said = subprocess.run([executable, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"PgBouncer (\d+)\.(\d+)", said)
    if found is None or (int(found[1]), int(found[2])) < _TRACKING_SINCE:
        return []
    return [{"max_prepared_statements": "1000"}]


class PgBouncer:
    """The PgBouncer at hand in front of one server. For `debian` tests.

    `settings` are lines of its `[pgbouncer]` section and beat ours; `tls` is a certificate and its key.
    """

    def __init__(
        self,
        server: PostgresServer,
        *,
        pool_mode: str = "transaction",
        settings: Mapping[str, str] | None = None,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        self.server = server
        self.port = free_port()
        self._pool_mode = pool_mode
        self._settings = dict(settings or {})
        self._tls = tls
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return at(self.server.url, self.port)

    def url_for(self, database: str, *, role: str = NAME) -> str:
        return at(self.server.url_for(database, role=role), self.port)

    @property
    def admin_url(self) -> str:
        """The console, for `SHOW POOLS`, `PAUSE`, `RECONNECT` by the simple protocol."""
        return self.url_for("pgbouncer")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        assert self._directory is not None
        return (self._directory / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start it, and return once it answers. Also starts it again after `stop` or `kill`."""
        executable = _pgbouncer()
        if executable is None:
            raise RuntimeError(
                "PgBouncer is missing: apt-get install pgbouncer (`make test-all` does it as root)."
            )
        if self._directory is None:
            self._directory = self._write_configuration()
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [executable, str(self._directory / "pgbouncer.ini")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509
                **self.server.location.identity(),
            )
        deadline = time.monotonic() + 20
        while not postgres_answers(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PgBouncer did not start:\n{self.log}")
            time.sleep(0.02)

    def stop(self) -> None:
        """SIGTERM: in these versions it ends at once, whatever is under way."""
        if self._process is not None:
            end_process(psutil.Process(self.pid))
            self._process.wait()
            self._process = None

    def kill(self) -> None:
        processes.kill(psutil.Process(self.pid))
        self._process.wait()
        self._process = None

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.kill()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _write_configuration(self) -> Path:
        directory = Path(tempfile.mkdtemp(prefix="groundwork-pgbouncer-"))
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "pool_mode": self._pool_mode,
            "auth_type": "scram-sha-256",
            "auth_file": str(directory / "users"),
            "admin_users": "groundwork",
            "max_client_conn": "2000",
            "default_pool_size": "20",
            **({"client_tls_sslmode": "require"} if self._tls else {}),
        }
        if self._tls:
            for name, source in zip(("client_tls_cert_file", "client_tls_key_file"), self._tls, strict=True):
                copy = directory / name
                copy.write_bytes(source.read_bytes())
                settings[name] = str(copy)
        settings |= self._settings
        lines = ["[databases]", f"* = host=127.0.0.1 port={self.server.port}", "[pgbouncer]"]
        lines += [f"{name} = {value}" for name, value in settings.items()]
        (directory / "pgbouncer.ini").write_text("\n".join(lines) + "\n")
        known = (f'"{role}" "{self.server.password_of(role)}"\n' for role in (NAME, APPLICATION))
        (directory / "users").write_text("".join(known))
        for path in (directory, *directory.iterdir()):
            self.server.location.chown(path)
        return directory
