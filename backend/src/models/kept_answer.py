"""A write that may be sent again: its key, what was asked with it, and the answer that was given."""

import re
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Index,
    LargeBinary,
    SmallInteger,
    Uuid,
    event,
    func,
)
from sqlalchemy import Text as SqlText
from sqlalchemy.engine import Connection
from sqlmodel import Field

from .base import Base, metadata
from .isolation import ROLE

KEY_MAX_LENGTH: Final = 255
KEY: Final = re.compile(r"[!-~]{1,255}")
"""Visible ASCII."""
# More than one, so that they become fewer; few, so that no write pays for a day of others.
SWEPT_AT_ONCE: Final = 20

_ASCII: Final[Any] = SqlText(collation="C")


class KeptAnswer(Base, table=True):
    """The table `idempotency_keys`: one row for each Idempotency-Key of a user, gone with the user.

    `request_hash` is the SHA-256 of what was asked. `task_id` is the task that a create made; null for a batch.
    `status` and `response` are the answer, null while the transaction that works on it is under way.
    """

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        CheckConstraint(f"char_length(key) BETWEEN 1 AND {KEY_MAX_LENGTH}", name="key_length"),
        CheckConstraint("octet_length(request_hash) = 32", name="request_hash_length"),
        CheckConstraint("status BETWEEN 200 AND 599", name="status_range"),
        Index("ix_idempotency_keys_user_id_created_at", "user_id", "created_at"),
    )

    user_id: UUID = Field(
        sa_column=Column(Uuid, ForeignKey("users.id", ondelete="CASCADE"), primary_key=True, nullable=False)
    )
    key: str = Field(sa_column=Column(_ASCII, primary_key=True, nullable=False))
    request_hash: bytes = Field(sa_type=LargeBinary, nullable=False)
    task_id: UUID | None = Field(default=None, sa_type=Uuid, nullable=True)
    response: str | None = Field(default=None, sa_type=SqlText, nullable=True)
    status: int | None = Field(default=None, sa_type=SmallInteger, nullable=True)
    created_at: datetime = Field(
        default=None,
        sa_type=DateTime(timezone=True),
        nullable=False,
        sa_column_kwargs={"server_default": func.now()},
    )


SWEEP: Final = "sweep_answers(uuid, text, timestamp with time zone)"
"""Runs by the rights of who calls it, and so within the caller's own rows. Gives the account back."""

# The key's own answer is waited for, because the key is about to be used anew. Of the others, those that somebody
# holds are left to them. By the index always: while the table is known to be empty a backend plans to read it whole,
# and keeps that plan while it fills.
SWEEP_FUNCTION: Final = """
CREATE FUNCTION sweep_answers(account uuid, wanted_key text, expiry timestamptz) RETURNS uuid
LANGUAGE plpgsql SET enable_seqscan = off AS $$
BEGIN
    IF EXISTS (SELECT FROM idempotency_keys WHERE user_id = account AND created_at <= expiry) THEN
        DELETE FROM idempotency_keys WHERE user_id = account AND key = wanted_key AND created_at <= expiry;
        DELETE FROM idempotency_keys WHERE user_id = account AND key = ANY (ARRAY(
            SELECT key FROM idempotency_keys WHERE user_id = account AND created_at <= expiry
            ORDER BY created_at LIMIT {most} FOR UPDATE SKIP LOCKED
        ));
    END IF;
    RETURN account;
END
$$
"""


@event.listens_for(metadata, "after_create")
def _declare(_metadata: Any, connection: Connection, **_: Any) -> None:
    connection.exec_driver_sql(SWEEP_FUNCTION.replace("{most}", str(SWEPT_AT_ONCE)))
    connection.exec_driver_sql(f"REVOKE ALL ON FUNCTION {SWEEP} FROM PUBLIC")
    connection.exec_driver_sql(f"GRANT EXECUTE ON FUNCTION {SWEEP} TO {ROLE}")
