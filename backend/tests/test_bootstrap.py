"""From a clone to a running service: what `make` does before any package is there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
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
    assert said["arguments"] == ["serve", "--embedded=auto"]
    assert said["prefix"] == str(clone / "backend" / ".venv")
    assert said["cwd"] == str(clone)

    second = make(
        clone, "run", "ARGS=--port 1", VIRTUAL_ENV="/nowhere", PYTHONPATH="/nowhere", PYTHONHOME="/nowhere"
    )
    assert second.stderr == ""
    said = json.loads(second.stdout)
    assert said["arguments"] == ["serve", "--embedded=auto", "--port", "1"]
    assert set(said["seen"].values()) == {None}

    failed = make(clone, "run", END_WITH="3")
    assert "Error 3" in failed.stderr

    # `python -m src` works from any directory.
    for directory in (clone, clone / "backend", clone / "backend" / "src", Path("/")):
        anywhere = subprocess.run(
            [clone / "backend" / ".venv" / "bin" / "python", "-m", "src", "verify"],
            cwd=directory,
            capture_output=True,
            text=True,
        )
        assert json.loads(anywhere.stdout)["arguments"] == ["verify"], anywhere.stderr

    # A kill in the middle of an installation leaves no stamp. Two makes at once take turns: one repairs.
    environment = clone / "backend" / ".venv"
    stamp = environment / Path(bootstrap.STAMP).name
    stamp.unlink()
    command = [sys.executable, "-I", str(clone / "backend" / "bootstrap.py")]
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
    ask = [sys.executable, "-c", "import bootstrap; print(len(bootstrap.read_stamp()))"]
    assert subprocess.check_output(ask, cwd=clone / "backend", text=True) == "4\n"
    (environment / "bin" / "python").unlink()
    assert subprocess.check_output(ask, cwd=clone / "backend", text=True) == "0\n"

    (clone / "backend" / ".env").write_text("SECRET=1\n")
    (clone / "backend" / ".data").mkdir()
    assert make(clone, "clean").returncode == 0
    assert {path.name for path in (clone / "backend").iterdir()} >= {".env", ".data", "src"}
    assert not (clone / "backend" / ".venv").exists()


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
        bootstrap.use_new_enough_python([])


@pytest.mark.parametrize("address", [None, "postgresql://db.example.com/x"])
def test_without_glibc_the_service_is_installed_without_its_private_postgresql(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str | None
) -> None:
    monkeypatch.setattr(bootstrap.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(sys, "platform", "linux")
    if address:
        monkeypatch.setenv("DATABASE_URL", address)
    assert bootstrap.requirements(development=False) == [bootstrap.SERVICE]
    assert ("Set DATABASE_URL" in capsys.readouterr().err) == (address is None)
    with pytest.raises(bootstrap.Problem, match="glibc"):
        bootstrap.requirements(development=True)


def test_on_windows_wsl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(bootstrap.Problem, match="wsl --install"):
        bootstrap.main([])


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
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets >= {"install-dev", "format", "test-fast", "upgrade-database"}
    for target in targets - {"venv", "venv-dev"}:
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


def programs(folder: Path, **lines: str) -> dict[str, str]:
    """An environment in whose path are these programs, each a line of shell, and the few that scripts need."""
    folder.mkdir(exist_ok=True)
    for name in ("bash", "dirname", "env", "mkdir", "rm"):
        if not (folder / name).exists():
            (folder / name).symlink_to(shutil.which(name) or "")
    for name, line in lines.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    return {"PATH": str(folder)}


@pytest.fixture
def install_node(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a copy of .ci/install-node with only the named programs installed."""
    script = tmp_path / ".ci" / "install-node"
    script.parent.mkdir()
    shutil.copy(ROOT / ".ci" / "install-node", script)
    packages = tmp_path / "backend" / "tests" / "better_auth"
    packages.mkdir(parents=True)
    (packages / "package-lock.json").touch()
    os.utime(packages / "package-lock.json", (1, 1))

    def run(*arguments: str, **lines: str) -> subprocess.CompletedProcess[str]:
        environment = programs(tmp_path / "bin", **lines)
        return subprocess.run([script, *arguments], env=environment, capture_output=True, text=True)

    return run


def test_without_node_install_node_says_what_is_missing(
    install_node: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    for lines, message in (
        ({}, "there is no node on this machine"),
        ({"node": "echo v20.1.0"}, "there is no npm on this machine"),
        ({"node": "echo v18.19.0", "npm": "exit 1"}, "this is v18.19.0"),
        ({"node": "echo v22.0.0"}, "npm could not install"),
    ):
        failed = install_node(**lines)
        assert failed.returncode == 1
        assert message in failed.stderr


def test_npm_packages_are_installed_once_and_again_when_they_were_deleted(
    install_node: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    npm = 'mkdir -p node_modules && echo > node_modules/.package-lock.json && echo "$@" >> calls'
    lines = {"node": "echo v20.1.0", "npm": npm}
    checked = install_node("--check", **lines)
    assert (checked.returncode, ".ci/install-node" in checked.stderr) == (1, True)
    for _ in range(2):
        assert install_node().returncode == 0
    assert install_node("--check").returncode == 0
    place = tmp_path / "backend" / "tests" / "better_auth"
    assert (place / "calls").read_text().splitlines() == ["ci --ignore-scripts --no-audit --no-fund"]
    shutil.rmtree(place / "node_modules")
    assert install_node().returncode == 0
    assert len((place / "calls").read_text().splitlines()) == 2


def test_missing_debian_packages_are_named_with_the_command(clone: Path) -> None:
    """With a path that holds no PgBouncer; /usr/sbin, where Debian has it, is searched too."""
    script = (ROOT / ".ci" / "install-debian").read_text().replace(":/usr/sbin", "")
    (clone / ".ci").mkdir()
    copy = clone / ".ci" / "install-debian"
    copy.write_text(script)
    copy.chmod(0o755)
    checked = subprocess.run([copy, "--check"], env=programs(clone / "bin"), capture_output=True, text=True)
    assert checked.returncode == 1
    assert "apt-get install pgbouncer" in checked.stderr
    assert ".ci/install-debian" in checked.stderr


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
