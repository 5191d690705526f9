"""Asking as one user, every attempt noted before it is sent and after it was answered: `Asker.attempt`."""

from __future__ import annotations

import json
from typing import Any, NamedTuple
from uuid import uuid4

from src.services.signing import SigningKeys

from .contract import BUSY, breaches, strange
from .journal import Journal
from .wire import Answer, Cut, Unsent, Wire

TASKS = "/v1/tasks"


class Person:
    """A user of a client's own, with what the client believes about their tasks: id to (etag, version)."""

    def __init__(self, keys: SigningKeys) -> None:
        self.id = str(uuid4())
        self.token = keys.mint(_uuid(self.id), None, 86_400)
        self.tasks: dict[str, tuple[str, int]] = {}
        self.made = 0
        self.keys = 0

    def next_key(self) -> str:
        """The same words for everybody: a key belongs to its user."""
        self.keys += 1
        return f"key-{self.keys}"


def _uuid(text: str) -> Any:
    from uuid import UUID

    return UUID(text)


class Outcome(NamedTuple):
    """How an attempt ended: `ok`, `fail` (nothing was done) or `unknown`; `task` is the body of a good answer."""

    kind: str
    status: int = 0
    task: Any = None
    etag: str = ""
    replayed: bool = False

    @property
    def ok(self) -> bool:
        return self.kind == "ok"


class Asker:
    """One client's voice: a connection, a journal, and a name that its request ids begin with."""

    def __init__(self, name: str, wire: Wire, journal: Journal) -> None:
        self.name = name
        self.wire = wire
        self.journal = journal
        self.marks = 0

    def new_mark(self) -> str:
        self.marks += 1
        return f"{self.name}-{self.marks}"

    async def attempt(
        self,
        do: str,
        person: Person,
        method: str,
        path: str = TASKS,
        *,
        body: Any = None,
        headers: str = "",
        hang_up_after: float | None = None,
        **facts: Any,
    ) -> Outcome:
        """Sends one request and notes how it ended. `facts` go into the journal's line; `key` also into a header."""
        key = facts.get("key")
        number = self.journal.invoke(do=do, user=person.id, **facts)
        request_id = f"{self.name}.{number}"
        request = _request(method, path, person.token, request_id, body, headers, key)
        try:
            answer = await self.wire.ask(request, hang_up_after=hang_up_after)
        except Unsent:
            self.journal.end(number, "fail", status=0)
            return Outcome("fail")
        except Cut as cut:
            more = {"late": True} if cut.late else {"idle": True} if cut.idle else {}
            self.journal.end(number, "unknown", status=0, **more, **({"left": 1} if hang_up_after else {}))
            return Outcome("unknown")
        return self._judge(number, do, person, answer, request_id, facts)

    def _judge(
        self, number: int, do: str, person: Person, answer: Answer, request_id: str, facts: dict[str, Any]
    ) -> Outcome:
        status, headers, body = answer
        wrong = breaches(do, answer, request_id, keyed="key" in facts)
        said: dict[str, Any] = {"status": status}
        found: Any = None
        if status in (200, 201):
            try:
                found = json.loads(body)
                wrong += _told(do, found, said, person, facts)
            except (ValueError, KeyError, TypeError):
                wrong.append("body-unreadable")
        etag = headers.get("etag", "").strip('"')
        if etag:
            said["etag"] = etag
        elif status in (200, 201) and do not in ("list", "batch"):
            wrong.append("no-etag")
        replayed = headers.get("idempotency-replayed") == "true"
        if replayed:
            said["replayed"] = 1
        if wrong:
            said["wrong"] = wrong
        kind = (
            "ok"
            if status < 400
            else "unknown"
            if status == 504 or (status not in BUSY and status >= 500)
            else "fail"
        )
        self.journal.end(number, kind, **said)
        return Outcome(kind, status, found, etag, replayed)

    def close(self) -> None:
        self.wire.close()
        self.journal.close()


def _told(do: str, found: Any, said: dict[str, Any], person: Person, facts: dict[str, Any]) -> list[str]:
    """Notes what was shown, and gives what is wrong with it."""
    wrong: list[str] = []
    if do == "list":
        said["tasks"] = [[task["id"], task["title"], task["version"]] for task in found["items"]]
        said["whole"] = found["next_cursor"] is None
        for task in found["items"]:
            wrong += strange(task, person.id)
    elif do == "batch":
        said["tasks"] = [
            [result["id"], result["task"]["title"], result["task"]["version"]] for result in found["results"]
        ]
        for result in found["results"]:
            wrong += strange(result["task"], person.id)
    else:
        said |= {"task": found["id"], "mark": found["title"], "version": found["version"]}
        wrong += strange(found, person.id, facts.get("task"))
    return sorted(set(wrong))


def _request(
    method: str, path: str, token: str, request_id: str, body: Any, headers: str, key: str | None
) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nhost: service\r\nauthorization: Bearer {token}\r\n"
    head += f"x-request-id: {request_id}\r\n"
    if content:
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n"
    if key is not None:
        head += f"idempotency-key: {key}\r\n"
    return f"{head}{headers}\r\n".encode() + content
