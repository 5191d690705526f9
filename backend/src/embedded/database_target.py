"""Which database a command of the operator means: the configured one, or the embedded one that is running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg

from ..config.command_line import command
from ..config.settings import load_settings, migration_connection, require_database
from ..errors import ConfigurationError, Fault, GroundworkError
from ..services import hosts
from ..services.faults import as_refusal, as_request_error, diagnose

if TYPE_CHECKING:
    from ..config.database import ConnectionSettings
    from ..config.settings import Settings

EMBEDDED = "the embedded database"
STARTED = "the embedded database, started for this"


def settings() -> tuple[Settings, str]:
    """The settings with a database in them, and where its address came from.

    Without DATABASE_URL it is the embedded database that runs on the data directory. Raises ConfigurationError
    when there is neither.
    """
    found = load_settings()
    if found.database_url is not None:
        return found, f"DATABASE_URL ({found.origin('database_url')})"
    attached = _running(found)
    if attached is None:
        raise ConfigurationError([_nothing_there(found)])
    return attached, EMBEDDED


def for_verifying(stack: ExitStack) -> tuple[Callable[[], Settings], str]:
    """As `settings`, but starts and migrates the embedded database when nothing is configured and none runs.

    `stack` stops it again. Whatever is wrong is raised by the function returned, so that it becomes a finding.
    """
    try:
        found = load_settings()
        if found.database_url is not None:
            return lambda: found, f"DATABASE_URL ({found.origin('database_url')})"
        attached = _running(found)
        if attached is not None:
            return lambda: attached, EMBEDDED
        started = _start(found, stack)
    except GroundworkError as error:
        problem = error

        def fail() -> Settings:
            raise problem

        return fail, "DATABASE_URL"
    return lambda: started, STARTED


def is_unconfigured(found: Settings) -> bool:
    """Whether an embedded database may be started: no address is set, and none was meant.

    A mistyped name of the setting, or production without an address, is an error that it would hide.
    """
    if found.database_url is not None or found.environment == "production":
        return False
    return _missing(found).problem == "Is not set."


def _running(found: Settings) -> Settings | None:
    from .roles import APPLICATION, running_url

    url = running_url(found.data_directory)
    if url is None:
        return None
    # A server that an older version started knows no role for the application yet.
    theirs = running_url(found.data_directory, role=APPLICATION) or url
    return load_settings(database_url=theirs, database_migration_url=url)


def _start(found: Settings, stack: ExitStack) -> Settings:
    from ..services import schema
    from .location import wheel_binaries
    from .server import EmbeddedPostgres

    if not is_unconfigured(found):
        raise ConfigurationError([_missing(found)])
    try:
        wheel_binaries()
    except GroundworkError:
        raise ConfigurationError([_missing(found)]) from None
    server = stack.enter_context(EmbeddedPostgres(found.data_directory))
    started = load_settings(database_url=server.application_url, database_migration_url=server.url)
    asyncio.run(schema.create_tables(migration_connection(started)))
    return started


def _missing(found: Settings) -> Fault:
    try:
        require_database(found)
    except ConfigurationError as error:
        return error.faults[0]
    raise AssertionError("an address is there")


def _nothing_there(found: Settings) -> Fault:
    fault = _missing(found)
    return Fault(
        fault.variable,
        f"{fault.problem} No embedded database runs on {found.data_directory} either.",
        f"{fault.remedy} By hand: {command('serve --embedded')}",
    )


@asynccontextmanager
async def connected(
    connection: ConnectionSettings, *, timeout_seconds: float = 10.0
) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A bare connection for one look: where it cannot be had, the family's error comes at once.

    A service waits for its database; a person at a terminal wants to hear what is wrong.
    """
    try:
        wire, _ = await hosts.connect(connection, timeout_seconds, statement_cache_size=0)
        try:
            yield wire
        finally:
            await wire.close(timeout=5)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        diagnosis = diagnose(error)
    else:
        return
    if diagnosis.fatal:
        raise as_refusal(diagnosis)
    raise as_request_error(diagnosis, sent=False, writing=False)


def wheel_psql() -> str | None:
    """The psql that came with the embedded PostgreSQL, if that is installed."""
    from .location import wheel_binaries

    try:
        found = wheel_binaries() / "psql"
    except GroundworkError:
        return None
    return str(found) if found.exists() else None


def libpq_environment(connection: ConnectionSettings) -> dict[str, str]:
    """What libpq's programs need to reach the same database in the same way; the password is in it."""
    tls = connection.tls
    found = {
        "PGHOST": ",".join(host.name for host in connection.hosts),
        "PGPORT": ",".join(str(host.port) for host in connection.hosts),
        "PGUSER": connection.user,
        "PGPASSWORD": connection.password.get_secret_value() if connection.password is not None else "",
        "PGDATABASE": connection.database,
        "PGSSLMODE": tls.mode,
        "PGSSLROOTCERT": tls.root_certificate or ("system" if tls.mode == "verify-full" else ""),
        "PGSSLCERT": tls.certificate or "",
        "PGSSLKEY": tls.key or "",
        "PGTARGETSESSIONATTRS": connection.target_session_attrs,
        "PGAPPNAME": "groundwork psql",
    }
    return {name: value for name, value in found.items() if value}
