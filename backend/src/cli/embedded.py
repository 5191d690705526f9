"""`python -m src embedded ...`: the private PostgreSQL of `serve --embedded`."""

from __future__ import annotations

from pathlib import Path

import click

from . import output


@click.group()
def embedded() -> None:
    """Maintain the private PostgreSQL of `serve --embedded`."""


@embedded.command("upgrade")
@click.option(
    "--old-binaries",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The programs of the PostgreSQL that made the data, where they are not found.",
)
def embedded_upgrade(old_binaries: Path | None) -> None:
    """Bring the embedded database's files to the installed PostgreSQL's major version.

    The service must not run. The old files are kept.
    """
    from ..config.settings import load_settings
    from ..embedded.upgrade import upgrade

    done = upgrade(load_settings().data_directory, old_binaries=old_binaries)
    if done.kept is None:
        output.say(f"The embedded database is PostgreSQL {done.new} already.")
    else:
        output.say(
            f"The embedded database is PostgreSQL {done.new} now. The files of PostgreSQL {done.old} are kept in "
            f"{done.kept}; delete them when they are no longer needed."
        )
