"""The announcement that the service is ready: lines on a terminal, one event in a log."""

from __future__ import annotations

from typing import Any

import click

from ..config.command_line import command
from ..config.logging import is_for_people
from ..config.settings import Settings
from ..server.supervisor import log_ready
from . import output


def show(settings: Settings, facts: dict[str, Any]) -> None:
    """Print `facts` (name and address), or log them where logs are JSON. They hold no password."""
    if settings.environment == "development":
        facts = {**facts, "access": command("user token you@example.com --create")}
    if not is_for_people():
        log_ready(settings, facts)
        return
    facts = {**facts, "try": f"curl {facts['service']}/health"}
    width = max(map(len, facts)) + 2
    lines = [f"  {click.style(name.ljust(width), bold=True)}{value}" for name, value in facts.items()]
    output.say("\n".join(["", *lines, "", "  Ctrl-C stops it.", ""]))
