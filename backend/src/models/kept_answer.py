"""A write that may be sent again: its key, what was asked with it, and the answer that was given."""

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
    func,
)
from sqlalchemy import Text as SqlText
from sqlmodel import Field

from .base import Base

KEY_MAX_LENGTH: Final = 255

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
