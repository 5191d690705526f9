"""From a clone to a running service: what `make` does before any package is there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bootstrap
from processes import lend_packages

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone in a path with a space, whose requirements are empty, so that no network is asked for."""
    place = tmp_path / "a clone é"
    backend = place / "backend"
    backend.mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", place)
    shutil.copy(ROOT / "backend" / "bootstrap.py", backend)
    for name in (bootstrap.SERVICE, bootstrap.EMBEDDED, bootstrap.DEVELOPMENT):
        (backend / name).write_text("# nothing\n")
    (backend / "src").mkdir()
    (backend / "src" / "__main__.py").write_text(
        "import json, os, sys\n"
        "seen = {name: os.environ.get(name) for name in ('VIRTUAL_ENV', 'PYTHONPATH', 'PYTHONHOME', 'MAKEFLAGS')}\n"
        "print(json.dumps({'arguments': sys.argv[1:], 'prefix': sys.prefix, 'seen': seen, 'cwd': os.getcwd()}))\n"
        "sys.exit(int(os.environ.get('END_WITH', '0')))\n"
    )
    return place


def make(clone: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *words],
        cwd=clone,
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=170,
    )


def test_the_second_run_installs_nothing_and_the_callers_environment_stays_outside(clone: Path) -> None:
    first = make(clone, "run", HOME="/nowhere", LANG="xx_YY")
    assert first.returncode == 0, first.stderr
    assert "Creating backend/.venv" in first.stderr
    said = json.loads(first.stdout)
    assert said["arguments"] == ["serve", "--embedded"]
    assert said["prefix"] == str(clone / "backend" / ".venv")
    assert said["cwd"] == str(clone / "backend")

    second = make(
        clone, "run", "ARGS=--port 1", VIRTUAL_ENV="/nowhere", PYTHONPATH="/nowhere", PYTHONHOME="/nowhere"
    )
    assert second.stderr == ""
    said = json.loads(second.stdout)
    assert said["arguments"] == ["serve", "--embedded", "--port", "1"]
    assert set(said["seen"].values()) == {None}

    given = make(clone, "run", DATABASE_URL="postgresql://db.example.com/x")
    assert json.loads(given.stdout)["arguments"] == ["serve"]

    failed = make(clone, "run", END_WITH="3")
    assert "Error 3" in failed.stderr

    # A kill in the middle of an installation leaves a mark. Two makes at once take turns: one repairs.
    environment = clone / "backend" / ".venv"
    (environment / "groundwork-installing").touch()
    command = [sys.executable, "-I", str(clone / "backend" / "bootstrap.py"), "install"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said_by = [process.communicate(timeout=170)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said_by
    assert sum("Creating" in text for text in said_by) == 1
    assert sum("waiting for it" in text for text in said_by) <= 1
    assert make(clone, "run").stderr == ""

    # Other pins are installed; an environment whose Python went away is as little used as a half-made one.
    (clone / "backend" / bootstrap.SERVICE).write_text("# changed\n")
    changed = make(clone, "run")
    assert "Installing" in changed.stderr
    assert "Creating" not in changed.stderr
    ask = [sys.executable, "-c", "import bootstrap; print(bootstrap.usable())"]
    assert subprocess.check_output(ask, cwd=clone / "backend", text=True) == "True\n"
    (environment / "bin" / "python").unlink()
    assert subprocess.check_output(ask, cwd=clone / "backend", text=True) == "False\n"

    (clone / "backend" / ".env").write_text("SECRET=1\n")
    (clone / "backend" / ".data").mkdir()
    assert make(clone, "clean").returncode == 0
    assert {path.name for path in (clone / "backend").iterdir()} >= {".env", ".data", "src"}
    assert not (clone / "backend" / ".venv").exists()


@pytest.fixture
def env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / ".env"
    monkeypatch.setattr(bootstrap, "ENV_FILE", str(path))
    return path


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("DATABASE_URL=postgresql://x/y", True),
        ("export DATABASE_URL = 'postgresql://x/y'  # ours", True),
        ("database_url=postgresql://x/y", True),
        ('DATABASE_URL="postgresql://u:p#q@x/y"', True),
        ("DATABASE_URL=", False),
        ("DATABASE_URL=''", False),
        ("DATABASE_URL= # none yet", False),
        ("# DATABASE_URL=postgresql://x/y", False),
        ("DATABASE_MIGRATION_URL=postgresql://x/y", False),
        ("", False),
    ],
)
def test_a_database_named_in_the_env_file_is_seen(env_file: Path, line: str, given: bool) -> None:
    env_file.write_text(f"PORT=1\n{line}\n", encoding="utf-8")
    assert bootstrap.database_given() is given


def test_a_database_named_elsewhere_is_seen_too(
    env_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not bootstrap.database_given()
    monkeypatch.setenv("SECRETS_DIR", str(tmp_path))
    assert not bootstrap.database_given()
    (tmp_path / "DATABASE_URL").write_text("\n")
    assert not bootstrap.database_given()
    (tmp_path / "DATABASE_URL").write_text("postgresql://x/y")
    assert bootstrap.database_given()
    monkeypatch.setattr(bootstrap, "BACKEND", str(tmp_path.parent))
    monkeypatch.setenv("SECRETS_DIR", tmp_path.name)  # as the service reads it: beside backend/.env
    assert bootstrap.database_given()
    monkeypatch.delenv("SECRETS_DIR")
    monkeypatch.setenv("DATABASE_URL", "postgresql://x/y")
    assert bootstrap.database_given()
    assert bootstrap.needed() == [bootstrap.SERVICE]


def test_a_python_without_venv_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(bootstrap.Problem, match=r"(?s)ensurepip.*apt-get install python3\.\d+-venv"):
        bootstrap.require_venv_module()


def test_a_python_that_is_too_old_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bootstrap, "OLDEST", (99, 0))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(bootstrap.Problem, match=r"(?s)99\.0 or newer.*apt-get install.*PYTHON="):
        bootstrap.use_new_enough_python(["run"])


def test_without_any_python_make_names_the_command(clone: Path) -> None:
    tools = clone / "tools"
    tools.mkdir()
    for name in ("make", "sh"):
        (tools / name).symlink_to(shutil.which(name) or "")
    found = subprocess.run(
        ["make", "run"], cwd=clone, env={"PATH": str(tools)}, capture_output=True, text=True
    )
    assert found.returncode != 0
    assert "apt-get install python3" in found.stderr


def test_it_can_be_read_by_an_old_python() -> None:
    """The file that says "your Python is too old" has to be understood by that Python."""
    import ast

    assert ast.parse((ROOT / "backend" / "bootstrap.py").read_text(), feature_version=(3, 6)).body


def test_make_help_names_every_target() -> None:
    said = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    for target in bootstrap.TARGETS:
        assert f"make {target} " in said.stdout


def test_an_installation_that_fails_says_so_and_is_tried_again(clone: Path) -> None:
    lend_packages(clone / "backend" / ".venv")
    requirements = clone / "backend" / bootstrap.SERVICE
    requirements.write_text("nothing-of-this-name==1\n")  # no hash: pip refuses without asking the network
    failed = make(clone, "install")
    assert failed.returncode != 0
    assert "could not be installed" in failed.stderr
    requirements.write_text("")
    mended = make(clone, "install")
    assert mended.returncode == 0
    assert "Creating" not in mended.stderr


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the programs that are named, each a line of shell, the only ones on the path; a place for packages."""
    monkeypatch.setattr(bootstrap, "BETTER_AUTH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()

    def put(**programs: str) -> None:
        for name, line in programs.items():
            program = tmp_path / "bin" / name
            program.write_text(f"#!/bin/sh\n{line}\n")
            program.chmod(0o755)

    return put


def test_without_node_the_issuers_tests_say_what_is_missing(tools: Callable[..., None]) -> None:
    with pytest.raises(bootstrap.Problem, match=r"Node\.js 20 or newer with npm.*there is no node"):
        bootstrap.install_better_auth()
    tools(node="echo v20.1.0")
    with pytest.raises(bootstrap.Problem, match="there is no npm"):
        bootstrap.install_better_auth()
    tools(node="echo v18.19.0", npm="exit 1")
    with pytest.raises(bootstrap.Problem, match=r"this is v18\.19\.0"):
        bootstrap.install_better_auth()
    tools(node="echo v22.0.0")
    with pytest.raises(bootstrap.Problem, match="npm could not install"):
        bootstrap.install_better_auth()


def test_better_auth_is_installed_once_and_again_when_it_was_deleted(
    tools: Callable[..., None], tmp_path: Path
) -> None:
    tools(node="echo v20.1.0", npm='/bin/mkdir -p node_modules && echo "$@" >> asked')
    asked = tmp_path / "asked"
    for times in (1, 1):
        bootstrap.install_better_auth()
        assert asked.read_text().splitlines() == ["ci --ignore-scripts --no-audit --no-fund"] * times
    shutil.rmtree(tmp_path / "node_modules")
    bootstrap.install_better_auth()
    assert len(asked.read_text().splitlines()) == 2


def test_a_part_that_cannot_be_run_hinders_no_other_part(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def part(name: str, problem: str | None = None) -> None:
        def run(rest: list[str]) -> int:
            if problem:
                raise bootstrap.Problem(problem)
            ran.append(name)
            return 1

        monkeypatch.setattr(bootstrap, f"target_{name}", run)

    part("test")
    part("test_debian", "PgBouncer is missing.")
    part("test_versions")
    part("test_issuers")
    with pytest.raises(bootstrap.Problem, match=r"(?s)Not everything was run.*PgBouncer is missing"):
        bootstrap.target_test_all([])
    part("test_debian")
    assert bootstrap.target_test_all([]) == 1
    others = ["test_versions", "test_issuers"]
    assert ran == ["test", *others, "test", "test_debian", *others]


def test_the_lock_of_better_auth_has_a_hash_for_each_package_and_names_no_registry() -> None:
    place = ROOT / "backend" / "tests" / "better_auth"
    packages = json.loads((place / "package-lock.json").read_text())["packages"]
    wanted = json.loads((place / "package.json").read_text())["dependencies"]
    assert packages.pop("")["dependencies"] == wanted
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values())
    assert set(wanted) <= {name.removeprefix("node_modules/") for name in packages}
    for name, package in packages.items():
        assert package["integrity"].startswith("sha512-"), name
        assert "resolved" not in package, name
        assert not package.get("hasInstallScript"), name


def test_the_pins_are_hashed() -> None:
    for name in (bootstrap.SERVICE, bootstrap.EMBEDDED, bootstrap.DEVELOPMENT):
        text = (ROOT / "backend" / name).read_text()
        pins = [line for line in text.splitlines() if "==" in line]
        assert pins
        assert all(line.endswith("\\") for line in pins), name
