"""The documents are held to the code: what they name exists, what they show parses, what they tell to type works."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from dotenv import dotenv_values

import bootstrap
from conftest import open_directory
from processes import copy_program, lend_packages
from src.api.health import Health
from src.api.reference import router as reference
from src.cli.app import app
from src.config.settings import Settings
from src.config.sources import ACCEPTED, HINTED, RENAMED
from src.config.validation_messages import OTHER_NAMES
from src.main import create_app
from src.services.metrics import Metrics
from waiting import until

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GUIDES = (ROOT / "docs" / "accounts.md", ROOT / "docs" / "api.md")
SECONDS = 150

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))

PATH = re.compile(r"(?<![\w./-])(?:/opt/groundwork/)?((?:backend|tests|docs|\.ci)/[\w./-]*)")
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
MADE_LATER = ("backend/.venv", "backend/.env", "backend/.data")

# Names in capitals that are no settings of ours.
OTHERS = {
    "NEON_DATABASE_URL", "NO_COLOR", "PGPASSWORD", "ARGS", "TASK_ID", "COMMAND", "USER", "PASSWORD", "DATABASE",
    "REGION", "NAME", "DATABASE_URI", "SQLSTATE", "MAINPID", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGINT", "SO_REUSEPORT",
    "SERVICE", "TOKEN", "ID", "ETAG", "NEW", "CURSOR", "BETTER_AUTH_SECRET", "SECONDS", "SEED", "KINDS", "CLIENTS",
    "PAIR", "ACCESS", "FIRST", "REFRESH", "GROUNDWORK_FAST_PATH", "ADMIN_URL", "OWNER_URL", "APP_URL", "BACKUP_URL",
    "BACKUP_PASSWORD", "ON_ERROR_STOP", "TCP_NOTSENT_LOWAT", "READY", "RELOADING", "STOPPING", "WATCHDOG",
}  # fmt: skip


def code(text: str) -> list[str]:
    """Every piece of code: the blocks, and the spans in running text with their line breaks undone."""
    blocks = [found[1] for found in BLOCK.findall(text)]
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", BLOCK.sub("", text))
    return [*blocks, *(re.sub(r"\s+", " ", span) for span in spans)]


def blocks(document: Path, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(document.read_text()) if kind == language]


@cache
def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@cache
def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# What is named exists


def missing_paths(text: str) -> list[str]:
    found = {match.rstrip("./") for match in PATH.findall(text)}
    return sorted(
        name
        for name in found
        if not name.startswith(MADE_LATER)
        and not (ROOT / name).exists()
        and not (ROOT / "backend" / name).exists()
    )


def missing_links(document: Path) -> list[str]:
    missing = []
    for link in LINK.findall(document.read_text()):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        place = (document.parent / target).resolve() if target else document
        if not place.exists() or (anchor and anchor not in anchors(place)):
            missing.append(link)
    return missing


@each_document
def test_every_file_and_link_exists(document: Path) -> None:
    assert missing_paths(document.read_text()) == []
    assert missing_links(document) == []


def missing_tests(text: str) -> list[str]:
    return [
        f"{file}::{name}"
        for file, name in TEST.findall(text)
        if not (ROOT / "backend" / file).exists() or name not in functions(ROOT / "backend" / file)
    ]


@each_document
def test_every_test_named_exists(document: Path) -> None:
    assert missing_tests(document.read_text()) == []


def unknown_targets(text: str) -> list[str]:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {
        name
        for piece in code(text)
        for name in re.findall(r"(?:^|[;&'$]) ?make ([a-z][a-z-]*)", piece, re.MULTILINE)
    }
    return sorted(called - targets)


@each_document
def test_every_make_target_exists(document: Path) -> None:
    assert unknown_targets(document.read_text()) == []


def wrong_commands(text: str) -> list[str]:
    """Calls of `python -m src` that name a command or an option which is not there."""
    wrong = []
    for piece in code(text):
        for called in re.findall(r"python -m src(?![.\w])([^\n|&;>)]*)", piece):
            command: Any = app
            for word in shlex.split(called, comments=True):
                options = {
                    option
                    for parameter in command.params
                    for option in parameter.opts + parameter.secondary_opts
                }
                if word in {"…", "...", "COMMAND"}:
                    break
                if hasattr(command, "commands"):
                    if word in {"-h", "--help", *options}:
                        continue
                    if word not in command.commands:
                        wrong.append(called)
                        break
                    command = command.commands[word]
                elif command.name == "psql":
                    break
                elif word.startswith("--") and word.partition("=")[0] not in {"-h", "--help", *options}:
                    wrong.append(called)
    return wrong


@each_document
def test_every_command_and_option_exists(document: Path) -> None:
    assert wrong_commands(document.read_text()) == []


def test_every_command_is_in_the_guide() -> None:
    def commands(group: Any, before: str) -> Iterator[str]:
        for name, command in group.commands.items():
            yield from (
                commands(command, f"{before} {name}")
                if hasattr(command, "commands")
                else [f"{before} {name}"]
            )

    text = (ROOT / "docs" / "cli.md").read_text()
    assert [name for name in commands(app, "python -m src") if f"`{name}" not in text] == []


def unknown_settings(text: str) -> list[str]:
    known = {name.upper() for name in (*Settings.model_fields, *ACCEPTED, *HINTED)} | {*OTHERS, *OTHER_NAMES}
    found = set()
    for piece in code(text):
        found |= set(re.findall(r"(?<![\w%$-])([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*)=", piece))
        found |= {piece} if re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", piece) else set()
    return sorted(found - known)


@each_document
def test_every_setting_named_exists(document: Path) -> None:
    old = {name.upper() for name in RENAMED} if document.name == "settings.md" else set()
    assert set(unknown_settings(document.read_text())) == old


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    assert [name for name in Settings.model_fields if f"`{name.upper()}`" not in text] == []


def test_what_does_not_exist_is_found(tmp_path: Path) -> None:
    text = (
        "`backend/src/nowhere.py` `tests/test_docs.py::test_nothing` `make nonsense` `python -m src serve --nonsense` "
        "`python -m src nonsense` `DATABASE_NONSENSE`\n```sh\n$ make rubbish\nDATABASE_RUBBISH=1 make run\n```\n"
    )
    assert missing_paths(text) == ["backend/src/nowhere.py"]
    assert missing_tests(text) == ["tests/test_docs.py::test_nothing"]
    assert unknown_targets(text) == ["nonsense", "rubbish"]
    assert wrong_commands(text) == [" serve --nonsense", " nonsense"]
    assert unknown_settings(text) == ["DATABASE_NONSENSE", "DATABASE_RUBBISH"]
    page = tmp_path / "page.md"
    page.write_text("# A heading, and more\n[a](nowhere.md) [b](#a-heading-and-more) [c](#nowhere)\n")
    assert missing_links(page) == ["nowhere.md", "#nowhere"]


# The architecture


def test_the_architecture_says_where_names_are_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.partition("## Where to find what")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| .+ \| (`backend/.+) \|$", section, re.MULTILINE)
    assert len(rows) == section.count("\n| ") - 1  # But for the heading.
    for row in rows:
        source = ""
        for piece in re.findall(r"`([^`]+)`", row):
            if piece.startswith("backend/src/") and piece.endswith(".py"):
                source += (ROOT / piece).read_text()
            elif re.fullmatch(r"[A-Za-z_.]+", piece) and not piece.endswith(".py"):
                for name in piece.split("."):
                    assert re.search(rf"\b(?:class|def) {name}\b|^{name}\b", source, re.MULTILINE), piece


# The specification


def test_every_task_of_the_specification_has_one_row() -> None:
    rows = re.findall(
        r"^\| (T\d{3}) \|(.+)\|$", (ROOT / "docs" / "specification.md").read_text(), re.MULTILINE
    )
    assert [name for name, _ in rows] == [f"T{number:03}" for number in range(1, 52)]
    for name, row in rows:
        task, files, tests, command = row.split(" | ")
        assert task.strip(), name
        assert PATH.search(files) or "`README.md`" in files or "`pytest.ini`" in files, name
        assert TEST.search(tests), name
        assert command.strip().startswith("`"), name


def test_every_row_of_the_faults_says_where_it_stands() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    for line in re.findall(r"^\| [A-Z]\d.*\|$", text, re.MULTILINE):
        standing = line.rsplit(" | ", 1)[1]
        assert standing.startswith(("proven", "in part", "open")), line
        assert standing.startswith("open") or TEST.search(standing), line


# Identity, as documented


def test_the_better_auth_configuration_is_the_file_that_is_run() -> None:
    shown = blocks(ROOT / "docs" / "identity.md", "js")
    assert shown == [(ROOT / "backend" / "tests" / "better_auth" / "auth.mjs").read_text()]


# How many items the sections of ASVS 5.0.0 have, for the chapters that docs/security.md goes through.
SECTIONS = {
    "1.1": 2, "1.2": 10, "1.3": 12, "1.4": 3, "1.5": 3, "2.1": 3, "2.2": 3, "2.3": 5, "2.4": 2, "4.1": 5, "4.2": 5,
    "4.3": 2, "4.4": 4, "6.1": 3, "6.2": 12, "6.3": 8, "6.4": 6, "6.5": 8, "6.6": 4, "6.7": 2, "6.8": 4, "7.1": 3,
    "7.2": 4, "7.3": 2, "7.4": 5, "7.5": 3, "7.6": 2, "8.1": 4, "8.2": 4, "8.3": 3, "8.4": 2, "9.1": 3, "9.2": 4,
    "11.1": 4, "11.2": 5, "11.3": 5, "11.4": 4, "11.5": 2, "11.6": 2, "11.7": 2, "12.1": 5, "12.2": 2, "12.3": 5,
    "13.1": 4, "13.2": 6, "13.3": 4, "13.4": 7, "14.1": 2, "14.2": 8, "14.3": 3, "15.1": 5, "15.2": 5, "15.3": 7,
    "15.4": 4, "16.1": 1, "16.2": 5, "16.3": 4, "16.4": 3, "16.5": 4,
}  # fmt: skip


def test_every_item_of_the_security_lists_has_one_row_that_says_where_it_stands() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    rows = re.findall(r"^\| ((?:\d[\d.]*|API\d+)(?:, [\d.]+)*) \| (.+)\|$", text, re.MULTILINE)
    items = [item for row, _ in rows for item in row.split(", ")]
    wanted = [f"{section}.{number}" for section, count in SECTIONS.items() for number in range(1, count + 1)]
    wanted += [f"API{number}" for number in range(1, 11)]
    assert len(items) == len(set(items))
    assert set(items) == set(wanted)
    for row, rest in rows:
        sentence, _, standing = rest.strip().rpartition(" | ")
        assert len(sentence) > 10, row
        assert standing.startswith(("proven: ", "in part", "held", "not met, because", "no such thing")), row
        assert TEST.search(standing) or not standing.startswith(("proven", "in part")), row


# Health, as documented


def test_the_health_guide_names_every_endpoint_and_metric_and_no_other() -> None:
    text = (ROOT / "docs" / "health.md").read_text()
    paths = {
        path
        for path in create_app(Settings()).openapi()["paths"]
        if not path.startswith(("/v1/", "/.well-known/"))
    }
    named = set(re.findall(r"`(?:GET )?(/[a-z]+)`", text)) | set(re.findall(r"path: (/\w+)", text))
    assert named - {route.path for route in reference.routes if hasattr(route, "path")} == paths

    families = list(Metrics("0").registry.collect())
    shown = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    buckets = {f"{family.name}_bucket" for family in families if family.type == "histogram"}
    named = set(re.findall(r"\b(?:groundwork|http)_[a-z_]+", text))
    assert named - buckets == {name for name in shown if not name.startswith("process_")}


def test_the_metrics_in_the_guides_have_the_labels_that_are_named() -> None:
    text = (ROOT / "docs" / "health.md").read_text()
    # The declarations know their labels; the exposition shows them only once there is a sample.
    declared = {
        (metric._name, tuple(metric._labelnames))  # type: ignore[attr-defined]
        for metric in Metrics("0").registry._collector_to_names
        if hasattr(metric, "_name")
    }
    for name, labels in re.findall(r"`([a-z_]+)\{([a-z,]+)\}`", text):
        assert (name.removesuffix("_total"), tuple(labels.split(","))) in declared, name


def test_the_health_example_is_one() -> None:
    (example,) = blocks(ROOT / "docs" / "health.md", "json")
    assert Health.model_validate_json(example).status == "pass"


def test_the_words_of_health_and_the_logs_are_the_codes_own() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "backend" / "src").rglob("*.py"))
    health = (ROOT / "docs" / "health.md").read_text()
    reasons = re.search(r"`reason` is one word: (.+?)\n\n", health, re.DOTALL)
    assert reasons
    words = {word for word in re.findall(r"`([a-z-]+)`", reasons[1]) if not word.startswith("schema-")}
    logs = (ROOT / "docs" / "operations.md").read_text().partition("## Logs")[2].partition("\n## ")[0]
    words |= {
        word
        for row in re.findall(r"^\| (`[^|]+) \|", logs, re.MULTILINE)
        for word in re.findall(r"`([a-z._-]+)`", row)
    }
    assert len(words) > 10
    assert sorted(word for word in words if f'"{word}"' not in source) == []


# What is shown parses


@each_document
def test_examples_of_env_files_parse(document: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(document, "dotenv")):
        file = tmp_path / str(number)
        file.write_text(block)
        values = {
            name.lower(): value for name, value in dotenv_values(file, interpolate=False).items() if value
        }
        assert values
        assert set(values) <= set(Settings.model_fields)
        Settings(**values)


def test_the_unit_and_the_container_file_name_what_exists() -> None:
    operations = ROOT / "docs" / "operations.md"
    (unit, _), (container,) = blocks(operations, "ini"), blocks(operations, "dockerfile")
    assert "\nExecStart=/opt/groundwork/backend/.venv/bin/python -m src serve\n" in unit
    assert "\nWorkingDirectory=/opt/groundwork/backend\n" in unit
    assert 'CMD ["python", "-m", "src", "serve"]' in container
    for source in re.findall(r"^COPY (\S+) ", container, re.MULTILINE):
        assert (ROOT / source).exists(), source
    for text in (unit, container):
        for assigned in re.findall(r"^(?:Environment=|ENV )(.+)$", text, re.MULTILINE):
            values = {
                name.lower(): value for name, value in (pair.split("=", 1) for pair in assigned.split())
            }
            assert set(values) <= set(Settings.model_fields)
            Settings(**{name: value for name, value in values.items() if name != "secrets_dir"})
    credentials = re.findall(r"^LoadCredential=(\w+):", unit, re.MULTILINE)
    assert set(credentials) == {"database_url", "signing_keys"}
    assert set(credentials) <= set(Settings.model_fields)


@pytest.mark.debian
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    service, listener = blocks(ROOT / "docs" / "operations.md", "ini")
    # The program and the user need not exist here.
    service = service.replace("/opt/groundwork/backend/.venv/bin/python", sys.executable)
    service = service.replace("/opt/groundwork/backend", str(ROOT / "backend")).replace(
        "User=groundwork", "User=root"
    )
    units = [tmp_path / "groundwork.service", tmp_path / "groundwork.socket"]
    for unit, text in zip(units, (service, listener), strict=True):
        unit.write_text(text)
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, units)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (checked.returncode, [line for line in checked.stderr.splitlines() if "groundwork" in line]) == (
        0,
        [],
    )


# What is told to type works


class Clone:
    """A copy of what git has, with a virtual environment that borrows this one's packages: nothing is downloaded."""

    def __init__(self, root: Path) -> None:
        self.root = root / "a clone"
        self.backend = self.root / "backend"
        copy_program(self.backend)
        shutil.copytree(ROOT / "docs", self.root / "docs")
        shutil.copy(ROOT / "Makefile", self.root)
        requirements = [bootstrap.SERVICE, bootstrap.EMBEDDED]
        for name in ("bootstrap.py", ".env.example", *requirements):
            shutil.copy(ROOT / "backend" / name, self.backend)
        lend_packages(self.backend / ".venv")
        # As bootstrap.py leaves it.
        (packages,) = (self.backend / ".venv").glob("lib/python3*/site-packages")
        (packages / "groundwork.pth").write_text("../../../..\n")
        stamp = {name: bootstrap.digest(name) for name in requirements}
        stamp |= {**bootstrap.maker(), "place": str(self.backend)}
        (self.backend / ".venv" / Path(bootstrap.STAMP).name).write_text(json.dumps(stamp))
        self.home = root / "home"
        self.home.mkdir()

    def environment(self, **more: str) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": str(self.home), "PYTHON": sys.executable, **more}

    def type(self, commands: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=self.root,
            env=self.environment(**more),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    @contextmanager
    def running(self) -> Iterator[str]:
        """`make run` on a free port; gives the service's address. It is stopped as `systemctl stop` would."""
        log = self.root / "log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                ["make", "run"],
                cwd=self.root,
                env=self.environment(PORT="0", LOG_FORMAT="json"),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + SECONDS
            while '"event":"service.ready"' not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
            yield next(event["service"] for event in events if event["event"] == "service.ready")
        finally:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(60)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


@pytest.fixture(scope="module")
def clone() -> Iterator[Clone]:
    with open_directory() as directory:
        yield Clone(directory)


def test_examples_that_need_no_server_run(clone: Clone) -> None:
    run = 0
    for document in DOCUMENTS:
        for block in re.findall(
            r"^<!-- run -->\n```sh\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL
        ):
            done = clone.type(block)
            assert done.returncode == 0, (document, done.stderr)
            run += 1
    assert run >= 2
    # The architecture's way of printing the files gives the files.
    assert (clone.backend / ".env.example").read_text() == (ROOT / "backend" / ".env.example").read_text()
    assert (clone.root / "docs" / "settings.md").read_text() == (ROOT / "docs" / "settings.md").read_text()


def test_every_example_of_the_api_answers_as_it_is_marked(clone: Clone) -> None:
    text, examples = "", []
    for guide in GUIDES:
        said = guide.read_text()
        text += said
        found = re.findall(r"^<!-- api: (\w+) ?(\d*) -->\n```sh\n(.*?)^```", said, re.MULTILINE | re.DOTALL)
        # What is shown is run, and nothing is shown without being run.
        assert len(found) == len(blocks(guide, "sh"))
        examples += found
    asked = " ".join(example for _, _, example in examples)
    with clone.running() as service:
        script = []
        for number, (kind, _, example) in enumerate(examples):
            script.append(example if kind == "setup" else f"{{ {example}}} > answer-{number}")
        done = clone.type("\n".join(script).replace("http://127.0.0.1:8000", service))
        assert done.returncode == 0, done.stderr
    # A request is logged after its answer: all are there once the service has ended.
    log = (clone.root / "log").read_text()
    for number, (kind, status, example) in enumerate(examples):
        if kind == "status":
            answer = (clone.root / f"answer-{number}").read_text()
            assert re.match(rf"HTTP/1.1 {status} ", answer), (example, answer)
    # Every operation, by its method and route as the service saw them.
    requests = [json.loads(line) for line in log.splitlines() if '"event":"request"' in line]
    seen = {(event["method"].lower(), event["route"]) for event in requests}
    paths = create_app(Settings()).openapi()["paths"]
    operations = {
        (verb, path)
        for path, item in paths.items()
        if path.startswith("/v1/")
        for verb in item
        if len(verb) < 7
    }
    assert operations - seen == set()
    assert not [event for event in requests if event["status"] >= 500]
    parameters = {parameter["name"] for parameter in paths["/v1/tasks"]["get"]["parameters"]}
    assert {name for name in parameters if f"{name}=" not in asked and f"`{name}`" not in text} == set()


def ask(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.load(answer)


def test_the_tour_of_the_readme(clone: Clone) -> None:
    consoles = blocks(ROOT / "README.md", "console")
    assert "\n$ make run\n" in consoles[0]
    typed, *shown = [line for line in consoles[1].splitlines() if line]
    with clone.running() as service:
        stored = clone.type(typed.removeprefix("$ "))
        assert stored.returncode == 0, stored.stderr
        rows = [json.loads(line) for line in stored.stdout.splitlines()]
        # What the reader sees differs from what the README shows in ids and times only.
        changing = {"id", "user_id", "created_at", "updated_at"}
        for row, line in zip(rows, map(json.loads, shown), strict=True):
            assert list(row) == list(line)
            assert {name: row[name] for name in row if name not in changing} == {
                name: line[name] for name in line if name not in changing
            }

        (line,) = re.findall(
            r"^\*\*Or over HTTP\*\*.*`(curl .+)`$", (ROOT / "README.md").read_text(), re.MULTILINE
        )
        page = clone.type(line.replace("http://127.0.0.1:8000", service))
        assert json.loads(page.stdout)["items"] == [rows[1]]

        listed = clone.type("cd backend && .venv/bin/python -m src task list ana@example.com")
        assert json.loads(listed.stdout) == rows[1]

        assert ask(f"{service}/readyz") == {"status": "ready", "database": "up", "reason": None}
        documented = re.findall(r"^✓ (.{16})", (ROOT / "docs" / "setup.md").read_text(), re.MULTILINE)
        assert len(documented) > 10

        def all_is_well() -> bool:
            """A loop that was held up on a busy machine is a warning for ten seconds."""
            until(lambda: ask(f"{service}/health")["status"] == "pass")
            verified = clone.type("make verify", PORT=service.rpartition(":")[2])
            assert verified.returncode == 0, verified.stderr
            return re.findall(r"^✓ (.{16})", verified.stderr, re.MULTILINE) == documented

        until(all_is_well)
    assert not (clone.backend / ".data" / "postgres" / "postmaster.pid").exists()
