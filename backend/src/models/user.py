"""A user: who owns tasks. The tables, and the shapes that come in and go out."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final
from uuid import UUID

from email_validator import EmailNotValidError, validate_email
from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError
from sqlalchemy import CheckConstraint, DateTime, Integer, UniqueConstraint, Uuid, func, text
from sqlalchemy import Text as SqlText
from sqlmodel import Field, Relationship

from .base import INSTANT, Base, Shape, Stamped, Text, finite_check, new_id
from .rendering import Timestamp

if TYPE_CHECKING:
    from .task import Task

EMAIL_MAX_LENGTH: Final = 255


def _normalised_email(value: str) -> str:
    """The address as its ASCII form in lower case, so that Python's and PostgreSQL's lower() cannot differ.

    Only the syntax is looked at, never DNS. International domains are kept in their `xn--` form; a local part
    outside ASCII has no such form and is refused.
    """
    try:
        address = validate_email(value, check_deliverability=False, allow_smtputf8=False)
    except EmailNotValidError:
        raise PydanticCustomError("email", "This is not an e-mail address we can store") from None
    normalised = (address.ascii_email or "").lower()
    if not 0 < len(normalised) <= EMAIL_MAX_LENGTH:
        raise PydanticCustomError("email_length", "An e-mail address has 255 characters at most")
    return normalised


Email = Annotated[
    Text,
    AfterValidator(_normalised_email),
    WithJsonSchema(
        {
            "type": "string",
            "format": "email",
            "maxLength": EMAIL_MAX_LENGTH,
            "examples": ["ada@example.com"],
            "description": "Stored in lower case and as ASCII; international domains in their `xn--` form.",
        }
    ),
]


# Byte order: the same on every server, and no index to rebuild when a C library changes its collations.
_ASCII: Final[Any] = SqlText(collation="C")


class User(Stamped, table=True):
    """The table `users`. Its `tasks` are loaded only when asked for (`selectinload(User.tasks)`).

    Accounts of our own have an e-mail. A user whose identity comes from elsewhere may have none: their issuer
    told none, or another user has it. Raising `token_epoch` ends every token of ours that names an earlier one;
    from `disabled_at` on nobody writes as this user, or logs in.
    """

    __tablename__ = "users"
    __table_args__ = (
        UniqueConstraint("email", name="uq_users_email"),
        CheckConstraint("email = lower(email)", name="email_lower"),
        CheckConstraint(f"char_length(email) BETWEEN 3 AND {EMAIL_MAX_LENGTH}", name="email_length"),
        CheckConstraint("email ~ '^[!-?A-~]+@[!-?A-~]+$'", name="email_shape"),
        CheckConstraint("token_epoch >= 0", name="token_epoch_positive"),
        CheckConstraint(finite_check("created_at"), name="created_at_finite"),
        CheckConstraint(finite_check("updated_at"), name="updated_at_finite"),
    )
    __mapper_args__: ClassVar[dict[str, Any]] = {"eager_defaults": True}

    id: UUID = Field(
        default_factory=new_id,
        primary_key=True,
        sa_type=Uuid,
        sa_column_kwargs={"server_default": text("gen_random_uuid()")},
    )
    email: str | None = Field(default=None, sa_type=_ASCII, nullable=True)
    token_epoch: int = Field(
        default=None, sa_type=Integer, nullable=False, sa_column_kwargs={"server_default": text("0")}
    )
    disabled_at: datetime | None = Field(default=None, sa_type=INSTANT, nullable=True)

    tasks: list["Task"] = Relationship(
        back_populates="user",
        sa_relationship_kwargs={
            "cascade": "all, delete-orphan",
            "passive_deletes": True,
            "lazy": "raise",
            "order_by": "Task.created_at.desc(), Task.id.desc()",
        },
    )


class DeletedUser(Base, table=True):
    """The table `deleted_users`: who was deleted, filled by a trigger, so that no old token makes them again."""

    __tablename__ = "deleted_users"

    id: UUID = Field(primary_key=True, sa_type=Uuid)
    deleted_at: datetime = Field(
        default=None,
        sa_type=DateTime(timezone=True),
        nullable=False,
        sa_column_kwargs={"server_default": func.now()},
    )


class UserCreate(Shape):
    """What makes a user."""

    email: Email


class UserRead(Shape):
    """A user as it is shown. The fields stand in the order in which PostgreSQL writes them."""

    id: UUID
    email: str | None
    created_at: Timestamp
    updated_at: Timestamp
