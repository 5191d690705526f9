"""`python -m src task ...`: a user's tasks, read and written without HTTP; helpers of all commands about rows."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from uuid import UUID

import click

from . import output

if TYPE_CHECKING:
    from ..services.database import Database

S = TypeVar("S")
T = TypeVar("T")

limit_option = click.option(
    "--limit", type=click.IntRange(1, 200), default=50, show_default=True, help="Maximum number of rows."
)


@click.group()
def task() -> None:
    """Add, list, complete, delete, import and export a user's tasks."""


@task.command("add")
@click.argument("email")
@click.argument("title")
@click.option("--description", help="The task's description.")
def task_add(email: str, title: str, description: str | None) -> None:
    """Add a task to a user; prints the row as JSON."""
    from ..models import TaskCreate
    from ..services import tasks

    address, new = address_of(email), shaped(TaskCreate, title=title, description=description)

    async def work(database: Database) -> str:
        author = tasks.Known(await owner_of(database, address))
        return (await tasks.create(database, author, new)).body

    emit_row(with_database(work))


@task.command("list")
@click.argument("email")
@click.option("--done/--open", "completed", default=None, help="List only completed or only open tasks.")
@limit_option
def task_list(email: str, completed: bool | None, limit: int) -> None:
    """List a user's tasks, the newest first.

    A table on a terminal, else one JSON object a line.
    """
    from ..services import tasks

    address, query = address_of(email), tasks.PageQuery(limit=limit, is_completed=completed)

    async def work(database: Database) -> str:
        return (await tasks.page(database, await owner_of(database, address), query)).items

    emit_rows(with_database(work), ("id", "is_completed", "title", "created_at"), limit)


@task.command("done")
@click.argument("email")
@click.argument("task_id", type=click.UUID)
def task_done(email: str, task_id: UUID) -> None:
    """Mark a task as completed; prints the row as JSON."""
    from ..models import TaskUpdate
    from ..services import tasks

    address, change = address_of(email), shaped(TaskUpdate, is_completed=True)

    async def work(database: Database) -> str:
        author = tasks.Known(await owner_of(database, address))
        return (await tasks.update(database, author, task_id, change)).body

    emit_row(with_database(work))


@task.command("delete")
@click.argument("email")
@click.argument("task_id", type=click.UUID)
def task_delete(email: str, task_id: UUID) -> None:
    """Delete a task."""
    from ..services import tasks

    address = address_of(email)

    async def work(database: Database) -> None:
        await tasks.delete(database, tasks.Known(await owner_of(database, address)), task_id)

    with_database(work)
    output.say(f"Deleted {task_id}.")


@task.command("import")
@click.argument("file")
@click.argument("email")
def task_import(file: str, email: str) -> None:
    """Add a task to a user for each line of FILE: all of them, or none.

    FILE is NDJSON, as `task export` prints it; - is standard input. A line requires a title only. Errors name the
    line.
    """
    from ..services import task_transfer, tasks

    address = address_of(email)
    with _opened(file) as lines:
        total = sum(1 for line in lines if line.strip())
        lines.seek(0)

        async def work(database: Database) -> int:
            author = tasks.Known(await owner_of(database, address))
            with output.progress("Importing", total) as bar:
                loaded = await task_transfer.load(
                    database, author, lines, on_progress=lambda count: bar.update(count - bar.pos)
                )
            return loaded.count

        count = with_database(work)
    output.say(f"Added {count} tasks to {address}.")


@task.command("export")
@click.argument("email")
def task_export(email: str) -> None:
    """Print all of a user's tasks as NDJSON, one a line, the oldest first."""
    from ..services import task_transfer, tasks

    address = address_of(email)

    async def work(database: Database) -> None:
        owner = await owner_of(database, address)
        counted = await tasks.page(database, owner, tasks.PageQuery(limit=1, count="exact"))
        begun = b""
        with output.progress("Exporting", counted.count or 0) as bar:
            async for piece in task_transfer.export(database, owner):
                whole, end, begun = (begun + bytes(piece)).rpartition(b"\n")
                output.emit_bytes(whole + end)
                bar.update(whole.count(b"\n") + len(end))

    with_database(work)


@contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    """The file, or a copy of standard input, which cannot be read twice."""
    try:
        with tempfile.TemporaryFile() if file == "-" else Path(file).open("rb") as opened:
            if file == "-":
                shutil.copyfileobj(sys.stdin.buffer, opened)
                opened.seek(0)
            yield opened
    except OSError as error:
        raise output.UsageError(f"The file cannot be read: {error.strerror}.") from None


def with_database(work: Callable[[Database], Awaitable[T]]) -> T:
    """Run `work` on the configured database, or on the running embedded one."""
    from ..config.settings import migration_connection
    from ..embedded import database_target
    from ..services.database import Database

    output.quiet_logs()
    settings, _ = database_target.settings()

    async def run() -> T:
        small = settings.model_copy(update={"database_pool_size": 1})
        # Commands read across users, which only the owner of the tables may.
        connection = migration_connection(small)
        async with database_target.connected(
            connection, timeout_seconds=small.database_connect_timeout_seconds
        ):
            pass
        async with Database.from_settings(small, connection) as database:
            return await work(database)

    return asyncio.run(run())


async def owner_of(database: Database, address: str) -> UUID:
    """The id of the user with this address; NotFound if there is none."""
    from ..services import users

    return UUID(json.loads(await users.find(database, address))["id"])


def address_of(email: str) -> str:
    """The address as it is stored."""
    from ..models import UserCreate

    return shaped(UserCreate, email=email).email


def shaped(shape: type[S], **values: Any) -> S:
    """An instance of the schema; UsageError names what is invalid without quoting the value."""
    from pydantic import ValidationError

    try:
        return shape(**values)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        message = "; ".join(f"{detail['loc'][0]}: {detail['msg']}" for detail in details)
    raise output.UsageError(f"{message}.")


def emit_row(row: str) -> None:
    """Print a row, which is JSON text, as one line."""
    output.emit_json(json.loads(row))


def emit_rows(page: str, columns: Sequence[str], limit: int) -> None:
    """Print a page of rows, which is a JSON array, and whether `limit` cut it off."""
    rows = json.loads(page)
    output.emit_rows(rows, columns)
    if len(rows) == limit:
        output.say(f"These are the first {limit}; --limit shows more.")
