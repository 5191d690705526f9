"""`python -m src.config env|markdown`: the files that are printed from the settings."""

from __future__ import annotations

import sys

from .settings_docs import env_example, settings_markdown

_PRINTERS = {"env": env_example, "markdown": settings_markdown}

if __name__ == "__main__":
    printer = _PRINTERS.get(sys.argv[1] if len(sys.argv) == 2 else "")
    if printer is None:
        sys.stderr.write(f"usage: python -m src.config {'|'.join(_PRINTERS)}\n")
        raise SystemExit(2)
    sys.stdout.write(printer())
