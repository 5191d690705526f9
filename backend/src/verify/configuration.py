"""Check of the configuration."""

from __future__ import annotations

from ..config.command_line import command
from ..config.settings import require_database
from ..errors import ConfigurationError
from .check import CheckContext, CheckResult, failed, passed, warned


async def configuration(context: CheckContext) -> CheckResult:
    """Load the settings and parse DATABASE_URL."""
    try:
        context.settings = context.load()
        context.address = require_database(context.settings)
    except ConfigurationError as error:
        cause = "\n".join(f"{fault.variable}: {fault.problem} {fault.remedy}" for fault in error.faults)
        return failed(
            f"{len(error.faults)} invalid",
            cause,
            f"Correct the environment or backend/.env, then: {command('verify')}",
            exit_code=error.exit_code,
        )
    summary = f"{context.address.redacted()}, from {context.source}"
    if context.address.warnings:
        return warned(summary, " ".join(context.address.warnings), command("config"))
    return passed(summary)
