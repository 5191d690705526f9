"""The command line as people and programs meet it: processes, exit codes, and what is said on which stream."""

from __future__ import annotations

import base64
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from clusters import Proxy, at
from conftest import open_directory
from installation import Installation, fetch
from postgres_server import PostgresServer
from processes import command_line
from src.cli import app
from src.embedded.server import running_url
from waiting import until

BACKEND = Path(__file__).resolve().parents[2]
CANARY = "p%@:/ é"
SECONDS = 100


@pytest.fixture(scope="module")
def installation() -> Iterator[Installation]:
    with open_directory() as directory, contextlib.closing(Installation(directory)) as made:
        yield made


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


# Serving


def test_serve_serves_and_verify_finds_the_service(installation: Installation, database_url: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "src", "serve", "--port", "0"],
        cwd=installation.backend,
        env=installation.environment(DATABASE_URL=database_url, LOG_FORMAT="json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        events = (json.loads(line) for line in process.stdout)
        place = next(event["service"] for event in events if event["event"] == "service.ready")

        def service_is_well() -> bool:
            """A loop that was held up on a busy machine is a warning for ten seconds."""
            verified = installation.run("verify", url=database_url, PORT=place.rpartition(":")[2])
            return f"✓ service          {place}/health reports pass" in verified.stderr

        until(service_is_well)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=SECONDS)
        assert errors == ""
        ends = [json.loads(line)["event"] for line in rest.splitlines()][-2:]
        assert ends == ["service.draining", "service.stopped"]
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


# Users and tasks


def test_a_user_and_a_task_live_through_their_lives(installation: Installation, database_url: str) -> None:
    added = installation.start("user", "create", "Ana@Example.com", url=database_url)
    assert (added.returncode, added.stderr) == (0, "")
    (user,) = lines(added.stdout)
    assert user["email"] == "ana@example.com"

    added = installation.run(
        "task", "add", "ana@example.com", "Buy milk ✓", "--description", "2 l", url=database_url
    )
    (task,) = lines(added.stdout)
    assert (task["title"], task["description"], task["is_completed"]) == ("Buy milk ✓", "2 l", False)

    done = installation.run("task", "done", "ana@example.com", task["id"], url=database_url)
    (finished,) = lines(done.stdout)
    assert finished["is_completed"] is True
    assert lines(installation.run("task", "list", "ANA@example.com", url=database_url).stdout) == [finished]
    assert installation.run("task", "list", "ana@example.com", "--open", url=database_url).stdout == ""
    assert lines(installation.run("user", "list", url=database_url).stdout) == [user]

    assert installation.run("task", "delete", "ana@example.com", task["id"], url=database_url).returncode == 0
    refused = installation.run("user", "delete", "ana@example.com", url=database_url)
    assert refused.returncode == 2
    assert "Pass --yes to run non-interactively." in refused.stderr
    deleted = installation.run("user", "delete", "ana@example.com", "--yes", url=database_url)
    assert (deleted.returncode, deleted.stdout) == (0, "")
    assert fetch(database_url, "SELECT 1 FROM users") == []


def test_what_cannot_be_done_is_said_in_a_line_with_its_exit_code(
    installation: Installation, database_url: str
) -> None:
    assert installation.run("user", "create", "ana@example.com", url=database_url).returncode == 0
    nobody = "00000000-0000-0000-0000-000000000000"
    cases = [
        (1, "already", ("user", "create", "ana@example.com")),
        (1, "no such user", ("task", "list", "bob@example.com")),
        (1, "no such task", ("task", "done", "ana@example.com", nobody)),
        (2, "e-mail", ("user", "create", "not an address")),
        (2, "white space", ("task", "add", "ana@example.com", " ")),
        (2, "UUID", ("task", "done", "ana@example.com", "1")),
        (2, "--limit", ("user", "list", "--limit", "0")),
    ]
    for code, said, arguments in cases:
        result = installation.run(*arguments, url=database_url)
        assert (result.returncode, result.stdout) == (code, ""), arguments
        assert said in result.stderr
        assert "Traceback" not in result.stderr


def test_a_list_is_a_table_on_a_terminal_and_a_title_cannot_steer_it(
    installation: Installation, database_url: str
) -> None:
    fetch(
        database_url,
        "WITH u AS (INSERT INTO users (email) VALUES ('ana@example.com') RETURNING id) "
        r"INSERT INTO tasks (user_id, title) SELECT id, E'red \x1b[31m alert' FROM u",
    )
    seen = installation.run_on_terminal("task", "list", "ana@example.com", url=database_url)
    assert "title" in seen.splitlines()[0]
    assert "red \\u001b[31m alert" in seen
    assert "\x1b" not in seen


def test_a_reader_that_goes_away_early_is_passed_over_in_silence(
    installation: Installation,
) -> None:
    command = f'"{sys.executable}" -m src openapi | true; echo "${{PIPESTATUS[0]}}"'
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=installation.backend,
        env=installation.environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (result.stdout, result.stderr) == ("0\n", "")


# Usage and configuration


def test_help_is_quick_because_nothing_of_the_service_is_imported(installation: Installation) -> None:
    script = (
        "import sys; from src.cli.app import main; code = main(['--help']); "
        "sys.exit(code or any(name in sys.modules for name in ('sqlalchemy', 'fastapi', 'asyncpg', 'rich')))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=installation.backend,
        env=installation.environment(),
        timeout=SECONDS,
    )
    assert result.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Commands:"),
        (("frobnicate",), "No such command"),
        (("verify", "--frobnicate"), "No such option"),
        (("serve", "--port", "70000"), "--port"),
        (("config", "--format", "xml"), "--format"),
    ],
)
def test_wrong_usage_ends_with_2(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(arguments) == 2
    seen = capsys.readouterr()
    assert said in seen.err
    assert seen.out == ""


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_has_a_short_and_a_long_option(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["user", "token", option]) == 0
    seen = capsys.readouterr()
    assert "--minutes" in seen.out
    assert seen.err == ""


def test_an_address_typed_as_an_argument_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["verify", "postgresql://ana:secret@db/x"]) == 2
    seen = capsys.readouterr()
    assert "secret" not in seen.err
    assert "DATABASE_URL" in seen.err


def test_a_defect_of_ours_is_told_by_its_places_and_never_by_a_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError(f"the password is {CANARY}")

    monkeypatch.setattr("src.config.settings.load_settings", broken)
    assert app.main(["config"]) == 1
    seen = capsys.readouterr()
    assert CANARY not in seen.out + seen.err
    assert "RuntimeError" in seen.err
    assert "test_cli.py" in seen.err


COMMANDS = {
    "serve": ("serve",),
    "verify": ("verify",),
    "verify --json": ("verify", "--json"),
    "migrate": ("migrate", "up"),
    "user": ("user", "list"),
    "task": ("task", "list", "ana@example.com"),
    "config": ("config",),
    "psql": ("psql",),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_configuration_names_every_fault_and_ends_with_3(
    installation: Installation, command: str
) -> None:
    url = f"postgresql://ana:{quote(CANARY, safe='')}@127.0.0.1:1/x?sslmode=perhaps"
    result = installation.run(*COMMANDS[command], url=url, DATABASE_POOL_SIZE="many", LOG_LEVEL="loud")
    assert result.returncode == 3
    said = result.stdout if "--json" in command or command == "serve" else result.stderr
    for name in ("DATABASE_URL", "DATABASE_POOL_SIZE", "LOG_LEVEL"):
        assert name in said
    assert "Traceback" not in result.stderr
    assert_silent_about(CANARY, result)


@pytest.mark.parametrize("command", ["serve", "migrate", "user", "psql"])
def test_without_a_database_the_way_to_one_is_shown(
    installation: Installation, command: str, tmp_path: Path
) -> None:
    result = installation.run(*COMMANDS[command], DATA_DIRECTORY=str(tmp_path / "none"))
    assert result.returncode == 3
    assert "DATABASE_URL" in result.stdout + result.stderr
    assert "make run" in result.stdout + result.stderr
    assert not (tmp_path / "none").exists()


def test_a_private_database_is_not_started_beside_a_configured_one(
    installation: Installation, database_url: str
) -> None:
    result = installation.run("serve", "--embedded", url=database_url)
    assert result.returncode == 3
    assert "--embedded" in result.stdout + result.stderr


def test_serve_embedded_port_without_a_private_database_is_a_usage_error(
    installation: Installation, database_url: str
) -> None:
    result = installation.run("serve", "--embedded-port", "5433", url=database_url)
    assert (result.returncode, result.stdout) == (2, "")
    assert "--embedded-port needs --embedded" in result.stderr


def test_embedded_upgrade_without_data_says_so(installation: Installation, tmp_path: Path) -> None:
    result = installation.run("embedded", "upgrade", DATA_DIRECTORY=str(tmp_path / "none"))
    assert result.returncode == 1
    assert "no embedded database" in result.stderr


@pytest.mark.parametrize(
    "more", [{"ENVIRONMENT": "production"}, {"DATABASE_URI": "postgresql://ana:pw@db.example.com/x"}], ids=str
)
def test_serve_embedded_auto_where_a_database_was_meant_ends_with_3(
    installation: Installation, tmp_path: Path, more: dict[str, str]
) -> None:
    result = installation.run("serve", "--embedded=auto", DATA_DIRECTORY=str(tmp_path / "none"), **more)
    assert result.returncode == 3
    assert "DATABASE_URL" in result.stdout + result.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("source", ["environment", "env file", "directory of secrets"])
def test_serve_embedded_auto_with_a_database_starts_no_other(
    installation: Installation, tmp_path: Path, source: str
) -> None:
    """The address is refused, so that nothing is served; what matters is that it was found."""
    address, more = (
        "postgresql://ana@127.0.0.1:1/x?sslmode=perhaps",
        {"DATA_DIRECTORY": str(tmp_path / "none")},
    )
    env_file = installation.backend / ".env"
    if source == "environment":
        more["DATABASE_URL"] = address
    elif source == "env file":
        env_file.write_text(f"export DATABASE_URL = '{address}'  # ours\n")
    else:
        (tmp_path / "DATABASE_URL").write_text(f"{address}\n")
        more["SECRETS_DIR"] = str(tmp_path)
    try:
        result = installation.run("serve", "--embedded=auto", **more)
    finally:
        env_file.unlink(missing_ok=True)
    assert result.returncode == 3
    assert "sslmode" in result.stdout
    assert not (tmp_path / "none").exists()


def test_the_effective_settings_are_printed_with_their_sources_and_without_secrets(
    installation: Installation,
) -> None:
    url = f"postgresql://ana:{quote(CANARY, safe='')}@db.example.com/x"
    table = installation.run("config", url=url)
    assert table.returncode == 0
    assert "postgresql://ana:***@db.example.com:5432/x?sslmode=verify-full  [environment]" in table.stdout
    document = installation.run("config", "--format", "json", url=url)
    rows = {row["name"]: row for row in json.loads(document.stdout)["settings"]}
    assert rows["PORT"]["origin"] == "environment"
    assert rows["HOST"]["origin"] == "default"
    for result in (table, document):
        assert_silent_about(CANARY, result)
    assert "DATABASE_POOL_SIZE=4" in installation.run("config", "--format", "env").stdout
    assert "| `DATABASE_POOL_SIZE` |" in installation.run("config", "--format", "markdown").stdout


def test_the_api_is_described_without_settings_and_without_a_database(installation: Installation) -> None:
    result = installation.run("openapi", url="nonsense", LOG_LEVEL="nonsense")
    assert (result.returncode, result.stderr) == (0, "")
    assert "/health" in json.loads(result.stdout)["paths"]


# Migrations


def test_the_schema_goes_up_is_checked_and_goes_down(
    installation: Installation, empty_database_url: str
) -> None:
    url = empty_database_url
    behind = installation.run("migrate", "check", url=url)
    assert (behind.returncode, "none" in behind.stderr) == (1, True)
    up = installation.run("migrate", "up", url=url)
    assert up.returncode == 0
    head = up.stdout.strip()
    assert f"from nothing to {head}" in up.stderr
    assert "nothing to do" in installation.run("migrate", "up", url=url).stderr
    assert installation.run("migrate", "check", url=url).returncode == 0

    fetch(url, "DROP INDEX ix_tasks_open")
    drifted = installation.run("migrate", "check", url=url)
    assert drifted.returncode == 1
    assert "ix_tasks_open" in drifted.stdout

    assert installation.run("migrate", "down", "base", url=url).returncode == 2
    assert installation.run("migrate", "down", "nowhere", "--yes", url=url).returncode == 2
    assert len(fetch(url, "SELECT 1 FROM pg_class WHERE relname = 'tasks'")) == 1
    down = installation.run("migrate", "down", "base", "--yes", url=url)
    assert (down.returncode, down.stdout) == (0, "base\n")
    assert fetch(url, "SELECT 1 FROM pg_class WHERE relname = 'tasks'") == []


def test_tables_that_are_missing_are_told_with_the_command_that_makes_them(
    installation: Installation, empty_database_url: str
) -> None:
    result = installation.run("user", "list", url=empty_database_url)
    assert result.returncode == 1
    assert "-m src migrate up" in result.stderr


# Verify


def test_verify_reports_to_people_on_standard_error_with_marks(
    installation: Installation, database_url: str
) -> None:
    result = installation.run("verify", url=database_url)
    assert (result.returncode, result.stdout) == (1, "")  # The tests' server runs without fsync.
    assert "✓ credentials" in result.stderr
    assert "✗ durability" in result.stderr
    assert "– service" in result.stderr
    assert "next: Start the server without -c fsync=off" in result.stderr


def test_verify_speaks_ascii_where_nothing_else_can_be_shown(
    installation: Installation, database_url: str
) -> None:
    result = installation.start("verify", url=database_url, PYTHONIOENCODING="ascii")
    assert result.stderr.isascii()
    assert "ok   credentials" in result.stderr
    assert "FAIL durability" in result.stderr


def test_colours_are_for_terminals_and_no_color_is_honoured(
    installation: Installation, database_url: str
) -> None:
    assert "\x1b[32m✓" in installation.run_on_terminal("verify", url=database_url)
    assert "\x1b" not in installation.run_on_terminal("verify", url=database_url, NO_COLOR="1")
    assert "\x1b" not in installation.run("verify", url=database_url).stderr


def test_verify_json_is_one_document_on_standard_output(
    installation: Installation, database_url: str
) -> None:
    result = installation.run("verify", "--json", url=database_url)
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert (document["ok"], document["exit_code"]) == (False, result.returncode)
    (durability,) = [check for check in document["checks"] if check["name"] == "durability"]
    assert durability["outcome"] == "failed"
    assert durability["remedy"]


def test_verify_without_a_database_starts_one_and_stops_it(installation: Installation) -> None:
    with open_directory() as directory:
        data = directory / "data"
        first = installation.run("verify", DATA_DIRECTORY=str(data))
        assert first.returncode == 0, first.stderr
        assert "started for this" in first.stderr
        assert running_url(data) is None
        assert not [
            process.pid for process in psutil.process_iter() if str(data) in " ".join(command_line(process))
        ]
        # The data stays, and is good for another time.
        assert installation.run("verify", DATA_DIRECTORY=str(data)).returncode == 0


def test_commands_attach_to_the_running_embedded_database(
    installation: Installation, private_postgres: Callable[..., PostgresServer]
) -> None:
    server = private_postgres()
    data = {"DATA_DIRECTORY": str(server.directory)}
    assert installation.run("migrate", "up", **data).returncode == 0
    assert installation.run("user", "create", "ana@example.com", **data).returncode == 0
    verified = installation.run("verify", **data)
    assert (verified.returncode, "from the embedded database" in verified.stderr) == (0, True)
    assert server.running
    asked = installation.run("psql", "-Atc", "SELECT email FROM users", **data)
    assert asked.stdout == "ana@example.com\n"


@pytest.mark.parametrize(
    "more", [{"ENVIRONMENT": "production"}, {"DATABASE_URI": "postgresql://ana:pw@db.example.com/x"}], ids=str
)
def test_verify_starts_nothing_where_a_database_was_meant(
    installation: Installation, tmp_path: Path, more: dict[str, str]
) -> None:
    result = installation.run("verify", DATA_DIRECTORY=str(tmp_path / "none"), **more)
    assert result.returncode == 3
    assert "DATABASE_URL" in result.stderr
    assert not (tmp_path / "none").exists()


def test_ctrl_c_ends_with_130_and_no_traceback(
    installation: Installation, database_url: str, postgres: PostgresServer
) -> None:
    with Proxy(postgres.port) as proxy:
        proxy.freeze()
        process = subprocess.Popen(
            [sys.executable, "-m", "src", "verify"],
            cwd=installation.backend,
            env=installation.environment(
                DATABASE_URL=proxy.through(database_url), DATABASE_CONNECT_TIMEOUT_SECONDS="60"
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        for line in process.stderr:
            if "TLS" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=SECONDS)[1]
        assert process.returncode == 130
        assert "Traceback" not in rest
        assert "Interrupted" in rest


# verify_db.py


def base_python() -> str:
    """The Python that the virtual environment was made with; it has none of our libraries."""
    return str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")


def test_verify_db_runs_from_any_directory_by_any_python(
    installation: Installation, database_url: str, tmp_path: Path
) -> None:
    venv = installation.backend / ".venv"
    venv.symlink_to(sys.prefix)
    try:
        result = subprocess.run(
            [base_python(), "-I", "-S", str(installation.backend / "verify_db.py"), "--json"],
            cwd=tmp_path,
            env=installation.environment(DATABASE_URL=database_url),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    finally:
        venv.unlink()
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert result.returncode == document["exit_code"] == 1
    assert [check["name"] for check in document["checks"] if check["outcome"] == "failed"] == ["durability"]


def test_verify_db_says_how_to_install_where_nothing_is(installation: Installation, tmp_path: Path) -> None:
    result = subprocess.run(
        [base_python(), "-I", "-S", str(installation.backend / "verify_db.py")],
        cwd=tmp_path,
        env=installation.environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert f'make -C "{installation.backend.parent}"' in result.stderr


# Secrets and failures of the database (C2, C3)


def assert_silent_about(secret: str, result: subprocess.CompletedProcess[str]) -> None:
    said = result.stdout + result.stderr
    encoded = base64.b64encode(secret.encode()).decode()
    for form in (secret, quote(secret, safe=""), quote(secret), encoded, encoded.rstrip("=")):
        assert form not in said


@pytest.mark.parametrize("command", ["verify", "verify --json", "migrate", "user"])
def test_refused_credentials_end_with_3_at_once_and_in_silence_about_them(
    installation: Installation, database_url: str, command: str
) -> None:
    address = database_url.rpartition("@")[2]
    url = f"postgresql://groundwork:{quote(CANARY, safe='')}@{address}"
    result = installation.run(*COMMANDS[command], url=url, LOG_LEVEL="debug")
    assert result.returncode == 3
    assert "credentials" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert_silent_about(CANARY, result)


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("verify", "127.0.0.1:1"),
        ("verify --json", "nowhere.invalid"),
        ("migrate", "nowhere.invalid"),
        ("task", "127.0.0.1:1"),
    ],
)
def test_an_unreachable_database_ends_with_1_soon_and_in_silence_about_the_password(
    installation: Installation, command: str, place: str
) -> None:
    begun = time.monotonic()
    result = installation.run(
        *COMMANDS[command], url=f"postgresql://ana:{CANARY}@{place}/x", LOG_LEVEL="debug"
    )
    assert time.monotonic() - begun < 30
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert_silent_about(CANARY, result)


def test_a_password_given_raw_reaches_the_server_and_no_output(
    installation: Installation, database_url: str, postgres: PostgresServer
) -> None:
    name = f"canary_{time.monotonic_ns()}"
    fetch(database_url, f"CREATE ROLE {name} LOGIN SUPERUSER PASSWORD '{CANARY}'")
    try:
        url = at(database_url, postgres.port).replace(
            database_url.split("@")[0], f"postgresql://{name}:{CANARY}"
        )
        commands = {
            ("verify", "--json"): 1,  # The tests' server runs without fsync.
            ("migrate", "check"): 0,
            ("user", "create", "ana@example.com"): 0,
            ("config",): 0,
        }
        for arguments, code in commands.items():
            result = installation.run(*arguments, url=url, LOG_LEVEL="debug")
            assert result.returncode == code, (arguments, result.stderr)
            assert_silent_about(CANARY, result)
    finally:
        fetch(database_url, f"DROP ROLE {name}")


# Many at once


def test_what_is_exported_can_be_imported_and_is_the_same(
    installation: Installation, database_url: str, tmp_path: Path
) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return installation.run(*arguments, url=database_url)

    for email in ("ana@example.com", "bo@example.com"):
        assert run("user", "create", email).returncode == 0
    titles = ["Water the plants", "é 💥", "a\tb", "\u202eb", "'; --"]
    source = tmp_path / "tasks.ndjson"
    source.write_text("\n".join(json.dumps({"title": title}) for title in titles) + "\n\n", encoding="utf-8")
    imported = run("task", "import", str(source), "ana@example.com")
    assert (imported.returncode, imported.stdout) == (0, "")
    assert imported.stderr == "Added 5 tasks to ana@example.com.\n"

    exported = run("task", "export", "ana@example.com")
    assert (exported.returncode, exported.stderr) == (0, "")
    assert sorted(task["title"] for task in lines(exported.stdout)) == sorted(titles)
    source.write_text(exported.stdout, encoding="utf-8")
    assert run("task", "import", str(source), "bo@example.com").returncode == 0
    again = lines(run("task", "export", "bo@example.com").stdout)
    changing = {"user_id"}
    assert [{name: task[name] for name in task if name not in changing} for task in again] == [
        {name: task[name] for name in task if name not in changing} for task in lines(exported.stdout)
    ]

    # A second time every id is taken: nothing is added, and the lines are named.
    twice = run("task", "import", str(source), "bo@example.com")
    assert (twice.returncode, twice.stdout) == (2, "")
    assert "Line 1:" in twice.stderr
    assert "Nothing was imported." in twice.stderr
    assert len(lines(run("task", "export", "bo@example.com").stdout)) == 5
    for wrong in (str(tmp_path / "nowhere"), str(tmp_path)):
        assert run("task", "import", wrong, "bo@example.com").returncode == 2


def test_many_tasks_come_from_standard_input_and_a_person_sees_how_far_it_is(
    installation: Installation, database_url: str, tmp_path: Path
) -> None:
    assert installation.run("user", "create", "ana@example.com", url=database_url).returncode == 0
    many = "".join(f'{{"title":"{number}"}}\n' for number in range(5000))
    piped = installation.run("task", "import", "-", "ana@example.com", url=database_url, typed=many)
    assert (piped.returncode, piped.stdout) == (0, "")
    assert piped.stderr == "Added 5000 tasks to ana@example.com.\n"
    source = tmp_path / "many"
    source.write_text(many)
    seen = installation.run_on_terminal("task", "import", str(source), "ana@example.com", url=database_url)
    assert "5000/5000" in seen
    assert seen.endswith("Added 5000 tasks to ana@example.com.\r\n")
    # Data and bar do not mix where the data goes into a file.
    exported = installation.run("task", "export", "ana@example.com", url=database_url)
    assert exported.stderr == ""
    assert len(lines(exported.stdout)) == 10_000
    # A reader that goes away early gets what it wanted.
    head = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m src task export ana@example.com | head -n 2"],
        cwd=installation.backend,
        env=installation.environment(DATABASE_URL=database_url),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (head.returncode, head.stderr) == (0, "")
    assert len(lines(head.stdout)) == 2
