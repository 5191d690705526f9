"""What every table and every shape stands on: names of constraints, text, the engine's factory.

Rules that hold on both sides are declared once here and read by the Pydantic shapes *and* by the CHECK
constraints, so that neither can drift from the other.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, cast
from uuid import UUID

import asyncpg
from asyncpg.pgproto import pgproto
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from sqlalchemy import DateTime, MetaData, func
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from sqlmodel import Field, SQLModel
from uuid_utils import uuid7

QuickUUID: Final = cast(Callable[[str | bytes], UUID], pgproto.UUID)
"""asyncpg's own: a `uuid.UUID` that is read from text in a ninth of the time, and sent in half. The text has 32 to 36
characters."""

# The characters that do not count as content. PostgreSQL's btrim() knows only U+0020, and what its \s matches
# depends on the collation, so both sides use this list: Unicode's White_Space, and the separators
# U+001C..U+001F which Python's str.isspace() counts too.
WHITE_SPACE: Final = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f\x20\x85\xa0\u1680"
    "\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)

SQLModel.metadata.naming_convention = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
}


def sql_literal(characters: str) -> str:
    r"""The characters as PostgreSQL's `E'\u0009...'`: readable, whatever the client's encoding."""
    return "E'" + "".join(f"\\u{ord(character):04X}" for character in characters) + "'"


def not_blank_check(column: str) -> str:
    return f"btrim({column}, {sql_literal(WHITE_SPACE)}) <> ''"


def finite_check(column: str) -> str:
    """Years 1 to 9999: what Python's datetime can hold. `infinity` and years before Christ are refused.

    In as few words as can be: PostgreSQL parses every CHECK of a table anew for each statement that writes to it.
    """
    return f"{column} >= '0001-01-01 00:00:00+00' AND {column} < '10000-01-01 00:00:00+00'"


def _storable(value: str) -> str:
    # PostgreSQL's text holds every Unicode character but U+0000, and UTF-8 has no form for a lone surrogate.
    if "\x00" in value:
        raise PydanticCustomError("text_nul", "Text must not contain the character U+0000")
    try:
        # The encoder looks at 10,000 characters in the time that a loop in Python takes for ten.
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text_surrogate", "Text must not contain lone surrogates") from None
    return value


def _not_blank(value: str) -> str:
    if not value.strip(WHITE_SPACE):
        raise PydanticCustomError("text_blank", "Text must contain more than white space")
    return value


@dataclass(frozen=True, slots=True)
class _Rule:
    """A rule for text that PostgreSQL sets, and the pattern that tells it to whoever reads the schema."""

    check: Callable[[str], str]
    pattern: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """What is validated out of Python's values is told what is wrong. Out of JSON the pattern says no more than
        that something is, in a fifth of the time: whoever wants to know validates again (`api.bodies`).
        """
        given = handler(source)
        of_json = of_python = given
        if given["type"] == "json-or-python":
            of_json, of_python = given["json_schema"], given["python_schema"]
        checked = core_schema.no_info_after_validator_function(self.check, of_python)
        if of_json["type"] != "str":
            return checked
        # A lone surrogate is no JSON for the parser behind this, so the pattern has not to speak of it.
        return core_schema.json_or_python_schema({**of_json, "pattern": self.pattern}, checked)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        # The pattern of the last rule stands, so a later rule's says what the earlier ones say too.
        return {**handler(schema), "pattern": self.pattern}


# In escapes that every dialect of regular expressions reads alike.
_WHITE_SPACE_IN_PATTERNS: Final = "".join(rf"\u{ord(character):04x}" for character in WHITE_SPACE)

# The one text type is `str` with STORABLE: whatever people may write, as PostgreSQL can store it. A length is
# named before it (`Annotated[str, StringConstraints(...), STORABLE]`), so that it is looked at first.
STORABLE: Final = _Rule(_storable, r"^[^\u0000]*$")
NOT_BLANK: Final = _Rule(_not_blank, rf"^[^\u0000]*[^\u0000{_WHITE_SPACE_IN_PATTERNS}][^\u0000]*$")
Text = Annotated[str, STORABLE]


def new_id() -> UUID:
    """A UUIDv7: near-sequential keys keep the index compact. Nothing may assume that ids rise with time."""
    return QuickUUID(uuid7().bytes)


class Base(SQLModel):
    """The root of tables. An error never quotes what came in."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)  # type: ignore[assignment]


class Shape(BaseModel):
    """The root of what comes in and goes out: closed, and an error never quotes what came in.

    Pydantic's own, and not SQLModel's, whose every object is begun in Python for SQLAlchemy's sake: a batch is
    validated in a third of the time.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, from_attributes=True)


INSTANT: Final[Any] = DateTime(timezone=True)


class Stamped(Base):
    """When a row was made and last changed: both by the database's clock, at the start of the transaction."""

    created_at: datetime = Field(
        default=None,
        sa_type=INSTANT,
        nullable=False,
        sa_column_kwargs={"server_default": func.now()},
    )
    updated_at: datetime = Field(
        default=None,
        sa_type=INSTANT,
        nullable=False,
        sa_column_kwargs={"server_default": func.now(), "onupdate": func.now()},
    )


metadata: MetaData = SQLModel.metadata


def make_engine(connect: Callable[[], Awaitable["asyncpg.Connection[Any]"]]) -> AsyncEngine:
    """An engine over connections that `connect` opens or lends; it keeps none and closes each after use.

    Neither SQLAlchemy nor its errors show a parameter's value. Its own cache of prepared statements is off,
    because behind a pooler the next transaction may meet another backend, where they do not exist.
    """

    def open_adapted() -> Any:
        # `async_creator=` would drop the argument about the cache, so this spells out what it does.
        return dialect.connect(async_creator_fn=connect, prepared_statement_cache_size=0)

    engine = create_async_engine(
        "postgresql+asyncpg://", creator=open_adapted, poolclass=NullPool, hide_parameters=True
    )
    dialect: Any = engine.dialect.dbapi
    return engine
