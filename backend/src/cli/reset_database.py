"""`make reset-database`: delete the embedded database, after asking, and never a running one."""

from __future__ import annotations

import sys

from ..config.settings import load_settings
from ..embedded.server import EmbeddedPostgres, erase, owned
from ..errors import GroundworkError


def main() -> int:
    """Exit code 0: deleted, or there was none; 1: refused or not confirmed; 3: configuration."""
    try:
        directory = load_settings().data_directory
        # Held from the question to the deed: nobody starts the server on it while the person thinks.
        with owned(directory):
            path = EmbeddedPostgres(directory).data_path
            if not path.exists():
                print(f"There is no embedded database in {directory}.", file=sys.stderr)
                return 0
            print(f"This deletes the embedded database in {path}, with every row in it.", file=sys.stderr)
            print("Type yes to go on: ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip() != "yes":
                print("Nothing was deleted.", file=sys.stderr)
                return 1
            erase(directory)
            print("Deleted. `make run` makes a new one.", file=sys.stderr)
            return 0
    except GroundworkError as error:
        print(error, file=sys.stderr)
        return int(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    sys.exit(main())
