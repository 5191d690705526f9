"""A database's password is found nowhere but where it belongs: in no output of any path, right or failing.

Real processes, on a real PostgreSQL whose role has the canary as its password. They all start at once, as many as the
machine likes, and each test judges one of them. Of each group of commands one has a start of its own; the others are
forked from a process that has loaded the program (`forking`), which says no less.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import asyncpg
import psutil
import pytest

import erring
import leaks
from conftest import open_directory
from forking import Commands
from leaks import CANARY
from postgres_server import PostgresServer
from processes import command_line, copy_program, descendants
from src.cli.app import app

BACKEND = Path(__file__).resolve().parents[1]
ENCODED = quote(CANARY, safe="")
SECONDS = 60


@dataclass(frozen=True)
class Ran:
    """What a process, or several, said: everything, with the command lines of it and its descendants."""

    code: int | None
    said: bytes
    command_lines: bytes

    @property
    def everything(self) -> bytes:
        return self.said + b"\n" + self.command_lines


class Stage:
    """A copy of the program, which meets no backend/.env of the developer's, and a server with the canary."""

    def __init__(self, root: Path, server: PostgresServer) -> None:
        self.backend = root / "backend"
        self.server = server
        copy_program(self.backend)
        self.logs = root / "logs"
        self.logs.mkdir()
        self._commands = Commands(self.backend, self.environment(""))
        self._one_at_a_time = threading.Lock()

    def close(self) -> None:
        self._commands.close()

    def forked(self, *arguments: str, url: str, **more: str) -> Ran:
        """A command to its end, without a start of its own. `ps` shows of it what we wrote ourselves."""
        with self._one_at_a_time:
            done = self._commands.run(*arguments, environment=self.environment(url, **more), seconds=SECONDS)
        return Ran(done.returncode, (done.stdout + done.stderr).encode(), " ".join(arguments).encode())

    def url(self, kind: str) -> str:
        port = self.server.port
        return {
            "good": f"postgresql://ana:{ENCODED}@127.0.0.1:{port}/canary",
            "raw": f"postgresql://ana:{CANARY}@127.0.0.1:{port}/canary",
            "wrong password": f"postgresql://bob:{ENCODED}@127.0.0.1:{port}/canary",
            "unknown database": f"postgresql://ana:{CANARY}@127.0.0.1:{port}/nothing",
            "unreachable": f"postgresql://ana:{ENCODED}@127.0.0.1:1/canary",
            "unknown host": f"postgresql://ana:{CANARY}@nowhere.invalid/canary",
            "bad parameter": f"postgresql://ana:{ENCODED}@127.0.0.1:{port}/canary?sslmode={ENCODED}",
            "bad port": f"postgresql://ana:{CANARY}@127.0.0.1:port/canary",
            "no host": f"postgresql://ana:{CANARY}",
            "another scheme": f"mysql://ana:{CANARY}@127.0.0.1/canary",
        }[kind]

    def environment(self, url: str, **more: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.backend),
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            "DATABASE_URL": url,
            "LOG_LEVEL": "debug",
            # Whatever runs at the usual port of this machine is no part of these tests.
            "PORT": "1",
            **more,
        }

    def run(self, *arguments: str, url: str, **more: str) -> Ran:
        """A command to its end."""
        with self.started(*arguments, url=url, **more) as running:
            running.until_ended()
        return running.ran()

    @contextlib.contextmanager
    def started(self, *arguments: str, url: str, **more: str) -> Iterator[Running]:
        running = Running(self, [sys.executable, *arguments], self.environment(url, **more))
        try:
            yield running
        finally:
            running.close()


class Running:
    def __init__(self, stage: Stage, command: list[str], environment: dict[str, str]) -> None:
        self.log_path = stage.logs / f"{time.monotonic_ns()}"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=stage.backend, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.command_lines: set[str] = set()
        self.answers: list[bytes] = []
        self._seen: set[psutil.Process] = set()

    def look(self) -> None:
        """Note what `ps` shows of it and its descendants now."""
        self._seen.update(descendants(self.process.pid))
        for pid in [self.process.pid, *(process.pid for process in self._seen)]:
            with contextlib.suppress(psutil.Error):
                self.command_lines.add("\0".join(psutil.Process(pid).cmdline()))

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.log_path.read_text(errors="replace")
            self.look()
            time.sleep(0.05)

    def until_ended(self) -> None:
        self.until(lambda: self.process.poll() is not None)

    def until_it_says(self, pattern: str) -> re.Match[str]:
        found: list[re.Match[str]] = []

        def look() -> bool:
            said = self.log_path.read_text(errors="replace")
            found.extend(re.finditer(pattern, said))
            assert found or self.process.poll() is None, said
            return bool(found)

        self.until(look)
        return found[0]

    def ask(self, port: int, *requests: tuple[str, str]) -> None:
        """The whole answers: status, headers and body."""
        for method, path in requests:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            body = b"x" * 200_000 if method == "POST" else None
            connection.request(method, path, body=body, headers={"Accept": "*/*"})
            answer = connection.getresponse()
            self.answers.append(
                f"{method} {path} {answer.status} {answer.getheaders()}\n".encode() + answer.read()
            )
            connection.close()

    def stop(self) -> None:
        self.look()
        self.process.send_signal(signal.SIGTERM)
        self.until_ended()

    def ran(self) -> Ran:
        said = b"\n".join([self.log_path.read_bytes(), *self.answers])
        return Ran(self.process.returncode, said, "\n".join(sorted(self.command_lines)).encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.look()
            self.process.kill()
            self.process.wait(10)
        for process in self._seen:
            with contextlib.suppress(psutil.Error):
                process.kill()


# What is run


SERVE = ("-m", "src", "serve", "--port", "0")
UVICORN = ("-m", "uvicorn", "src.main:app", "--port", "0")
VERIFY = ("-m", "src", "verify")
CHECK = ("-m", "src", "migrate", "check")
USERS = ("-m", "src", "user", "list")
CONFIG = ("-m", "src", "config")

# name: (command, which address, exit code, further variables)
COMMANDS: dict[str, tuple[tuple[str, ...], str, int, dict[str, str]]] = {
    "serve, wrong password": (SERVE, "wrong password", 3, {}),
    "serve, unknown database": (SERVE, "unknown database", 3, {"LOG_FORMAT": "console"}),
    "serve, bad parameter": (SERVE, "bad parameter", 3, {}),
    "serve, bad port": (SERVE, "bad port", 3, {}),
    "uvicorn, wrong password": (UVICORN, "wrong password", 3, {"LOG_FORMAT": "json"}),
    "uvicorn, no host": (UVICORN, "no host", 3, {}),
    "verify": (VERIFY, "raw", 0, {}),
    "verify, wrong password": (VERIFY, "wrong password", 3, {}),
    "verify, unreachable": (VERIFY, "unreachable", 1, {}),
    "verify, bad parameter": (VERIFY, "bad parameter", 3, {}),
    "verify --json": ((*VERIFY, "--json"), "good", 0, {}),
    "verify --json, wrong password": ((*VERIFY, "--json"), "wrong password", 3, {}),
    "verify --json, unknown host": ((*VERIFY, "--json"), "unknown host", 1, {}),
    "verify --json, bad port": ((*VERIFY, "--json"), "bad port", 3, {}),
    "verify_db.py": (("verify_db.py",), "another scheme", 3, {}),
    "config": (CONFIG, "raw", 0, {}),
    "config as JSON": ((*CONFIG, "--format", "json"), "good", 0, {}),
    "config as env": ((*CONFIG, "--format", "env"), "good", 0, {}),
    "config as markdown": ((*CONFIG, "--format", "markdown"), "raw", 0, {}),
    "config, bad parameter": (CONFIG, "bad parameter", 3, {"DATABASE_MIGRATION_URL": f"x://{CANARY}", "PORT": CANARY}),
    "embedded upgrade": (("-m", "src", "embedded", "upgrade"), "good", 1, {}),
    "migrate check": (CHECK, "good", 0, {}),
    "migrate check, wrong password": (CHECK, "wrong password", 3, {}),
    "migrate check, unreachable": (CHECK, "unreachable", 1, {}),
    "migrate check, no host": (CHECK, "no host", 3, {}),
    "migrate down": (("-m", "src", "migrate", "down", "base"), "raw", 2, {}),
    "user create": (("-m", "src", "user", "create", "bea@example.com"), "good", 0, {}),
    "user list, wrong password": (USERS, "wrong password", 3, {}),
    "task list, unknown host": (("-m", "src", "task", "list", "ana@example.com"), "unknown host", 1, {}),
    "task add, nobody": (("-m", "src", "task", "add", "nobody@example.com", "x"), "raw", 1, {}),
    "task list, another scheme": (("-m", "src", "task", "list", "ana@example.com"), "another scheme", 3, {}),
    "openapi": (("-m", "src", "openapi"), "good", 0, {}),
    "an address as an argument": (("-m", "src", "verify", f"postgresql://ana:{CANARY}@h/d"), "good", 2, {}),
    **{
        f"{' '.join(words[:2])}, unreachable": (("-m", "src", *words), "unreachable", code, {})
        for words, code in (
            (("sweep",), 1), (("migrate", "up"), 1), (("keys", "new"), 0),
            (("user", "set-password", "ana@example.com"), 2),
            (("user", "disable", "ana@example.com"), 1), (("user", "enable", "ana@example.com"), 1),
            (("user", "delete", "ana@example.com", "--yes"), 1), (("user", "token", "ana@example.com"), 1),
            (("task", "done", "ana@example.com", str(UUID(int=1))), 1), (("task", "export", "ana@example.com"), 1),
            (("task", "delete", "ana@example.com", str(UUID(int=1))), 1),
            (("task", "import", "src/config/version.py"), 2),
        )
    },
    "reprs": (("ERRING", "show"), "raw", 0, {"PYTHONASYNCIODEBUG": "1"}),
    "reprs, wrong password": (("ERRING", "show"), "wrong password", 0, {}),
}  # fmt: skip

PROBES = tuple(("GET", path) for path in ("/livez", "/readyz", "/health", "/metrics"))
PAGES = (
    *(
        ("GET", path)
        for path in ("/openapi.json", "/docs", "/problems", "/problems/unavailable", "/no/such/page")
    ),
    ("PUT", "/health"),
    ("POST", "/health"),
    ("HEAD", "/readyz"),
)


def serve(stage: Stage) -> Ran:
    with stage.started(*SERVE, "--workers", "2", url=stage.url("raw"), LOG_FORMAT="json") as running:
        port = int(running.until_it_says(r'"service":"http://127\.0\.0\.1:(\d+)"')[1])
        running.ask(port, *PROBES, *PAGES)
        running.stop()
        return running.ran()


def serve_unreachable(stage: Stage) -> Ran:
    with stage.started(*SERVE, url=stage.url("unreachable"), LOG_FORMAT="console") as running:
        port = int(running.until_it_says(r"http://127\.0\.0\.1:(\d+)/docs")[1])
        running.ask(port, *PROBES)
        running.stop()
        return running.ran()


def uvicorn(stage: Stage) -> Ran:
    with stage.started(*UVICORN, url=stage.url("good"), LOG_FORMAT="console") as running:
        port = int(running.until_it_says(r"running on http://127\.0\.0\.1:(\d+)")[1])
        running.ask(port, *PROBES)
        running.stop()
        return running.ran()


def err(log_format: str) -> Callable[[Stage], Ran]:
    def run(stage: Stage) -> Ran:
        program = str(Path(erring.__file__))
        with stage.started(program, "supervise", url=stage.url("good"), LOG_FORMAT=log_format) as running:
            port = int(running.until_it_says(r"http://127\.0\.0\.1:(\d+)/docs")[1])
            running.ask(port, *(("GET", f"/bug/{bug}") for bug in erring.BUGS), *PROBES)
            running.stop()
            return running.ran()

    return run


def psql(stage: Stage) -> Ran:
    """psql, which is given the password by its environment: what `ps` shows of it."""
    arguments = ("-m", "src", "psql", "-c", "SELECT pg_sleep(0.5)", "-c", "SELECT no_such_column")
    return stage.run(*arguments, url=stage.url("raw"))


SERVICES: dict[str, tuple[Callable[[Stage], Ran], int]] = {
    "serve": (serve, 0),
    "serve, unreachable": (serve_unreachable, 0),
    "uvicorn": (uvicorn, -signal.SIGTERM),  # It ends in order, and then by the signal that it was sent.
    "bugs, logged as JSON": (err("json"), 0),
    "bugs, logged for people": (err("console"), 0),
    "psql": (psql, 1),
}


async def prepare(server: PostgresServer) -> None:
    connection = await asyncpg.connect(server.url)
    # The server writes every statement down, and this one holds the canary rightly.
    await connection.execute("SET log_statement = 'none'; SET log_min_error_statement = 'panic'")
    await connection.execute(
        f"CREATE ROLE ana LOGIN PASSWORD '{CANARY}'; CREATE ROLE bob LOGIN PASSWORD 'another'"
    )
    await connection.execute("CREATE DATABASE canary OWNER ana")
    await connection.close()


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    options = {"log_statement": "all", "log_connections": "on", "log_error_verbosity": "verbose"}
    with open_directory() as directory, PostgresServer(directory / "data", options=options) as server:
        asyncio.run(prepare(server))
        with contextlib.closing(Stage(directory, server)) as made:
            yield made


@pytest.fixture(scope="module")
def results(stage: Stage) -> Iterator[dict[str, Future[Ran]]]:
    """Everything under way, by name."""
    first = stage.run("-m", "src", "migrate", "up", url=stage.url("raw"))
    assert first.code == 0, first.said
    assert leaks.found(first.everything) == []

    # A start of its own has the first of each group, and whatever serves: it starts others.
    firsts: dict[tuple[str, ...], str] = {}
    for name, (arguments, *_) in COMMANDS.items():
        firsts.setdefault(arguments[:3], name)

    def run(name: str, arguments: tuple[str, ...], kind: str, more: dict[str, str]) -> Ran:
        if arguments[:2] == ("-m", "src") and arguments != SERVE and firsts[arguments[:3]] != name:
            return stage.forked(*arguments[2:], url=stage.url(kind), **more)
        program = [str(Path(erring.__file__)) if word == "ERRING" else word for word in arguments]
        return stage.run(*program, url=stage.url(kind), **more)

    with ThreadPoolExecutor(max_workers=4) as pool:
        under_way = {name: pool.submit(work, stage) for name, (work, _) in SERVICES.items()}
        for name, (arguments, kind, _, more) in COMMANDS.items():
            under_way[name] = pool.submit(run, name, arguments, kind, more)
        yield under_way
        pool.shutdown(cancel_futures=True)


# What is claimed


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_does_not_say_it(name: str, results: dict[str, Future[Ran]]) -> None:
    ran = results[name].result(2 * SECONDS)
    assert ran.code == SERVICES[name][1], ran.said
    assert leaks.found(ran.everything) == [], ran.said


def test_every_command_there_is_is_among_them() -> None:
    def leaves(group: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        for name, command in group.commands.items():
            yield from leaves(command, (*before, name)) if hasattr(command, "commands") else [(*before, name)]

    run = {arguments[2 : 2 + length] for arguments, *_ in COMMANDS.values() for length in (1, 2)}
    # What is served and psql are under SERVICES.
    assert set(leaves(app)) - run == {("psql",)}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_does_not_say_it(name: str, results: dict[str, Future[Ran]]) -> None:
    ran = results[name].result(2 * SECONDS)
    assert ran.code == COMMANDS[name][2], ran.said
    said = ran.everything
    if name == "an address as an argument":
        said = ran.said  # Who types a password into a command line has shown it to `ps` already.
    assert said.strip()
    assert leaks.found(said) == [], ran.said


def test_the_defects_were_met_and_logged(results: dict[str, Future[Ran]]) -> None:
    """Otherwise the search would have found nothing in nothing."""
    ran = results["bugs, logged as JSON"].result(2 * SECONDS)
    lines = [
        json.loads(line) for line in ran.said.splitlines() if line.startswith(b"{") and b'"event"' in line
    ]
    failed = {line["route"] for line in lines if line["event"] == "request" and line["status"] >= 500}
    assert failed >= {
        f"/bug/{bug}" for bug in ("session", "statement", "gone", "reprs", "address", "cause", "group")
    }
    tracebacks = [line["exception"] for line in lines if "exception" in line]
    assert any("a bug, while a session is open" in text for text in tracebacks)
    assert b"cannot reach" in ran.said
    assert b"SecretStr" in ran.said
    shown = results["reprs"].result(2 * SECONDS).said
    for kind in (b"Settings: ", b"ConnectionSettings: ", b"Database: ", b"AsyncEngine: ", b"AsyncSession: "):
        assert kind in shown
    workers = results["serve"].result(2 * SECONDS).command_lines
    assert workers.count(b"src.server") >= 1


def test_the_servers_own_log_and_processes_do_not_say_it(
    stage: Stage, results: dict[str, Future[Ran]]
) -> None:
    for future in results.values():
        future.result(2 * SECONDS)
    log = stage.server.log_path.read_bytes()
    assert b"password authentication failed" in log
    assert b"INSERT INTO users" in log
    assert leaks.found(log) == []
    titles = [command_line(process) for process in psutil.Process(stage.server.pid).children(recursive=True)]
    assert leaks.found(repr(titles).encode()) == []


def test_the_password_of_the_embedded_database_is_not_said(stage: Stage, tmp_path: Path) -> None:
    """One that is made by us: its banner, its verification, its log and its processes."""
    with open_directory() as directory:
        data = {"DATA_DIRECTORY": str(directory / "data"), "LOG_FORMAT": "json"}
        with stage.started(*SERVE, "--embedded", url="", **data) as running:
            running.until_it_says('"service":"http')
            verified = stage.run(*VERIFY, "--json", url="", **data)
            running.stop()
            ran = running.ran()
        assert (ran.code, verified.code) == (0, 0), (ran.said, verified.said)
        (kept,) = directory.glob("data/password")
        password = kept.read_text().strip()
        logged = (directory / "data" / "postgres.log").read_bytes()
    assert len(password) > 20
    assert b"-D\0" in ran.command_lines
    for said in (ran.everything, verified.everything, logged):
        assert leaks.found_of(password, said) == []


# Whether it would be found


@pytest.mark.parametrize("form", leaks.forms(CANARY))
def test_every_form_of_it_would_be_found(form: str) -> None:
    said = b"2026-11-22 [info] serving at " + leaks.forms(CANARY)[form] + b" and so on\n"
    assert leaks.found(said)
    assert leaks.found(b"postgresql://ana:***@127.0.0.1:5432/canary \xe2\x9c\x93 \xc3\xb6\n") == []
    assert leaks.found_of("0f3a" * 12, b"token " + b"0f3a" * 12)


@pytest.mark.parametrize(
    "leak",
    [
        "print(url)",
        "import sys; sys.stderr.write(repr(connection.asyncpg_arguments()))",
        "import logging; logging.warning('%s', connection.password.get_secret_value())",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)', url])",
        "raise RuntimeError(settings.database_url.get_secret_value()[-40:])",
        "type(connection).redacted = lambda self: url; from src.cli.app import main; main(['config'])",
    ],
)
def test_a_planted_leak_is_found(stage: Stage, leak: str) -> None:
    known = (
        "from src.config.settings import load_settings, require_database; settings = load_settings();"
        "connection = require_database(settings); url = settings.database_url.get_secret_value(); "
    )
    if "subprocess" not in leak:
        assert leaks.found(stage.forked("-c", known + leak, url=stage.url("good")).said)
        return
    # What `ps` shows is looked for while it runs.
    with stage.started("-c", known + leak, url=stage.url("good")) as running:
        running.until(lambda: leaks.found(running.ran().everything) or running.process.poll() is not None)
    assert leaks.found(running.ran().everything)
