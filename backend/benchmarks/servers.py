"""The servers: ours as users run it, and its peers; how each is started, spoken to and ended."""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID

from src.embedded.lifetime import die_with_parent
from src.embedded.server import EmbeddedPostgres
from src.services.signing import SigningKeys, new_key

from .data import clean_environment
from .operations import Paging, Speech

HERE: Final = Path(__file__).resolve().parent
BACKEND: Final = HERE.parent
PEERS: Final = HERE / "peers"
PEERS_PYTHON: Final = HERE / ".venv" / "bin" / "python"
_READY_SECONDS: Final = 60.0
_LIFETIME_SECONDS: Final = 6 * 3600


class NotInstalled(Exception):
    """What a server needs is not there; the message says what."""


@dataclass(frozen=True)
class Server:
    slug: str
    title: str
    command: Callable[[Server, int], list[str]]
    pool: int
    """Connections to PostgreSQL: the number with which it was fastest (`make bench ARGS=sweep`)."""
    paging: Paging = "keyset"
    directory: Path = PEERS
    needs: Path | None = None
    """A file that is there once it is installed."""
    ours: bool = False
    usual: bool = True
    """Whether a run that names no servers has it."""
    validates: bool = True
    variables: dict[str, str] = field(default_factory=dict)


def _uvicorn(python: Path, module: str) -> Callable[[Server, int], list[str]]:
    # One process, the fast loop and parser, no access log: whoever tunes a server for a benchmark begins here.
    words = ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    return lambda server, port: [str(python), "-m", "uvicorn", f"{module}:app", "--port", str(port), *words]


def _node(slug: str, title: str, pool: int) -> Server:
    directory = PEERS / slug
    return Server(
        slug,
        title,
        lambda server, port: ["node", "server.js", str(port)],
        pool,
        directory=directory,
        needs=directory / "node_modules" / "installed",
    )


def _ours(server: Server, port: int) -> list[str]:
    return [sys.executable, "-m", "src", "serve", "--port", str(port)]


def _twice(server: Server, port: int) -> list[str]:
    return [*_ours(server, port), "--workers", "2"]


OURS: Final = Server("ours", "Groundwork", _ours, 8, "cursor", BACKEND, ours=True)
FLOOR: Final = Server(
    "floor", "the floor: raw ASGI + asyncpg", _uvicorn(Path(sys.executable), "floor"), 8, validates=False
)
SERVERS: Final = {
    server.slug: server
    for server in (
        OURS,
        FLOOR,
        # The same budget of connections, divided.
        Server("ours-2", "Groundwork, two workers", _twice, 4, "cursor", BACKEND, ours=True, usual=False),
        Server(
            "template",
            "FastAPI + SQLModel + psycopg",
            _uvicorn(PEERS_PYTHON, "template"),
            40,
            "offset",
            needs=PEERS_PYTHON,
        ),
        Server(
            "orm",
            "FastAPI + SQLModel + asyncpg",
            _uvicorn(PEERS_PYTHON, "orm"),
            40,
            "offset",
            needs=PEERS_PYTHON,
        ),
        Server(
            "litestar",
            "Litestar + msgspec + asyncpg",
            _uvicorn(PEERS_PYTHON, "litestar_app"),
            8,
            needs=PEERS_PYTHON,
        ),
        _node("express", "Express + pg", 8),
        _node("fastify", "Fastify + postgres.js", 4),
    )
}


@dataclass
class Running:
    server: Server
    process: subprocess.Popen[bytes]
    port: int
    database: str
    log: Path
    speech: Speech

    @property
    def pid(self) -> int:
        return self.process.pid


@contextlib.contextmanager
def running(
    server: Server, postgres: EmbeddedPostgres, database: str, logs: Path, *, pool: int | None = None
) -> Iterator[Running]:
    """Starts it on `database`, ready to answer; ends it afterwards. Raises `NotInstalled`."""
    if server.needs is not None and not server.needs.exists():
        raise NotInstalled(f"{server.title}: {server.needs.relative_to(BACKEND)} is not there.")
    port = _free_port()
    variables = {**clean_environment(), **server.variables}
    size = str(pool or server.pool)
    if server.ours:
        key = new_key()
        # As in production: the role that row-level security binds, every wall up, JSON to a file.
        variables |= {
            "ENVIRONMENT": "production",
            "DATABASE_URL": postgres.url_for(database, role="app"),
            "DATABASE_POOL_SIZE": size,
            "MIGRATE_ON_START": "false",
            "SIGNING_KEYS": key,
        }
        speech = Speech(_bearer(key), server.paging, once=True)
    else:
        variables |= {"DATABASE_URL": postgres.url_for(database), "POOL_SIZE": size, "NODE_ENV": "production"}
        speech = Speech(lambda owner: {"X-User-Id": str(owner)}, server.paging, once=False)
    log = logs / f"{server.slug}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            server.command(server, port),
            cwd=server.directory,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            # However we end, nothing of ours goes on.
            preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509 - looked up before the fork
        )
    try:
        _wait_until_ready(server, process, port, log)
        yield Running(server, process, port, database, log, speech)
    finally:
        _end(process)


def _bearer(key: str) -> Callable[[UUID], dict[str, str]]:
    """A token for each user, made once: theirs to the end."""
    from src.config.auth import seeds

    signing = SigningKeys(seeds(key))
    made: dict[UUID, dict[str, str]] = {}

    def identify(owner: UUID) -> dict[str, str]:
        if owner not in made:
            token = signing.mint(owner, None, _LIFETIME_SECONDS)
            made[owner] = {"Authorization": f"Bearer {token}"}
        return made[owner]

    return identify


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    path = "/readyz" if server.ours else "/livez"
    until = time.monotonic() + _READY_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                connection.close()
                return
        time.sleep(0.05)
    said = log.read_bytes()[-2000:].decode("utf-8", "replace")
    raise RuntimeError(f"{server.title} did not become ready. The end of its log:\n{said}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        # It has a session, and so a group, of its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def database_of(server: Server) -> str:
    return f"bench_{server.slug.replace('-', '_')}_{secrets.token_hex(3)}"
