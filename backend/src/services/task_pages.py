"""Pages of an owner's tasks: keyset paging both ways, filters, search, counts. Each page is one statement.

A page begins where the one before ended, by the timestamp it is sorted by and the id, which the indexes hold in
this order: page 1,000 costs what page 1 costs, and a task that comes or goes moves no other to another page.
There is a statement for each combination of filters, so that PostgreSQL plans each for what it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple
from uuid import UUID

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Integer,
    Select,
    Subquery,
    Text,
    Uuid,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    null,
    or_,
    select,
    tuple_,
)
from sqlmodel import col

from ..models import Task, TaskRead
from ..models.base import QuickUUID
from ..models.rendering import render_timestamp, written, written_timestamp
from .ownership import me, mine
from .paging import PAGE_BYTES, bounded
from .statements import Statement
from .task_rows import after, instant

if TYPE_CHECKING:
    from .database import Database

SEARCH_SECONDS: Final = 1.0
"""What a search or an exact count may take: both read as many rows as their owner has."""

COUNT_BOUND: Final = 1_000
"""As far as an estimated count counts (docs/decisions/0030-pages.md)."""


class Position(NamedTuple):
    """Where a page ended: the timestamp it is sorted by, as PostgreSQL wrote it to the microsecond, and the id."""

    timestamp: str
    id: UUID


@dataclass(frozen=True, kw_only=True)
class PageQuery:
    """Which tasks, in which order. `..._after` and `..._before` are exclusive.

    `q` is looked for, in any case, in title and description, as it is: it knows no wildcards. What follows from the
    query alone is worked out once: most lists are asked for by a query that was asked before.
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

    @cached_property
    def list_of(self) -> bytes:
        """What makes its list this one, but for the owner: pages of any size, counted or not, belong to it."""
        bounds = (self.created_after, self.created_before, self.updated_after, self.updated_before)
        return repr(("tasks", self.sort, self.descending, self.is_completed, *bounds, self.q)).encode()

    @cached_property
    def prepared(self) -> tuple[Statement, dict[str, Any]]:
        """Its statement, and the values but for the owner. Raises `Invalid` for a limit outside 1 to 200."""
        form = form_of(self)
        values: dict[str, Any] = {"limit": bounded(self.limit)}
        values |= {name: render_timestamp(getattr(self, name)) for name in form.bounds}
        if self.after is not None:
            values["after_at"], values["after_id"] = self.after
        if self.q is not None:
            values["pattern"] = _pattern(self.q)
        return statement_for(form), values


@dataclass(slots=True)
class PageText:
    """`items` is a JSON array. `last` is the position of its last item, None when there is none.

    `count` is how many tasks all pages together hold; an estimated one is exact below `COUNT_BOUND`, and
    `COUNT_BOUND` says "that many or more".
    """

    items: str
    last: Position | None
    has_more: bool
    count: int | None


@dataclass(frozen=True, slots=True)
class Form:
    """What makes one query another statement, and not the same with other values."""

    sort: str
    descending: bool
    continued: bool
    is_completed: bool | None
    bounds: tuple[str, ...]
    searching: bool
    count: str


_BOUNDS: Final = ("created_after", "created_before", "updated_after", "updated_before")


async def page(db: Database, owner: UUID, query: PageQuery | None = None) -> PageText:
    """One page. Raises `Invalid` for a limit outside 1 to 200.

    A search or an exact count that takes more than `SEARCH_SECONDS` raises `Unavailable` (`statement-timeout`).
    """
    statement, values = (query or PageQuery()).prepared
    row = await db.row(statement, owner=owner, **values)
    assert row is not None
    items, last_at, last_id, has_more, total, too_large = row
    if too_large:
        return PageText(*_shortened(items, (query or PageQuery()).sort), True, total)
    last = None if last_at is None else Position(last_at, QuickUUID(last_id))
    return PageText(_cut(items) if has_more else items, last, has_more, total)


# Between two tasks and nowhere within one: in a string of JSON every quote has a backslash before it.
_BETWEEN: Final = ',{"id":"'


def _cut(items: str) -> str:
    """Without the last task."""
    return items[: items.rindex(_BETWEEN)] + "]"


def _shortened(items: str, sort: str) -> tuple[str, Position]:
    """The tasks of `items` that fit into `PAGE_BYTES`, and the position of the last one; the end may be broken off."""
    content = items.encode()
    kept = content[: content.rindex(_BETWEEN.encode(), 0, PAGE_BYTES)].decode()
    # A JSON array of one task has no separator: then the task begins after the bracket.
    last = json.loads(kept[kept.rfind(_BETWEEN) + 1 :])
    return kept + "]", Position(last[sort], QuickUUID(last["id"]))


def form_of(query: PageQuery) -> Form:
    return Form(
        query.sort,
        query.descending,
        query.after is not None,
        query.is_completed,
        tuple(name for name in _BOUNDS if getattr(query, name) is not None),
        query.q is not None,
        query.count,
    )


@lru_cache(maxsize=512)
def statement_for(form: Form) -> Statement:
    """The statement of this form, compiled at its first use."""
    slow = form.searching or form.count == "exact"
    return Statement(
        "tasks.search" if form.searching else "tasks.page",
        lambda: _page(form),
        repeatable=True,
        within_seconds=SEARCH_SECONDS if slow else None,
    )


def _pattern(q: str) -> str:
    escaped = q.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return f"%{escaped}%"


def _conditions(who: CTE, form: Form) -> list[ColumnElement[bool]]:
    found: list[Any] = [mine(who, Task.user_id)]
    if form.is_completed is not None:
        found.append(col(Task.is_completed) if form.is_completed else ~col(Task.is_completed))
    for name in form.bounds:
        field, _, side = name.rpartition("_")
        limit = instant(bindparam(name, type_=Text))
        column = col(getattr(Task, f"{field}_at"))
        found.append(column > limit if side == "after" else column < limit)
    return found


def _matches(source: Any) -> ColumnElement[bool]:
    pattern = cast(bindparam("pattern", type_=Text), Text)
    return or_(source.title.ilike(pattern), source.description.ilike(pattern))


def _page(form: Form) -> Any:
    who = me()
    conditions = _conditions(who, form)
    rows = select(*Task.__table__.columns).where(*conditions)  # type: ignore[attr-defined]
    if form.continued:
        here = tuple_(col(getattr(Task, form.sort)), col(Task.id))
        there = tuple_(
            instant(bindparam("after_at", type_=Text)),
            cast(bindparam("after_id", type_=Uuid), Uuid),
        )
        rows = rows.where(here < there if form.descending else here > there)
    # One more than asked for tells whether there is a next page.
    limit = cast(bindparam("limit", type_=Integer), Integer)
    wanted = limit + literal_column("1")
    if form.searching:
        # Read in its order until enough was found: the search is behind the bound, so it is no reason to sort.
        read = _some(rows.order_by(*_order(Task, form)), literal_column("2147483647")).subquery("read").c
        rows = select(*read).where(_matches(read))
        ordered = _some(rows.order_by(*_order(read, form)), wanted).subquery("found")
    else:
        ordered = _some(rows.order_by(*_order(Task, form)), wanted).subquery("found")
    return after(who, _gathered(ordered, form.sort, limit, _total(conditions, form)))


def _order(source: Any, form: Form) -> list[Any]:
    keys = [getattr(source, form.sort), source.id]
    return [key.desc() for key in keys] if form.descending else keys


def _some(rows: Select[Any], count: ColumnElement[int]) -> Select[Any]:
    """The first of `rows`, by a number that the planner does not know, because it is a subselect.

    It expects every owner to have few tasks, and would rather sort them all than read that many in the order of
    an index. When it does not know how many are wanted it expects the first tenth, and takes the order.
    """
    return rows.limit(select(count).scalar_subquery())


def _gathered(rows: Subquery, sort: str, limit: ColumnElement[int], total: Any) -> Select[Any]:
    """The page in one row; `items` holds one row too many, if there is one: see `_cut`.

    To number the rows, so as to leave that one out, takes PostgreSQL a tenth of the page, and so would a running sum of
    their sizes. So a page is measured as a whole, and only the beginning of one that is too large is sent: as many
    characters as have `PAGE_BYTES` on average. See `_shortened`.
    """
    joined = func.string_agg(written(TaskRead, rows.c), literal_column("','", Text))
    there = func.count()
    last = func.least(there, limit)
    page = (
        select(
            joined.label("joined"),
            written_timestamp(func.array_agg(rows.c[sort])[last]).label("last_at"),
            cast(func.array_agg(rows.c.id)[last], Text).label("last_id"),
            (there > limit).label("has_more"),
        )
        .select_from(rows)
        .subquery("page")
        .c
    )
    most = literal_column(str(PAGE_BYTES), Integer)
    size = func.octet_length(page.joined)
    beginning = func.left(
        page.joined, cast(cast(func.char_length(page.joined), BigInteger) * most // size, Integer)
    )
    items = case((size > most, beginning), else_=page.joined)
    return select(
        func.concat(literal_column("'['"), items, literal_column("']'"), type_=Text).label("items"),
        page.last_at,
        page.last_id,
        page.has_more,
        total.label("total"),
        (size > most).label("too_large"),
    )


def _total(conditions: list[ColumnElement[bool]], form: Form) -> Any:
    if form.count == "none":
        return cast(null(), BigInteger)
    counted: Select[Any] = select(literal_column("1").label("one")).select_from(Task).where(*conditions)
    if form.searching:
        counted = counted.where(_matches(Task))
    if form.count == "estimated":
        counted = _some(counted.order_by(*_order(Task, form)), literal_column(str(COUNT_BOUND)))
    inner = counted.subquery("counted")
    return select(func.count()).select_from(inner).scalar_subquery()
