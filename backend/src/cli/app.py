"""The command line: `python -m src COMMAND`.

Messages go to standard error, data to standard output. Exit codes: 0 success, 1 a check or an operation failed,
2 usage, 3 configuration or credentials, 130 interrupted. Each command imports what it needs when it runs, so that
`--help` is quick.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from ..config.version import VERSION
from ..errors import ConfigurationError, Conflict, GroundworkError, Invalid, NotFound, OutcomeUnknown
from . import output
from .embedded import embedded as embedded_group
from .keys import keys
from .migrate import migrate
from .tasks import task
from .users import user

if TYPE_CHECKING:
    from ..config.settings import Settings
    from ..verify.runner import CheckRun, Report

PROGRAM = "python -m src"
INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, message="%(version)s")
def app() -> None:
    """Groundwork: the backend and data layer of a multi-user task service."""


for group in (migrate, keys, user, task, embedded_group):
    app.add_command(group)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; no exception leaves this function."""
    try:
        result = app.main(
            list(sys.argv[1:] if arguments is None else arguments),
            prog_name=PROGRAM,
            standalone_mode=False,
            color=output.colour_default(),
        )
    except click.ClickException as error:
        return _report_usage(error)
    except GroundworkError as error:
        return _report(error)
    except (click.Abort, KeyboardInterrupt):
        output.say("Interrupted.")
        return INTERRUPTED
    except Exception as error:
        return _report_unexpected(error)
    return result if isinstance(result, int) else 0


def _report_usage(error: click.ClickException) -> int:
    message = error.format_message()
    if "://" in message:
        # An address was passed where none is expected, and it may hold a password.
        message = "An address was given where none is expected. Addresses go into DATABASE_URL."
    context = getattr(error, "ctx", None)
    if message.startswith("Usage:") or context is None:
        output.say(message)
    else:
        output.say(f"{context.get_usage()}\nError: {message}")
    return error.exit_code


def _report(error: GroundworkError) -> int:
    if isinstance(error, Invalid):
        output.say("\n".join([*(fault.detail for fault in error.faults), str(error)]))
        return output.UsageError.exit_code
    if isinstance(error, ConfigurationError | output.UsageError):
        output.say(str(error))
        return error.exit_code
    if isinstance(error, NotFound | Conflict | OutcomeUnknown):
        output.say(error.detail or f"{error.title}. {error.meaning}")
        return 1
    from ..verify.explain import explain

    result = explain(error)
    output.say(" ".join(text for text in (result.cause, result.remedy) if text))
    return result.exit_code


def _report_unexpected(error: Exception) -> int:
    """Print where it was raised, without any value, because a value may be a secret."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    output.say(f"Unexpected error ({type(error).__name__}). Please report these places:")
    for frame in frames[-6:]:
        output.say(f"  {frame.filename}:{frame.lineno} in {frame.name}")
    return 1


# -- serve and verify ----------------------------------------------------------------------------------------


@app.command()
@click.option(
    "--embedded",
    is_flag=False,
    flag_value="always",
    type=click.Choice(["always", "auto"]),
    help="Start a private PostgreSQL for it; `auto` does so only where no database is configured.",
)
@click.option(
    "--embedded-port",
    type=click.IntRange(1, 65535),
    help="Let the private PostgreSQL listen on this port of 127.0.0.1 too (default: a Unix socket only).",
)
@click.option("--reload", is_flag=True, help="Restart when the code changes.")
@click.option("--workers", type=click.IntRange(min=1), help="Number of processes (default: WORKERS).")
@click.option("--host", help="Address to listen on (default: HOST).")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on (default: PORT).")
def serve(
    embedded: str | None,
    embedded_port: int | None,
    reload: bool,
    workers: int | None,
    host: str | None,
    port: int | None,
) -> int:
    """Serve HTTP until stopped by a signal."""
    from ..config.logging import configure_service, log_refusal
    from ..config.settings import load_settings, log_settings

    try:
        settings = load_settings(host=host, port=port, workers=workers)
        start_embedded = _start_embedded(settings, embedded)
    except ConfigurationError as error:
        configure_service(log_settings())
        return log_refusal(error)
    if embedded_port is not None and not start_embedded:
        raise output.UsageError("--embedded-port needs --embedded, and no DATABASE_URL.")
    from ..server import supervisor
    from . import banner

    return supervisor.run(
        settings,
        embedded=start_embedded,
        embedded_port=embedded_port,
        reload=reload,
        workers=settings.workers,
        announce=banner.show,
    )


def _start_embedded(settings: Settings, choice: str | None) -> bool:
    """Whether a private PostgreSQL is started; ConfigurationError where the choice and DATABASE_URL conflict."""
    from ..config.settings import require_database
    from ..embedded import database_target
    from ..errors import Fault

    if choice == "always" and settings.database_url is not None:
        problem = "is set, while --embedded asks for a private PostgreSQL."
        raise ConfigurationError(
            [Fault("DATABASE_URL", problem, "Leave --embedded out, or unset DATABASE_URL.")]
        )
    if choice == "always" or (choice == "auto" and database_target.is_unconfigured(settings)):
        return True
    require_database(settings)
    return False


@app.command()
@click.option("--json", is_flag=True, help="Print one JSON document on standard output.")
def verify(json: bool) -> int:
    """Check configuration, database, schema and service.

    A configured database is not changed. Without one the embedded database is checked, and started if necessary.
    """
    from contextlib import ExitStack

    from ..embedded import database_target
    from ..verify import runner as checks

    output.quiet_logs()
    with ExitStack() as stack:
        load, source = database_target.for_verifying(stack)
        report = asyncio.run(checks.run(load, source, on_result=_no_line if json else _say_line))
    if json:
        output.emit_json(report.document(), indent=2)
    else:
        _say_summary(report)
    return report.exit_code


def _no_line(_: CheckRun) -> None:
    pass


def _say_line(run: CheckRun) -> None:
    result = run.result
    output.say_safely(f"{output.mark(result.outcome)} {run.check.name:<16} ", result.summary)
    if result.outcome != "passed" and result.cause is not None:
        for cause in result.cause.splitlines():
            output.say_safely("    ", cause)
        output.say_safely("    next: ", result.remedy or "")


def _say_summary(report: Report) -> None:
    from ..verify.check import Outcome

    counts = [f"{report.count(outcome)} {outcome}" for outcome in Outcome if report.count(outcome)]
    verdict = "All is well" if report.exit_code == 0 else "Something needs attention"
    output.say(f"\n{verdict}: {', '.join(counts)}, in {report.seconds:.1f} s.")


# -- config, openapi, psql -----------------------------------------------------------------------------------


@app.command()
@click.option(
    "--format",
    "layout",
    type=click.Choice(["table", "env", "markdown", "json"]),
    default="table",
    show_default=True,
    help="Output format.",
)
def config(layout: str) -> None:
    """Print the effective settings, secrets masked.

    `env` and `markdown` print the files generated from the settings: .env.example and docs/settings.md.
    """
    from dataclasses import asdict

    from ..config import settings_docs
    from ..config.settings import load_settings

    if layout == "env":
        output.emit(settings_docs.env_example().rstrip("\n"))
        return
    if layout == "markdown":
        output.emit(settings_docs.settings_markdown().rstrip("\n"))
        return
    settings = load_settings()
    effective, understood = settings_docs.effective(settings), settings_docs.understood(settings)
    if layout == "json":
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
    """Print the OpenAPI description. Needs no database and reads no settings."""
    from ..config.settings import Settings
    from ..main import create_app

    output.emit_json(create_app(Settings.model_construct()).openapi(), indent=2)


@app.command()
def sweep() -> None:
    """Delete the expired idempotency keys and sessions of every user, and print their number.

    Keyed writes and log-ins delete those of their own user; run this once a day for users who do neither any more.
    """
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


# psql has a -h of its own: its server's host.
@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": ["--help"],
    }
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def psql(arguments: tuple[str, ...]) -> None:
    """Open psql on the database, as the role that migrates it.

    ARGUMENTS are passed to psql. The password is passed in the environment.
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
    os.execve(program, ["psql", *arguments], environment)  # noqa: S606
