"""What is tested: PostgreSQL, the service's own processes, and a network on either side of them.

PostgreSQL keeps fsync and synchronous_commit on. The service is `python -m src serve` from a copy of the source (or
`mutated.py` with a mutant), connected as the role that row-level security binds.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import asyncpg
import psutil
import uvloop

from src.embedded.lifetime import die_with_parent
from src.embedded.roles import APPLICATION, NAME
from src.services.signing import SigningKeys, new_key, seeds
from tests.postgres_server import PostgresServer, free_port, give_away, port_is_free

from .network import Network

T = TypeVar("T")

BACKEND: Final = Path(__file__).resolve().parents[2]
MUTATED: Final = Path(__file__).with_name("mutated.py")

# Impatient, so that a fault of a second is a long one; every promise is written in terms of these.
SETTINGS: Final = {
    "DATABASE_CONNECT_TIMEOUT_SECONDS": "2",
    "DATABASE_COMMAND_TIMEOUT_SECONDS": "2.5",
    "DATABASE_STATEMENT_TIMEOUT_SECONDS": "2",
    "DATABASE_LOCK_TIMEOUT_SECONDS": "0.8",
    "LOG_FORMAT": "json",
    "LOG_LEVEL": "warning",
}
MAX_CONNECTIONS: Final = 60
OURS: Final = "nemesis"
"""What connections of the harness call themselves, so that no fault is meant for them."""
DURABLE: Final = ("fsync", "full_page_writes", "synchronous_commit")


class Loop:
    """An event loop in a thread of its own. The main thread stays free to start processes, which end with it."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="clients", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], seconds: float = 60) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(seconds)

    def close(self) -> None:
        async def cancel() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(cancel())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Stage:
    """Everything under test, opened by `staged`. Plain calls, for the main thread."""

    def __init__(
        self,
        directory: Path,
        loop: Loop,
        postgres: PostgresServer,
        *,
        workers: int,
        mutant: str | None,
        role: str,
        settings: Mapping[str, str],
    ) -> None:
        self.directory = directory
        self.loop = loop
        self.postgres = postgres
        self.workers = workers
        self.signing_key = new_key()
        self.database = Network(loop.loop, postgres.port, speaks_postgres=True)
        self.port = free_port()
        self.clients = Network(loop.loop, self.port, speaks_postgres=False)
        self.log_path = directory / "service.log"
        self._mutant = mutant
        self._role = role
        self._settings = dict(settings)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def keys(self) -> SigningKeys:
        return SigningKeys(seeds(self.signing_key))

    # The service

    def environment(self) -> dict[str, str]:
        url = self.postgres.url_for(NAME, role=self._role)
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return {
            **kept,
            **SETTINGS,
            "DATABASE_URL": url.replace(f":{self.postgres.port}/", f":{self.database.port}/"),
            "DATABASE_MIGRATION_URL": self.postgres.url_for(NAME),
            "SIGNING_KEYS": self.signing_key,
            "PORT": str(self.port),
            "WORKERS": str(self.workers),
            **({"FAULTS_MUTANT": self._mutant} if self._mutant else {}),
            **self._settings,
        }

    def start_service(self) -> None:
        """Returns once it answers, and every worker is there."""
        root = self.directory / "service"
        serve = [sys.executable, "-m", "src", "serve"]
        if self._mutant:
            serve = [sys.executable, str(MUTATED), "serve", str(root)]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                serve,
                cwd=root,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_as_an_operator_would(),  # noqa: PLW1509 - the main thread
            )
        until = time.monotonic() + 90
        while not (self.answers() and len(self.worker_pids()) == self.workers):
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(
                    f"The service did not start:\n{self.log_path.read_text(errors='replace')[-4000:]}"
                )
            time.sleep(0.02)

    def answers(self, path: str = "/livez") -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def worker_pids(self) -> list[int]:
        return [] if self._process is None else sorted(_children(self._process.pid))

    def service_lives(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def signal_service(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop_service(self, seconds: float = 40, then: Callable[[], None] = lambda: None) -> int | None:
        """SIGTERM, and its exit code; None when it had to be killed. `then` is done when the port is closed."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(signal.SIGTERM)
        try:
            while process.poll() is None and not port_is_free(self.port):
                time.sleep(0.01)
            then()
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            family = _children(process.pid)
            for pid in (process.pid, *family):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            return None

    def verify(self) -> dict[str, Any]:
        """What `python -m src verify` finds, straight at the database and with the service's own role."""
        environment = {**self.environment(), "DATABASE_URL": self.postgres.url_for(NAME, role=self._role)}
        done = subprocess.run(
            [sys.executable, "-m", "src", "verify", "--json"],
            cwd=self.directory / "service",
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        report: dict[str, Any] = json.loads(done.stdout)
        return report | {"exit_code": done.returncode}

    # PostgreSQL, as its superuser and past the network

    def sql(self, *statements: str) -> None:
        """Each in a transaction of its own, and again while somebody else is in its way."""
        asyncio.run(self._sql(statements))

    async def _sql(self, statements: tuple[str, ...]) -> None:
        connection = await self.connect()
        try:
            for statement in statements:
                for attempt in range(20):
                    try:
                        await connection.execute(statement)
                        break
                    except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
                        if attempt == 19:
                            raise
        finally:
            connection.terminate()
            await asyncio.sleep(0)

    async def connect(self, role: str = NAME, **settings: str) -> asyncpg.Connection[asyncpg.Record]:
        """Writes also while the fault is that nobody may."""
        return await asyncpg.connect(
            self.postgres.url_for(NAME, role=role),
            timeout=10,
            server_settings={
                "application_name": OURS,
                "default_transaction_read_only": "off",
                "lock_timeout": "1500",
                **settings,
            },
        )

    def durability(self) -> dict[str, str]:
        """What the service's role is given, of the settings that keep what is committed."""

        async def look() -> dict[str, str]:
            connection = await asyncpg.connect(self.postgres.url_for(NAME, role=self._role), timeout=10)
            try:
                return {name: await connection.fetchval(f"SHOW {name}") for name in DURABLE}
            finally:
                await connection.close()

        return asyncio.run(look())


def _children(pid: int) -> list[int]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children()]
    return []


def _as_an_operator_would() -> Callable[[], None]:
    """Whoever runs the harness by nohup lets it, and all that it starts, ignore the signal that renews workers."""
    end_with_us = die_with_parent(signal.SIGTERM)

    def arrange() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if end_with_us is not None:
            end_with_us()

    return arrange


@contextlib.contextmanager
def staged(
    *,
    workers: int,
    mutant: str | None = None,
    role: str = APPLICATION,
    options: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
    prepare: tuple[str, ...] = (),
) -> Iterator[Stage]:
    """A running stage; `prepare` are statements that are run between the migration and the start of the load."""
    directory = Path(tempfile.mkdtemp(prefix="groundwork-faults-"))
    give_away(directory)
    loop = Loop()
    try:
        shutil.copytree(
            BACKEND / "src", directory / "service" / "src", ignore=shutil.ignore_patterns("__pycache__")
        )
        chosen = {"max_connections": str(MAX_CONNECTIONS), "max_wal_size": "1GB", **(options or {})}
        with PostgresServer(directory / "data", options=chosen) as postgres:
            stage = Stage(
                directory, loop, postgres, workers=workers, mutant=mutant, role=role, settings=settings or {}
            )
            loop.run(stage.database.open())
            loop.run(stage.clients.open())
            try:
                stage.start_service()
                if prepare:
                    stage.sql(*prepare)
                yield stage
            finally:
                stage.stop_service()
    finally:
        loop.close()
        shutil.rmtree(directory, ignore_errors=True)
