"""Writes that may be sent again: an Idempotency-Key, and what was asked with it.

A key belongs to one user. It is kept in the same statement or transaction as the write it stands for, together
with the answer, so that a repeat within its time is given that answer and writes nothing.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any, Final, NamedTuple, Self

import asyncpg
from sqlalchemy import (
    CTE,
    ColumnElement,
    Interval,
    LargeBinary,
    Select,
    Text,
    Uuid,
    bindparam,
    cast,
    func,
)
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col

from ..errors import InputFault, Invalid
from ..models import KeptAnswer
from ..models.kept_answer import KEY, KEY_MAX_LENGTH
from ..models.kept_answer import SWEPT_AT_ONCE as SWEPT_AT_ONCE

HOURS: Final = 24


class IdempotencyKey(NamedTuple):
    """`request_hash` (32 bytes) tells one request from another; `hours` is how long the answer is kept."""

    key: str
    request_hash: bytes
    hours: float = HOURS

    @classmethod
    def of(cls, key: str, operation: str, body: bytes, *, hours: float = HOURS) -> Self:
        """The key that came with `body` for `operation`, such as `create_task`.

        1 to 255 visible ASCII characters; raises `Invalid` (pointer `Idempotency-Key`) otherwise.
        """
        if not KEY.fullmatch(key):
            fault = f"Has to be 1 to {KEY_MAX_LENGTH} visible ASCII characters."
            raise Invalid(faults=[InputFault("Idempotency-Key", fault)])
        return cls(key, hashlib.sha256(operation.encode() + b"\0" + body).digest(), hours)


def claim(new: Select[Any]) -> CTE:
    """Keeps the key, or finds it kept: one row with `task_id`, `response`, `created_at`, and `same`.

    `new` gives user_id, task_id, response and status of the answer; the parameters are `key` and `request_hash`.
    Of many at once one makes the row, and the others wait for its transaction and then see it. `same` is false when
    the key is kept for another request. An answer that is too old is one that `swept` has taken away before.
    """
    table = KeptAnswer
    row = new.add_columns(_key(), _request_hash())
    given = ["user_id", "task_id", "response", "status", "key", "request_hash"]
    offered = insert(table).from_select(given, row, include_defaults=False)
    same = col(table.request_hash) == _request_hash()
    # Changes nothing. What is there is waited for, held, and given back as it is by then.
    as_it_is = {"status": table.status}
    return (
        offered.on_conflict_do_update(index_elements=["user_id", "key"], set_=as_it_is)
        .returning(
            col(table.user_id),
            col(table.task_id),
            col(table.response),
            col(table.created_at),
            same.label("same"),
        )
        .cte("kept")
    )


def swept(owner: ColumnElement[Any]) -> ColumnElement[Any]:
    """The owner again, once the answers that are too old are gone: the key's own, and some more of theirs.

    For `me_making`: a function looks whether there are any, at less than half the cost of being ready to delete some.
    Takes the parameters `key` and `kept_for`.
    """
    kept_for = cast(bindparam("kept_for", type_=Interval), Interval)
    return func.sweep_answers(owner, _key(), func.now() - kept_for, type_=Uuid)


def key_values(key: IdempotencyKey) -> dict[str, Any]:
    """The parameters of `claim` and `swept`."""
    return {"key": key.key, "request_hash": key.request_hash, "kept_for": timedelta(hours=key.hours)}


def _key() -> ColumnElement[str]:
    return cast(bindparam("key", type_=Text), Text)


def _request_hash() -> ColumnElement[bytes]:
    return cast(bindparam("request_hash", type_=LargeBinary), LargeBinary)


async def sweep(connection: asyncpg.Connection[Any], hours: float = HOURS) -> int:
    """Deletes the expired keys of every user, and says how many; for whoever owns the tables.

    A user's keyed write takes that user's own expired keys along. This is for those who write no more. The owner
    of the tables is bound by the policies too, so it goes from user to user, in one transaction.
    """
    async with connection.transaction():
        await connection.execute(
            "SELECT set_config('app.swept', '0', true), set_config('app.hours', $1, true)", str(hours)
        )
        await connection.execute(_SWEEP)
        swept: str = await connection.fetchval("SELECT current_setting('app.swept')")
    return int(swept)


_SWEEP: Final = """
DO $$
DECLARE
    someone uuid;
    gone bigint;
    expired timestamptz := now() - current_setting('app.hours')::double precision * interval '1 hour';
BEGIN
    FOR someone IN SELECT id FROM users LOOP
        PERFORM set_config('app.user_id', someone::text, true);
        DELETE FROM idempotency_keys WHERE user_id = someone AND created_at < expired;
        GET DIAGNOSTICS gone = ROW_COUNT;
        PERFORM set_config('app.swept', (current_setting('app.swept')::bigint + gone)::text, true);
    END LOOP;
END
$$
"""
