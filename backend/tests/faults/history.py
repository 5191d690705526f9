"""The journals of one family, read back: every intention with its attempts, and everything that was seen.

An intention (one `mark`) is *acked* when an attempt was answered that it is done, *unknown* when an attempt may have
done it, *failed* when every attempt was answered that nothing was done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

CHANGES: Final = frozenset({"patch", "replace"})
BARRED: Final = frozenset({"foreign", "foreign-read", "reuse"})
"""What must not succeed: another person's task, and another request under a key that was used."""


@dataclass(slots=True)
class Intention:
    """`first` is when it was first sent, `acked` when it was first acknowledged (None: never)."""

    mark: str
    do: str
    client: str
    user: str
    task: str | None
    first: float
    key: str | None = None
    base: int | None = None
    tag: str | None = None
    acked: float | None = None
    version: int | None = None
    etag: str | None = None
    unknown: bool = False
    last: float = 0.0
    told: set[str] = field(default_factory=set)
    """The ids of tasks that acknowledgements named: more than one is too many."""

    @property
    def failed(self) -> bool:
        return self.acked is None and not self.unknown


@dataclass(slots=True)
class Sight:
    """A task as somebody saw it between `asked` and `told`: `version` None says that it was not there."""

    client: str
    user: str
    task: str
    asked: float
    told: float
    version: int | None
    mark: str | None


@dataclass(slots=True)
class Refusal:
    """A condition that was refused (412), or a task that was said not to be there (404), in answer to a write."""

    intention: Intention
    status: int
    asked: float
    told: float


class Ended(NamedTuple):
    """An attempt's times, what it was for and how it ended. `forgiven`: an idle connection was closed as the
    request came, or the client itself had hung up."""

    asked: float
    told: float
    do: str
    kind: str
    status: int
    forgiven: bool


@dataclass
class History:
    """What `read` found. `breaches` are words about single answers, each with where it stands."""

    intentions: dict[str, Intention] = field(default_factory=dict)
    sights: list[Sight] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    lists: list[tuple[str, str, float, float, dict[str, tuple[str, int]]]] = field(default_factory=list)
    breaches: list[tuple[str, str]] = field(default_factory=list)
    barred: dict[str, str] = field(default_factory=dict)
    """Marks that must never be stored, and what was tried with each."""
    ended: list[Ended] = field(default_factory=list)
    users: set[str] = field(default_factory=set)


def lines(text: Iterable[str]) -> Iterator[dict[str, Any]]:
    """A last line that was not finished is none: whoever was killed could not finish it."""
    for line in text:
        if line.endswith("\n"):
            yield json.loads(line)


def read(name: str, journal: Iterable[dict[str, Any]], into: History) -> None:
    """Adds the journal of the client `name`."""
    open_attempts: dict[int, dict[str, Any]] = {}
    for line in journal:
        event = line["e"]
        if event == "invoke":
            open_attempts[line["n"]] = line
            into.users.add(line["user"])
            _intend(name, line, into)
        else:
            asked = open_attempts.pop(line["n"])
            _ended(name, asked, line, into)
    for asked in open_attempts.values():
        # Nobody was there any more to hear the answer.
        _ended(name, asked, {"at": float("inf"), "e": "unknown", "status": 0}, into)


def _intend(name: str, line: dict[str, Any], into: History) -> None:
    mark = line.get("mark")
    if mark is None or line["do"] == "replay":
        return
    if line["do"] in BARRED:
        into.barred[mark] = line["do"]
        return
    known = into.intentions.get(mark)
    if known is None:
        into.intentions[mark] = Intention(
            mark, line["do"], name, line["user"], line.get("task"), line["at"], line.get("key"), line.get("base"),
            line.get("if"),
        )  # fmt: skip


def _ended(name: str, asked: dict[str, Any], told: dict[str, Any], into: History) -> None:
    do, kind, status = asked["do"], told["e"], told.get("status", 0)
    forgiven = bool(told.get("idle") or told.get("left"))
    into.ended.append(Ended(asked["at"], told["at"], do, kind, status, forgiven))
    where = f"{name}.{asked['n']} {do} at {asked['at']:.3f}"
    into.breaches += [(word, where) for word in told.get("wrong", ())]
    if told.get("late"):
        into.breaches.append(("no-answer-at-all", where))
    if do in ("foreign", "foreign-read") and kind == "ok":
        into.breaches.append(("foreign-task-reached", where))
    if do == "reuse" and kind == "ok":
        into.breaches.append(("key-taken-for-another-request", where))
    if do == "read":
        _saw(name, asked, told, into)
    elif do == "list" and kind == "ok":
        seen = {task: (mark, version) for task, mark, version in told["tasks"]}
        if told["whole"]:
            into.lists.append((name, asked["user"], asked["at"], told["at"], seen))
        for task, (mark, version) in seen.items():
            into.sights.append(Sight(name, asked["user"], task, asked["at"], told["at"], version, mark))
    intention = into.intentions.get(asked.get("mark", ""))
    if intention is not None and do not in BARRED and do != "read":
        _weigh(name, intention, asked, told, into)


def _saw(name: str, asked: dict[str, Any], told: dict[str, Any], into: History) -> None:
    status = told.get("status", 0)
    if status == 200:
        version, mark = told["version"], told["mark"]
    elif status == 304:
        version, mark = asked["known"], None
    elif status == 404:
        version, mark = None, None
    else:
        return
    into.sights.append(Sight(name, asked["user"], asked["task"], asked["at"], told["at"], version, mark))


def _weigh(
    name: str, intention: Intention, asked: dict[str, Any], told: dict[str, Any], into: History
) -> None:
    kind, status = told["e"], told.get("status", 0)
    if kind == "unknown":
        intention.unknown = True
    elif kind == "ok":
        if "task" in told:
            intention.told.add(told["task"])
            if told["mark"] != intention.mark:
                into.breaches.append(("answer-to-another-request", f"{name}.{asked['n']}"))
        for part, mark, version in told.get("tasks", ()):
            _part(intention, part, mark, version, asked, told, into)
        if intention.acked is None or told["at"] < intention.acked:
            intention.acked = told["at"]
        if asked["do"] != "replay":
            intention.last = max(intention.last, asked["at"])
        if intention.task is None:
            intention.task = told.get("task")
        if intention.version is None:
            intention.version, intention.etag = told.get("version"), told.get("etag")
        elif intention.do == "create" and told.get("etag") != intention.etag:
            into.breaches.append(("another-answer-to-the-same-key", f"{name}.{asked['n']}"))
    elif status in (404, 412):
        into.refusals.append(Refusal(intention, status, asked["at"], told["at"]))


def _part(
    whole: Intention,
    task: str,
    mark: str,
    version: int,
    asked: dict[str, Any],
    told: dict[str, Any],
    into: History,
) -> None:
    """A task that a batch has made: an intention of its own, that shares the batch's fate."""
    part = into.intentions.get(mark)
    if part is None:
        part = Intention(mark, "create", whole.client, whole.user, task, whole.first)
        into.intentions[mark] = part
    part.told.add(task)
    part.version = version
    part.acked = told["at"] if part.acked is None else min(part.acked, told["at"])
