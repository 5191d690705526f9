"""Check of the running service."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from .check import CheckContext, CheckResult, failed, not_run, passed, warned


async def service(context: CheckContext) -> CheckResult:
    """Read the running service's /health."""
    host, port = context.settings.host, context.settings.port
    # A wildcard address is reached at the loopback.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104
    place = f"http://{f'[{host}]' if ':' in host else host}:{port}/health"
    try:
        status, body = await _get_health(host, port)
    except OSError:
        return not_run(f"nothing answers at {place}")
    try:
        document = json.loads(body)
        verdict = str(document["status"])
    except (ValueError, KeyError, TypeError):
        return warned(
            f"{place} answers {status}",
            "Another program than Groundwork listens there.",
            "Set HOST and PORT to where the service runs.",
        )
    if status == 200 and verdict == "pass":
        return passed(f"{place} reports pass")
    if status == 200 and verdict == "warn":
        return warned(f"{place} reports warn", _complaints(document), f"curl -s {place}")
    return failed(f"{place} reports {verdict} ({status})", _complaints(document), f"curl -s {place}")


async def _get_health(host: str, port: int) -> tuple[int, bytes]:
    """The status and body of one GET, read to the end of the connection or a megabyte."""
    async with asyncio.timeout(3):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            name = f"[{host}]" if ":" in host else host
            request = f"GET /health HTTP/1.0\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n"
            writer.write(request.encode("ascii", "replace"))
            answer = bytearray()
            while len(answer) < 1_000_000 and (chunk := await reader.read(65536)):
                answer += chunk
        finally:
            writer.close()
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    status = int(words[1]) if head.startswith(b"HTTP/") and len(words) > 1 and words[1].isdigit() else 0
    return status, body


def _complaints(document: dict[str, Any]) -> str:
    """The checks of a health document that do not pass, each with its output."""
    said = []
    checks = document.get("checks")
    for name, entries in (checks if isinstance(checks, dict) else {}).items():
        for entry in entries if isinstance(entries, list) else [entries]:
            if isinstance(entry, dict) and entry.get("status") not in (None, "pass"):
                said.append(f"{name}: {entry.get('output') or entry.get('status')}")
    return "; ".join(said) or "It gives no reason."
