"""Runs the checks of everything that the service depends on.

`CHECKS` is the list, in order. Nothing of the database is changed: what checks write is rolled back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config.command_line import command
from ..config.version import VERSION
from . import data, isolation, network, privileges, schema, server, tls
from .check import Check, CheckContext, CheckResult, Outcome, failed, not_run
from .configuration import configuration
from .explain import explain
from .service import service

if TYPE_CHECKING:
    from ..config.settings import Settings

__all__ = ["CHECKS", "CheckRun", "Report", "explain", "run"]

TIMEOUT_SECONDS = 30.0
_CLOSE_SECONDS = 2.0

CHECKS: tuple[Check, ...] = (
    Check("configuration", "The settings are complete and valid.", configuration),
    Check("DNS", "Each host of the address resolves.", network.dns, ("configuration",)),
    Check("network", "The port accepts connections.", network.network, ("DNS",), timeout_seconds=12.0),
    Check("TLS", "The server's certificate is verified before a password is sent.", tls.tls, ("network",)),
    Check("credentials", "The role can log in to the database.", server.credentials, ("TLS",)),
    Check("server version", "PostgreSQL is 15, 16, 17 or 18.", server.version, ("credentials",)),
    Check("encoding", "The database's encoding is UTF8.", server.encoding, ("credentials",)),
    Check("pooler", "The pooler is the one that is configured.", server.pooler, ("credentials",)),
    Check("latency", "A round trip is short.", server.latency, ("credentials",)),
    Check(
        "durability",
        "A committed row survives a crash: fsync, synchronous_commit and full_page_writes are on.",
        server.durability,
        ("credentials",),
    ),
    Check("schema revision", "The migrations have run.", schema.revision, ("credentials",)),
    Check("tables", "The schema is as the models declare it.", schema.tables, ("schema revision",)),
    Check("users and tasks", "The service's statements work.", data.crud, ("schema revision",)),
    Check("cascade", "Deleting a user deletes the user's tasks.", data.cascade, ("users and tasks",)),
    Check("uniqueness", "An e-mail address belongs to one user.", data.uniqueness, ("users and tasks",)),
    Check("isolation", "Row-level security separates users.", isolation.isolated, ("schema revision",)),
    Check("privileges", "The role has the privileges it needs.", privileges.privileges, ("credentials",)),
    Check("grantees", "No other role has privileges.", privileges.grantees, ("schema revision",)),
    Check("migration", "The role that migrates can change the schema.", schema.migration, ("credentials",)),
    Check("clock", "The clocks of server and service agree.", server.clock, ("credentials",)),
    Check("service", "The running service, if there is one, is healthy.", service, ("configuration",)),
)


@dataclass(frozen=True, slots=True)
class CheckRun:
    """A check, its result and its duration."""

    check: Check
    result: CheckResult
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """The results of all checks, in order, and the duration of the run."""

    runs: tuple[CheckRun, ...]
    seconds: float

    @property
    def exit_code(self) -> int:
        """0: no check failed; 3: the configuration or a credential is at fault; 1: another check failed."""
        codes = [run.result.exit_code for run in self.runs if run.result.outcome is Outcome.FAILED]
        return max(codes, default=0)

    def count(self, outcome: Outcome) -> int:
        return sum(run.result.outcome is outcome for run in self.runs)

    def document(self) -> dict[str, Any]:
        """The report as `verify --json` prints it. `cause` and `remedy` are null where a check passed."""
        return {
            "ok": self.exit_code == 0,
            "exit_code": self.exit_code,
            "version": VERSION,
            "seconds": round(self.seconds, 3),
            "checks": [
                {
                    "name": run.check.name,
                    "outcome": str(run.result.outcome),
                    "summary": run.result.summary,
                    "cause": run.result.cause,
                    "remedy": run.result.remedy,
                    "seconds": round(run.seconds, 4),
                }
                for run in self.runs
            ],
        }


async def run(
    load: Callable[[], Settings],
    source: str = "DATABASE_URL",
    *,
    on_result: Callable[[CheckRun], None] = lambda _: None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Report:
    """Run every check in order, and pass each result to `on_result`.

    `load` returns the settings or raises ConfigurationError; `source` says where the URL came from. The run ends
    within `timeout_seconds`, also on a silent network, and leaves no connection open.
    """
    start = time.monotonic()
    context = CheckContext(load, source)
    runs: list[CheckRun] = []
    try:
        for check in CHECKS:
            started = time.monotonic()
            left = timeout_seconds - (started - start)
            result = await _run_check(check, context, runs, left, timeout_seconds)
            runs.append(CheckRun(check, result, time.monotonic() - started))
            on_result(runs[-1])
    finally:
        await _close(context)
    return Report(tuple(runs), time.monotonic() - start)


async def _run_check(
    check: Check, context: CheckContext, runs: list[CheckRun], left: float, whole: float
) -> CheckResult:
    sound = {run.check.name for run in runs if run.result.outcome in (Outcome.PASSED, Outcome.WARNED)}
    missing = [name for name in check.requires if name not in sound]
    if missing:
        return not_run(f"not run: requires {missing[0]}")
    if left <= 0:
        return not_run(f"not run: the run's {whole:.0f} s are over")
    timeout_seconds = min(check.timeout_seconds, left)
    try:
        async with asyncio.timeout(timeout_seconds) as timeout:
            return await check.run(context)
    except Exception as error:
        # Checks exist to find faults: any error is a result.
        if isinstance(error, TimeoutError) and timeout.expired():
            return failed(
                f"no response within {timeout_seconds:.0f} s",
                "The server accepted the connection and fell silent, or the network drops packets.",
                command("verify") + "   # again; then the server's log and load",
            )
        return explain(error)


async def _close(context: CheckContext) -> None:
    for close in reversed(context.closers):
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await close()
        except Exception as error:
            # The results stand; a connection that does not close ends with the process.
            del error
