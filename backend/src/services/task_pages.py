"""Pages of an owner's tasks: keyset paging both ways, filters, search, counts. Each page is one statement."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple
from uuid import UUID


class Position(NamedTuple):
    """Where a page ended: the timestamp it is sorted by, as PostgreSQL wrote it to the microsecond, and the id."""

    timestamp: str
    id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class PageQuery:
    """Which tasks, in which order. `..._after` and `..._before` are exclusive.

    `q` is looked for, in any case, in title and description, as it is: it knows no wildcards.
    """

    limit: int = 50
    sort: Literal["created_at", "updated_at"] = "created_at"
    descending: bool = True
    after: Position | None = None
    is_completed: bool | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    updated_after: datetime | None = None
    updated_before: datetime | None = None
    q: str | None = None
    count: Literal["none", "exact", "estimated"] = "none"


@dataclass(frozen=True, slots=True)
class PageText:
    """`items` is a JSON array. `last` is the position of its last item, None when there is none.

    `count` is how many tasks all pages together hold; an estimated one is exact up to `COUNT_BOUND` and never more.
    """

    items: str
    last: Position | None
    has_more: bool
    count: int | None
