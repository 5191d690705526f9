"""What every statement about tasks is made of: who asks, which row, how it is written and by which tag it goes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, Self
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    CTE,
    ColumnElement,
    DateTime,
    Select,
    Text,
    Uuid,
    and_,
    bindparam,
    cast,
    column,
    exists,
    false,
    func,
    literal_column,
    or_,
    select,
    true,
)
from sqlmodel import col

from ..errors import NotFound, PreconditionFailed
from ..models import Task, TaskRead
from ..models.rendering import written
from .ownership import mine

NOBODYS: Final = "There is no such task."

TASK_KEY: Final = "pk_tasks"
"""What says of a Conflict that the owner has a task of this id."""

ANY_VERSION: Final = "*"
"""As `if_match`: any version will do, as long as there is one."""

_TAG_LENGTH: Final = 32


class Rendered(NamedTuple):
    """A task's JSON (`TaskRead`), and its entity tag without the quotes that HTTP puts around it."""

    body: str
    etag: str

    @classmethod
    def of(cls, body: str) -> Self:
        return cls(body, etag_of(body))


class Created(NamedTuple):
    """A new task; `replayed` says that an earlier request with the same key had made it."""

    body: str
    etag: str
    task_id: UUID
    replayed: bool = False


class Put(NamedTuple):
    """`created` is False when an earlier version was replaced."""

    body: str
    etag: str
    created: bool


def etag_of(body: str) -> str:
    """The entity tag of a task: the first 128 bits of the SHA-256 of its JSON, so two bodies never share one.

    What an import brings, and what was deleted and put again, is told apart by the microseconds in it. Whoever
    carries the body does this, and PostgreSQL only where it has to compare: it takes PostgreSQL a third of a read.
    """
    return hashlib.sha256(body.encode()).hexdigest()[:_TAG_LENGTH]


def _etag(json: ColumnElement[str]) -> ColumnElement[str]:
    """As `etag_of`, in PostgreSQL."""
    content = func.convert_to(json, literal_column("'UTF8'"))
    digest = func.encode(func.sha256(content), literal_column("'hex'"))
    return func.left(digest, literal_column(str(_TAG_LENGTH)))


def this(who: CTE) -> ColumnElement[bool]:
    """The owner's task whose id is the parameter `id`."""
    return and_(mine(who, Task.user_id), col(Task.id) == bindparam("id", type_=Uuid))


def as_json(source: Any = Task) -> ColumnElement[str]:
    """The JSON of `TaskRead`, as the column `json`; `source` has the task's columns by name."""
    return written(TaskRead, source).label("json")


def locked(who: CTE) -> CTE:
    """The owner's task whose id is `id`, in the version that the statement is about: the newest, and held.

    Reading the version beside the UPDATE would compare the statement's own snapshot: whoever waited for another
    write and lost would be told the version they asked for, and a deleted task would look like a changed one.
    """
    held = select(col(Task.user_id), col(Task.id), _etag(written(TaskRead, Task)).label("etag"))
    return held.where(this(who)).with_for_update().cte("held").prefix_with("MATERIALIZED")


def matches(held: CTE) -> ColumnElement[bool]:
    """The row being written is the one in `held`, and that has the tag that the parameter `if_match` names."""
    wanted = cast(bindparam("if_match", type_=Text), Text)
    return and_(
        col(Task.user_id) == held.c.user_id,
        col(Task.id) == held.c.id,
        or_(held.c.etag == wanted, wanted == literal_column(f"'{ANY_VERSION}'", Text)),
    )


def instant(written: ColumnElement[str]) -> ColumnElement[datetime]:
    """A timestamp out of its text.

    The driver takes the first and the last moment that Python knows for minus and plus infinity.
    """
    return cast(cast(written, Text), DateTime(timezone=True))


def array_rows(kind: str, names: Sequence[str], types: Sequence[Any]) -> Any:
    """Rows out of the parameters `<kind>_<name>`, an array for each column."""
    arrays = [
        cast(bindparam(f"{kind}_{name}", type_=ARRAY(of)), ARRAY(of))
        for name, of in zip(names, types, strict=True)
    ]
    columns = [column(name, of) for name, of in zip(names, types, strict=True)]
    return func.unnest(*arrays).table_valued(*columns, name=kind).render_derived()


def after(who: CTE, answer: Select[Any]) -> Select[Any]:
    """`answer`, not begun before `who` has set the owner, whichever way PostgreSQL plans the statement.

    A CTE runs when it is first asked for a row. What is LATERAL and cannot be flattened (OFFSET) comes after the
    row that it depends on; so nothing inside looks at a guarded table, or at its policy, too early.
    """
    guarded = answer.where(who.c.v.is_not(None)).correlate(who).offset(literal_column("0")).lateral("answer")
    return select(*guarded.c).select_from(who.join(guarded, true()))


def settled(who: CTE, done: CTE, held: CTE | None = None) -> Select[Any]:
    """One row in any case: the `json` of what was done, `refused` where it was of another version."""
    refused = false() if held is None else exists(select(held.c.id).correlate(None))
    one = select(literal_column("1").label("one")).subquery("one")
    given = select(done.c.json).subquery("given")
    answer = select(given.c.json, refused.label("refused"))
    return after(who, answer.select_from(one.outerjoin(given, true())))


def found(row: Any) -> Rendered:
    """The row of a statement that gives `json`. Raises `NotFound` when there is none."""
    if row is None:
        raise NotFound(NOBODYS)
    return Rendered.of(row[0])


def outcome(row: Any) -> Rendered:
    """The row of a `settled` statement. Raises `NotFound` or `PreconditionFailed`."""
    json, refused = row
    if json is not None:
        return Rendered.of(json)
    if refused:
        raise PreconditionFailed
    raise NotFound(NOBODYS)
