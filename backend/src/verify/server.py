"""Checks of the server: credentials, version, encoding, durability, pooler, latency, clock."""

from __future__ import annotations

import secrets
import statistics
import time
from typing import TYPE_CHECKING, Any

import asyncpg

from ..config.command_line import command
from ..services import hosts
from .check import CheckContext, CheckResult, failed, not_run, passed, statements_as, warned
from .roles import quoted, roles

if TYPE_CHECKING:
    from collections.abc import Callable

_OLDEST, _NEWEST = 15, 18
_SLOW_ROUND_TRIP_MS = 20.0
_CLOCK_WARNING_SECONDS = 2.0
_DURABLE = ("fsync", "synchronous_commit", "full_page_writes")


async def _connect(context: CheckContext) -> asyncpg.Connection[Any]:
    connection, _ = await hosts.connect(
        context.address,
        context.connect_timeout_seconds,
        command_timeout=context.settings.database_command_timeout_seconds,
        statement_cache_size=0,
    )
    return connection


async def _close(connection: asyncpg.Connection[Any]) -> None:
    try:
        await connection.close(timeout=1.0)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        connection.terminate()


async def credentials(context: CheckContext) -> CheckResult:
    context.connection = connection = await _connect(context)
    context.closers.append(lambda: _close(connection))
    (row,) = await context.fetch("SELECT current_user::text AS role, current_database()::text AS name")
    return passed(f'role "{row["role"]}" on database "{row["name"]}"')


async def version(context: CheckContext) -> CheckResult:
    (row,) = await context.fetch(
        "SELECT current_setting('server_version') AS text, "
        "current_setting('server_version_num')::int / 10000 AS major"
    )
    summary = f"PostgreSQL {row['text']}"
    if row["major"] < _OLDEST:
        return failed(
            summary,
            f"Groundwork needs PostgreSQL {_OLDEST} or newer.",
            f"Upgrade the server; {_OLDEST} to {_NEWEST} are supported.",
        )
    if row["major"] > _NEWEST:
        return warned(
            summary, f"Newer than {_NEWEST}, the newest that is tested.", "Run `make test` against it first."
        )
    return passed(summary)


async def encoding(context: CheckContext) -> CheckResult:
    """The database's encoding: only UTF8 stores every character that the API accepts."""
    (row,) = await context.fetch(
        "SELECT pg_encoding_to_char(encoding) AS name, datname::text AS database, "
        "current_setting('server_version_num')::int / 10000 AS major "
        "FROM pg_database WHERE datname = current_database()"
    )
    if row["name"] == "UTF8":
        return passed("UTF8")
    able = await roles(context)
    name = f"{row['database']}_utf8"
    locale = "LOCALE_PROVIDER builtin BUILTIN_LOCALE" if row["major"] >= 17 else "LOCALE_PROVIDER libc LOCALE"
    return failed(
        row["name"],
        "SQL_ASCII checks nothing: wrong bytes and wrong comparisons are stored."
        if row["name"] == "SQL_ASCII"
        else f"Characters outside {row['name']} are refused: most scripts, and every emoji.",
        statements_as(
            able.superuser,
            f"CREATE DATABASE {quoted(name)} OWNER {quoted(able.database_owner)} TEMPLATE template0 "
            f"ENCODING 'UTF8' {locale} 'C.UTF-8'",
        )
        + f"\nThen name {name} in DATABASE_URL and run: {command('migrate up')}"
        f"\nTo keep what is stored: pg_dump {row['database']} | psql {name}",
    )


async def pooler(context: CheckContext) -> CheckResult:
    """What the server does, compared with what the configuration says.

    The start-up message names a backend's PID. A pooler makes that up; when two open connections meet the same
    backend, or one meets two, transactions are shared and sessions are not kept.
    """
    configured = str(context.address.pooler)
    (first,) = await context.fetch("SELECT pg_backend_pid() AS pid")
    if first["pid"] == context.connection.get_server_pid():
        if configured in ("transaction", "tracking"):
            return warned(
                f"none, configured as {configured}",
                "There is no pooler, and working around one costs speed.",
                "Set DATABASE_POOLER=auto.",
            )
        return passed("none")
    shared = await _shares_backends(context, first["pid"])
    if shared is None:
        return not_run(f"a proxy; no second connection was free to tell its mode (configured: {configured})")
    if not shared:
        return passed("a proxy that keeps sessions")
    found = "tracking" if await _tracks_statements(context) else "transaction"
    summary = f"transaction mode, prepared statements {'tracked' if found == 'tracking' else 'not tracked'}"
    if configured == "none":
        return failed(
            summary,
            "DATABASE_POOLER=none, but the pooler shares connections: statements will meet other backends.",
            f"Set DATABASE_POOLER={found} (or auto).",
        )
    if configured == "tracking" and found == "transaction":
        return failed(
            summary,
            "The pooler does not track prepared statements, and DATABASE_POOLER says that it does.",
            "Set DATABASE_POOLER=transaction, or max_prepared_statements=1000 in PgBouncer 1.21 or newer.",
        )
    return passed(f"{summary} (configured: {configured})")


async def _shares_backends(context: CheckContext, first: int) -> bool | None:
    """Whether two connections met one backend, or one met two. None: no second connection was free."""
    try:
        other = await _connect(context)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return None
    try:
        async with other.transaction(readonly=True):
            second = await other.fetchval("SELECT pg_backend_pid()")
            (again,) = await context.fetch("SELECT pg_backend_pid() AS pid")
            return bool(second == first or again["pid"] != first)
    finally:
        await _close(other)


async def _tracks_statements(context: CheckContext) -> bool:
    """Whether the pooler renames prepared statements, which is how PgBouncer tracks them."""
    name = f"groundwork_{secrets.token_hex(6)}"
    async with context.connection.transaction(readonly=True):
        query = f"SELECT count(*)::int FROM pg_prepared_statements WHERE name = '{name}'"  # noqa: S608
        statement = await context.connection.prepare(query, name=name)
        kept = await statement.fetchval()
        await context.connection.execute(f"DEALLOCATE {name}" if kept else "SELECT 1")
    return not kept


async def latency(context: CheckContext) -> CheckResult:
    samples = [await _timed(lambda: context.connection.execute("SELECT 1")) for _ in range(9)]
    median = 1000 * statistics.median(samples)
    summary = f"{median:.2f} ms a round trip (median of {len(samples)})"
    if median > _SLOW_ROUND_TRIP_MS:
        return warned(
            summary,
            "Every request waits for at least one round trip.",
            "Run the service in the database's region.",
        )
    return passed(summary)


async def _timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    await work()
    return time.perf_counter() - begun


async def durability(context: CheckContext) -> CheckResult:
    rows = await context.fetch(
        "SELECT name, setting, source FROM pg_settings WHERE name = ANY($1::text[]) ORDER BY name",
        list(_DURABLE),
    )
    summary = ", ".join(f"{row['name']} {row['setting']}" for row in rows)
    off = {row["name"]: row["source"] for row in rows if row["setting"] == "off"}
    if context.address.neon:
        # Neon's computes keep no data: its safekeepers acknowledge the WAL of a commit, whatever these two are.
        for name in ("fsync", "full_page_writes"):
            if off.pop(name, None):
                summary = summary.replace(f"{name} off", f"{name} by Neon's storage")
    if not off:
        return passed(summary)
    where = ", ".join(f"{name} (set by {source})" for name, source in off.items())
    return failed(
        summary, f"A crash can lose committed rows: {where} is off.", await _switch_on(context, off)
    )


async def _switch_on(context: CheckContext, off: dict[str, str]) -> str:
    """The remedy for each source of a setting, as pg_settings names it."""
    able, remedies = await roles(context), []
    (row,) = await context.fetch("SELECT current_database()::text AS name")
    role, database = quoted(able.current), quoted(row["name"])
    file = []
    for name, source in off.items():
        if source == "user":
            remedies.append(statements_as(able.current, f"ALTER ROLE {role} RESET {name}"))
        elif source == "database":
            remedies.append(statements_as(able.database_owner, f"ALTER DATABASE {database} RESET {name}"))
        elif source == "database user":
            statement = f"ALTER ROLE {role} IN DATABASE {database} RESET {name}"
            remedies.append(statements_as(able.current, statement))
        elif source == "client":
            remedies.append(f"Take {name}=off out of DATABASE_URL.")
        elif source == "command line":
            remedies.append(f"Start the server without -c {name}=off: its command line overrides every file.")
        else:
            file.append(f"ALTER SYSTEM SET {name} = on")
    if file:
        remedies.append(statements_as(able.superuser, *file, "SELECT pg_reload_conf()"))
    return "\n".join(remedies)


async def clock(context: CheckContext) -> CheckResult:
    async with context.connection.transaction(readonly=True):
        before = time.time()
        server = await context.connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
        after = time.time()
    # The server read its clock at some moment in between.
    difference = server - (before + after) / 2
    uncertainty = (after - before) / 2
    summary = f"{1000 * difference:+.0f} ms from this machine (give or take {1000 * uncertainty:.0f})"
    if abs(difference) - uncertainty > _CLOCK_WARNING_SECONDS:
        return warned(
            summary,
            "Timestamps and the expiry of tokens disagree.",
            "timedatectl status   # on both machines",
        )
    return passed(summary)
