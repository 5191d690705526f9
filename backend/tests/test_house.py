"""Rules of the code base that no linter knows, each with sources that break it.

The rules are functions in `house_rules` and `credentials`; here is where each applies, and its exceptions with the
reason. Everything else is checked by ruff, import-linter and mypy (pyproject.toml).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import BaseModel, SecretStr
from sqlalchemy import CheckConstraint, Column, ForeignKey, Integer, MetaData, Table, UniqueConstraint

import credentials
import house_rules as house
from house_rules import Rule, Source
from src import models
from src.config.settings import Settings

BACKEND = Path(__file__).resolve().parents[1]
REPOSITORY = BACKEND.parent

READS_ENVIRONMENT = frozenset(
    {
        "config/sources.py",
        "config/logging.py",  # NO_COLOR, whose meaning is not ours to name.
        "config/tls.py",  # Variables by which OpenSSL and libpq would be led elsewhere.
        "cli/output.py",  # The same of terminals.
        "server/supervisor.py",  # What workers inherit.
        "server/systemd.py",  # What systemd passes to a service.
        "server/worker.py",
        "cli/app.py",  # What psql inherits.
        "config/command_line.py",  # Whether the advised command works in this shell.
        "migrations/catalogue.py",  # A program of its own, for who writes a migration.
    }
)

TELLS_MOMENTS = frozenset(
    {
        "config/logging.py",  # When an event was.
        "services/health.py",  # When the schema was seen.
        "services/metrics.py",  # When the lag was measured.
        "services/vitality.py",  # The moment of the last evidence: now, less its monotonic age.
        "embedded/lock.py",  # Since when somebody holds the lock.
        "services/signing.py",  # Until when a token is good: other machines have to agree on it.
        "verify/tls.py",  # How long a certificate is still good.
        "verify/server.py",  # How far the database's clock is from ours.
        "api/health.py",  # When the pool was looked at.
    }
)

SPECIFIED = (
    "backend/src/main.py", "backend/src/models/base.py", "backend/src/models/user.py", "backend/src/models/task.py",
    "backend/src/services/database.py", "backend/src/api/deps.py", "backend/src/api/health.py",
    "backend/src/config/settings.py", "backend/src/config/database.py", "backend/tests", "backend/requirements.txt",
    "backend/.env.example", "backend/verify_db.py",
)  # fmt: skip


def python_files(*folders: str) -> list[Source]:
    found = [path for folder in folders for path in sorted((BACKEND / folder).rglob("*.py"))]
    return [Source(path.relative_to(BACKEND).as_posix(), path.read_text(encoding="utf-8")) for path in found]


PRODUCT = python_files("src")
TESTS = python_files("tests")
PROGRAMS = [Source(path.name, path.read_text(encoding="utf-8")) for path in sorted(BACKEND.glob("*.py"))]
MIGRATIONS = [source for source in PRODUCT if source.path.startswith("src/migrations/")]
TEST_MODULES = [source for source in TESTS if source.name.startswith("test_")]
CLAIMING = {
    name
    for source in TESTS
    if not source.name.startswith("test_")
    for name in house.asserting_functions(source)
}


def findings(rule: Rule, sources: list[Source]) -> list[str]:
    return [f"{source.path}:{line}: {what}" for source in sources for line, what in rule(source)]


@dataclass(frozen=True)
class Kept:
    """A rule, where it holds, and sources that break it: (path, text), each of which has to be found."""

    rule: Rule
    sources: list[Source]
    breaches: tuple[tuple[str, str], ...]
    forgiven: tuple[str, ...] = ()
    """Findings without their line that are right as they are; beside each the reason."""

    def found(self) -> list[str]:
        left = list(self.forgiven)
        kept = []
        for finding in findings(self.rule, self.sources):
            plain = re.sub(r":\d+:", ":", finding)
            if plain in left:
                left.remove(plain)
            else:
                kept.append(finding)
        return kept + [f"no longer needs to be forgiven: {plain}" for plain in left]


RULES = {
    "imports inside are relative": Kept(
        house.imports_inside_are_relative,
        PRODUCT,
        (("src/main.py", "from src.errors import NotFound"), ("src/main.py", "import src.models")),
    ),
    "no exception of every kind is suppressed": Kept(
        house.no_exception_of_every_kind_is_suppressed,
        [*PRODUCT, *PROGRAMS],
        (("src/x.py", "with contextlib.suppress(OSError, Exception):\n    f()"),),
        # The bridge from the standard library's logging: a broken log must not break its caller.
        forgiven=("src/config/logging.py: every exception is suppressed",),
    ),
    "no engine at module level": Kept(
        house.no_engine_at_module_level,
        PRODUCT,
        (
            ("src/x.py", "engine = create_async_engine(url)"),
            ("src/x.py", "if True:\n    database = Database(connection)"),
            ("src/x.py", "class Holder:\n    engine = sqlmodel.create_engine(url)"),
        ),
    ),
    "no BaseHTTPMiddleware": Kept(
        house.no_base_http_middleware,
        PRODUCT,
        (
            ("src/x.py", "from starlette.middleware.base import BaseHTTPMiddleware"),
            ("src/x.py", "class M(base.BaseHTTPMiddleware): ..."),
            ("src/x.py", "@app.middleware('http')\nasync def m(request, call_next): ..."),
        ),
    ),
    "no SELECT *": Kept(
        house.no_select_star,
        PRODUCT,
        (
            ("src/x.py", "q = 'SELECT * FROM tasks'"),
            ("src/x.py", "q = f'''select\n  t.* from {table} t'''"),
            ("src/x.py", "q = 'DELETE FROM tasks RETURNING *'"),
        ),
    ),
    "events in the log are constant": Kept(
        house.log_events_are_constant,
        PRODUCT,
        (
            ("src/x.py", "log.info(f'pool {size}')"),
            ("src/x.py", "log.info('pool %s' % size)"),
            ("src/x.py", "log.warning('pool %s', size)"),
            ("src/x.py", "self.log.error('pool {}'.format(size))"),
            ("src/x.py", "log.error('The pool is empty.')"),
        ),
    ),
    "what a dependency yields ends before the answer": Kept(
        house.yield_dependencies_end_with_the_function,
        PRODUCT,
        (
            ("src/api/deps.py", "async def s():\n    yield 1\nS = Annotated[int, Depends(s)]"),
            (
                "src/api/deps.py",
                "async def s():\n    yield 1\nS = Annotated[int, Depends(s, scope='request')]",
            ),
        ),
    ),
    "endpoints only speak HTTP": Kept(
        house.endpoints_only_speak_http,
        PRODUCT,
        (
            (
                "src/api/x.py",
                "@router.get('/')\nasync def f():\n    try:\n        g()\n    except E:\n        h()",
            ),
            (
                "src/api/x.py",
                "@router.post('/')\nasync def f(db):\n    await db.rows('SELECT id FROM tasks')",
            ),
            ("src/api/x.py", "@router.post('/')\nasync def f(session):\n    await session.exec(query)"),
            ("src/api/x.py", "@router.get('/')\nasync def f():\n    return select(Task)"),
        ),
    ),
    "the wall clock tells moments, never durations": Kept(
        house.wall_clock_tells_moments,
        [source for source in PRODUCT if source.path.removeprefix("src/") not in TELLS_MOMENTS],
        (
            ("src/services/x.py", "import time\nstarted = time.time()"),
            ("src/services/x.py", "took = datetime.now(UTC) - started"),
        ),
    ),
    "labels of metrics are bounded": Kept(
        house.labels_are_bounded,
        PRODUCT,
        (("src/services/metrics.py", "Counter('requests', 'Requests.', ['method', 'path'])"),),
    ),
    "constraints have names": Kept(
        house.constraints_are_named,
        [*MIGRATIONS, *(source for source in PRODUCT if source.package == ("models",))],
        (
            ("src/models/x.py", "UniqueConstraint('email')"),
            ("src/models/x.py", "CheckConstraint('b > 0')"),
            ("src/migrations/versions/x.py", "S = 'CREATE TABLE a (b int PRIMARY KEY)'"),
            ("src/migrations/versions/x.py", "S = 'CREATE TABLE a (b int, CHECK (b > 0))'"),
            ("src/migrations/versions/x.py", "S = 'CREATE TABLE a (b int REFERENCES c (id))'"),
            ("src/migrations/versions/x.py", "S = 'ALTER TABLE a ADD UNIQUE (b)'"),
        ),
    ),
    "migrations set lock_timeout": Kept(
        house.migrations_set_lock_timeout,
        MIGRATIONS,
        (
            ("src/migrations/env.py", "def run():\n    with begin():\n        context.run_migrations()"),
            (
                "src/migrations/env.py",
                "def run():\n    context.run_migrations()\n    c.execute('SET lock_timeout = 1')",
            ),
        ),
    ),
    "files are named for what is in them": Kept(
        house.file_names_have_a_meaning,
        [*PRODUCT, *TESTS, *PROGRAMS],
        (
            ("src/utils.py", ""),
            ("src/repositories/x.py", ""),
            ("src/api/schemas.py", ""),
            ("src/db_helpers.py", ""),
        ),
    ),
    "classes are named for what they are": Kept(
        house.class_names_have_a_meaning,
        [*PRODUCT, *TESTS, *PROGRAMS],
        (("src/x.py", "class ConnectionManager: ..."), ("src/x.py", "class PoolImpl: ...")),
    ),
    "the environment is read where the program starts": Kept(
        house.environment_is_read_by(READS_ENVIRONMENT),
        PRODUCT,
        (
            ("src/services/tasks.py", "x = os.environ['X']"),
            ("src/api/x.py", "from os import getenv\nx = getenv('X')"),
        ),
    ),
    "a test claims something": Kept(
        house.tests_claim_something(CLAIMING),
        TEST_MODULES,
        (
            ("tests/test_x.py", "def test_a():\n    run()"),
            ("tests/test_x.py", "def look():\n    print(1)\ndef test_a():\n    look()"),
        ),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_the_rule_is_kept(name: str) -> None:
    kept = RULES[name]
    assert kept.sources
    found = kept.found()
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "path", "text"),
    [(name, path, text) for name, kept in RULES.items() for path, text in kept.breaches],
)
def test_a_breach_of_the_rule_is_found(name: str, path: str, text: str) -> None:
    assert findings(RULES[name].rule, [Source(path, text)])


def test_what_only_looks_like_a_breach_is_let_pass() -> None:
    innocent = (
        (house.no_select_star, "q = 'SELECT count(*) FROM tasks'"),
        (
            house.yield_dependencies_end_with_the_function,
            "def s():\n    yield 1\nS = Depends(s, scope='function')",
        ),
        (house.constraints_are_named, "S = 'CREATE TABLE a (b int, CONSTRAINT c CHECK (b > 0))'"),
        (house.tests_claim_something([]), "def look():\n    assert 1\ndef test_a():\n    look()"),
        (
            house.migrations_set_lock_timeout,
            "def run():\n    c.execute('SET lock_timeout=1')\n    run_migrations()",
        ),
    )
    for rule, text in innocent:
        assert findings(rule, [Source("src/x.py", text)]) == []


def test_linters_reject_what_they_are_configured_to_reject(tmp_path: Path) -> None:
    """Each rule that replaced one of ours is selected, and finds a breach of it."""
    shutil.copy(BACKEND / "pyproject.toml", tmp_path)
    place = tmp_path / "src" / "config"
    place.mkdir(parents=True)
    for number, text in enumerate(LINTED.values()):
        (place / f"planted_{number}.py").write_text(f'"""A module."""\n\n{text}\n')
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "src"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    for number, name in enumerate(LINTED):
        code = name.partition(" ")[0]
        assert re.search(rf"planted_{number}\.py:\d+:\d+: {code} ", found.stdout), (name, found.stdout)


LINTED = {
    "T201": "print(1)",
    "BLE001": "try:\n    f()\nexcept Exception:\n    g()",
    "S110": "try:\n    f()\nexcept Exception:\n    pass",
    "E722": "try:\n    f()\nexcept:\n    g()",
    "FIX002": "# TO" + "DO: later",
    "ASYNC251": "import time\n\n\nasync def _f():\n    time.sleep(1)",
    "F811": "def test_a(): ...\ndef test_a(): ...",
    "D103": "def public(): ...",
    "G004": "import logging\n\nlogging.info(f'{1}')",
    "TID251": "from fastapi import Depends",
    "TID251 skip": "import pytest\n\npytest.skip('later')",
    "TID251 mark": "import pytest\n\n\n@pytest.mark.skipif(True)\ndef test_a(): ...",
}


def test_mypy_checks_every_test() -> None:
    configured = tomllib.loads((BACKEND / "pyproject.toml").read_text())["tool"]["mypy"]
    folders = {f"tests.{path.parent.name}" for path in (BACKEND / "tests").glob("*/*.py")}
    assert folders <= set(configured["packages"])
    assert {path.stem for path in (BACKEND / "tests").glob("test_*.py")} == set(configured["modules"])


def test_imports_against_the_layers_are_found(tmp_path: Path) -> None:
    """import-linter runs in `make check`; here it is shown to pass, and to fail."""
    shutil.copytree(BACKEND / "src", tmp_path / "src", ignore=shutil.ignore_patterns("static", "__pycache__"))
    shutil.copy(BACKEND / "pyproject.toml", tmp_path)
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
    ]

    def lint() -> subprocess.CompletedProcess[str]:
        words = [*command, "--no-cache"]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    kept = lint()
    assert kept.returncode == 0, kept.stdout
    task = tmp_path / "src" / "models" / "task.py"
    task.write_text(
        f"{task.read_text()}\ndef late():\n    from ..services import tasks\n    import fastapi\n"
    )
    broken = lint()
    assert broken.returncode == 1
    for contract in ("Packages depend one way", "Only the API and the server import a web framework"):
        assert f"{contract} BROKEN" in broken.stdout


def test_every_exception_to_a_rule_is_still_needed() -> None:
    sources = {source.path: source for source in [*PRODUCT, *PROGRAMS]}
    readers = house.environment_is_read_by(frozenset())
    assert [path for path in READS_ENVIRONMENT if not list(readers(sources[f"src/{path}"]))] == []


# Importing


def effects_of_importing(
    root: Path, package: str, modules: list[str], tmp_path: Path
) -> dict[str, list[str]]:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            str(BACKEND / "tests" / "importing.py"),
            str(root),
            package,
            *modules,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return {module: did for module, did in found.items() if did}


def test_importing_has_no_effect(tmp_path: Path) -> None:
    modules = [house.module_of(source) for source in PRODUCT]
    assert len(modules) > 40
    assert effects_of_importing(BACKEND, "src", modules, tmp_path) == {}


def test_every_effect_of_importing_is_found(tmp_path: Path) -> None:
    planted = {
        "sockets": "import socket\nsocket.socket().close()",
        "names": "import socket\nsocket.getaddrinfo('127.0.0.1', 1)",
        "processes": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])",
        "threads": "import threading\nthreading.Thread(target=print, args=('', ), kwargs={'end': ''}).start()",
        "environment": "import os\nx = os.environ.get('HOME')",
        "variables": "import os\nx = os.getenv('HOME')",
        "setting": "import os\nos.environ['X'] = '1'",
        "writing": "open('written', 'w').close()",
        "making": "from pathlib import Path\nPath('made').mkdir()",
        "reading": "from pathlib import Path\nx = Path(__file__).read_text()",
        "signals": "import signal\nsignal.signal(signal.SIGUSR1, signal.SIG_IGN)",
    }
    for name, text in planted.items():
        (tmp_path / "planted").mkdir(exist_ok=True)
        (tmp_path / "planted" / f"{name}.py").write_text(text)
    found = effects_of_importing(tmp_path, "planted", [f"planted.{name}" for name in planted], tmp_path)
    assert [name for name in planted if f"planted.{name}" not in found] == []


# Shapes


def unnamed_constraints(metadata: MetaData) -> list[str]:
    named = (c for table in metadata.tables.values() for c in [*table.constraints, *table.indexes])
    return [repr(constraint) for constraint in named if not isinstance(constraint.name, str)]  # type: ignore[attr-defined]


def test_every_constraint_of_a_table_has_a_name() -> None:
    assert models.metadata.tables
    assert unnamed_constraints(models.metadata) == []
    planted = MetaData()
    Table(
        "a",
        planted,
        Column("b", Integer, ForeignKey("a.c")),
        Column("c", Integer),
        UniqueConstraint("c"),
        CheckConstraint("b > 0"),
    )
    assert len(unnamed_constraints(planted)) == 4  # and the primary key


def shapes_that_take_anything(shapes: list[type[BaseModel]]) -> list[str]:
    incoming = [shape for shape in shapes if shape.__name__.endswith(("Create", "Update"))]
    return [shape.__name__ for shape in incoming if shape.model_config.get("extra") != "forbid"]


def test_what_comes_in_may_hold_no_unknown_field() -> None:
    shapes = [
        shape for shape in vars(models).values() if isinstance(shape, type) and issubclass(shape, BaseModel)
    ]
    assert {shape.__name__ for shape in shapes} >= {"UserCreate", "TaskCreate", "TaskUpdate"}
    assert shapes_that_take_anything(shapes) == []

    class LaxCreate(BaseModel):
        pass

    assert shapes_that_take_anything([LaxCreate]) == ["LaxCreate"]


def open_secrets(settings: type) -> list[str]:
    secret = ("password", "secret", "token", "_url", "dsn", "key")
    return [
        name
        for name, annotation in settings.__annotations__.items()
        if name.endswith(secret) and "SecretStr" not in str(annotation)
    ]


def test_settings_are_frozen_and_their_secrets_closed() -> None:
    assert Settings.model_config.get("frozen") is True
    assert open_secrets(Settings) == []

    class Lax:
        database_url: str
        signing_key: SecretStr

    assert open_secrets(Lax) == ["database_url"]


# Files


def shared_files() -> Iterator[Path]:
    """What is in the repository, or would be with the next commit."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
    )
    if listed.returncode == 0:
        names = listed.stdout.decode("utf-8", "surrogateescape").split("\0")
        yield from (
            path for path in (REPOSITORY / name for name in sorted(set(names)) if name) if path.is_file()
        )
        return
    # An unpacked archive has no list; then it is everything but what running has left behind.
    for path in sorted(REPOSITORY.rglob("*")):
        left = any(
            part.startswith((".venv", ".data", ".git")) or part.endswith(("cache", "__"))
            for part in path.parts
        )
        if path.is_file() and not left and path.name != ".env":
            yield path


def read(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def is_ours(path: Path) -> bool:
    """Others' files, kept as they came, speak of their own places."""
    return "swagger-ui" not in path.parts and path.parent != BACKEND / "tests" / "data"


def test_the_specified_paths_exist() -> None:
    assert [name for name in SPECIFIED if not (REPOSITORY / name).exists()] == []
    for folder in ("models", "services", "api", "config"):
        assert (BACKEND / "src" / folder).is_dir()
    pinned = {line.split("==")[0] for line in read(BACKEND / "requirements.txt").splitlines() if "==" in line}
    assert pinned >= {"fastapi", "uvicorn", "sqlmodel", "asyncpg", "python-dotenv"}


def test_requirements_are_pinned_to_hashes_and_to_no_index() -> None:
    files = sorted(BACKEND.glob("requirements*.txt"))
    assert len(files) >= 3
    assert [
        f"{path.name}: {what}" for path in files for what in house.requirements_are_pinned(read(path))
    ] == []


@pytest.mark.parametrize(
    "line",
    [
        "fastapi",
        "fastapi>=0.100 --hash=sha256:" + "0" * 64,
        "fastapi==0.1",
        "fastapi==0.1 --hash=md5:" + "0" * 32,
        "--index-" + "url https://packages.example.com/simple",
        "--find-links wheels",
        "fastapi @ https://example.com/fastapi.whl --hash=sha256:" + "0" * 64,
        "-r others.txt",
    ],
)
def test_a_loose_requirement_is_found(line: str) -> None:
    good = "asyncpg==0.30.0 \\\n    --hash=sha256:" + "a" * 64 + " \\\n    --hash=sha256:" + "b" * 64 + "\n"
    assert list(house.requirements_are_pinned(good)) == []
    assert len(list(house.requirements_are_pinned(good + line + "\n"))) == 1


def test_every_package_has_one_version_in_all_requirements() -> None:
    files = sorted(BACKEND.glob("requirements*.txt"))
    assert list(house.pins_agree(map(read, files))) == []
    two = ["a==1 \\\n", "b==1\n", "A[x]==1.1 \\\n", "b==1\n", "c==1 ; m < '1'\nc==2 ; m >= '1'\n"]
    assert list(house.pins_agree(two)) == ["a: 1 and 1.1"]


def test_texts_speak_of_the_project_only() -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}: {what}"
        for path in shared_files()
        if is_ours(path)
        for line, what in house.text_speaks_of_the_project(read(path))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "cd /ho" + "me/builder/groundwork",
        "see /ro" + "ot/notes.md",
        "at /wo" + "rk/main/backend",
        "in /Us" + "ers/ana/src",
        "/t" + "mp/plan.md",
        "pip install -i https://py" + "pi.org/simple x",
        "fetched from files.python" + "hosted.org",
        "--extra-index-" + "url https://packages.example.com",
        "https://artifactory" + ".example.com/api",
    ],
)
def test_a_place_that_is_nobody_elses_is_found(text: str) -> None:
    assert list(house.text_speaks_of_the_project(text))


def test_no_credential_is_in_the_repository() -> None:
    found = [
        finding
        for path in shared_files()
        for finding in credentials.scan(path.relative_to(REPOSITORY).as_posix(), read(path))
    ]
    assert not found, "\n".join(found)


PLANTED = {
    # Put together here, so that neither this scanner nor anybody else's finds them in this file.
    "a pasted Neon address": "url = 'postgresql://owner:npg"
    "_h7RkQ2xWz9Lp@ep-cool-sun-a1b2.eu-central-1.aws.neon.tech/db'",
    "an address with a short password": "postgres://ana:hun" + "ter2@db.internal/app",
    "an encoded password": "DATABASE_URL=postgresql://ana:p%40ss" + "w0rd%21@10.0.0.7/app",
    "a broker's address": "amqp://svc:Blue" + "Whale@mq.internal:5672",
    "a private key": "-----BEGIN RSA PRIV" + "ATE KEY-----",
    "another private key": "-----BEGIN PRIV" + "ATE KEY-----",
    "an OpenSSH key": "-----BEGIN OPENSSH PRIV" + "ATE KEY-----",
    "an AWS key": "aws = 'AKIA" + "J4QXN7ZTWP2L5MVB'",
    "a web token": "x = 'eyJhbGciOiJIUzI1NiJ9"
    + ".eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P'",
    "a GitHub token": "ghp" + "_1a2B3c4D5e6F7g8H9i0J1k2L3m4N5o6P7q8R",
    "a Neon password": "PGPASS='npg" + "_h7RkQ2xWz9Lp'",
    "a Slack token": "xoxb" + "-123456789012-abcdefGHIJKL",
    "an API key": "sk-" + "a8Zq3Lw0Vn5Xt2Rb7Yc4Mp9Ks1",
    "an assigned secret": "SECRET_KEY = 'q8" + "Zr3Lw0Vn5Xt2Rb7Yc4Mp9Ks1Jd6'",
    "a secret in YAML": "  password: 7f3a" + "9c1e5b2d8046",
    "a secret in JSON": '"api_key": "9d8f' + '7a6s5d4f3g2h1j0k"',
    "a header": "Authorization: Bearer 3fGh" + "7Kq9Zx1Vb5Nm8Lp2Wr6Td4",
    "basic authentication": "authorization: basic YW5hOmNvcnJlY3Qg" + "aG9yc2UgYmF0dGVyeQ==",
    "a hash": "$2b$12$" + "R9h7cIPz0gi.URNNX3kh2OPST9.PgBkqquzi.Ss7KIUgO2t0jWMUW",
    "a stored verifier": "SCRAM-SHA-256$4096:" + "c2FsdHNhbHRzYWx0c2E=$StoredKey:ServerKey",
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_credential_is_found_and_not_repeated(kind: str) -> None:
    found = list(credentials.scan("docs/x.md", f"# A page\n\n{PLANTED[kind]}\n"))
    assert found
    assert all(line.startswith("docs/x.md:3: ") and len(line) < 80 for line in found)


@pytest.mark.parametrize(
    "name", [".env", "backend/.env", ".env.production", "server.key", "ca.pem", "id_ed25519", ".pgpass"]
)
def test_a_file_made_for_credentials_is_found_by_its_name(name: str) -> None:
    assert list(credentials.scan(name, ""))


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://USER:PASSWORD@db.example.com/DATABASE",
        "postgresql://user:password@host:5432/database",
        "postgresql://{name}:{password}@127.0.0.1:{port}/x",
        "postgresql://$USER:$PASSWORD@host/x",
        "postgresql://u:***@h/db",
        "password: SecretStr | None",
        "secret = building / 'password'",
        "token = settings.tokens.first_one2",
        "password = secrets.token_hex(24)",
        "http://[::1]:8000/health",
    ],
)
def test_an_obvious_placeholder_is_let_pass(text: str) -> None:
    assert list(credentials.scan("README.md", text)) == []
    assert list(credentials.scan(".env.example", "")) == []
