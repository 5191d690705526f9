"""What the tests stand on: a real PostgreSQL of their own, and for each test a database that is nobody else's.

Nothing here, and no test, ever touches the database that is configured: every setting is taken out of the
environment first.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
import pytest

import versions
from lending import Library
from postgres_server import PostgresServer, give_away
from src.config import settings as settings_module
from src.config.database import ConnectionSettings, parse
from src.config.private_files import make_directory
from src.embedded import location
from src.embedded.roles import APPLICATION, PASSWORD_FILES
from src.services.signing import new_key

if TYPE_CHECKING:
    from proxies import Proxy
    from src.services.database import Database

T = TypeVar("T")

FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "200",
        "max_wal_size": "128MB"}  # fmt: skip
"""For throw-away clusters only: a test that kills a server and counts rows asks for none of these."""

_TEST_SECONDS = float(os.environ.get("GROUNDWORK_TEST_SECONDS", "180"))
_NO_SKIPS = "GROUNDWORK_FORBID_SKIPS"
_CPU_PROFILE = os.environ.get("GROUNDWORK_CPU_PROFILE")
"""Path prefix of files (one per process) to which each test's CPU seconds are written."""


# How a run is judged


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Whoever starts a job in the background lets it, and all that it starts, ignore Ctrl-C, which tests send.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A copy of the real descriptor: pytest's capturing replaces 2 while a test runs.
    config.stash[_STDERR] = os.fdopen(os.dup(2), "w")
    # asyncpg and psql look for passwords and certificates there, and stumble over a home that is closed.
    config.stash[_HOME] = tempfile.mkdtemp(prefix="groundwork-home-")
    os.environ["HOME"] = config.stash[_HOME]
    # Thousands of modules and tests live as long as we do: nothing is gained by looking through them for garbage.
    gc.disable()
    for variable in list(os.environ):
        if variable.startswith("PG") and variable[2:].isalpha():
            del os.environ[variable]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests that share what their module has made stay together in one process; the others go to whoever is free.

    xdist's own groups are marks that it writes into the ids of tests, which pytest 9.2 no longer lets it do.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if _shares(config.rootpath / file) else nodeid

    return Together(config, log) if config.getvalue("dist") == "loadgroup" else None


@cache
def _shares(module: Path) -> bool:
    return 'scope="module"' in module.read_text()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    faulthandler.cancel_dump_traceback_later()
    config.stash[_STDERR].close()
    shutil.rmtree(config.stash[_HOME], ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A hung test ends the run with every thread's stack, instead of hanging it."""
    faulthandler.dump_traceback_later(_TEST_SECONDS, exit=True, file=item.config.stash[_STDERR])
    before = _cpu_seconds() if _CPU_PROFILE else (0.0, 0.0)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        if _CPU_PROFILE:
            own, children = (now - then for now, then in zip(_cpu_seconds(), before, strict=True))
            with open(f"{_CPU_PROFILE}.{os.getpid()}", "a") as file:
                file.write(f"{own:.3f}\t{children:.3f}\t{item.nodeid}\n")


def _cpu_seconds() -> tuple[float, float]:
    """CPU seconds of this process, and of the children that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime


_RAN_BY: defaultdict[str, set[str]] = defaultdict(set)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if hasattr(report, "worker_id"):
        _RAN_BY[report.nodeid.partition("::")[0]].add(report.worker_id)


def _torn(config: pytest.Config) -> list[str]:
    """Modules that made several times what their tests were to share."""
    if not config.pluginmanager.has_plugin("dsession"):
        return []
    return [file for file, ran in _RAN_BY.items() if len(ran) > 1 and _shares(config.rootpath / file)]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if _torn(session.config) and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if os.environ.get(_NO_SKIPS) and exitstatus == pytest.ExitCode.OK and _counts(session.config)["skipped"]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    counts = _counts(config)
    terminalreporter.write_line(f"{counts['run']} tests were run, {counts['skipped']} skipped.")
    for file in _torn(config):
        terminalreporter.write_line(f"{file} was run by several processes: it counts as failed.", red=True)
    if os.environ.get(_NO_SKIPS) and counts["skipped"]:
        terminalreporter.write_line("A skipped test proves nothing: this run counts as failed.", red=True)


def _counts(config: pytest.Config) -> dict[str, int]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    stats: dict[str, list[Any]] = reporter.stats if reporter else {}
    run = sum(len(stats.get(name, [])) for name in ("passed", "failed", "xfailed", "xpassed"))
    return {"run": run, "skipped": len(stats.get("skipped", []))}


_STDERR = pytest.StashKey[Any]()
_HOME = pytest.StashKey[str]()


# Settings

_SIGNING_KEY = new_key()


@pytest.fixture(autouse=True)
def clean_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """No variable of the caller's and no backend/.env reaches a test; no service makes a key in backend/.data.

    What a test lets the standard library's log do ends with it: the next one may look at the log otherwise. A socket
    that it left open is told of it where that can be had cheaply, and else of whichever test runs when it is found.
    """
    names = {name.upper() for name in settings_module.Settings.model_fields}
    for variable in list(os.environ):
        if variable.upper() in names:
            monkeypatch.delenv(variable)
    monkeypatch.setattr(settings_module, "ENV_FILE", tmp_path_factory.getbasetemp() / "there-is-no.env")
    monkeypatch.setenv("SIGNING_KEYS", _SIGNING_KEY)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    # The young only: to look through all that thousands of tests have left would take minutes of a run.
    gc.collect(1)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


# PostgreSQL


_MEMORY = "/dev/shm"
_ROOM = 6 << 30


def _place() -> str:
    """Memory, where it has room: what clusters write and delete is half of what the tests cost on a disk."""
    with contextlib.suppress(OSError):
        usable = os.access(_MEMORY, os.W_OK) and not os.statvfs(_MEMORY).f_flag & os.ST_NOEXEC
        if usable and shutil.disk_usage(_MEMORY).free > _ROOM:
            return _MEMORY
    return tempfile.gettempdir()


@contextlib.contextmanager
def open_directory() -> Iterator[Path]:
    """A new directory of an unprivileged user's, whose servers keep their data in it also when root runs the tests."""
    path = Path(tempfile.mkdtemp(prefix="groundwork-test-", dir=_place()))
    give_away(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Root's servers on pytest's closed directories keep their data in /var/lib/groundwork: taken away here."""
    yield
    # Only this session's own, and what belongs to nobody any more: others may be running beside it.
    ours = str(tmp_path_factory.getbasetemp())
    strays = tuple(f"{place}/groundwork-test-" for place in (_MEMORY, tempfile.gettempdir()))
    for origin in location.ROOT_HOME.glob("*/origin"):
        directory = origin.read_text().strip()
        if directory.startswith(ours) or (directory.startswith(strays) and not os.path.exists(directory)):
            shutil.rmtree(origin.parent, ignore_errors=True)


def _store_cheap_verifiers(server: PostgresServer) -> None:
    """Run it in a thread: an asynchronous test may have asked for the server."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, _with_one_iteration(server)).result()


async def _with_one_iteration(server: PostgresServer) -> None:
    """Store the passwords with one SCRAM iteration: 4,096 are nearly half the CPU of each of thousands of connects."""
    connection = await asyncpg.connect(server.url)
    try:
        if connection.get_server_version().major < 16:
            return
        await connection.execute("SET scram_iterations = 1")
        for role in PASSWORD_FILES:
            await connection.execute(f"ALTER ROLE {role} PASSWORD '{server.password_of(role)}'")
    finally:
        await connection.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One running PostgreSQL for the whole session, 18 unless another version is to be tried (`versions.chosen`).
    Whoever stops or freezes a server uses a private one."""
    binaries = versions.binaries(versions.chosen())
    with (
        open_directory() as directory,
        PostgresServer(directory / "data", binaries=binaries, options=FAST) as server,
    ):
        _store_cheap_verifiers(server)
        yield server


@pytest.fixture(scope="session")
def prepared_cluster() -> Iterator[Callable[[Path, Path | None], None]]:
    """Puts a fresh cluster into a data directory by copying one that was made once: a tenth of initdb's time."""
    with contextlib.ExitStack() as stack:
        originals: dict[Path | None, Path] = {}

        def put(directory: Path, binaries: Path | None = None) -> None:
            if binaries not in originals:
                original = stack.enter_context(open_directory()) / "data"
                with PostgresServer(original, binaries=binaries, options=FAST) as server:
                    _store_cheap_verifiers(server)
                originals[binaries] = original
            make_directory(directory)
            for name in ("postgres", "password", "app-password"):
                # Unlike shutil, cp keeps the owner.
                subprocess.run(["cp", "-a", str(originals[binaries] / name), str(directory)], check=True)

        yield put


@pytest.fixture
def private_postgres(
    prepared_cluster: Callable[[Path, Path | None], None],
) -> Iterator[Callable[..., PostgresServer]]:
    """A factory of started servers of the test's own: `private_postgres(options=..., binaries=..., port=...)`.

    `prepare` is called with the server before its start and gives further options (certificates that it may read).

    They keep fsync and synchronous_commit on unless told otherwise, and are ended and deleted after the test.
    """
    with contextlib.ExitStack() as stack:

        def start(
            *,
            options: Mapping[str, str] | None = None,
            binaries: Path | None = None,
            port: int | None = None,
            directory: Path | None = None,
            prepare: Callable[[PostgresServer], Mapping[str, str]] | None = None,
        ) -> PostgresServer:
            binaries = binaries or versions.binaries(versions.chosen())
            place = directory or stack.enter_context(open_directory()) / "data"
            if not place.exists():
                prepared_cluster(place, binaries)
            server = PostgresServer(place, options=options, binaries=binaries, port=port)
            stack.callback(server.stop, "immediate")
            if prepare is not None:
                server.options.update(prepare(server))
            server.start()
            return server

        yield start


class Administrator:
    """Runs coroutines in a thread of its own, so that fixtures need not care whose loop a test has."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="administrator", daemon=True)
        self._thread.start()
        self._connection: asyncpg.Connection[asyncpg.Record] = self.run(asyncpg.connect(url))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(120)

    def execute(self, statement: str) -> None:
        self.run(self._connection.execute(statement))

    def value(self, statement: str) -> Any:
        """The first value of its first row."""
        return self.run(self._connection.fetchval(statement))

    def close(self) -> None:
        self.run(self._connection.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="session")
def administrator(postgres: PostgresServer) -> Iterator[Administrator]:
    opened = Administrator(postgres.url_for("postgres"))
    yield opened
    opened.close()


@contextlib.contextmanager
def new_database(administrator: Administrator, *, template: str = "template1") -> Iterator[str]:
    """The name of a database that is there for as long as it is used."""
    name = f"test_{uuid.uuid4().hex[:16]}"
    administrator.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    try:
        yield name
    finally:
        administrator.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def empty_database_url(postgres: PostgresServer, administrator: Administrator) -> Iterator[str]:
    """The URL of a fresh database without any table."""
    with new_database(administrator) as name:
        yield postgres.url_for(name)


@pytest.fixture(scope="session")
def template(postgres: PostgresServer, administrator: Administrator) -> Iterator[str]:
    """The name of a migrated database that others are cloned from; nobody stays connected to it."""
    from src.services import schema

    with new_database(administrator) as name:
        administrator.run(schema.create_tables(parse(postgres.url_for(name))))
        yield name


@pytest.fixture(scope="session")
def library(postgres: PostgresServer, administrator: Administrator, template: str) -> Iterator[Library]:
    """Lends migrated databases."""
    opened = Library(postgres, administrator, template)
    yield opened
    opened.close()


@pytest.fixture
def database_url(postgres: PostgresServer, library: Library) -> Iterator[str]:
    """The URL of a migrated database without a row, nobody else's for as long as the test runs."""
    name = library.lend()
    yield postgres.url_for(name)
    library.take_back(name)


@pytest.fixture
def second_database_url(
    postgres: PostgresServer, administrator: Administrator, template: str
) -> Iterator[str]:
    """The URL of another one, to compare with."""
    with new_database(administrator, template=template) as name:
        yield postgres.url_for(name)


@pytest.fixture
def app_database_url(postgres: PostgresServer, database_url: str) -> str:
    """The URL of the same database for the role that the service connects as: bound by row-level security."""
    return postgres.url_for(database_url.rsplit("/", 1)[1], role=APPLICATION)


@pytest.fixture
def connection_settings(database_url: str) -> ConnectionSettings:
    return parse(database_url)


@pytest.fixture
async def database(connection_settings: ConnectionSettings) -> AsyncIterator[Database]:
    """An opened `Database` on a fresh migrated database."""
    from src.services.database import Database
    from waiting import PATIENT

    async with Database(connection_settings, PATIENT) as opened:
        yield opened


@pytest.fixture
async def app_database(app_database_url: str) -> AsyncIterator[Database]:
    """As `database`, and on the same one, connected as the service is."""
    from src.services.database import Database
    from waiting import PATIENT

    async with Database(parse(app_database_url), PATIENT) as opened:
        yield opened


@pytest.fixture
def proxy(postgres: PostgresServer) -> Iterator[Proxy]:
    """A way to the session's PostgreSQL that counts, and misbehaves when told to."""
    from proxies import Proxy

    with Proxy(postgres.port) as opened:
        yield opened
