"""A second server that follows the first by streaming, made from the same binaries: what a failover needs.

with standby_of(primary, directory) as standby: ...
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import Administrator
from postgres_server import PostgresServer
from proxies import Proxy
from src.config import private_files
from src.embedded.roles import NAME, PASSWORD_FILES, url_of


@contextmanager
def standby_of(
    primary: PostgresServer, directory: Path, *, port: int | None = None, through: int | None = None
) -> Iterator[PostgresServer]:
    """A hot standby in `directory`, which is not there yet, following `primary`, by another port where one is given."""
    standby = PostgresServer(directory, port=port)
    private_files.make_directory(directory)
    standby.location.prepare()
    building = standby.location.home / "copied"
    building.mkdir(mode=0o700)
    standby.location.chown(building)
    source = url_of(NAME, primary.password, "postgres", "127.0.0.1", through or primary.port)
    subprocess.run(
        [
            str(standby.binaries / "pg_basebackup"),
            f"--dbname={source}",
            f"--pgdata={building}",
            "--write-recovery-conf",
            "--checkpoint=fast",
            "--no-sync",
        ],
        env=standby.location.environment(),
        cwd="/",
        check=True,
        capture_output=True,
        **standby.location.identity(),
    )
    building.rename(standby.data_path)
    for role, file in PASSWORD_FILES.items():
        private_files.write_privately(standby.location.home / file, primary.password_of(role))
    try:
        standby.start()
        yield standby
    finally:
        standby.stop("immediate")


class Pair:
    """A primary, its standby, the wire by which the second hears of the first, and what an operator does at them."""

    def __init__(self, primary: PostgresServer, standby: PostgresServer, wire: Proxy) -> None:
        self.primary, self.standby, self.wire = primary, standby, wire

    def ask(self, server: PostgresServer, *statements: str) -> object:
        """Runs statements at that server and gives the last one's first value."""
        administrator = Administrator(server.url_for("postgres"))
        try:
            for statement in statements:
                value = administrator.value(statement)
        finally:
            administrator.close()
        return value

    def make_synchronous(self) -> None:
        """From now on a commit is answered once the standby has it on its disk."""
        self.ask(self.primary, "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()")
        self._until(self.primary, "SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync'")

    def is_streaming(self) -> None:
        self._until(self.primary, "SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'")

    def promote(self) -> None:
        self.ask(self.standby, "SELECT pg_promote(wait => true)")

    def _until(self, server: PostgresServer, question: str) -> None:
        deadline = time.monotonic() + 30
        while not self.ask(server, question):
            assert time.monotonic() < deadline, question
            time.sleep(0.05)
