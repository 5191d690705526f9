"""The command line: `python -m src serve | verify | migrate | config | openapi | user | task | psql`.

What is for people goes to standard error, data to standard output. Exit codes: 0 success, 1 a check or an
operation failed, 2 usage, 3 configuration or credentials, 130 interrupted. Each command imports what it needs when
it runs, so that `--help` is quick.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from uuid import UUID

import typer

from . import terminal
from .errors import ConfigurationError, GroundworkError, Invalid
from .version import VERSION

if TYPE_CHECKING:
    from .config.database import ConnectionSettings
    from .services.database import Database
    from .services.schema import SchemaChange
    from .services.verify import Line, Report

S = TypeVar("S")
T = TypeVar("T")

PROGRAM = "python -m src"
INTERRUPTED = 130

# Plain help (no rich): quick, and the same in every terminal. Tracebacks with local variables would show secrets.
_PLAIN: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "pretty_exceptions_show_locals": False,
    "add_completion": False,
    "no_args_is_help": True,
}
app = typer.Typer(help="Groundwork: the backend and data layer of a multi-user task service.", **_PLAIN)
migrate = typer.Typer(help="Bring the schema up, take it down, or compare it with the code.", **_PLAIN)
user = typer.Typer(help="Add, list and delete users.", **_PLAIN)
task = typer.Typer(help="Add, list, finish and delete a user's tasks.", **_PLAIN)
app.add_typer(migrate, name="migrate")
app.add_typer(user, name="user")
app.add_typer(task, name="task")

Email = Annotated[str, typer.Argument(metavar="EMAIL", help="The user's e-mail address.")]
TaskId = Annotated[UUID, typer.Argument(metavar="TASK_ID", help="The task's id, as `task list` shows it.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Limit = Annotated[int, typer.Option(min=1, max=200, help="How many rows at most.")]


class UsageError(GroundworkError):
    """The command was asked for something it cannot mean."""

    exit_code = 2


class ConfigFormat(StrEnum):
    TABLE = "table"
    ENV = "env"
    MARKDOWN = "markdown"
    JSON = "json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives its exit code and never lets a traceback out."""
    try:
        result = app(
            args=list(sys.argv[1:] if arguments is None else arguments),
            prog_name=PROGRAM,
            standalone_mode=False,
        )
    except typer.TyperException as error:
        return _explain_usage(error)
    except GroundworkError as error:
        return _explain(error)
    except (typer.Abort, KeyboardInterrupt):
        terminal.say("Interrupted.")
        return INTERRUPTED
    except Exception as error:
        return _explain_defect(error)
    code = result if isinstance(result, int) else 0
    if code == INTERRUPTED:
        terminal.say("Interrupted.")
    return code


def _explain_usage(error: typer.TyperException) -> int:
    message = error.format_message()
    if "://" in message:
        # Somebody typed an address where none is taken, and it may hold a password.
        message = "An address was given where none is expected. Addresses go into DATABASE_URL."
    context = getattr(error, "ctx", None)
    if context is not None and message:
        terminal.say(context.get_usage())
    terminal.say(f"Error: {message}" if message and context is not None else message)
    return error.exit_code


def _explain(error: GroundworkError) -> int:
    from .services.verify import explain

    code = int(getattr(error, "exit_code", 1))
    if isinstance(error, ConfigurationError | UsageError | Invalid):
        terminal.say(str(error))
        return 2 if isinstance(error, Invalid) else code
    finding = explain(error)
    terminal.say(" ".join(text for text in (finding.cause, finding.remedy) if text))
    return max(code, finding.exit_code)


def _explain_defect(error: Exception) -> int:
    """A defect of ours: where it happened, without any value, because a value may be a secret."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    terminal.say(f"Groundwork met a defect of its own ({type(error).__name__}). Please report these places:")
    for frame in frames[-6:]:
        terminal.say(f"  {frame.filename}:{frame.lineno} in {frame.name}")
    return 1


def _show_version(wanted: bool) -> None:
    if wanted:
        terminal.emit(VERSION)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# -- serve and verify ----------------------------------------------------------------------------------------


@app.command()
def serve(
    embedded: Annotated[bool, typer.Option("--embedded", help="Start a private PostgreSQL for it.")] = False,
    reload: Annotated[bool, typer.Option("--reload", help="Start anew when the code changes.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes (default: WORKERS).")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default: HOST).")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to listen on (default: PORT).")
    ] = None,
) -> int:
    """Serve HTTP until told to stop."""
    from .config.settings import load_settings, require_database
    from .errors import Fault

    settings = load_settings(host=host, port=port, workers=workers)
    if not embedded:
        require_database(settings)
    elif settings.database_url is not None:
        raise ConfigurationError(
            [
                Fault(
                    "DATABASE_URL",
                    "is set, while --embedded asks for a private PostgreSQL.",
                    "Leave --embedded out, or unset DATABASE_URL.",
                )
            ]
        )
    from . import supervisor

    return supervisor.run(settings, embedded=embedded, reload=reload, workers=settings.workers)


@app.command()
def verify(
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> int:
    """Check everything the service stands on; changes nothing of a given database."""
    from contextlib import ExitStack

    from .services import attach
    from .services import verify as checks

    _quiet_logs()
    with ExitStack() as stack:
        load, source = attach.for_verifying(stack)
        report = asyncio.run(checks.run(load, source, say=_no_line if json else _say_line))
    if json:
        terminal.emit_json(report.document(), indent=2)
    else:
        _say_summary(report)
    return report.exit_code


def _no_line(_: Line) -> None:
    pass


def _say_line(line: Line) -> None:
    finding = line.finding
    terminal.say_safely(f"{terminal.mark(finding.outcome)} {line.check.name:<16} ", finding.figure)
    if finding.outcome != "passed" and finding.cause is not None:
        for cause in finding.cause.splitlines():
            terminal.say_safely("    ", cause)
        terminal.say_safely("    next: ", finding.remedy or "")


def _say_summary(report: Report) -> None:
    from .services.examination import Outcome

    counts = [f"{report.count(outcome)} {outcome}" for outcome in Outcome if report.count(outcome)]
    verdict = "All is well" if report.exit_code == 0 else "Something needs attention"
    terminal.say(f"\n{verdict}: {', '.join(counts)}, in {report.seconds:.1f} s.")


# -- migrate -------------------------------------------------------------------------------------------------


@migrate.command("up")
def migrate_up() -> None:
    """Bring the schema to this code's revision, and print that revision."""
    from .services import schema

    def waiting() -> None:
        terminal.say("Another process is migrating; waiting for it.")

    _say_change(asyncio.run(schema.create_tables(_migration_connection(), on_wait=waiting)))


@migrate.command("down")
def migrate_down(
    revision: Annotated[str, typer.Argument(help="The revision to go back to; `base` removes the tables.")],
    yes: Yes = False,
) -> None:
    """Take the schema back, with the rows of what is removed, and print the revision reached."""
    from .services import schema

    if revision != "base" and revision not in schema.known_revisions():
        known = ", ".join(("base", *schema.known_revisions()))
        raise UsageError(f"There is no revision of that name. Known are: {known}.")
    connection = _migration_connection()
    _confirm(f"Take {connection.redacted()} back to {revision}? Rows go with their tables.", yes)
    _say_change(asyncio.run(schema.downgrade(connection, revision)))


@migrate.command("check")
def migrate_check() -> int:
    """Compare the schema with the code. Exit code 1 when they differ; each difference on a line of standard output."""
    from .services import schema

    connection = _migration_connection()
    found, differences = asyncio.run(_look_at_schema(connection))
    if found != schema.head():
        terminal.say(f"The schema's revision is {found or 'none'}; this code's is {schema.head()}.")
    for difference in differences:
        terminal.emit(difference)
    if found == schema.head() and not differences:
        terminal.say(f"The schema is at {found}, and as the code declares it.")
        return 0
    return 1


async def _look_at_schema(connection: ConnectionSettings) -> tuple[str | None, list[str]]:
    import asyncpg

    from .services import faults, schema

    try:
        wire = await asyncpg.connect(**connection.asyncpg_arguments(), statement_cache_size=0, timeout=30)
        try:
            async with wire.transaction(readonly=True):
                return await schema.revision_of(wire), await schema.differences(wire)
        finally:
            await wire.close(timeout=5)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        diagnosis = faults.diagnose(error)
    if diagnosis.fatal:
        raise faults.as_refusal(diagnosis)
    raise faults.as_request_error(diagnosis, sent=False, writing=False)


def _migration_connection() -> ConnectionSettings:
    from .config.settings import migration_connection
    from .services import attach

    _quiet_logs()
    settings, _ = attach.settings()
    return migration_connection(settings)


def _say_change(change: SchemaChange) -> None:
    if change.changed:
        terminal.say(f"The schema went from {change.before or 'nothing'} to {change.after or 'nothing'}.")
    else:
        terminal.say(f"The schema is at {change.after or 'nothing'}; there was nothing to do.")
    terminal.emit(change.after or "base")


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not terminal.can_ask():
        raise UsageError(f"{question} Say so with --yes.")
    if not terminal.ask(question):
        raise typer.Abort


def _quiet_logs() -> None:
    """One command, one clear line at its end: what the services log on the way is for those who ask by LOG_LEVEL."""
    import os

    from .config.logging import configure

    configure("debug" if os.environ.get("LOG_LEVEL", "").lower() == "debug" else "critical", "console")


# -- config, openapi, psql -----------------------------------------------------------------------------------


@app.command()
def config(
    format: Annotated[ConfigFormat, typer.Option(help="How to print it.")] = ConfigFormat.TABLE,  # noqa: A002
) -> None:
    """Print the effective settings and where each came from; secrets are masked.

    `env` and `markdown` print the files made from the settings instead: .env.example and docs/settings.md.
    """
    from dataclasses import asdict

    from .config import printed
    from .config.settings import load_settings

    if format is ConfigFormat.ENV:
        terminal.emit(printed.env_example().rstrip("\n"))
        return
    if format is ConfigFormat.MARKDOWN:
        terminal.emit(printed.settings_markdown().rstrip("\n"))
        return
    settings = load_settings()
    effective, understood = printed.effective(settings), printed.understood(settings)
    if format is ConfigFormat.JSON:
        document = {"settings": effective, "understood": understood}
        terminal.emit_json(
            {name: [asdict(row) for row in found] for name, found in document.items()}, indent=2
        )
        return
    width = max(len(row.name) for row in effective)
    for row in effective:
        terminal.emit(f"{row.name:<{width}}  {row.value or '(unset)'}  [{row.origin}]")
    for row in understood:
        terminal.emit(f"{row.name:<{width}}  {row.value}  (understood from {row.origin})")


@app.command()
def openapi() -> None:
    """Print the API's description. Needs no database and reads no settings."""
    from .config.settings import Settings
    from .main import create_app

    terminal.emit_json(create_app(Settings.model_construct()).openapi(), indent=2)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def psql(context: typer.Context) -> None:
    """Open psql on the database; arguments go on to psql. The password passes by the environment."""
    import os
    import shutil

    from .config.settings import require_database
    from .services import attach

    settings, _ = attach.settings()
    connection = require_database(settings)
    program = shutil.which("psql") or attach.wheel_psql()
    if program is None:
        raise UsageError("psql is not installed: apt-get install postgresql-client")
    os.execve(program, ["psql", *context.args], {**os.environ, **attach.libpq_environment(connection)})  # noqa: S606


# -- user and task -------------------------------------------------------------------------------------------


@user.command("add")
def user_add(email: Email) -> None:
    """Make a user; prints the row as JSON."""
    from .models import UserCreate
    from .services import users

    row = _with_database(lambda database: users.create(database, _shaped(UserCreate, email=email)))
    _emit_row(row)


@user.command("list")
def user_list(limit: Limit = 50) -> None:
    """List users: a table on a terminal, else one JSON object a line."""
    from .services import users

    _emit_rows(
        _with_database(lambda database: users.page(database, limit=limit)),
        ("id", "email", "created_at"),
        limit,
    )


@user.command("delete")
def user_delete(email: Email, yes: Yes = False) -> None:
    """Delete a user with all tasks."""
    from .services import users

    address = _address(email)
    _confirm(f"Delete {address} and all their tasks?", yes)

    async def work(database: Database) -> None:
        await users.delete(database, await _owner(database, address))

    _with_database(work)
    terminal.say(f"Deleted {address}.")


@task.command("add")
def task_add(
    email: Email,
    title: Annotated[str, typer.Argument(metavar="TITLE", help="What is to be done.")],
    description: Annotated[str | None, typer.Option(help="More about it.")] = None,
) -> None:
    """Add a task to a user; prints the row as JSON."""
    from .models import TaskCreate
    from .services import tasks

    address, new = _address(email), _shaped(TaskCreate, title=title, description=description)

    async def work(database: Database) -> str:
        return await tasks.create(database, await _owner(database, address), new)

    _emit_row(_with_database(work))


@task.command("list")
def task_list(
    email: Email,
    completed: Annotated[bool | None, typer.Option("--done/--open", help="Only these.")] = None,
    limit: Limit = 50,
) -> None:
    """List a user's tasks: a table on a terminal, else one JSON object a line."""
    from .services import tasks

    address = _address(email)

    async def work(database: Database) -> str:
        owner = await _owner(database, address)
        return await tasks.page(database, owner, limit=limit, is_completed=completed)

    _emit_rows(_with_database(work), ("id", "is_completed", "title", "created_at"), limit)


@task.command("done")
def task_done(email: Email, task_id: TaskId) -> None:
    """Mark a task as completed; prints the row as JSON."""
    from .models import TaskUpdate
    from .services import tasks

    address, change = _address(email), _shaped(TaskUpdate, is_completed=True)

    async def work(database: Database) -> str:
        return await tasks.update(database, await _owner(database, address), task_id, change)

    _emit_row(_with_database(work))


@task.command("delete")
def task_delete(email: Email, task_id: TaskId) -> None:
    """Delete a task."""
    from .services import tasks

    address = _address(email)

    async def work(database: Database) -> None:
        await tasks.delete(database, await _owner(database, address), task_id)

    _with_database(work)
    terminal.say(f"Deleted {task_id}.")


def _with_database(work: Callable[[Database], Awaitable[T]]) -> T:
    """Run `work` on the configured database, or on the running embedded one."""
    from .config.settings import require_database
    from .services import attach
    from .services.database import Database

    _quiet_logs()
    settings, _ = attach.settings()

    async def run() -> T:
        small = settings.model_copy(update={"database_pool_size": 1})
        async with Database.from_settings(small, require_database(small)) as database:
            return await work(database)

    return asyncio.run(run())


async def _owner(database: Database, address: str) -> UUID:
    import json

    from .services import users

    return UUID(json.loads(await users.find(database, address))["id"])


def _address(email: str) -> str:
    """The address as it is stored."""
    from .models import UserCreate

    return _shaped(UserCreate, email=email).email


def _shaped(shape: type[S], **values: Any) -> S:
    """The values as a shape; what is wrong with them is told without quoting them."""
    from pydantic import ValidationError

    try:
        return shape(**values)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        said = "; ".join(f"{detail['loc'][0]}: {detail['msg']}" for detail in details)
    raise UsageError(f"{said}.")


def _emit_row(row: str) -> None:
    import json

    terminal.emit_json(json.loads(row))


def _emit_rows(page: str, columns: Sequence[str], limit: int) -> None:
    import json

    found = json.loads(page)
    terminal.rows(found, columns)
    if len(found) == limit:
        terminal.say(f"These are the first {limit}; --limit shows more.")
