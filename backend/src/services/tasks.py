"""What an owner may do with tasks. Every function is one statement; what it gives is the JSON of `TaskRead`.

Another owner's task is not there: it is answered as an id that does not exist. Whoever writes for the first time
gets their row in `users` by the same statement; a deleted user's write raises `Unauthenticated`.

`if_match` is an entity tag as `Rendered.etag` gives it, or `ANY_VERSION`. A task of another version raises
`PreconditionFailed`, a task that is not there `NotFound`, however many write at the same time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import (
    CTE,
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
from ..models.base import QuickUUID, new_id
from .idempotency import IdempotencyKey, claim, key_values, swept
from .ownership import Author, Known, me, me_making, me_writing, revoked_is_unauthenticated, theirs
from .statements import Statement
from .task_batches import Batched, batch
from .task_pages import PageQuery, PageText, Position, page
from .task_rows import (
    ANY_VERSION,
    Created,
    Put,
    Rendered,
    after,
    as_json,
    etag_of,
    found,
    locked,
    matches,
    outcome,
    settled,
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


def _new(who: CTE) -> Any:
    """An INSERT of the given task for its owner."""
    given = _given()
    row = select(who.c.v, _id(), *given.values())
    return insert(Task).from_select(["user_id", "id", *given], row, include_defaults=False)


def _create() -> Any:
    who = me_making()
    created = _new(who).returning(col(Task.user_id), as_json()).cte("created")
    return select(created.c.json).where(theirs(who, created))


def _create_once() -> Any:
    """The answer is rendered before the task is there, from the same values: the key's row has to hold it.

    The key is this statement's own when it holds the id and the moment of this statement. The id alone would not
    tell: a statement whose answer was lost is run again as it was.
    """
    who = me_making(swept)
    now = func.now()
    fresh = select(
        who.c.v.label("user_id"),
        _id().label("id"),
        *(value.label(name) for name, value in _given().items()),
        cast(literal_column("1"), Integer).label("version"),
        now.label("created_at"),
        now.label("updated_at"),
    ).cte("fresh")
    created_status: ColumnElement[int] = literal_column("201")
    kept = claim(select(fresh.c.user_id, fresh.c.id, as_json(fresh.c), created_status))
    names = ["user_id", "id", "title", "description", "is_completed"]
    own = and_(kept.c.task_id == fresh.c.id, kept.c.created_at == fresh.c.created_at)
    row = select(*(fresh.c[name] for name in names)).where(own)
    created = (
        insert(Task).from_select(names, row, include_defaults=False).returning(col(Task.id)).cte("created")
    )
    told = select(kept.c.response, cast(kept.c.task_id, Text).label("task_id"), kept.c.same)
    return told.where(theirs(who, kept)).add_cte(created)


def _read() -> Any:
    who = me()
    return after(who, select(as_json()).where(this(who)))


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
    changed = update_in(Task).where(this(who)).values(_changes()).returning(as_json())
    return settled(who, changed.cte("changed"))


def _update_matched(changes: dict[str, Any]) -> Any:
    who = me_writing()
    held = locked(who)
    changed = update_in(Task).where(this(who), matches(held)).values(changes).returning(as_json())
    return settled(who, changed.cte("changed"), held)


def _put() -> Any:
    who = me_making()
    new = _new(who)
    replaced = {name: new.excluded[name] for name in _given()}
    replaced |= {"version": col(Task.version) + literal_column("1"), "updated_at": func.now()}
    placed = (
        new.on_conflict_do_update(index_elements=["user_id", "id"], set_=replaced)
        .returning(col(Task.user_id), as_json(), (col(Task.version) == literal_column("1")).label("created"))
        .cte("placed")
    )
    return select(placed.c.json, placed.c.created).where(theirs(who, placed))


def _put_new() -> Any:
    who = me_making()
    new = _new(who).on_conflict_do_nothing(index_elements=["user_id", "id"])
    placed = new.returning(col(Task.user_id), as_json()).cte("placed")
    return select(placed.c.json).where(theirs(who, placed))


def _delete() -> Any:
    who = me_writing()
    return settled(who, delete_from(Task).where(this(who)).returning(as_json()).cte("gone"))


def _delete_matched() -> Any:
    who = me_writing()
    held = locked(who)
    gone = delete_from(Task).where(this(who), matches(held)).returning(as_json())
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
    body, kept_for, same = row
    if not same:
        raise KeyReused
    task_id = QuickUUID(kept_for)
    return Created(body, etag_of(body), task_id, replayed=task_id != new["id"])


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
    return Put(*Rendered.of(row[0]), created=only_new or row[1])


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
