"""The command line: `python -m src COMMAND`.

What is for people goes to standard error, data to standard output. Exit codes: 0 success, 1 a check or an
operation failed, 2 usage, 3 configuration or credentials, 130 interrupted. Each command imports what it needs when
it runs, so that `--help` is quick.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ..config.version import VERSION
from ..errors import ConfigurationError, Conflict, GroundworkError, Invalid, NotFound, OutcomeUnknown
from . import output
from .keys import keys
from .migrate import migrate
from .tasks import task
from .users import user

if TYPE_CHECKING:
    from ..verify.runner import Line, Report

PROGRAM = "python -m src"
INTERRUPTED = 130

app = typer.Typer(help="Groundwork: the backend and data layer of a multi-user task service.", **output.PLAIN)
app.add_typer(migrate, name="migrate")
app.add_typer(keys, name="keys")
app.add_typer(user, name="user")
app.add_typer(task, name="task")


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
        output.say("Interrupted.")
        return INTERRUPTED
    except Exception as error:
        return _explain_defect(error)
    code = result if isinstance(result, int) else 0
    if code == INTERRUPTED:
        output.say("Interrupted.")
    return code


def _explain_usage(error: typer.TyperException) -> int:
    message = error.format_message()
    if "://" in message:
        # Somebody typed an address where none is taken, and it may hold a password.
        message = "An address was given where none is expected. Addresses go into DATABASE_URL."
    context = getattr(error, "ctx", None)
    if message.startswith("Usage:") or context is None:
        output.say(message)
    else:
        output.say(f"{context.get_usage()}\nError: {message}")
    return error.exit_code


def _explain(error: GroundworkError) -> int:
    if isinstance(error, Invalid):
        output.say("\n".join([*(fault.detail for fault in error.faults), str(error)]))
        return output.UsageError.exit_code
    if isinstance(error, ConfigurationError | output.UsageError):
        output.say(str(error))
        return error.exit_code
    if isinstance(error, NotFound | Conflict | OutcomeUnknown):
        output.say(error.detail or f"{error.title}. {error.meaning}")
        return 1
    from ..verify.runner import explain

    finding = explain(error)
    output.say(" ".join(text for text in (finding.cause, finding.remedy) if text))
    return finding.exit_code


def _explain_defect(error: Exception) -> int:
    """A defect of ours: where it happened, without any value, because a value may be a secret."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    output.say(f"Groundwork met a defect of its own ({type(error).__name__}). Please report these places:")
    for frame in frames[-6:]:
        output.say(f"  {frame.filename}:{frame.lineno} in {frame.name}")
    return 1


def _show_version(wanted: bool) -> None:
    if wanted:
        output.emit(VERSION)
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
    from ..config.settings import load_settings, require_database
    from ..errors import Fault

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
    from ..server import supervisor

    return supervisor.run(settings, embedded=embedded, reload=reload, workers=settings.workers)


@app.command()
def verify(
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> int:
    """Check everything the service stands on.

    Nothing of a given database is changed. Without one, the embedded database is checked, and started if need be.
    """
    from contextlib import ExitStack

    from ..embedded import database_target
    from ..verify import runner as checks

    output.quiet_logs()
    with ExitStack() as stack:
        load, source = database_target.for_verifying(stack)
        report = asyncio.run(checks.run(load, source, say=_no_line if json else _say_line))
    if json:
        output.emit_json(report.document(), indent=2)
    else:
        _say_summary(report)
    return report.exit_code


def _no_line(_: Line) -> None:
    pass


def _say_line(line: Line) -> None:
    finding = line.finding
    output.say_safely(f"{output.mark(finding.outcome)} {line.check.name:<16} ", finding.figure)
    if finding.outcome != "passed" and finding.cause is not None:
        for cause in finding.cause.splitlines():
            output.say_safely("    ", cause)
        output.say_safely("    next: ", finding.remedy or "")


def _say_summary(report: Report) -> None:
    from ..verify.check import Outcome

    counts = [f"{report.count(outcome)} {outcome}" for outcome in Outcome if report.count(outcome)]
    verdict = "All is well" if report.exit_code == 0 else "Something needs attention"
    output.say(f"\n{verdict}: {', '.join(counts)}, in {report.seconds:.1f} s.")


# -- config, openapi, psql -----------------------------------------------------------------------------------


@app.command()
def config(
    format: Annotated[ConfigFormat, typer.Option(help="How to print it.")] = ConfigFormat.TABLE,  # noqa: A002
) -> None:
    """Print the effective settings, secrets masked.

    `env` and `markdown` print the files made from the settings instead: .env.example and docs/settings.md.
    """
    from dataclasses import asdict

    from ..config import settings_docs
    from ..config.settings import load_settings

    if format is ConfigFormat.ENV:
        output.emit(settings_docs.env_example().rstrip("\n"))
        return
    if format is ConfigFormat.MARKDOWN:
        output.emit(settings_docs.settings_markdown().rstrip("\n"))
        return
    settings = load_settings()
    effective, understood = settings_docs.effective(settings), settings_docs.understood(settings)
    if format is ConfigFormat.JSON:
        document = {"settings": effective, "understood": understood}
        output.emit_json({name: [asdict(row) for row in found] for name, found in document.items()}, indent=2)
        return
    width = max(len(row.name) for row in effective)
    for row in effective:
        output.emit(f"{row.name:<{width}}  {row.value or '(unset)'}  [{row.origin}]")
    for row in understood:
        output.emit(f"{row.name:<{width}}  {row.value}  (understood from {row.origin})")


@app.command()
def openapi() -> None:
    """Print the API's description. Needs no database and reads no settings."""
    from ..config.settings import Settings
    from ..main import create_app

    output.emit_json(create_app(Settings.model_construct()).openapi(), indent=2)


@app.command()
def sweep() -> None:
    """Delete the expired idempotency keys and sessions of every user, and print how many they were.

    Keyed writes and log-ins take their own user's along; run this once a day for users who do neither any more.
    """
    import asyncio

    from ..config.settings import migration_connection
    from ..embedded import database_target
    from ..services import accounts, idempotency

    async def work() -> int:
        async with database_target.connected(migration_connection(settings)) as connection:
            keys = await idempotency.sweep(connection, settings.idempotency_hours)
            return keys + await accounts.sweep(connection)

    output.quiet_logs()
    settings, _ = database_target.settings()
    output.emit(str(asyncio.run(work())))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def psql(context: typer.Context) -> None:
    """Open psql on the database, as the role that migrates it.

    Arguments go on to psql. The password passes by the environment.
    """
    import os
    import shutil

    from ..config.settings import migration_connection
    from ..embedded import database_target

    settings, _ = database_target.settings()
    connection = migration_connection(settings)
    program = shutil.which("psql") or database_target.wheel_psql()
    if program is None:
        raise output.UsageError("psql is not installed: apt-get install postgresql-client")
    environment = {**os.environ, **database_target.libpq_environment(connection)}
    os.execve(program, ["psql", *context.args], environment)  # noqa: S606
