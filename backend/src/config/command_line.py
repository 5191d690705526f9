"""The text of commands that messages and remedies ask a person to run."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

BACKEND = Path(__file__).resolve().parents[2]


def command(arguments: str) -> str:
    """Return `python -m src <arguments>` as it can be typed in the current directory."""
    here = Path.cwd()
    venv = BACKEND / ".venv"
    if not venv.exists():
        python = Path(sys.executable).name or "python"
    elif os.environ.get("VIRTUAL_ENV") == str(venv):
        python = "python"
    else:
        python = _shortest(venv / "bin" / "python", here)
    if here == BACKEND or _imports_src_anywhere(venv):
        return f"{python} -m src {arguments}"
    if venv.exists() and python != "python":
        python = ".venv/bin/python"
    return f"cd {_shortest(BACKEND, here)} && {python} -m src {arguments}"


def _imports_src_anywhere(venv: Path) -> bool:
    """Whether bootstrap.py put `src` on the path of the environment's Python."""
    return any(venv.glob("lib/python3*/site-packages/groundwork.pth"))


def _shortest(path: Path, here: Path) -> str:
    return shlex.quote(min(os.path.relpath(path, here), str(path), key=len))
