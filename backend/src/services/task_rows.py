"""What every statement about tasks is made of: who asks, which row, how it is written and by which tag it goes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    CTE,
    BigInteger,
    ColumnElement,
    DateTime,
    Select,
    Subquery,
    Text,
    Uuid,
    and_,
    bindparam,
    cast,
    column,
    exists,
    extract,
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
from ..models.rendering import fields
from .ownership import mine

NOBODYS: Final = "There is no such task."

ANY_VERSION: Final = "*"
"""As `if_match`: any version will do, as long as there is one."""


class Rendered(NamedTuple):
    """A task's JSON (`TaskRead`), and its entity tag without the quotes that HTTP puts around it."""

    body: str
    etag: str


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


def etag_of(task: Any) -> ColumnElement[str]:
    """The entity tag: the version, the microsecond of the last change, and the first 64 bits of a hash of the rest.

    The version alone would come again after a task was deleted and another put in its place, and both numbers after
    an import, which brings its own. `task` has the columns by name.
    """
    length = cast(func.char_length(task.title), Text)
    truth = cast(task.is_completed, Text)
    comma = literal_column("','", Text)
    content = func.concat_ws(comma, length, truth, _instant_of(task.created_at), task.title, task.description)
    digest = func.encode(
        func.sha256(func.convert_to(content, literal_column("'UTF8'"))), literal_column("'hex'")
    )
    return func.concat_ws(
        literal_column("'-'", Text),
        cast(task.version, Text),
        _instant_of(task.updated_at),
        func.left(digest, literal_column("16")),
    )


def _instant_of(moment: Any) -> ColumnElement[str]:
    microseconds = cast(extract("epoch", moment) * literal_column("1000000"), BigInteger)
    return func.to_hex(microseconds)


def this(who: CTE) -> ColumnElement[bool]:
    """The owner's task whose id is the parameter `id`."""
    return and_(mine(who, Task.user_id), col(Task.id) == bindparam("id", type_=Uuid))


def tagged(source: Any = Task) -> list[ColumnElement[Any]]:
    """The columns of `TaskRead` as they are written, and `etag`; `source` has them by name."""
    return [*fields(TaskRead, source), etag_of(source).label("etag")]


def locked(who: CTE) -> CTE:
    """The owner's task whose id is `id`, in the version that the statement is about: the newest, and held.

    Reading the version beside the UPDATE would compare the statement's own snapshot: whoever waited for another
    write and lost would be told the version they asked for, and a deleted task would look like a changed one.
    """
    held = select(col(Task.user_id), col(Task.id), etag_of(Task).label("etag"))
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


def shown(rows: CTE | Subquery) -> Select[Any]:
    """The columns `json` and `etag` of `rows`, which hold `tagged()`."""
    columns = [rows.c[name] for name in TaskRead.model_fields]
    task = select(*columns).correlate(rows).lateral("task")
    json = cast(func.row_to_json(task.table_valued()), Text).label("json")
    return select(json, rows.c.etag).select_from(rows.join(task, true()))


def after(who: CTE, answer: Select[Any]) -> Select[Any]:
    """`answer`, not begun before `who` has set the owner, whichever way PostgreSQL plans the statement.

    A CTE runs when it is first asked for a row. What is LATERAL and cannot be flattened (OFFSET) comes after the
    row that it depends on; so nothing inside looks at a guarded table, or at its policy, too early.
    """
    guarded = answer.where(who.c.v.is_not(None)).correlate(who).offset(literal_column("0")).lateral("answer")
    return select(*guarded.c).select_from(who.join(guarded, true()))


def settled(who: CTE, written: CTE, held: CTE | None = None) -> Select[Any]:
    """One row in any case: `json` and `etag` of what was written, `refused` where it was of another version."""
    given = shown(written).subquery("given")
    refused = false() if held is None else exists(select(held.c.id).correlate(None))
    one = select(literal_column("1").label("one")).subquery("one")
    answer = select(given.c.json, given.c.etag, refused.label("refused"))
    return after(who, answer.select_from(one.outerjoin(given, true())))


def found(row: Any) -> Rendered:
    """The row of a statement that gives `json` and `etag`. Raises `NotFound` when there is none."""
    if row is None:
        raise NotFound(NOBODYS)
    return Rendered(row[0], row[1])


def outcome(row: Any) -> Rendered:
    """The row of a `settled` statement. Raises `NotFound` or `PreconditionFailed`."""
    json, etag, refused = row
    if json is not None:
        return Rendered(json, etag)
    if refused:
        raise PreconditionFailed
    raise NotFound(NOBODYS)
