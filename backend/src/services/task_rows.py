"""What every statement about tasks is made of: who asks, which row, how it is written and by which tag it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from sqlalchemy import BigInteger, ColumnElement, Text, cast, extract, func, literal_column
from sqlmodel import col

from ..models import Task


class Author(Protocol):
    """Whoever writes: their user id, and the e-mail their account gets if this write makes it."""

    @property
    def user_id(self) -> UUID: ...

    @property
    def email(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Known:
    """An author whose account exists already."""

    user_id: UUID
    email: str | None = None


class Rendered(NamedTuple):
    """A task's JSON (`TaskRead`), and its entity tag without the quotes that HTTP puts around it."""

    body: str
    etag: str


class Created(NamedTuple):
    """A task that was made or, for PUT, put in another's place; `replayed` says it was made by an earlier request."""

    body: str
    etag: str
    task_id: UUID
    replayed: bool = False


class Put(NamedTuple):
    """`created` is False when an earlier version was replaced."""

    body: str
    etag: str
    created: bool


def etag_of(version: Any, updated_at: Any) -> ColumnElement[str]:
    """The entity tag: the version and the microsecond of the last change.

    The version alone would come again after a task was deleted and another put in its place.
    """
    micros = cast(extract("epoch", updated_at) * literal_column("1000000"), BigInteger)
    return cast(version, Text).concat(literal_column("'-'", Text)).concat(func.to_hex(micros))


def tag(table: Any = Task) -> ColumnElement[str]:
    return etag_of(col(table.version), col(table.updated_at))
