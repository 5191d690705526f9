"""The words in which a statement says whose rows it is about, so that both walls stand in one round trip.

The first wall is the condition `mine(...)`, the second is PostgreSQL's row-level security, which reads the
setting `app.user_id` (`models.isolation`). `me()` sets it within the statement itself:

    WITH me AS MATERIALIZED (SELECT set_config('app.user_id', $1::uuid::text, true)::uuid AS v) ...

Every statement on a guarded table names its owner by the parameter `owner`, begins with one `me()`, and has
`mine(...)` **in each WHERE that reads, changes or deletes such a table**, also in a second CTE of the same
statement. A read, a change, and a first write:

    def _read():
        who = me()
        found = select(*fields(TaskRead, Task)).where(mine(who, Task.user_id), Task.id == bindparam("id"))
        return as_object(found.subquery("found"))

    def _update():
        who = me()
        changed = update(Task).where(mine(who, Task.user_id), Task.id == bindparam("id")).values(...)
        return as_object(changed.returning(*fields(TaskRead, Task)).cte("changed"))

    def _create():
        writer = provisioned(me())
        values = select(writer.c.v, bindparam("id", type_=Uuid), bindparam("title", type_=Text))
        created = insert(Task).from_select(["user_id", "id", "title"], values)
        return as_object(created.returning(*fields(TaskRead, Task)).cte("created"))

    with deleted_is_unauthenticated():
        await db.row(CREATE, owner=principal.user_id, email=principal.email, id=..., title=...)

docs/decisions/0017-two-walls.md has the reasons and the cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import (
    CTE,
    ColumnElement,
    Text,
    Uuid,
    and_,
    bindparam,
    cast,
    exists,
    func,
    literal_column,
    null,
    select,
)
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col

from ..errors import Conflict, Unauthenticated
from ..models import DeletedUser, User
from ..models.isolation import SETTING
from ..models.user import Email

ACCOUNT_GONE: Final = frozenset({"ex_users_deleted", "fk_tasks_user_id", "fk_idempotency_keys_user_id"})
"""The constraints by which PostgreSQL refuses the write of a user who was deleted, before or meanwhile."""

_email: TypeAdapter[str] = TypeAdapter(Email)
_SETTING: Final = literal_column(f"'{SETTING}'", Text)
_WITHIN_TRANSACTION: Final[Any] = literal_column("true")


def me() -> CTE:
    """The statement's owner (the parameter `owner`, a UUID) in the column `v` of one row, with `app.user_id` set.

    One for each statement: it has to be the same object wherever the statement needs it.
    """
    owner = cast(bindparam("owner", type_=Uuid), Text)
    setting = func.set_config(_SETTING, owner, _WITHIN_TRANSACTION)
    return select(cast(setting, Uuid).label("v")).cte("me").prefix_with("MATERIALIZED")


def _value(who: CTE) -> Any:
    # Without this SQLAlchemy would take a `me` further out for the one that is meant, and drop it here.
    return select(who.c.v).correlate(None).scalar_subquery()


def mine(who: CTE, owner: Any) -> ColumnElement[bool]:
    """`owner` (a column such as `Task.user_id`) is the statement's owner: the WHERE of whatever touches its table.

    PostgreSQL is free to look at the policy before it looks at `me`, and the policy would then see the setting as
    it was: no row is found. A condition on no table of its own becomes a one-time filter above the whole scan or
    join, so the first half makes PostgreSQL evaluate `me` before it reads the first row, in any plan.
    """
    return and_(_value(who).is_not(None), col(owner) == _value(who))


def provisioned(who: CTE) -> CTE:
    """The owner again, in the column `v` of one row, once there is a row in `users` for them.

    For writes: `INSERT ... SELECT` from it. Takes the parameter `email` (`address()` of what the token says, or
    None). A new user gets that address when it is free at that moment, and none otherwise, whoever else writes at
    the same time. A deleted user is not made again: see `deleted_is_unauthenticated`.
    """
    known = select(col(User.id)).where(mine(who, User.id)).cte("known").prefix_with("MATERIALIZED")
    unknown = ~exists(select(known.c.id).correlate(None))
    email = cast(bindparam("email", type_=Text), Text)
    # Without a target both unique rules count: another user's e-mail, and our own other first write.
    named = (
        insert(User)
        .from_select(["id", "email"], select(who.c.v, email).where(unknown), include_defaults=False)
        .on_conflict_do_nothing()
        .returning(col(User.id))
        .cte("named")
    )
    nameless = ~exists(select(named.c.id).correlate(None))
    unnamed = (
        insert(User)
        .from_select(
            ["id", "email"],
            select(who.c.v, cast(null(), Text)).where(unknown, nameless),
            include_defaults=False,
        )
        .on_conflict_do_nothing()
        .returning(col(User.id))
        .cte("unnamed")
    )
    # Counting what was inserted is what makes PostgreSQL do it before the row of `writer` comes out.
    done = select(func.count()).select_from(unnamed).correlate(None).scalar_subquery()
    return select(who.c.v).where(done >= literal_column("0")).cte("writer").prefix_with("MATERIALIZED")


def address(email: str | None) -> str | None:
    """The e-mail that a token states as `users` can hold it; None when it states none that could be held."""
    try:
        return None if email is None else _email.validate_python(email)
    except ValidationError:
        return None


def deleted(who: CTE) -> ColumnElement[bool]:
    """Whether the owner was deleted: for a write that provisions nobody and has found no row."""
    return exists(select(col(DeletedUser.id)).where(mine(who, DeletedUser.id)).correlate(None))


@contextmanager
def deleted_is_unauthenticated() -> Iterator[None]:
    """Inside, a write refused because its user was deleted raises `Unauthenticated`. Nothing was written."""
    try:
        yield
    except Conflict as conflict:
        if conflict.constraint in ACCOUNT_GONE:
            raise Unauthenticated("account-deleted", "The account was deleted.") from None
        raise
