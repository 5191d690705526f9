"""Named checks of everything the service stands on, each with what it found and, on failure, what to type next.

`CHECKS` is the list, in order; `run` looks at each in turn. Nothing of the database is changed: what the checks
write is rolled back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config.command_line import command
from ..config.version import VERSION
from ..errors import ConfigurationError, DatabaseRefused, GroundworkError, Overloaded, RequestError
from ..services.faults import as_refusal, diagnose
from . import connection as reach
from . import database as store
from . import isolation
from .check import Check, Examination, Finding, Outcome, failed, not_run

if TYPE_CHECKING:
    from ..config.settings import Settings

BOUND_SECONDS = 30.0
_CLOSE_SECONDS = 2.0

CHECKS: tuple[Check, ...] = (
    Check("configuration", "The settings are complete and valid.", reach.configuration),
    Check("DNS", "Each host of the address has an address of its own.", reach.names, ("configuration",)),
    Check("network", "The port takes a connection.", reach.network, ("DNS",), bound_seconds=12.0),
    Check("TLS", "The server's certificate is verified before a password leaves.", reach.tls, ("network",)),
    Check(
        "credentials",
        "The server knows the role, its password and the database.",
        reach.credentials,
        ("TLS",),
    ),
    Check("server version", "PostgreSQL is 15, 16, 17 or 18.", reach.version, ("credentials",)),
    Check("pooler", "What stands in between is what the configuration says.", reach.pooler, ("credentials",)),
    Check("latency", "A round trip is short.", reach.latency, ("credentials",)),
    Check(
        "durability",
        "A committed row survives a crash: fsync, synchronous_commit and full_page_writes are on.",
        store.durability,
        ("credentials",),
    ),
    Check("schema revision", "The migrations have run.", store.revision, ("credentials",)),
    Check(
        "tables",
        "Tables, columns, constraints, indexes, policies and rights are as the models declare them.",
        store.tables,
        ("schema revision",),
    ),
    Check(
        "users and tasks",
        "Users and tasks can be written, read, changed and deleted.",
        store.crud,
        ("schema revision",),
    ),
    Check("cascade", "A deleted user's tasks go along.", store.cascade, ("users and tasks",)),
    Check("uniqueness", "One e-mail address is one user.", store.uniqueness, ("users and tasks",)),
    Check(
        "isolation",
        "PostgreSQL itself shows nobody another user's rows.",
        isolation.isolated,
        ("schema revision",),
    ),
    Check("rights", "The role may do what it must, and no more.", store.rights, ("credentials",)),
    Check("clock", "The server's clock agrees with ours.", store.clock, ("credentials",)),
    Check("service", "The running service, if there is one, is healthy.", store.service, ("configuration",)),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One check and what it found, in how many seconds."""

    check: Check
    finding: Finding
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """What all checks found, in their order, and how long they took together."""

    lines: tuple[Line, ...]
    seconds: float

    @property
    def exit_code(self) -> int:
        """0: no check failed; 3: the configuration or a credential is at fault; 1: another check failed."""
        codes = [line.finding.exit_code for line in self.lines if line.finding.outcome is Outcome.FAILED]
        return max(codes, default=0)

    def count(self, outcome: Outcome) -> int:
        return sum(line.finding.outcome is outcome for line in self.lines)

    def document(self) -> dict[str, Any]:
        """The report as `verify --json` prints it. `cause` and `remedy` are null where all is well."""
        return {
            "ok": self.exit_code == 0,
            "exit_code": self.exit_code,
            "version": VERSION,
            "seconds": round(self.seconds, 3),
            "checks": [
                {
                    "name": line.check.name,
                    "outcome": str(line.finding.outcome),
                    "figure": line.finding.figure,
                    "cause": line.finding.cause,
                    "remedy": line.finding.remedy,
                    "seconds": round(line.seconds, 4),
                }
                for line in self.lines
            ],
        }


async def run(
    load: Callable[[], Settings],
    source: str = "DATABASE_URL",
    *,
    say: Callable[[Line], None] = lambda _: None,
    bound_seconds: float = BOUND_SECONDS,
) -> Report:
    """Look at every check in order, telling `say` each line as it is known.

    `load` gives the settings, or raises ConfigurationError; `source` says where the address came from. The whole
    run ends within `bound_seconds`, however silent the network is, and leaves no connection open.
    """
    begun = time.monotonic()
    examination = Examination(load, source)
    lines: list[Line] = []
    try:
        for check in CHECKS:
            started = time.monotonic()
            left = bound_seconds - (started - begun)
            finding = await _look(check, examination, lines, left, bound_seconds)
            lines.append(Line(check, finding, time.monotonic() - started))
            say(lines[-1])
    finally:
        await _close(examination)
    return Report(tuple(lines), time.monotonic() - begun)


async def _look(
    check: Check, examination: Examination, lines: list[Line], left: float, whole: float
) -> Finding:
    sound = {line.check.name for line in lines if line.finding.outcome in (Outcome.PASSED, Outcome.WARNED)}
    missing = [name for name in check.needs if name not in sound]
    if missing:
        return not_run(f"not run: needs {missing[0]}")
    if left <= 0:
        return not_run(f"not run: the {whole:.0f} s of the whole run are over")
    bound = min(check.bound_seconds, left)
    try:
        async with asyncio.timeout(bound) as limit:
            return await check.look(examination)
    except Exception as error:
        # A check is there to find faults: whatever it meets becomes its finding.
        if isinstance(error, TimeoutError) and limit.expired():
            return failed(
                f"no answer within {bound:.0f} s",
                "The database server took the connection and fell silent, or the network between swallows packets.",
                command("verify") + "   # again; then the server's log and load",
            )
        return explain(error)


async def _close(examination: Examination) -> None:
    for close in reversed(examination.closers):
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await close()
        except Exception as error:
            # The run is over and its findings stand; a connection that will not close politely dies with us.
            del error


# What a reason means for the person who runs the checks, and what to type next.
_CAUSES: dict[str, tuple[str, str]] = {
    "insufficient-privilege": (
        "The role lacks a right.",
        'psql -c "GRANT groundwork_app TO <role>"   # as the owner of the tables, who made that role by migrating',
    ),
    "read-only": (
        "The database is read-only: a standby, or default_transaction_read_only is on. Nothing could be written.",
        "Name the primary in DATABASE_URL (with several hosts: target_session_attrs=read-write).",
    ),
    "disk-full": ("The database server's disk is full.", "df -h   # on the database server"),
    "too-many-connections": (
        "The server takes no more connections.",
        'psql -c "SELECT usename, state, count(*) FROM pg_stat_activity GROUP BY 1, 2"',
    ),
    "server-starting": ("The server is starting up, shutting down or recovering.", "Wait, and try again."),
    "lock-timeout": (
        "Somebody holds a lock on the tables.",
        "psql -c \"SELECT pid, state, query FROM pg_stat_activity WHERE state <> 'idle'\"",
    ),
    "statement-timeout": (
        "The server took too long over a statement.",
        "psql -c \"SELECT pid, state, query FROM pg_stat_activity WHERE state <> 'idle'\"",
    ),
    "connection-refused": ("Nothing listens at the address.", "Start PostgreSQL, or mend DATABASE_URL."),
    "host-not-found": (
        "The host of the address has no address of its own.",
        "Mend the host in DATABASE_URL.",
    ),
    "connection-lost": (
        "The connection was lost in the middle.",
        "Try again; then look into the database server's log and at the network between.",
    ),
    "timeout": (
        "The server did not answer in time.",
        "Try again; a Neon compute that slept is awake by then. Else look at the server's load.",
    ),
}


def explain(error: Exception) -> Finding:
    """A finding for an error: cause and remedy in our own words, never the driver's text."""
    if isinstance(error, ConfigurationError):
        causes = "\n".join(f"{fault.variable}: {fault.problem}" for fault in error.faults)
        remedies = " ".join(dict.fromkeys(fault.remedy for fault in error.faults))
        return failed("refused", causes, remedies, exit_code=error.exit_code)
    if isinstance(error, DatabaseRefused):
        return failed("refused", error.detail, error.remedy, exit_code=error.exit_code)
    if isinstance(error, Overloaded):
        return failed("no connection", "No connection came free in time.", command("verify") + "   # again")
    if isinstance(error, GroundworkError) and not isinstance(error, RequestError):
        return failed(
            "refused", str(error), f"Then: {command('verify')}", exit_code=getattr(error, "exit_code", 1)
        )
    reason = getattr(error, "reason", None)
    if not isinstance(reason, str):
        diagnosis = diagnose(error)
        if diagnosis.fatal:
            refusal = as_refusal(diagnosis)
            return failed("refused", refusal.detail, refusal.remedy, exit_code=refusal.exit_code)
        reason = diagnosis.reason
    if reason == "schema-mismatch":
        return failed("schema", "The tables are not those that the code expects.", command("migrate up"))
    if reason in _CAUSES:
        cause, remedy = _CAUSES[reason]
        return failed(reason.replace("-", " "), cause, remedy)
    kind = type(error).__name__
    return failed(
        reason.replace("-", " "),
        f"It ended early ({kind}).",
        "Look into the database server's log at this moment.",
    )
