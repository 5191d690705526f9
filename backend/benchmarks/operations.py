"""What is asked of every server, and in which words.

Requests are made before the load begins: many users, many tasks, a token each. Where servers differ is in two words
only: who asks (`Authorization`, or `X-User-Id` at a server that has no identity) and how a list goes on.
"""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import urlencode
from uuid import UUID

from .data import Data, Task
from .load import COUNTED

Paging = Literal["cursor", "keyset", "offset"]
"""How a list goes on: by an opaque cursor, from a task on, or after so many."""

REQUESTS: Final = 20_000
DEEPEST: Final = range(3_000, 4_900, 10)
"""How many tasks of a heavy user lie before a deep page."""

TITLE: Final = "Water the plants"
DESCRIPTION: Final = (
    "The ferns in the hall want little, the basil on the balcony a lot; look under the leaves too."
)
BATCH: Final = 100


@dataclass(frozen=True)
class Speech:
    """How one server is spoken to: the headers that say who asks, and a path with parameters for a later page."""

    identify: Callable[[UUID], dict[str, str]]
    paging: Paging
    once: bool
    """Whether a creation carries an Idempotency-Key."""


@dataclass(frozen=True)
class Operation:
    slug: str
    title: str
    status: int
    requests: Callable[[Data, Speech, int, random.Random], list[bytes]]
    """Of a server on this port."""


def request(
    port: int, method: str, path: str, headers: dict[str, str] | None = None, body: Any = None
) -> bytes:
    """A whole HTTP/1.1 request. `body` becomes JSON."""
    lines = [
        f"{method} {path} HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "User-Agent: groundwork-benchmark",
        "Accept: */*",
    ]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    content = b""
    if body is not None:
        content = json.dumps(body, separators=(",", ":")).encode()
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, "", ""]).encode() + content


def one_of(tasks: dict[UUID, list[Task]], chance: random.Random) -> Task:
    return chance.choice(tasks[chance.choice(list(tasks))])


def some(tasks: dict[UUID, list[Task]], count: int, chance: random.Random) -> list[Task]:
    owners = list(tasks)
    return [chance.choice(tasks[chance.choice(owners)]) for _ in range(count)]


def _health(data: Data, speech: Speech, port: int, chance: random.Random) -> list[bytes]:
    return [request(port, "GET", "/livez")]


def _read(data: Data, speech: Speech, port: int, chance: random.Random) -> list[bytes]:
    return [
        request(port, "GET", f"/v1/tasks/{task.id}", speech.identify(task.user_id))
        for task in some(data.tasks, REQUESTS, chance)
    ]


def _list(data: Data, speech: Speech, port: int, chance: random.Random) -> list[bytes]:
    return [request(port, "GET", "/v1/tasks?limit=50", speech.identify(owner)) for owner in data.tasks]


def _deep(data: Data, speech: Speech, port: int, chance: random.Random) -> list[bytes]:
    made = []
    for owner, tasks in data.heavy.items():
        cursors = _cursors(port, speech, owner) if speech.paging == "cursor" else {}
        for before in cursors or DEEPEST:
            path = f"/v1/tasks?{urlencode(later(speech.paging, tasks, before, cursors.get(before)))}"
            made.append(request(port, "GET", path, speech.identify(owner)))
    return made


def later(paging: Paging, tasks: list[Task], before: int, cursor: str | None) -> dict[str, Any]:
    """The parameters of the page that begins after the `before` newest tasks."""
    if paging == "cursor":
        assert cursor is not None
        return {"limit": 50, "cursor": cursor}
    if paging == "offset":
        return {"limit": 50, "skip": before}
    last = tasks[before - 1]
    return {"limit": 50, "before": last.created_at, "before_id": last.id}


def _cursors(port: int, speech: Speech, owner: UUID) -> dict[int, str]:
    """Cursors of deep pages, by how many tasks lie before: found as a client finds them, page by page."""
    found: dict[int, str] = {}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    seen, cursor = 0, ""
    while seen < DEEPEST.stop:
        size = 200 if seen < DEEPEST.start else 10
        more = f"&cursor={cursor}" if cursor else ""
        connection.request("GET", f"/v1/tasks?limit={size}{more}", headers=speech.identify(owner))
        answer = json.loads(connection.getresponse().read())
        seen, cursor = seen + size, answer["next_cursor"]
        if seen in DEEPEST:
            found[seen] = cursor
    connection.close()
    return found


def _create(data: Data, speech: Speech, port: int, chance: random.Random) -> list[bytes]:
    key = {"Idempotency-Key": f"benchmark-{COUNTED.decode()}"} if speech.once else {}
    body = {"title": TITLE, "description": DESCRIPTION}
    return [
        request(port, "POST", "/v1/tasks", {**speech.identify(owner), **key}, body) for owner in data.tasks
    ]


def _update(data: Data, speech: Speech, port: int, chance: random.Random) -> list[bytes]:
    return [
        request(
            port,
            "PATCH",
            f"/v1/tasks/{task.id}",
            speech.identify(task.user_id),
            {"title": f"{TITLE} {number}"},
        )
        for number, task in enumerate(some(data.tasks, REQUESTS, chance))
    ]


def _batch(data: Data, speech: Speech, port: int, chance: random.Random) -> list[bytes]:
    operations = [
        {
            "op": "create",
            "id": f"01a1{index:04x}-0000-7000-8000-{COUNTED.decode()}",
            "task": {"title": f"{TITLE} {index}", "description": DESCRIPTION},
        }
        for index in range(BATCH)
    ]
    body = {"operations": operations}
    return [
        request(port, "POST", "/v1/tasks/batch", speech.identify(owner), body)
        for owner in list(data.tasks)[:200]
    ]


OPERATIONS: Final = {
    operation.slug: operation
    for operation in (
        Operation("health", "health", 200, _health),
        Operation("read", "read one", 200, _read),
        Operation("list", "list 50", 200, _list),
        Operation("deep", "list 50 deep", 200, _deep),
        Operation("create", "create", 201, _create),
        Operation("update", "update", 200, _update),
        Operation("batch", "batch of 100", 200, _batch),
    )
}
JUDGED: Final = ("read", "list", "create")
"""The operations that targets are set for."""
