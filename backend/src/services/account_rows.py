"""The statements behind accounts of our own. Each calls one function of the database (`models.credential`), because
the service itself can neither read nor change a password or a session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    CTE,
    DateTime,
    Integer,
    Interval,
    LargeBinary,
    Select,
    Text,
    Uuid,
    bindparam,
    cast,
    column,
    func,
    literal_column,
    null,
    select,
)
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col
from sqlmodel import delete as delete_from
from sqlmodel import update as update_in

from ..models import Credential, Session, User, UserRead
from ..models.rendering import as_object, fields
from .ownership import me_writing
from .statements import Statement

_TYPES: dict[str, Any] = {
    "account": Uuid, "session": Uuid, "email": Text, "recipe": Text,
    "proof": LargeBinary, "verifier": LargeBinary, "secret": LargeBinary, "fresh": LargeBinary, "repeat": LargeBinary,
    "idle": Interval, "longest": Interval,
}  # fmt: skip


def _given(name: str) -> Any:
    of = _TYPES[name]
    return cast(bindparam(name, type_=of), of)


def _rows(call: Any, *columns: Any) -> Any:
    return call.table_valued(*columns, name="answer").render_derived()


def _user(call: Any) -> Select[Any]:
    """The JSON of `UserRead`, of a function that gives its columns."""
    found = _rows(
        call,
        column("id", Uuid),
        column("email", Text),
        column("created_at", DateTime(timezone=True)),
        column("updated_at", DateTime(timezone=True)),
    )
    return as_object(select(*fields(UserRead, found.c)).subquery("shown"))


def _sign_up() -> Any:
    return _user(func.sign_up(*map(_given, ("account", "email", "recipe", "verifier"))))


def _recipe_by_email() -> Any:
    found = _rows(func.recipe_of_email(_given("email")), column("user_id", Uuid), column("recipe", Text))
    return select(found.c.user_id, found.c.recipe)


def _recipe_by_id() -> Any:
    return select(func.recipe_of_user(_given("account"), type_=Text).label("recipe"))


def _open() -> Any:
    names = ("account", "proof", "session", "fresh", "idle", "longest")
    found = _rows(
        func.open_session(*map(_given, names)), column("email", Text), column("token_epoch", Integer)
    )
    return select(found.c.email, found.c.token_epoch)


def _refresh() -> Any:
    columns = [
        column("outcome", Text), column("user_id", Uuid), column("email", Text), column("token_epoch", Integer)
    ]  # fmt: skip
    names = ("session", "secret", "fresh", "repeat", "idle")
    found = _rows(func.refresh_session(*map(_given, names)), *columns)
    return select(found.c.outcome, found.c.user_id, found.c.email, found.c.token_epoch)


def _close() -> Any:
    return select(func.close_session(_given("session"), _given("secret"), type_=Uuid).label("user_id"))


def _end_all() -> Any:
    who = me_writing()
    return select(func.end_sessions(who.c.v, type_=Integer).label("epoch")).select_from(who)


def _renew() -> Any:
    names = ("account", "proof", "recipe", "verifier")
    return select(func.renew_verifier(*map(_given, names)).label("renewed"))


def _change() -> Any:
    who = me_writing()
    # As a scalar subselect the account's id comes before the call, and with it the look whether the token is good.
    account = select(who.c.v).scalar_subquery()
    return _user(func.change_account(account, *map(_given, ("proof", "email", "recipe", "verifier"))))


# Of operators, who connect as the owner of the tables


def _next_epoch(**values: Any) -> CTE:
    raised = {"token_epoch": col(User.token_epoch) + literal_column("1"), "updated_at": func.now(), **values}
    changed = update_in(User).where(col(User.id) == _given("account")).values(raised)
    return changed.returning(col(User.id)).cte("changed")


def _set_password() -> Any:
    changed = _next_epoch()
    row: Sequence[Any] = (changed.c.id, _given("recipe"), _given("verifier"))
    new = insert(Credential).from_select(
        ["user_id", "recipe", "verifier"], select(*row), include_defaults=False
    )
    kept = new.on_conflict_do_update(
        index_elements=["user_id"],
        set_={
            "recipe": new.excluded.recipe,
            "verifier": new.excluded.verifier,
            "changed_at": func.now(),
        },
    ).returning(col(Credential.user_id))
    return select(changed.c.id).add_cte(kept.cte("kept"))


def _disable() -> Any:
    return select(_next_epoch(disabled_at=func.coalesce(col(User.disabled_at), func.now())).c.id)


def _end_theirs() -> Any:
    gone = delete_from(Session).where(col(Session.user_id) == _given("account"))
    return select(func.count().label("count")).select_from(gone.returning(col(Session.id)).cte("gone"))


def _enable() -> Any:
    changed = update_in(User).where(col(User.id) == _given("account"))
    return changed.values(disabled_at=null(), updated_at=func.now()).returning(col(User.id))


def _standing() -> Any:
    theirs = col(User.email) == _given("email")
    return select(col(User.id), col(User.token_epoch), col(User.disabled_at)).where(theirs)


def _expired() -> Any:
    # What somebody holds at this moment is ending anyway, and waiting for it might be mutual.
    held = (
        select(col(Session.id)).where(col(Session.expires_at) <= func.now()).with_for_update(skip_locked=True)
    )
    old = delete_from(Session).where(col(Session.id).in_(held)).returning(col(Session.id)).cte("old")
    return select(func.count().label("count")).select_from(old)


SIGN_UP = Statement("accounts.sign_up", _sign_up, repeatable=False)
RECIPE_BY_EMAIL = Statement("accounts.recipe_by_email", _recipe_by_email, repeatable=True)
RECIPE_BY_ID = Statement("accounts.recipe_by_id", _recipe_by_id, repeatable=True)
OPEN = Statement("sessions.open", _open, repeatable=False)
REFRESH = Statement("sessions.refresh", _refresh, repeatable=False)
REFRESH_ONCE = Statement("sessions.refresh_once", _refresh, repeatable=True, writes=True)
CLOSE = Statement("sessions.close", _close, repeatable=False)
END_ALL = Statement("sessions.end_all", _end_all, repeatable=False)
RENEW = Statement("accounts.renew_verifier", _renew, repeatable=False)
CHANGE = Statement("accounts.change", _change, repeatable=False)
SET_PASSWORD = Statement("accounts.set_password", _set_password, repeatable=False)
DISABLE = Statement("accounts.disable", _disable, repeatable=False)
END_THEIRS = Statement("sessions.end_theirs", _end_theirs, repeatable=False)
ENABLE = Statement("accounts.enable", _enable, repeatable=True, writes=True)
STANDING = Statement("accounts.standing", _standing, repeatable=True)
EXPIRED = Statement("sessions.sweep", _expired, repeatable=True, writes=True)
