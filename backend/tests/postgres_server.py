"""The embedded PostgreSQL as tests use it: by TCP, so that proxies fit in between, and with faults to inject."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psutil

from src.embedded import location, processes
from src.embedded.errors import EmbeddedError
from src.embedded.roles import NAME, url_of
from src.embedded.server import EmbeddedPostgres

_ATTEMPTS: Final = 3


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As PostgreSQL itself binds: old connections in TIME_WAIT do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A random free port below the range that the kernel gives to outgoing connections.

    A port of that range can be taken, while the server is down, by any outgoing connection; a client that
    keeps reconnecting to it on loopback can even connect to itself.
    """
    for _ in range(200):
        port = random.randrange(20_000, 32_000)
        if port_is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def postgres_answers(port: int, seconds: float = 2.0) -> bool:
    """Whether a PostgreSQL or PgBouncer on 127.0.0.1 answers a start-up packet by asking for the password."""
    body = struct.pack("!i", 196608) + b"user\0groundwork\0database\0groundwork\0\0"
    try:
        with socket.socket() as connection:
            connection.settimeout(seconds)
            connection.connect(("127.0.0.1", port))
            connection.sendall(struct.pack("!i", len(body) + 4) + body)
            return connection.recv(1) == b"R"
    except OSError:
        return False


def give_away(directory: Path) -> None:
    """Let all users pass through; as root, make it the unprivileged user's, so that a server's data stays in it."""
    directory.chmod(0o755)
    if os.geteuid() == 0:
        account = location._unprivileged()
        os.chown(directory, account.uid, account.gid)


class PostgresServer(EmbeddedPostgres):
    """On a free port, or the one given, which it keeps; its addresses are those of TCP."""

    port: int

    def __init__(
        self,
        directory: Path,
        *,
        binaries: Path | None = None,
        options: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        super().__init__(directory, binaries=binaries, options=options, port=port or free_port())
        self._attempts = 1 if port else _ATTEMPTS

    def start(self) -> None:
        while True:
            try:
                super().start()
            except EmbeddedError as error:
                self._attempts -= 1
                if self._attempts <= 0 or "taken" not in str(error):
                    raise
                self.port = free_port()
            else:
                # From now on others have its address.
                self._attempts = 1
                return

    @property
    def password(self) -> str:
        """The superuser's."""
        return self.password_of(NAME)

    def url_for(self, database: str, *, role: str = NAME) -> str:
        return url_of(role, self.password_of(role), database, "127.0.0.1", self.port)

    def kill(self) -> None:
        """SIGKILL for the postmaster and every process of it, as in a crash; returns when all are gone."""
        self._abandon()

    def freeze(self) -> None:
        """SIGSTOP for every process of the server: connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self, mode: str = "fast") -> None:
        if self.running:
            self.thaw()
        super().stop(mode)

    def _signal(self, number: signal.Signals) -> None:
        """The postmaster first, so that it starts no process meanwhile; one that ended on its own is fine."""
        postmaster = psutil.Process(self.pid)
        postmaster.send_signal(number)
        for child in postmaster.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)


def end_process(process: psutil.Process, *, first: signal.Signals = signal.SIGTERM) -> None:
    """End a program that a test started, harder if it does not follow within ten seconds; reaps a child."""
    processes.end(process, first=first, seconds=10)
