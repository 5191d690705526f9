"""What an owner may do with tasks. Every function is one statement; what it gives is the JSON of `TaskRead`.

Another owner's task is not there: it is answered as an id that does not exist. Whoever writes for the first time
gets their row in `users` by the same statement; a deleted user's write raises `Unauthenticated`.

`if_match` is an entity tag as `Rendered.etag` gives it, or `ANY_VERSION`. A task of another version raises
`PreconditionFailed`, a task that is not there `NotFound`, however many write at the same time.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import (
    CTE,
    JSON,
    Boolean,
    ColumnElement,
    Integer,
    Text,
    Uuid,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col
from sqlmodel import delete as delete_from
from sqlmodel import update as update_in

from ..errors import KeyReused, NotFound, PreconditionFailed
from ..models import Task, TaskCreate, TaskPut, TaskUpdate
from ..models.base import new_id
from .idempotency import IdempotencyKey, claim, key_values, swept
from .ownership import Author, Known, me, me_writing, provisioned, revoked_is_unauthenticated
from .statements import Statement
from .task_batches import Batched, batch
from .task_pages import PageQuery, PageText, Position, page
from .task_rows import (
    ANY_VERSION,
    Created,
    Put,
    Rendered,
    after,
    etag_of,
    found,
    locked,
    matches,
    outcome,
    settled,
    shown,
    tagged,
    this,
)
from .task_transfer import Loaded, export, load

if TYPE_CHECKING:
    from .database import Database

__all__ = [
    "ANY_VERSION",
    "Author",
    "Batched",
    "Created",
    "IdempotencyKey",
    "Known",
    "Loaded",
    "PageQuery",
    "PageText",
    "Position",
    "Put",
    "Rendered",
    "batch",
    "create",
    "delete",
    "export",
    "load",
    "page",
    "put",
    "read",
    "update",
]


def _given() -> dict[str, ColumnElement[Any]]:
    """A whole task as it comes in, by the names of its columns."""
    return {
        "title": cast(bindparam("title", type_=Text), Text),
        "description": cast(bindparam("description", type_=Text), Text),
        "is_completed": cast(bindparam("is_completed", type_=Boolean), Boolean),
    }


def _id() -> ColumnElement[UUID]:
    return cast(bindparam("id", type_=Uuid), Uuid)


def _new(who: Any) -> Any:
    """An INSERT of the given task for its owner, who is provisioned before."""
    given = _given()
    row = select(provisioned(who).c.v, _id(), *given.values())
    return insert(Task).from_select(["user_id", "id", *given], row, include_defaults=False)


def _create() -> Any:
    who = me_writing()
    return after(who, shown(_new(who).returning(*tagged()).cte("created")))


def _create_once() -> Any:
    """The answer is rendered before the task is there, from the same values: the key's row has to hold it.

    The key is this statement's own when it holds the id and the moment of this statement. The id alone would not
    tell: a statement whose answer was lost is run again as it was.
    """
    who = me_writing()
    now = func.now()
    fresh = select(
        provisioned(who).c.v.label("user_id"),
        _id().label("id"),
        *(value.label(name) for name, value in _given().items()),
        cast(literal_column("1"), Integer).label("version"),
        now.label("created_at"),
        now.label("updated_at"),
    ).cte("fresh")
    answer = shown(select(*tagged(fresh.c)).subquery("rendered")).subquery("answer")
    created_status: ColumnElement[int] = literal_column("201")
    kept = claim(
        select(fresh.c.user_id, fresh.c.id, answer.c.json, created_status).select_from(fresh, answer)
    )
    names = ["user_id", "id", "title", "description", "is_completed"]
    own = and_(kept.c.task_id == fresh.c.id, kept.c.created_at == fresh.c.created_at)
    row = select(*(fresh.c[name] for name in names)).where(own)
    created = (
        insert(Task).from_select(names, row, include_defaults=False).returning(col(Task.id)).cte("created")
    )
    etag = etag_of(_as_kept(kept)).label("etag")
    told = select(kept.c.response, etag, cast(kept.c.task_id, Text).label("task_id"), kept.c.same)
    return after(who, told).add_cte(created, swept(who))


def _as_kept(kept: CTE) -> Any:
    """The task as the answer in `kept` shows it, by the names of its columns."""
    answer = cast(kept.c.response, JSON)
    told = {name: answer[name].as_string() for name in _given()}
    at = kept.c.created_at
    return SimpleNamespace(**told, version=literal_column("1"), created_at=at, updated_at=at)


def _read() -> Any:
    who = me()
    return after(who, shown(select(*tagged()).where(this(who)).subquery("found")))


def _changes() -> dict[str, Any]:
    # Null means "leave it" for what can never be null; a description may be, so a flag says whether it came.
    # `version` and `updated_at` follow from the table's own onupdate.
    given = _given()
    return {
        "title": func.coalesce(given["title"], col(Task.title)),
        "description": case(
            (cast(bindparam("describe", type_=Boolean), Boolean), given["description"]),
            else_=col(Task.description),
        ),
        "is_completed": func.coalesce(given["is_completed"], col(Task.is_completed)),
    }


def _update() -> Any:
    who = me_writing()
    changed = update_in(Task).where(this(who)).values(_changes()).returning(*tagged())
    return settled(who, changed.cte("changed"))


def _update_matched(changes: dict[str, Any]) -> Any:
    who = me_writing()
    held = locked(who)
    changed = update_in(Task).where(this(who), matches(held)).values(changes).returning(*tagged())
    return settled(who, changed.cte("changed"), held)


def _put() -> Any:
    who = me_writing()
    new = _new(who)
    replaced = {name: new.excluded[name] for name in _given()}
    replaced |= {"version": col(Task.version) + literal_column("1"), "updated_at": func.now()}
    placed = new.on_conflict_do_update(index_elements=["user_id", "id"], set_=replaced)
    placed = placed.returning(*tagged()).cte("placed")
    answer = shown(placed)
    return after(who, answer.add_columns((placed.c.version == literal_column("1")).label("created")))


def _put_new() -> Any:
    who = me_writing()
    placed = _new(who).on_conflict_do_nothing(index_elements=["user_id", "id"]).returning(*tagged())
    return after(who, shown(placed.cte("placed")))


def _delete() -> Any:
    who = me_writing()
    return settled(who, delete_from(Task).where(this(who)).returning(*tagged()).cte("gone"))


def _delete_matched() -> Any:
    who = me_writing()
    held = locked(who)
    gone = delete_from(Task).where(this(who), matches(held)).returning(*tagged())
    return settled(who, gone.cte("gone"), held)


CREATE = Statement("tasks.create", _create, repeatable=False)
CREATE_ONCE = Statement("tasks.create_once", _create_once, repeatable=True, writes=True)
READ = Statement("tasks.read", _read, repeatable=True)
UPDATE = Statement("tasks.update", _update, repeatable=False)
UPDATE_MATCHED = Statement("tasks.update_matched", lambda: _update_matched(_changes()), repeatable=False)
PUT = Statement("tasks.put", _put, repeatable=False)
PUT_NEW = Statement("tasks.put_new", _put_new, repeatable=False)
PUT_MATCHED = Statement("tasks.put_matched", lambda: _update_matched(_given()), repeatable=False)
DELETE = Statement("tasks.delete", _delete, repeatable=False)
DELETE_MATCHED = Statement("tasks.delete_matched", _delete_matched, repeatable=False)


async def create(
    db: Database, author: Author, task: TaskCreate, *, idempotency: IdempotencyKey | None = None
) -> Created:
    """The new task. With a key that came before, the answer that was given then, and nothing is written.

    Raises `KeyReused` when the key came with another request.
    """
    new = _values(author, new_id(), task)
    with revoked_is_unauthenticated():
        if idempotency is None:
            return Created(*found(await db.row(CREATE, **new)), new["id"])
        row = await db.row(CREATE_ONCE, **new, **key_values(idempotency))
    assert row is not None
    body, etag, kept_for, same = row
    if not same:
        raise KeyReused
    task_id = UUID(kept_for)
    return Created(body, etag, task_id, replayed=task_id != new["id"])


async def read(db: Database, owner: UUID, task_id: UUID) -> Rendered:
    """Raises `NotFound`."""
    return found(await db.row(READ, owner=owner, id=task_id))


async def update(
    db: Database, author: Author, task_id: UUID, change: TaskUpdate, *, if_match: str | None = None
) -> Rendered:
    """The task as it is afterwards, its version one higher. Raises `NotFound` and `PreconditionFailed`.

    A change that changes no field is answered with the task as it is, and makes no new version.
    """
    changes = change.changes()
    if not changes:
        now = await read(db, author.user_id, task_id)
        if if_match not in (None, ANY_VERSION, now.etag):
            raise PreconditionFailed
        return now
    values = {
        "owner": author.user_id,
        "epoch": author.epoch,
        "id": task_id,
        "title": changes.get("title"),
        "describe": "description" in changes,
        "description": changes.get("description"),
        "is_completed": changes.get("is_completed"),
    }
    with revoked_is_unauthenticated():
        if if_match is None:
            return outcome(await db.row(UPDATE, **values))
        return outcome(await db.row(UPDATE_MATCHED, **values, if_match=if_match))


async def put(
    db: Database,
    author: Author,
    task_id: UUID,
    task: TaskPut,
    *,
    if_match: str | None = None,
    only_new: bool = False,
) -> Put:
    """The task of this id is as given from now on: made, or put in the place of the author's earlier one.

    Raises `PreconditionFailed` when `if_match` names no stored version (also where no task is), and, with
    `only_new`, when there is one.
    """
    values = _values(author, task_id, task)
    with revoked_is_unauthenticated():
        if if_match is not None:
            try:
                return Put(*outcome(await db.row(PUT_MATCHED, **values, if_match=if_match)), created=False)
            except NotFound:
                raise PreconditionFailed from None
        row = await db.row(PUT_NEW if only_new else PUT, **values)
    if row is None:
        raise PreconditionFailed
    return Put(row[0], row[1], created=only_new or row[2])


async def delete(db: Database, author: Author, task_id: UUID, *, if_match: str | None = None) -> None:
    """Raises `NotFound` and `PreconditionFailed`."""
    values = {"owner": author.user_id, "epoch": author.epoch, "id": task_id}
    with revoked_is_unauthenticated():
        if if_match is None:
            outcome(await db.row(DELETE, **values))
        else:
            outcome(await db.row(DELETE_MATCHED, **values, if_match=if_match))


def _values(author: Author, task_id: UUID, task: TaskCreate) -> dict[str, Any]:
    return {
        "owner": author.user_id,
        "epoch": author.epoch,
        "email": author.email,
        "id": task_id,
        "title": task.title,
        "description": task.description,
        "is_completed": task.is_completed,
    }
