"""`python -m src migrate ...`: upgrade the schema, downgrade it, compare it with the code."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from . import output

if TYPE_CHECKING:
    from ..config.database import ConnectionSettings
    from ..services.schema import SchemaChange


@click.group()
def migrate() -> None:
    """Upgrade the schema, downgrade it, or compare it with the code."""


@migrate.command("up")
def migrate_up() -> None:
    """Upgrade the schema to the newest revision, and print it."""
    from ..services import schema

    def waiting() -> None:
        output.say("Another process is migrating; waiting for it.")

    _say_change(asyncio.run(schema.create_tables(_migration_connection(), on_wait=waiting)))


@migrate.command("down")
@click.argument("revision")
@output.yes_option
def migrate_down(revision: str, yes: bool) -> None:
    """Downgrade the schema to REVISION, and print it.

    Tables and columns that later revisions added are dropped with their rows. `base` drops all tables.
    """
    from ..services import schema

    if revision != "base" and revision not in schema.known_revisions():
        known = ", ".join(("base", *schema.known_revisions()))
        raise output.UsageError(f"There is no revision of that name. Known are: {known}.")
    connection = _migration_connection()
    output.confirm(f"Take {connection.redacted()} back to {revision}? Rows go with their tables.", yes)
    _say_change(asyncio.run(schema.downgrade(connection, revision)))


@migrate.command("check")
def migrate_check() -> int:
    """Compare the schema with the code.

    Exit code 1 when they differ; each difference is a line of standard output.
    """
    from ..services import schema

    connection = _migration_connection()
    found, differences = asyncio.run(_look_at_schema(connection))
    if found != schema.head():
        output.say(f"The schema's revision is {found or 'none'}; this code's is {schema.head()}.")
    for difference in differences:
        output.emit(difference)
    if found == schema.head() and not differences:
        output.say(f"The schema is at {found}, and as the code declares it.")
        return 0
    return 1


async def _look_at_schema(connection: ConnectionSettings) -> tuple[str | None, list[str]]:
    from ..embedded import database_target
    from ..services import schema

    async with database_target.connected(connection) as wire, wire.transaction(readonly=True):
        return await schema.revision_of(wire), await schema.differences(wire)


def _migration_connection() -> ConnectionSettings:
    from ..config.settings import migration_connection
    from ..embedded import database_target

    output.quiet_logs()
    settings, _ = database_target.settings()
    return migration_connection(settings)


def _say_change(change: SchemaChange) -> None:
    if change.changed:
        output.say(f"The schema went from {change.before or 'nothing'} to {change.after or 'nothing'}.")
    else:
        output.say(f"The schema is at {change.after or 'nothing'}; there was nothing to do.")
    output.emit(change.after or "base")
