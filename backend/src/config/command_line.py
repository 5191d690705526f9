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
    venv = BACKEND / ".venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    python = "python"
    if venv.exists() and os.environ.get("VIRTUAL_ENV") != str(BACKEND / ".venv"):
        python = str(venv.relative_to(BACKEND))
    elif not venv.exists():
        python = Path(sys.executable).name or "python"
    if here == BACKEND:
        return f"{python} -m src {arguments}"
    place = min(os.path.relpath(BACKEND, here), str(BACKEND), key=len)
    return f"cd {shlex.quote(place)} && {python} -m src {arguments}"
