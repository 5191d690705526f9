"""Many operations on an owner's tasks as one: all are done, in their order, or none is.

Three round trips between BEGIN and COMMIT, however many operations there are: the first reads and holds every
task they name, and keeps the Idempotency-Key; then the operations are gone through in Python, each meeting what
the ones before it left; the second writes what has come out of it.

New tasks alone, without a key, need none of that: one statement makes them all, or none where an id is taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import (
    CTE,
    Boolean,
    Integer,
    Select,
    SmallInteger,
    Text,
    Uuid,
    bindparam,
    cast,
    func,
    literal_column,
    null,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col, delete

from ..errors import BatchRefused, Conflict, InputFault, InternalFault, KeyReused, OutcomeUnknown
from ..models import KeptAnswer, Task, TaskCreate, TaskOperation, TaskRead
from ..models.rendering import as_array, as_json_string, fields, form, written_timestamp
from .idempotency import IdempotencyKey, claim, key_values, swept
from .ownership import Author, me_making, me_writing, mine, revoked_is_unauthenticated, theirs
from .statements import Statement
from .task_rows import ANY_VERSION, NOBODYS, TASK_KEY, after, array_rows, etag_of, instant

if TYPE_CHECKING:
    from .connections import Connection
    from .database import Database

_EXISTS: Final = "There is a task of this id."
_CHANGED: Final = "The task is of another version."
_GIVEN: Final = ("title", "description", "is_completed")
_COLUMNS: Final = ("id", *_GIVEN, "version")
_TYPES: Final = (Uuid, Text, Text, Boolean, Integer)
_FORM: Final = form(TaskRead)

_Shown = dict[str, Any]
"""A task by the names of `TaskRead`, its values as JSON has them."""


class Batched(NamedTuple):
    """The JSON of `TaskBatchRead`; `replayed` says that an earlier request with the same key was answered so."""

    body: str
    replayed: bool


async def batch(
    db: Database,
    author: Author,
    operations: Sequence[TaskOperation],
    *,
    idempotency: IdempotencyKey | None = None,
) -> Batched:
    """Does all of `operations` or raises `BatchRefused`, whose faults name each that cannot be done by its index.

    An operation meets the tasks as the operations before it leave them. With a key that came before, the answer
    that was given then; `KeyReused` when it came with another request.
    """

    async def work(connection: Connection) -> Batched:
        return await _run(connection, author, operations, idempotency)

    try:
        with revoked_is_unauthenticated():
            if idempotency is None and (made := await _make(db, author, operations)) is not None:
                return made
            return await _unless_made_meanwhile(db, author, work)
    except OutcomeUnknown as unknown:
        if idempotency is None:
            raise
        raise OutcomeUnknown(unknown.reason, retry_after_seconds=1) from None


async def _make(db: Database, author: Author, operations: Sequence[TaskOperation]) -> Batched | None:
    """New tasks and nothing else, each under an id of its own; None, and nothing written, for any other batch."""
    new = {str(operation.id): operation.task for operation in operations if operation.op == "create"}
    if len(new) < len(operations):
        return None
    ids = sorted(new)
    given = [new[task_id] for task_id in ids]
    values: dict[str, Any] = {f"made_{name}": [getattr(task, name) for task in given] for name in _GIVEN}
    values |= {"owner": author.user_id, "epoch": author.epoch, "email": author.email, "made_id": ids}
    try:
        now = await db.value(MAKE, **values)
    except Conflict as conflict:
        if conflict.constraint != TASK_KEY:
            raise
        # Which ids are taken is for the other way to say.
        return None
    owner = str(author.user_id)
    results = [
        _result("create", task_id, _made(task_id, owner, task, 1, now)) for task_id, task in new.items()
    ]
    return Batched(_answer(results), replayed=False)


async def _unless_made_meanwhile(db: Database, author: Author, work: Any) -> Batched:
    """A task that another transaction made after this one had looked is met as a task at the next attempt."""
    for _ in range(3):
        try:
            made: Batched = await db.atomically(work, owner=author.user_id, name="tasks.batch")
        except Conflict as conflict:
            if conflict.constraint != TASK_KEY:
                raise
            met = conflict
        else:
            return made
    raise met


async def _run(
    connection: Connection,
    author: Author,
    operations: Sequence[TaskOperation],
    idempotency: IdempotencyKey | None,
) -> Batched:
    values: dict[str, Any] = {
        "owner": author.user_id,
        "epoch": author.epoch,
        "email": author.email,
        "wanted_id": sorted({str(operation.id) for operation in operations}),
    }
    if idempotency is not None:
        values |= key_values(idempotency)
    look = LOOK if idempotency is None else LOOK_ONCE
    row = await connection.fetchrow(look.sql, *look.arguments(values))
    assert row is not None
    now, held, response, same = row
    if not same:
        raise KeyReused
    if response is not None:
        return Batched(response, replayed=True)
    account = _Account(now, {row["id"]: row for row in json.loads(held)}, str(author.user_id))
    body = account.go_through(operations)
    written = {"response": body, **account.changes(), **values}
    write = WRITE if idempotency is None else WRITE_ONCE
    done = await connection.fetchval(write.sql, *write.arguments(written))
    if done != account.written:
        raise InternalFault("batch-incomplete")
    return Batched(body, replayed=False)


# What the operations come to


@dataclass
class _Account:
    """The tasks that a batch names, as JSON shows them: what they were, and what they are by now."""

    now: str
    before: dict[str, _Shown]
    owner: str
    after: dict[str, _Shown] = field(init=False)
    last_versions: dict[str, int] = field(init=False, default_factory=dict)
    written: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.after = dict(self.before)

    def go_through(self, operations: Iterable[TaskOperation]) -> str:
        """The answer. Raises `BatchRefused` with every operation that cannot be done."""
        faults: list[InputFault] = []
        results: list[str] = []
        for index, operation in enumerate(operations):
            task_id = str(operation.id)
            fault = self._do(operation, task_id)
            if fault is not None:
                where, why = fault
                faults.append(InputFault(f"/operations/{index}/{where}", why))
            elif not faults:
                results.append(_result(operation.op, task_id, self.after.get(task_id)))
        if faults:
            raise BatchRefused(faults=faults)
        return _answer(results)

    def _do(self, operation: TaskOperation, task_id: str) -> tuple[str, str] | None:
        task = self.after.get(task_id)
        if operation.op == "create":
            if task is not None:
                return "id", _EXISTS
            # Made, deleted and made again within one microsecond: the version goes on, so that no tag is there twice.
            version = self.last_versions.get(task_id, 0) + 1
            self.after[task_id] = _made(task_id, self.owner, operation.task, version, self.now)
            return None
        if task is None:
            return "id", NOBODYS
        if operation.if_match not in (None, ANY_VERSION) and operation.if_match != etag_of(_json(task)):
            return "if_match", _CHANGED
        if operation.op == "delete":
            if task["updated_at"] == self.now:
                self.last_versions[task_id] = task["version"]
            del self.after[task_id]
        elif changes := operation.task.changes():
            changes |= {"version": task["version"] + 1, "updated_at": self.now}
            self.after[task_id] = task | changes
        return None

    def changes(self) -> dict[str, Any]:
        """The parameters of the writing statement, in the order of ids: then no two batches wait for each other."""
        made, changed, gone = [], [], []
        for task_id in sorted(self.before.keys() | self.after.keys()):
            before, after = self.before.get(task_id), self.after.get(task_id)
            if after is None:
                gone.append(task_id)
            elif before is None:
                made.append(after)
            elif after != before:
                changed.append(after)
        self.written = len(made) + len(changed) + len(gone)
        values = {f"made_{name}": [task[name] for task in made] for name in _COLUMNS}
        values |= {f"changed_{name}": [task[name] for task in changed] for name in (*_COLUMNS, "created_at")}
        return values | {"gone_id": gone}


def _made(task_id: str, owner: str, given: TaskCreate, version: int, now: str) -> _Shown:
    return {
        "id": task_id,
        "user_id": owner,
        "title": given.title,
        "description": given.description,
        "is_completed": given.is_completed,
        "version": version,
        "created_at": now,
        "updated_at": now,
    }


def _result(op: str, task_id: str, task: _Shown | None) -> str:
    if task is None:
        return f'{{"op":"{op}","id":"{task_id}","etag":null,"task":null}}'
    body = _json(task)
    return f'{{"op":"{op}","id":"{task_id}","etag":"{etag_of(body)}","task":{body}}}'


def _answer(results: list[str]) -> str:
    return '{"results":[' + ",".join(results) + "]}"


def _json(task: _Shown) -> str:
    """As PostgreSQL writes it."""
    description = task["description"]
    return _FORM % (
        task["id"],
        task["user_id"],
        as_json_string(task["title"]),
        "null" if description is None else as_json_string(description),
        "true" if task["is_completed"] else "false",
        task["version"],
        task["created_at"],
        task["updated_at"],
    )


# The statements


def _each(who: CTE, ids: str, columns: Sequence[Any], *, hold: bool = False) -> Select[Any]:
    """`columns` of each task that the parameter `ids` names and its owner has, in the order of the parameter.

    One after the other by the key (what is LATERAL and has a LIMIT is done so): a condition over all ids would be
    met by reading everything that the owner has, where the planner takes that for little.
    """
    named = array_rows(ids, ("id",), (Uuid,))
    one = (
        select(*columns)
        .where(mine(who, Task.user_id), col(Task.id) == named.c.id)
        .correlate(named)
        .limit(literal_column("1"))
    )
    task = (one.with_for_update() if hold else one).lateral("task")
    return select(*task.c).select_from(named.join(task, true()))


def _make_all() -> Any:
    who = me_making()
    rows = array_rows("made", _COLUMNS[:-1], _TYPES[:-1])
    new = select(who.c.v, *(rows.c[name] for name in _COLUMNS[:-1]))
    made = insert(Task).from_select(["user_id", *_COLUMNS[:-1]], new, include_defaults=False)
    written = made.returning(col(Task.user_id)).cte("made")
    return (
        select(written_timestamp(func.now()).label("now"))
        .where(theirs(who, written))
        .limit(literal_column("1"))
    )


def _look(once: bool) -> Any:
    who = me_making(swept if once else None)
    held = _each(who, "wanted", fields(TaskRead, Task), hold=True).cte("held").prefix_with("MATERIALIZED")
    now = written_timestamp(func.now())
    rows = as_array(held).scalar_subquery()
    if not once:
        nothing = cast(null(), Text).label("response")
        found = select(now.label("now"), rows.label("held"), nothing, literal_column("true").label("same"))
        return after(who, found)
    nobody = cast(null(), Uuid).label("task_id"), cast(null(), Text), cast(null(), SmallInteger)
    kept = claim(select(who.c.v, *nobody))
    # The key first: whoever repeats a batch waits here, and not for the tasks.
    found = select(now.label("now"), rows.label("held"), kept.c.response, kept.c.same).select_from(kept)
    return after(who, found)


def _write(once: bool) -> Any:
    # Once more, because it may have waited for others since it looked.
    who = me_writing()
    rows = array_rows("made", _COLUMNS, _TYPES)
    new = select(who.c.v, *(rows.c[name] for name in _COLUMNS))
    made = (
        insert(Task).from_select(["user_id", *_COLUMNS], new, include_defaults=False).returning(col(Task.id))
    )
    rows = array_rows("changed", (*_COLUMNS, "created_at"), (*_TYPES, Text))
    # Written as an insertion that meets what is there: it goes by the key, row for row, however many rows the
    # owner has. They are all there, because this transaction holds them.
    given = [*_COLUMNS, "created_at", "updated_at"]
    new = select(who.c.v, *(rows.c[name] for name in _COLUMNS), instant(rows.c.created_at), func.now())
    meeting = insert(Task).from_select(["user_id", *given], new, include_defaults=False)
    changed = meeting.on_conflict_do_update(
        index_elements=["user_id", "id"], set_={name: meeting.excluded[name] for name in given[1:]}
    )
    place: Any = literal_column("tasks.ctid")
    places = func.array(_each(who, "gone", [place.label("place")]).scalar_subquery())
    gone = delete(Task).where(mine(who, Task.user_id), place == func.any(places))
    made_ids = made.cte("made")
    changed_ids = changed.returning(col(Task.id)).cte("changed")
    gone_ids = gone.returning(col(Task.id)).cte("gone")
    done = union_all(select(made_ids.c.id), select(changed_ids.c.id), select(gone_ids.c.id)).subquery("done")
    answer = after(who, select(func.count().label("done")).select_from(done))
    if not once:
        return answer
    mine_and_this = mine(who, KeptAnswer.user_id), col(KeptAnswer.key) == bindparam("key", type_=Text)
    body = cast(bindparam("response", type_=Text), Text)
    kept = update(KeptAnswer).where(*mine_and_this).values(response=body, status=literal_column("200"))
    return answer.add_cte(kept.returning(col(KeptAnswer.key)).cte("kept"))


MAKE = Statement("tasks.batch_make", _make_all, repeatable=False)
LOOK = Statement("tasks.batch_look", lambda: _look(once=False), repeatable=False)
LOOK_ONCE = Statement("tasks.batch_look_once", lambda: _look(once=True), repeatable=False)
WRITE = Statement("tasks.batch_write", lambda: _write(once=False), repeatable=False)
WRITE_ONCE = Statement("tasks.batch_write_once", lambda: _write(once=True), repeatable=False)
