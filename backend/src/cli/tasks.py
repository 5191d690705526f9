"""`python -m src task ...`: a user's tasks, without the HTTP in between; and what all commands about rows share."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, TypeVar
from uuid import UUID

import typer

from . import output

if TYPE_CHECKING:
    from ..services.database import Database

S = TypeVar("S")
T = TypeVar("T")

task = typer.Typer(help="Add, list, finish, delete, import and export a user's tasks.", **output.PLAIN)

Email = Annotated[str, typer.Argument(metavar="EMAIL", help="The user's e-mail address.")]
TaskId = Annotated[UUID, typer.Argument(metavar="TASK_ID", help="The task's id, as `task list` shows it.")]
Limit = Annotated[int, typer.Option(min=1, max=200, help="How many rows at most.")]


@task.command("add")
def task_add(
    email: Email,
    title: Annotated[str, typer.Argument(metavar="TITLE", help="What is to be done.")],
    description: Annotated[str | None, typer.Option(help="More about it.")] = None,
) -> None:
    """Add a task to a user; prints the row as JSON."""
    from ..models import TaskCreate
    from ..services import tasks

    address, new = address_of(email), shaped(TaskCreate, title=title, description=description)

    async def work(database: Database) -> str:
        author = tasks.Known(await owner_of(database, address))
        return (await tasks.create(database, author, new)).body

    emit_row(with_database(work))


@task.command("list")
def task_list(
    email: Email,
    completed: Annotated[bool | None, typer.Option("--done/--open", help="Only these.")] = None,
    limit: Limit = 50,
) -> None:
    """List a user's tasks, the newest first.

    A table on a terminal, else one JSON object a line.
    """
    from ..services import tasks

    address, query = address_of(email), tasks.PageQuery(limit=limit, is_completed=completed)

    async def work(database: Database) -> str:
        return (await tasks.page(database, await owner_of(database, address), query)).items

    emit_rows(with_database(work), ("id", "is_completed", "title", "created_at"), limit)


@task.command("done")
def task_done(email: Email, task_id: TaskId) -> None:
    """Mark a task as completed; prints the row as JSON."""
    from ..models import TaskUpdate
    from ..services import tasks

    address, change = address_of(email), shaped(TaskUpdate, is_completed=True)

    async def work(database: Database) -> str:
        author = tasks.Known(await owner_of(database, address))
        return (await tasks.update(database, author, task_id, change)).body

    emit_row(with_database(work))


@task.command("delete")
def task_delete(email: Email, task_id: TaskId) -> None:
    """Delete a task."""
    from ..services import tasks

    address = address_of(email)

    async def work(database: Database) -> None:
        await tasks.delete(database, tasks.Known(await owner_of(database, address)), task_id)

    with_database(work)
    output.say(f"Deleted {task_id}.")


@task.command("import")
def task_import(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="NDJSON, one task a line; - for standard input.")
    ],
    email: Email,
) -> None:
    """Add a task for each line of a file to a user: all of them, or none.

    A line needs a title only; a line of an export is one. What is wrong is named by its line.
    """
    from ..services import task_transfer, tasks

    address = address_of(email)
    with _opened(file) as lines:
        progress = output.Progress("Importing", sum(1 for line in lines if line.strip()))
        lines.seek(0)

        async def work(database: Database) -> int:
            author = tasks.Known(await owner_of(database, address))
            loaded = await task_transfer.load(database, author, lines, on_progress=progress.to)
            return loaded.count

        try:
            count = with_database(work)
        finally:
            progress.end()
    output.say(f"Added {count} tasks to {address}.")


@task.command("export")
def task_export(email: Email) -> None:
    """Print all of a user's tasks as NDJSON, one a line, the oldest first."""
    from ..services import task_transfer, tasks

    address = address_of(email)

    async def work(database: Database) -> None:
        owner = await owner_of(database, address)
        counted = await tasks.page(database, owner, tasks.PageQuery(limit=1, count="exact"))
        progress = output.Progress("Exporting", counted.count or 0)
        count, begun = 0, b""
        try:
            async for piece in task_transfer.export(database, owner):
                whole, end, rest = (begun + bytes(piece)).rpartition(b"\n")
                begun = rest
                output.emit_bytes(whole + end)
                count += whole.count(b"\n") + len(end)
                progress.to(count)
        finally:
            progress.end()

    with_database(work)


@contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    """The file, or all of standard input, from which nobody can read twice."""
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
        # Operators look across users, which only the owner of the tables may.
        connection = migration_connection(small)
        async with database_target.connected(
            connection, timeout_seconds=small.database_connect_timeout_seconds
        ):
            pass
        async with Database.from_settings(small, connection) as database:
            return await work(database)

    return asyncio.run(run())


async def owner_of(database: Database, address: str) -> UUID:
    from ..services import users

    return UUID(json.loads(await users.find(database, address))["id"])


def address_of(email: str) -> str:
    """The address as it is stored."""
    from ..models import UserCreate

    return shaped(UserCreate, email=email).email


def shaped(shape: type[S], **values: Any) -> S:
    """The values as a shape; what is wrong with them is told without quoting them."""
    from pydantic import ValidationError

    try:
        return shape(**values)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        said = "; ".join(f"{detail['loc'][0]}: {detail['msg']}" for detail in details)
    raise output.UsageError(f"{said}.")


def emit_row(row: str) -> None:
    output.emit_json(json.loads(row))


def emit_rows(page: str, columns: Sequence[str], limit: int) -> None:
    found = json.loads(page)
    output.rows(found, columns)
    if len(found) == limit:
        output.say(f"These are the first {limit}; --limit shows more.")
