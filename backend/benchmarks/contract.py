"""What every server has to get right before its speed is worth anything: status, shape and content of each answer."""

from __future__ import annotations

import http.client
import json
import random
import secrets
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final
from urllib.parse import urlencode
from uuid import UUID

from src.embedded.server import EmbeddedPostgres

from .data import Data, rows_of
from .load import COUNTED
from .operations import BATCH, DESCRIPTION, OPERATIONS, TITLE, later
from .servers import Running

FIELDS: Final = {
    "id", "user_id", "title", "description", "is_completed", "version", "created_at", "updated_at",
}  # fmt: skip


class Broken(Exception):
    """A server does not do what the others do."""


def check(running: Running, postgres: EmbeddedPostgres, data: Data) -> int:
    """Returns how many answers were looked at. Raises `Broken`."""
    talk = _Talk(running)
    owner, other = list(data.tasks)[3], list(data.tasks)[4]
    stored = rows_of(postgres, running.database, owner)

    talk.expect(200, "GET", "/livez")
    shown = talk.expect(200, "GET", f"/v1/tasks/{stored[7]['id']}", owner)
    _same(shown, stored[7])
    talk.expect(404, "GET", f"/v1/tasks/{stored[7]['id']}", other)
    talk.expect(404, "GET", f"/v1/tasks/{UUID(int=7)}", owner)

    page = talk.expect(200, "GET", "/v1/tasks?limit=50", owner)["items"]
    _same_page(page, stored[:50])
    heavy = next(iter(data.heavy))
    before, cursor = 3_000, None
    if running.speech.paging == "cursor":
        for seen in range(0, before, 200):
            more = f"&cursor={cursor}" if seen else ""
            cursor = talk.expect(200, "GET", f"/v1/tasks?limit=200{more}", heavy)["next_cursor"]
    words = urlencode(later(running.speech.paging, data.heavy[heavy], before, cursor))
    deep = talk.expect(200, "GET", f"/v1/tasks?{words}", heavy)["items"]
    _same_page(deep, rows_of(postgres, running.database, heavy)[before : before + 50])

    made = talk.expect(201, "POST", "/v1/tasks", owner, {"title": TITLE, "description": DESCRIPTION})
    wanted = {"title": TITLE, "description": DESCRIPTION, "is_completed": False, "version": 1}
    _holds(made, {**wanted, "user_id": str(owner)})
    _same(made, rows_of(postgres, running.database, owner)[0])
    _same_page([talk.expect(200, "GET", f"/v1/tasks/{made['id']}", owner)], [made])

    changed = talk.expect(200, "PATCH", f"/v1/tasks/{made['id']}", owner, {"title": "Other"})
    _holds(changed, {**wanted, "title": "Other", "version": 2, "id": made["id"]})
    if _moment(changed["updated_at"]) <= _moment(made["updated_at"]):
        raise Broken("a change leaves updated_at as it was")
    _same(changed, rows_of(postgres, running.database, owner)[0])
    talk.expect(404, "PATCH", f"/v1/tasks/{made['id']}", other, {"title": "Other"})

    ids = [f"01a1{number:04x}-0000-7000-8000-{secrets.token_hex(6)}" for number in range(BATCH)]
    operations = [
        {"op": "create", "id": task_id, "task": {"title": f"{TITLE} {task_id}", "description": DESCRIPTION}}
        for task_id in ids
    ]
    results = talk.expect(200, "POST", "/v1/tasks/batch", owner, {"operations": operations})["results"]
    if [result["id"] for result in results] != ids:
        raise Broken("a batch does not answer for every task in its order")
    kept = {str(row["id"]): row for row in rows_of(postgres, running.database, owner)}
    for result in results:
        _same(result["task"], kept[result["id"]])

    if running.server.validates:
        talk.expect(range(400, 423), "POST", "/v1/tasks", owner, {"title": ""})
        talk.expect(range(400, 423), "POST", "/v1/tasks", owner, {"title": "x" * 256})
        talk.expect(range(400, 423), "POST", "/v1/tasks", owner, {"title": 7})
        talk.expect(range(400, 423), "PATCH", f"/v1/tasks/{made['id']}", owner, {"title": ""})
        talk.expect(range(400, 423), "GET", "/v1/tasks/not-an-id", owner)
        talk.expect(range(400, 423), "GET", "/v1/tasks?limit=many", owner)
        talk.expect(range(400, 423), "POST", "/v1/tasks/batch", owner, {"operations": [{"op": "create"}]})
    _as_asked(running, data)
    return talk.count


def _as_asked(running: Running, data: Data) -> None:
    """The very requests that the load sends, one of each operation."""
    for operation in OPERATIONS.values():
        request = operation.requests(data, running.speech, running.port, random.Random(1))[0]
        request = request.replace(COUNTED, secrets.token_hex(6).encode())
        head, _, body = request.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        method, path, _ = first.split(" ")
        headers = dict(line.split(": ", 1) for line in lines if not line.startswith("Host"))
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        connection.request(method, path, body or None, headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        if answer.status != operation.status or not answer.getheader("content-length"):
            raise Broken(f"{operation.title}: {answer.status} {text[:300]!r}")


class _Talk:
    def __init__(self, running: Running) -> None:
        self._running = running
        self.count = 0

    def expect(
        self, status: int | range, method: str, path: str, owner: UUID | None = None, body: Any = None
    ) -> Any:
        """The JSON of the answer, if it has this status. Raises `Broken`."""
        headers = {} if owner is None else self._running.speech.identify(owner)
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            headers = {**headers, "Content-Type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", self._running.port, timeout=30)
        connection.request(method, path, content, headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        self.count += 1
        right = answer.status in status if isinstance(status, range) else answer.status == status
        if not right:
            raise Broken(f"{method} {path}: {answer.status}, not {status}: {text[:500]!r}")
        return json.loads(text) if answer.status < 400 else None


def _moment(value: Any) -> datetime:
    return value if isinstance(value, datetime) else datetime.fromisoformat(value)


def _same(shown: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    if set(shown) != FIELDS:
        raise Broken(f"a task shows {sorted(shown)}")
    for name in FIELDS - {"created_at", "updated_at"}:
        value = stored[name]
        if shown[name] != (str(value) if isinstance(value, UUID) else value):
            raise Broken(f"{name} of a task is shown as {shown[name]!r}, stored as {value!r}")
    for name in ("created_at", "updated_at"):
        # JavaScript's dates know milliseconds only.
        if abs(_moment(shown[name]) - _moment(stored[name])) >= timedelta(milliseconds=1):
            raise Broken(f"{name} of a task is shown as {shown[name]!r}, stored as {stored[name]!r}")


def _same_page(shown: list[Any], stored: list[Any]) -> None:
    if len(shown) != len(stored):
        raise Broken(f"a page has {len(shown)} tasks, not {len(stored)}")
    for one, other in zip(shown, stored, strict=True):
        _same(one, other)


def _holds(shown: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = {name: shown.get(name) for name, value in wanted.items() if shown.get(name) != value}
    if different:
        raise Broken(f"a task shows {different}, not {dict(wanted)}")
