"""How rows become JSON, whoever renders them: PostgreSQL in hot statements, Pydantic elsewhere.

Both halves stand side by side because they must print the same bytes: the fields in the shape's order, no blank
between them, and one way to write a timestamp (docs/decisions/0013-timestamps.md).
"""

from collections.abc import Callable
from datetime import UTC, datetime
from json.encoder import encode_basestring
from typing import Annotated, Any, Final, get_args
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError
from sqlalchemy import (
    CTE,
    JSON,
    Boolean,
    ColumnElement,
    DateTime,
    Integer,
    Select,
    String,
    Subquery,
    Text,
    Uuid,
    cast,
    func,
    literal_column,
    select,
)

from .base import Shape


def _to_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise PydanticCustomError("timestamp_range", "The year must be 1 to 9999 in UTC") from None


def render_timestamp(value: datetime) -> str:
    """RFC 3339 in UTC, always six digits and `Z`: 27 characters that sort as text in the order of time."""
    return value.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


# The one way to write a timestamp; `fields` below holds PostgreSQL's half.
Timestamp = Annotated[
    AwareDatetime,
    AfterValidator(_to_utc),
    PlainSerializer(render_timestamp, return_type=str, when_used="json"),
    WithJsonSchema(
        {
            "type": "string",
            "format": "date-time",
            "pattern": r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{6}Z$",
            "examples": ["2026-11-22T09:30:00.000000Z"],
            "description": "RFC 3339 in UTC, always with six digits of a second and `Z`.",
        },
        mode="serialization",
    ),
]


_PATTERN: Final[ColumnElement[str]] = literal_column("""'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'""")
_UTC: Final[ColumnElement[str]] = literal_column("'UTC'")
_OPENING: Final[ColumnElement[str]] = literal_column("'['", Text)
_CLOSING: Final[ColumnElement[str]] = literal_column("']'", Text)
_NOTHING: Final[ColumnElement[str]] = literal_column("''", Text)


def fields(shape: type[Shape], table: Any) -> list[ColumnElement[Any]]:
    """The columns of `table` that `shape` shows, in its order, with timestamps already written as text.

    The writing depends on no session setting (TimeZone, DateStyle), which a pooler could lose.
    """
    return [_written(getattr(table, name)).label(name) for name in shape.model_fields]


def written_timestamp(moment: Any) -> ColumnElement[str]:
    """As `render_timestamp` writes it."""
    return func.to_char(func.timezone(_UTC, moment), _PATTERN, type_=Text)


class Moment(Text):
    """The type of a moment that is written already: text that has nothing to escape."""


def _written(column: Any) -> ColumnElement[Any]:
    if isinstance(column.type, DateTime):
        return written_timestamp(column)
    found: ColumnElement[Any] = column
    return found


def written(shape: type[Shape], table: Any) -> ColumnElement[str]:
    """`shape` of one row of `table` as JSON text: the bytes that `as_object` gives, from the columns themselves.

    row_to_json() looks up the type of every column of every row, and wants a row made for it. A page of 50 takes
    PostgreSQL a fifth less this way.
    """
    parts: list[ColumnElement[Any]] = []
    before = "{"
    for name, field in shape.model_fields.items():
        column = getattr(table, name)
        quote = '"' if isinstance(column.type, DateTime | Uuid | Moment) else ""
        parts += [
            literal_column(f"'{before}\"{name}\":{quote}'"),
            _value(column, type(None) in get_args(field.annotation)),
        ]
        before = f"{quote},"
    return func.concat(*parts, literal_column(f"'{before[:-1]}}}'"), type_=Text)


def form(shape: type[Shape]) -> str:
    """What `written` writes, with a place (`%s`) for each value in the order of `shape`.

    Moments and UUIDs go into it as text, all else as JSON: strings by `as_json_string`.
    """
    quoted = (UUID, AwareDatetime)
    fields = shape.model_fields.items()
    places = [f'"{name}":' + ('"%s"' if field.annotation in quoted else "%s") for name, field in fields]
    return "{" + ",".join(places) + "}"


as_json_string: Final[Callable[[str], str]] = encode_basestring
"""A string as PostgreSQL's to_json() writes it: nothing is escaped that need not be."""


def _value(column: Any, may_be_null: bool) -> ColumnElement[Any]:
    """What stands for `column` in JSON, but for the quotes around what has nothing to escape."""
    if isinstance(column.type, DateTime):
        return _written(column)
    if isinstance(column.type, Boolean):
        return cast(column, Text)
    if isinstance(column.type, String) and not isinstance(column.type, Moment):
        json = func.to_json(column, type_=JSON)
        return func.coalesce(json, literal_column("'null'::json")) if may_be_null else json
    if may_be_null or not isinstance(column.type, Uuid | Integer | Moment):
        raise NotImplementedError(f"{column} has no way to be written yet")
    found: ColumnElement[Any] = column
    return found


def as_object(rows: Subquery | CTE) -> Select[Any]:
    """One text column of JSON for each row of `rows`, which holds `fields(...)`."""
    return select(cast(func.row_to_json(rows.table_valued()), Text).label("json")).select_from(rows)


def as_array(rows: Subquery | CTE) -> Select[Any]:
    """One row with one text column: the JSON array of `rows` in their order, `[]` when there are none.

    json_agg() would do, but it puts a line feed between the elements, so that the bytes would not be Pydantic's.
    """
    elements = func.string_agg(cast(func.row_to_json(rows.table_valued()), Text), literal_column("','"))
    array = _OPENING.concat(func.coalesce(elements, _NOTHING)).concat(_CLOSING)
    return select(cast(array, Text).label("json")).select_from(rows)
