"""What every answer is held to, whatever goes wrong around it; a breach is a word."""

from __future__ import annotations

import json
from typing import Any, Final
from zlib import crc32

from .wire import Answer

PROBLEM: Final = "application/problem+json"

# What an intention may be answered. 429 and 503 are always possible; 504 only where something may have been written.
ALLOWED: Final[dict[str, frozenset[int]]] = {
    "create": frozenset({201, 504}),
    "replay": frozenset({201, 504}),
    "reuse": frozenset({422, 504}),
    "batch": frozenset({200, 504}),
    "place": frozenset({201, 412, 504}),
    "replace": frozenset({200, 404, 412, 504}),
    "patch": frozenset({200, 404, 412, 504}),
    "delete": frozenset({204, 404, 412, 504}),
    "read": frozenset({200, 304, 404}),
    "list": frozenset({200}),
    "foreign": frozenset({404, 412, 504}),
    "foreign-read": frozenset({404}),
}
BUSY: Final = frozenset({429, 503})


def content_of(mark: str) -> dict[str, Any]:
    """The whole task that a mark stands for: whoever meets the mark knows what has to be beside it."""
    number = crc32(mark.encode())
    description = None if number % 5 == 0 else f"{mark} äöü 漢 \U0001f331 " * (1 + number % 7)
    return {"title": mark, "description": description, "is_completed": number % 2 == 0}


def breaches(do: str, answer: Answer, request_id: str, *, keyed: bool) -> list[str]:
    """What is wrong with the form of an answer to `do`; empty when nothing is."""
    status, headers, body = answer
    found = []
    if status not in BUSY and status not in ALLOWED[do]:
        found.append(f"status-{status}-on-{do}")
    if headers.get("x-request-id") != request_id:
        found.append("another-request-id")
    if headers.get("x-content-type-options") != "nosniff":
        found.append("no-nosniff")
    if status < 400:
        if "retry-after" in headers:
            found.append("retry-after-on-success")
        if status in (200, 201) and headers.get("content-type") != "application/json":
            found.append("content-type")
        return found
    promised = status in BUSY or (status == 504 and keyed)
    if headers.get("retry-after", "").isdigit() != promised:
        found.append(f"retry-after-{'missing' if promised else 'untrue'}-on-{status}")
    if headers.get("content-type") != PROBLEM:
        return [*found, f"no-problem-on-{status}"]
    try:
        problem = json.loads(body)
        whole = problem["status"] == status and problem["type"].startswith("/problems/") and problem["title"]
        if not whole or problem["request_id"] != request_id:
            found.append("problem-untrue")
    except (ValueError, KeyError, TypeError):
        found.append("problem-unreadable")
    return found


def strange(task: dict[str, Any], user: str, task_id: str | None = None) -> list[str]:
    """What is wrong with a task that `user` was shown: somebody else's, another one, or not what its mark says."""
    found = []
    if task["user_id"] != user:
        found.append("row-of-another-person")
    if task_id is not None and task["id"] != task_id:
        found.append("another-task")
    if any(task[name] != value for name, value in content_of(task["title"]).items()):
        found.append("content-untrue")
    return found
