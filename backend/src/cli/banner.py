"""What is said once, when the service answers: lines for a person, or one event for a machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ..config.logging import get_logger
from ..config.settings import Settings, require_database
from . import output

if TYPE_CHECKING:
    from ..embedded.server import EmbeddedPostgres

log = get_logger("groundwork.supervisor")


def show(settings: Settings, addresses: list[tuple[Any, ...]], postgres: EmbeddedPostgres | None) -> None:
    """Where everything is, on standard error; never a password. `addresses` are the listening sockets' own: the
    public one, and that of ADMIN_PORT where there is one."""
    url, inside = url_of(addresses[0]), url_of(addresses[-1])
    facts = {
        "service": url,
        "docs": f"{url}/docs",
        "health": f"{inside}/health",
        "metrics": f"{inside}/metrics",
    }
    if settings.database_url is not None:
        facts["database"] = require_database(settings).redacted()
    if postgres is not None:
        facts["data"] = str(postgres.data_path)
    if settings.environment == "development":
        from ..config.command_line import command

        facts["access"] = command("user token you@example.com --create")
    if settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty()):
        facts["try"] = f"curl {url}/health"
        width = max(map(len, facts)) + 2
        lines = [f"  {click.style(name.ljust(width), bold=True)}{value}" for name, value in facts.items()]
        output.say("\n".join(["", *lines, "", "  Ctrl-C stops it.", ""]))
    else:
        log.info("serving", **facts, workers=settings.workers)


def url_of(address: tuple[Any, ...]) -> str:
    """How a program on this machine reaches the address; a wildcard is reached by the loopback."""
    host, port = str(address[0]), int(address[1])
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
