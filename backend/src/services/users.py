"""What can be done with users. Every function is one statement; what it gives is the JSON of `UserRead`.

`find` and `page` are the operators': row-level security shows everybody else only themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import CTE, Integer, Text, bindparam, cast
from sqlmodel import col, insert, select
from sqlmodel import delete as delete_from

from ..errors import NotFound
from ..models import User, UserCreate, UserRead
from ..models.base import new_id
from ..models.rendering import as_array, as_object, fields
from ..models.user import Email
from .ownership import Author, me, me_writing, mine, revoked_is_unauthenticated
from .paging import bounded
from .statements import Statement

if TYPE_CHECKING:
    from .database import Database


def _create() -> Any:
    who = me()
    new = insert(User).from_select(["id", "email"], select(who.c.v, bindparam("email", type_=Text)))
    return as_object(new.returning(*fields(UserRead, User)).cte("created"))


def _read() -> Any:
    return as_object(select(*fields(UserRead, User)).where(mine(me(), User.id)).subquery("found"))


def _find() -> Any:
    theirs = col(User.email) == bindparam("email", type_=Text)
    return as_object(select(*fields(UserRead, User)).where(theirs).subquery("found"))


def _page() -> Any:
    few = bindparam("limit", type_=Integer)
    return as_array(
        select(*fields(UserRead, User)).order_by(col(User.email), col(User.id)).limit(few).subquery("page")
    )


def _delete(who: CTE) -> Any:
    gone = delete_from(User).where(mine(who, User.id))
    return gone.returning(cast(col(User.id), Text).label("id"))


CREATE = Statement("users.create", _create, repeatable=False)
READ = Statement("users.read", _read, repeatable=True)
FIND = Statement("users.find", _find, repeatable=True)
PAGE = Statement("users.page", _page, repeatable=True)
DELETE = Statement("users.delete", lambda: _delete(me_writing()), repeatable=False)
REMOVE = Statement("users.remove", lambda: _delete(me()), repeatable=False)

_email: TypeAdapter[str] = TypeAdapter(Email)


async def create(db: Database, user: UserCreate) -> str:
    """The new user. Raises `Conflict` (constraint `uq_users_email`) when the address is taken."""
    return _found(await db.value(CREATE, owner=new_id(), email=user.email))


async def read(db: Database, user_id: UUID) -> str:
    """Raises `NotFound`."""
    return _found(await db.value(READ, owner=user_id))


async def find(db: Database, email: str) -> str:
    """The user with this address, written in any way that means the same. Raises `NotFound`."""
    try:
        address = _email.validate_python(email)
    except ValidationError:
        raise NotFound("There is no such user.") from None
    return _found(await db.value(FIND, email=address))


async def page(db: Database, *, limit: int = 50) -> str:
    """A JSON array of the first users in the order of their addresses, those without one last; 1 to 200 of them."""
    return _found(await db.value(PAGE, limit=bounded(limit)))


async def delete(db: Database, author: Author) -> None:
    """The user and all their tasks are gone, for good: this id is never a user again. Raises `NotFound`."""
    with revoked_is_unauthenticated():
        _found(await db.value(DELETE, owner=author.user_id, epoch=author.epoch))


async def remove(db: Database, user_id: UUID) -> None:
    """As `delete`, also of a disabled account: for operators. Raises `NotFound`."""
    _found(await db.value(REMOVE, owner=user_id))


def _found(value: str | None) -> str:
    if value is None:
        raise NotFound("There is no such user.")
    return value
