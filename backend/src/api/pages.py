"""Lists: what a client may ask of one, and the answer, put together around the text that PostgreSQL made."""

# FastAPI reads the annotations of dependencies, so they stay real types here.

import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, Final, Literal
from urllib.parse import parse_qsl, urlencode
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import PydanticCustomError, PydanticKnownError
from starlette.requests import Request
from starlette.responses import Response

from ..errors import InputFault, Invalid
from ..models import TaskRead
from ..models.base import STORABLE
from ..models.rendering import Timestamp
from ..services.task_pages import COUNT_BOUND, PageQuery, PageText
from . import problems
from .cursors import MAX_LENGTH, Cursors
from .written import Written

_RFC_3339: Final = re.compile(
    r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII
)


def _whole_number(value: object) -> object:
    # Pydantic would take 50.0, 5_0 and +50 too.
    if isinstance(value, str) and not re.fullmatch(r"-?[0-9]{1,18}", value):
        raise PydanticKnownError("int_parsing")
    return value


def _truth(value: object) -> object:
    # Pydantic would take yes, on, 1 and t too.
    return {"true": True, "false": False}.get(value, 2) if isinstance(value, str) else value


def _instant(value: object) -> object:
    # Pydantic would take seconds since 1970 too.
    if isinstance(value, str) and not _RFC_3339.fullmatch(value):
        raise PydanticCustomError("datetime_parsing", "Not RFC 3339")
    return value


# Of a query string that is remembered.
_SHORT: Final = 200
# As we make them, and MAX_LENGTH long at most, so that nothing in it is to be decoded or refused.
_CURSOR: Final = re.compile(r"(?:^|&)cursor=([A-Za-z0-9_-]{1,200})(?=&|$)")

Instant = Annotated[Timestamp, BeforeValidator(_instant), Field(json_schema_extra={"format": "date-time"})]


class TaskQuery(BaseModel):
    """Which of the caller's tasks, in which order."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    limit: Annotated[int, BeforeValidator(_whole_number)] = Field(
        50, ge=1, le=200, description="Tasks on a page."
    )
    cursor: str | None = Field(
        None,
        max_length=MAX_LENGTH,
        description="`next_cursor` of the page before, asked for with the same filters and order.",
    )
    is_completed: Annotated[bool | None, BeforeValidator(_truth)] = Field(
        None, description="Only completed tasks, or only open ones."
    )
    created_after: Instant | None = Field(None, description="Only tasks created later than this.")
    created_before: Instant | None = Field(None, description="Only tasks created earlier than this.")
    updated_after: Instant | None = Field(None, description="Only tasks last changed later than this.")
    updated_before: Instant | None = Field(None, description="Only tasks last changed earlier than this.")
    q: Annotated[str, StringConstraints(min_length=1, max_length=255), STORABLE] | None = Field(
        None, description="Only tasks with this text in title or description, whatever its case."
    )
    sort: Literal["created_at", "updated_at"] = Field("created_at", description="What they are sorted by.")
    order: Literal["desc", "asc"] = Field("desc", description="The newest or the oldest first.")
    count: Literal["none", "exact", "estimated"] = Field(
        "none",
        description=(
            f"Whether all pages together are counted; `estimated` stops at {COUNT_BOUND}, which then means "
            "that many or more."
        ),
    )


class TaskPage(BaseModel):
    """A page of tasks."""

    items: list[TaskRead]
    next_cursor: str | None = Field(description="For the next page; null on the last.")
    count: int | None = Field(description="The tasks of all pages, when asked for.")


@dataclass(frozen=True, slots=True)
class Asking:
    """What a query string asks for. `kept` are its parameters, but for the cursor, as the next page is asked for."""

    first: PageQuery
    cursor: str | None
    kept: str


class Listing:
    """One request for a page: the query that it comes to, and the answer to it."""

    def __init__(self, asking: Asking, path: str, owner: UUID, cursors: Cursors) -> None:
        self._asking = asking
        self._path = path
        self._owner = owner
        self._cursors = cursors

    def query(self) -> PageQuery:
        """Raises `Invalid` for a cursor that does not belong to this list."""
        asking = self._asking
        if asking.cursor is None:
            return asking.first
        position = self._cursors.open(asking.cursor, self._owner, asking.first)
        return replace(asking.first, after=position)

    def answer(self, page: PageText) -> Response:
        headers = [(b"cache-control", b"no-store")]
        following = "null"
        if page.has_more and page.last is not None:
            cursor = self._cursors.seal(page.last, self._owner, self._asking.first)
            following = f'"{cursor}"'
            link = f'<{self._path}?{self._asking.kept}cursor={cursor}>; rel="next"'
            headers.append((b"link", link.encode("latin-1")))
        count = "null" if page.count is None else page.count
        body = f'{{"items":{page.items},"next_cursor":{following},"count":{count}}}'
        return Written(body, headers)


class Asked:
    """Reads a list's parameters: each once, none that is not known."""

    async def __call__(self, request: Request) -> Asking:
        # Starlette would read U+FFFD where no UTF-8 is, and something else would be looked for.
        text = request.scope["query_string"].decode("latin-1")
        # Lists are asked for with few different texts, and over and over; only cursors differ.
        cursor = _CURSOR.search(text)
        rest = text if cursor is None else text[: cursor.start()] + text[cursor.end() :]
        # A second cursor, also one whose name is escaped, is looked for the long way.
        if len(rest) > _SHORT or "cursor" in rest or (cursor is not None and "%" in rest):
            return _read(text)
        asking = _read_once(rest)
        return asking if cursor is None else replace(asking, cursor=cursor[1])

    def describe(self, operation: dict[str, Any]) -> None:
        schema = TaskQuery.model_json_schema()
        for name, one in schema["properties"].items():
            kind = next((part for part in one.get("anyOf", ()) if part.get("type") != "null"), one)
            kind = {key: value for key, value in kind.items() if key not in ("title", "description")}
            operation.setdefault("parameters", []).append(
                {"name": name, "in": "query", "description": one["description"], "schema": kind}
            )


def _read(text: str) -> Asking:
    given = parse_qsl(text, keep_blank_values=True, errors="surrogateescape")
    names = {name for name, _ in given}
    if not names <= TaskQuery.model_fields.keys():
        raise Invalid(faults=[InputFault("", "In the query: Has a parameter that is not known here.")])
    if len(names) < len(given):
        raise Invalid(faults=[InputFault("", "In the query: Has a parameter twice.")])
    try:
        asked = TaskQuery.model_validate(dict(given))
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
    else:
        return _asking(asked)
    raise problems.invalid([{**fault, "loc": ("query", *fault["loc"])} for fault in found])


# What is refused is not remembered: `lru_cache` keeps no exceptions.
_read_once: Final = lru_cache(maxsize=512)(_read)


def _asking(asked: TaskQuery) -> Asking:
    first = PageQuery(
        limit=asked.limit,
        sort=asked.sort,
        descending=asked.order == "desc",
        is_completed=asked.is_completed,
        created_after=asked.created_after,
        created_before=asked.created_before,
        updated_after=asked.updated_after,
        updated_before=asked.updated_before,
        q=asked.q,
        count=asked.count,
    )
    told = asked.model_dump(mode="json", exclude_defaults=True, exclude={"cursor"})
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in told.items()}
    return Asking(first, asked.cursor, f"{urlencode(texts)}&" if texts else "")
