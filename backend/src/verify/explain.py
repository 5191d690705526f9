"""From an error to a check's result: cause and remedy in fixed sentences, never the driver's text."""

from __future__ import annotations

from ..config.command_line import command
from ..errors import ConfigurationError, DatabaseRefused, GroundworkError, Overloaded, RequestError
from ..services.faults import as_refusal, diagnose
from .check import CheckResult, failed

_ACTIVITY = "psql -c \"SELECT pid, usename, state, query FROM pg_stat_activity WHERE state <> 'idle'\""

# The cause, and the remedy: a sentence, or the arguments of a command.
_CAUSES: dict[str, tuple[str, str]] = {
    "insufficient-privilege": (
        "The role lacks a privilege.",
        "The check `privileges` prints the statements.",
    ),
    "read-only": (
        "The database is read-only: a standby, or default_transaction_read_only is on. Nothing was written.",
        "Name the primary in DATABASE_URL (with several hosts: target_session_attrs=read-write).",
    ),
    "disk-full": ("The database server's disk is full.", "df -h   # on the database server"),
    "too-many-connections": ("The server has no free connections.", _ACTIVITY),
    "server-starting": ("The server is starting, shutting down or recovering.", "Wait, and try again."),
    "lock-timeout": ("Another session holds a lock on the tables.", _ACTIVITY),
    "statement-timeout": ("The server took too long over a statement.", _ACTIVITY),
    "connection-refused": ("Nothing listens at the address.", "Start PostgreSQL, or correct DATABASE_URL."),
    "host-not-found": ("The host name has no address.", "Correct the host in DATABASE_URL."),
    "connection-lost": (
        "The connection was lost during the check.",
        "Try again; then read the database server's log and check the network between.",
    ),
    "timeout": (
        "The server did not respond in time.",
        "Try again; a suspended Neon compute is awake by then. Otherwise check the server's load.",
    ),
}


def explain(error: Exception) -> CheckResult:
    """The result for an error that ended a check or a command."""
    if isinstance(error, ConfigurationError):
        causes = "\n".join(f"{fault.variable}: {fault.problem}" for fault in error.faults)
        remedies = " ".join(dict.fromkeys(fault.remedy for fault in error.faults))
        return failed("refused", causes, remedies, exit_code=error.exit_code)
    if isinstance(error, DatabaseRefused):
        return failed("refused", error.detail, error.remedy, exit_code=error.exit_code)
    if isinstance(error, Overloaded):
        return failed("no connection", "No connection was free in time.", command("verify") + "   # again")
    if isinstance(error, GroundworkError) and not isinstance(error, RequestError):
        code = getattr(error, "exit_code", 1)
        return failed("refused", str(error), f"Then: {command('verify')}", exit_code=code)
    reason = getattr(error, "reason", None)
    if not isinstance(reason, str):
        diagnosis = diagnose(error)
        if diagnosis.fatal:
            refusal = as_refusal(diagnosis)
            return failed("refused", refusal.detail, refusal.remedy, exit_code=refusal.exit_code)
        reason = diagnosis.reason
    summary = reason.replace("-", " ")
    if reason == "schema-mismatch":
        return failed("schema", "The tables differ from what the code expects.", command("migrate up"))
    cause, remedy = _CAUSES.get(
        reason,
        (f"It ended early ({type(error).__name__}).", "Read the database server's log at this moment."),
    )
    return failed(summary, cause, command(remedy) if remedy.startswith("psql ") else remedy)
