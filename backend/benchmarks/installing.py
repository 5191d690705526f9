"""What the peers need, in environments of their own, so that nothing of ours depends on it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from .servers import BACKEND, HERE, PEERS, PEERS_PYTHON, Server

REQUIREMENTS: Final = BACKEND / "requirements-bench.txt"


def install(wanted: Sequence[Server]) -> None:
    """Brings what `wanted` need to what is pinned; quick when it is there. Node's peers need node and npm."""
    if any(server.needs == PEERS_PYTHON for server in wanted):
        _python()
    for directory in {server.directory for server in wanted if (server.directory / "package.json").exists()}:
        if shutil.which("node") and shutil.which("npm"):
            _node(directory)


def _python() -> None:
    if _stamped(HERE / ".venv", REQUIREMENTS):
        return
    print("Installing requirements-bench.txt into backend/benchmarks/.venv ...", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(HERE / ".venv")], check=True)
    words = ["install", "--quiet", "--disable-pip-version-check", "--require-hashes", "-r", str(REQUIREMENTS)]
    subprocess.run([str(PEERS_PYTHON), "-m", "pip", *words], check=True)
    _stamp(HERE / ".venv", REQUIREMENTS)


def _node(directory: Path) -> None:
    lock, modules = directory / "package-lock.json", directory / "node_modules"
    if _stamped(modules, lock):
        return
    print(f"Installing {directory.relative_to(PEERS)} by npm ...", file=sys.stderr, flush=True)
    words = ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run(["npm", *words], cwd=directory, check=True, stdout=sys.stderr)
    _stamp(modules, lock)


def _stamped(place: Path, by: Path) -> bool:
    stamp = place / "installed"
    return stamp.exists() and stamp.read_text() == _mark(by)


def _stamp(place: Path, by: Path) -> None:
    (place / "installed").write_text(_mark(by))


def _mark(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
