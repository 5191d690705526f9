"""The words in which a statement says whose rows it is about, so that both walls stand in one round trip.

The first wall is the condition `mine(...)`, the second is PostgreSQL's row-level security, which reads the
setting `app.user_id` (`models.isolation`). `me()` sets it within the statement itself:

    WITH me AS MATERIALIZED (SELECT set_config('app.user_id', $1::uuid::text, true)::uuid AS v) ...

Every statement on a guarded table names its owner by the parameter `owner`, begins with one `me()`, with
`me_writing()` when it writes, or with `me_making()` when it may be a user's first write, and has `mine(...)` **in
each WHERE that reads, changes or deletes such a table**, also in a second CTE of the same statement. A read, a
change, and a first write:

    def _read():
        who = me()
        found = select(*fields(TaskRead, Task)).where(mine(who, Task.user_id), Task.id == bindparam("id"))
        return as_object(found.subquery("found"))

    def _update():
        who = me_writing()
        changed = update(Task).where(mine(who, Task.user_id), Task.id == bindparam("id")).values(...)
        return as_object(changed.returning(*fields(TaskRead, Task)).cte("changed"))

    def _create():
        who = me_making()
        values = select(who.c.v, bindparam("id", type_=Uuid), bindparam("title", type_=Text))
        new = insert(Task).from_select(["user_id", "id", "title"], values)
        created = new.returning(col(Task.user_id), written(TaskRead, Task).label("json")).cte("created")
        return select(created.c.json).where(theirs(who, created))

    with revoked_is_unauthenticated():
        await db.row(CREATE, owner=principal.user_id, epoch=principal.epoch, email=principal.email, id=..., title=...)

docs/decisions/0017-two-walls.md has the reasons and the cost, 0051-accounts.md those of `me_writing()`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol
from uuid import UUID

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import (
    CTE,
    ColumnElement,
    Integer,
    Text,
    Uuid,
    and_,
    bindparam,
    cast,
    func,
    literal_column,
    select,
)
from sqlmodel import col

from ..errors import Conflict, Unauthenticated
from ..models.isolation import SETTING
from ..models.user import Email

_DELETED: Final = ("account-deleted", "The account was deleted.")
REVOKED: Final = {
    "ex_users_deleted": _DELETED,
    "fk_tasks_user_id": _DELETED,
    "fk_idempotency_keys_user_id": _DELETED,
    "ex_users_disabled": ("account-disabled", "The account is disabled."),
    "ex_users_revoked": ("token-revoked", "The token was revoked. Log in again."),
}
"""The constraints by which PostgreSQL refuses a write because of whose it is, and what is said of each."""

_email: TypeAdapter[str] = TypeAdapter(Email)
_SETTING: Final = literal_column(f"'{SETTING}'", Text)
_WITHIN_TRANSACTION: Final[Any] = literal_column("true")


class Author(Protocol):
    """Whoever writes: their user id, and the e-mail their account gets if this write makes it."""

    @property
    def user_id(self) -> UUID: ...

    @property
    def email(self) -> str | None: ...

    @property
    def epoch(self) -> int | None:
        """Which of our tokens speaks for them; None where another issuer vouches, or an operator writes."""


@dataclass(frozen=True, slots=True)
class Known:
    """An author whose account exists already."""

    user_id: UUID
    email: str | None = None
    epoch: int | None = None


def me() -> CTE:
    """The statement's owner (the parameter `owner`, a UUID) in the column `v` of one row, with `app.user_id` set.

    One for each statement: it has to be the same object wherever the statement needs it.
    """
    owner = cast(bindparam("owner", type_=Uuid), Text)
    setting = func.set_config(_SETTING, owner, _WITHIN_TRANSACTION)
    return select(cast(setting, Uuid).label("v")).cte("me").prefix_with("MATERIALIZED")


def me_writing() -> CTE:
    """As `me()`, for a statement that writes: the token's user has to be one who may.

    Takes the parameter `epoch` too: which of our tokens it is, None where another issuer vouches. A user who was
    deleted or disabled, or whose tokens of that epoch were revoked, ends the statement before it writes anything:
    see `revoked_is_unauthenticated`.
    """
    owner = cast(bindparam("owner", type_=Uuid), Text)
    setting = func.set_config(_SETTING, owner, _WITHIN_TRANSACTION)
    epoch = cast(bindparam("epoch", type_=Integer), Integer)
    # The setting is the function's argument, so it is made before the function looks at the row it opens.
    allowed = func.require_current(cast(setting, Uuid), epoch, type_=Uuid)
    return select(allowed.label("v")).cte("me").prefix_with("MATERIALIZED")


def me_making(then: Callable[[Any], Any] | None = None) -> CTE:
    """As `me_writing()`, for a statement that may be a user's first write: there is a row in `users` for them by then.

    Takes the parameter `email` too (`address()` of what the token says, or None). A new user gets that address when
    it is free at that moment, and none otherwise, whoever else writes at the same time. A user who is deleted
    meanwhile is not made again: see `revoked_is_unauthenticated`. The statement itself does not see that row, its
    foreign keys do. `then` is what else is to happen before the statement begins: a function of the owner that
    gives the owner.
    """
    owner = cast(bindparam("owner", type_=Uuid), Text)
    setting = func.set_config(_SETTING, owner, _WITHIN_TRANSACTION)
    epoch = cast(bindparam("epoch", type_=Integer), Integer)
    email = cast(bindparam("email", type_=Text), Text)
    admitted = func.admit(cast(setting, Uuid), epoch, email, type_=Uuid)
    ready = admitted if then is None else then(admitted)
    return select(ready.label("v")).cte("me").prefix_with("MATERIALIZED")


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


def theirs(who: CTE, written: CTE) -> ColumnElement[bool]:
    """What was `written` is the statement's owner's: the WHERE of an answer whose rows no other WHERE has chosen."""
    condition: ColumnElement[bool] = written.c.user_id == _value(who)
    return condition


def address(email: str | None) -> str | None:
    """The e-mail that a token states as `users` can hold it; None when it states none that could be held."""
    try:
        return None if email is None else _email.validate_python(email)
    except ValidationError:
        return None


class _Revoked:
    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Conflict) and error.constraint in REVOKED:
            raise Unauthenticated(*REVOKED[error.constraint]) from None


_REVOKED: Final = _Revoked()


def revoked_is_unauthenticated() -> AbstractContextManager[None, None]:
    """Inside, a write refused because of whose it is raises `Unauthenticated`. Nothing was written."""
    return _REVOKED
