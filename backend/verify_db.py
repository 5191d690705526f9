"""Verify everything the service stands on: `python3 backend/verify_db.py [--json]`, from any directory, by any Python.

The same as `python -m src verify` and `make verify`. Exit codes: 0 all is well, 1 a check failed (or Groundwork is
not installed), 2 usage, 3 the configuration or a credential is at fault.
"""

import os
import sys
from importlib.util import find_spec

BACKEND = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(BACKEND, ".venv")
PYTHON = (
    os.path.join(VENV, "Scripts", "python.exe") if os.name == "nt" else os.path.join(VENV, "bin", "python")
)

if __name__ == "__main__":
    elsewhere = os.path.realpath(sys.prefix) != os.path.realpath(VENV)
    if elsewhere and os.path.exists(PYTHON) and not os.environ.get("GROUNDWORK_REEXECUTED"):
        os.environ["GROUNDWORK_REEXECUTED"] = "1"  # A damaged .venv must not make us go round in circles.
        os.execv(PYTHON, [PYTHON, os.path.abspath(__file__)] + sys.argv[1:])  # noqa: RUF005, S606
    if sys.version_info < (3, 11) or any(
        find_spec(name) is None for name in ("click", "asyncpg", "sqlmodel")
    ):
        root = os.path.dirname(BACKEND)
        sys.stderr.write("Groundwork is not installed here. Install it first:\n")
        sys.stderr.write('  make -C "%s" install\n' % root)  # noqa: UP031
        sys.exit(1)
    sys.path.insert(0, BACKEND)
    try:
        from src.cli.app import main

        sys.exit(main(["verify"] + sys.argv[1:]))  # noqa: RUF005
    except KeyboardInterrupt:
        sys.exit(130)
