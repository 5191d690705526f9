"""What an owner may do with tasks. Every function is one statement; what it gives is the JSON of `TaskRead`.

Another owner's task is not there: it raises `NotFound`, as an id that does not exist.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import Boolean, Integer, Text, Uuid, and_, bindparam, case, cast, func
from sqlmodel import col, insert, select
from sqlmodel import delete as delete_from
from sqlmodel import update as update_in

from ..errors import Conflict, NotFound
from ..models import Task, TaskCreate, TaskRead, TaskUpdate
from ..models.base import new_id
from ..models.rendering import as_array, as_object, fields
from .paging import bounded
from .statements import Statement

if TYPE_CHECKING:
    from .database import Database

_OWNER_EXISTS: Final = "fk_tasks_user_id"


def _mine() -> Any:
    return col(Task.user_id) == bindparam("owner", type_=Uuid)


def _this() -> Any:
    return and_(_mine(), col(Task.id) == bindparam("id", type_=Uuid))


def _create() -> Any:
    new = {
        "user_id": bindparam("owner", type_=Uuid),
        "id": bindparam("id", type_=Uuid),
        "title": bindparam("title", type_=Text),
        "description": bindparam("description", type_=Text),
        "is_completed": bindparam("is_completed", type_=Boolean),
    }
    return as_object(insert(Task).values(new).returning(*fields(TaskRead, Task)).cte("created"))


def _read() -> Any:
    return as_object(select(*fields(TaskRead, Task)).where(_this()).subquery("found"))


def _page(*state: Any) -> Any:
    newest_first = (
        select(*fields(TaskRead, Task))
        .where(_mine(), *state)
        .order_by(col(Task.created_at).desc(), col(Task.id).desc())
        .limit(bindparam("limit", type_=Integer))
    )
    return as_array(newest_first.subquery("page"))


def _update() -> Any:
    # Null means "leave it" for what can never be null; a description may be, so a flag says whether it came.
    # `version` and `updated_at` follow from the table's own onupdate.
    description = bindparam("description", type_=Text)
    changed = (
        update_in(Task)
        .where(_this())
        .values(
            title=func.coalesce(bindparam("title", type_=Text), col(Task.title)),
            description=case(
                (bindparam("describe", type_=Boolean), description), else_=col(Task.description)
            ),
            is_completed=func.coalesce(bindparam("is_completed", type_=Boolean), col(Task.is_completed)),
        )
        .returning(*fields(TaskRead, Task))
    )
    return as_object(changed.cte("changed"))


def _delete() -> Any:
    return delete_from(Task).where(_this()).returning(cast(col(Task.id), Text).label("id"))


CREATE = Statement("tasks.create", _create, repeatable=False)
READ = Statement("tasks.read", _read, repeatable=True)
PAGE = Statement("tasks.page", _page, repeatable=True)
PAGE_OPEN = Statement("tasks.page_open", lambda: _page(~col(Task.is_completed)), repeatable=True)
PAGE_DONE = Statement("tasks.page_done", lambda: _page(col(Task.is_completed)), repeatable=True)
UPDATE = Statement("tasks.update", _update, repeatable=False)
DELETE = Statement("tasks.delete", _delete, repeatable=False)

_PAGES: Final = {None: PAGE, False: PAGE_OPEN, True: PAGE_DONE}


async def create(db: Database, owner: UUID, task: TaskCreate) -> str:
    """The new task. Raises `NotFound` when there is no such owner (any more)."""
    try:
        return _found(
            await db.value(
                CREATE,
                owner=owner,
                id=new_id(),
                title=task.title,
                description=task.description,
                is_completed=task.is_completed,
            )
        )
    except Conflict as conflict:
        if conflict.constraint == _OWNER_EXISTS:
            raise NotFound("There is no such user.") from None
        raise


async def read(db: Database, owner: UUID, task_id: UUID) -> str:
    """Raises `NotFound`."""
    return _found(await db.value(READ, owner=owner, id=task_id))


async def page(db: Database, owner: UUID, *, limit: int = 50, is_completed: bool | None = None) -> str:
    """A JSON array, the newest first; 1 to 200 tasks: all, the open ones, or the completed ones."""
    return _found(await db.value(_PAGES[is_completed], owner=owner, limit=bounded(limit)))


async def update(db: Database, owner: UUID, task_id: UUID, change: TaskUpdate) -> str:
    """The task as it is afterwards, its version one higher. Raises `NotFound`.

    A change that changes no field is answered with the task as it is, and makes no new version.
    """
    changes = change.changes()
    if not changes:
        return await read(db, owner, task_id)
    return _found(
        await db.value(
            UPDATE,
            owner=owner,
            id=task_id,
            title=changes.get("title"),
            describe="description" in changes,
            description=changes.get("description"),
            is_completed=changes.get("is_completed"),
        )
    )


async def delete(db: Database, owner: UUID, task_id: UUID) -> None:
    """Raises `NotFound`."""
    _found(await db.value(DELETE, owner=owner, id=task_id))


def _found(value: str | None) -> str:
    if value is None:
        raise NotFound("There is no such task.")
    return value
