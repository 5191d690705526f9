"""`make reset-database`: delete the embedded database, after a confirmation, and never a running one."""

from __future__ import annotations

import sys

import click

from ..config.settings import load_settings
from ..embedded.server import EmbeddedPostgres, erase, owned
from ..errors import GroundworkError
from . import output


def main() -> int:
    """Exit code 0: deleted, or there was none; 1: refused or not confirmed; 3: configuration."""
    try:
        directory = load_settings().data_directory
        # The lock is held from the question to the deletion: no server starts on the data meanwhile.
        with owned(directory):
            path = EmbeddedPostgres(directory).data_path
            if not path.exists():
                output.say(f"There is no embedded database in {directory}.")
                return 0
            output.say(f"This deletes the embedded database in {path}, with every row in it.")
            click.echo("Type yes to continue: ", err=True, nl=False)
            if sys.stdin.readline().strip() != "yes":
                output.say("Nothing was deleted.")
                return 1
            erase(directory)
            output.say("Deleted. `make run` creates a new one.")
            return 0
    except GroundworkError as error:
        output.say(str(error))
        return int(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    sys.exit(main())
