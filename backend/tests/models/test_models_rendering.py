"""What PostgreSQL writes and what Pydantic writes are the same bytes, whatever the session's settings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from clusters import postgres_15_binaries
from src.config.database import parse
from src.models import TaskRead, UserRead
from src.services import schema, tasks, users
from src.services.statements import Statement
from src.services.task_pages import PageQuery, form_of, statement_for

PAGE = statement_for(form_of(PageQuery()))

MOMENTS = [
    "0001-01-01 00:00:00+00",
    "0001-01-01 00:00:00.000001+00",
    "0999-12-31 23:59:59.999999+00",
    "1969-12-31 23:59:59.9+00",
    "1970-01-01 00:00:00+00",
    "2026-03-29 01:30:00+00",
    "2026-11-22 20:13:25.12+00",
    "2026-11-22 20:13:25.123456+05:30",
    "9999-12-31 23:59:59.999999+00",
]
SETTINGS = [
    "SET timezone = 'UTC'",
    "SET timezone = 'Asia/Kolkata'; SET datestyle = 'German'",
    "SET timezone = 'America/Los_Angeles'; SET datestyle = 'SQL, DMY'; SET intervalstyle = 'iso_8601'",
    "SET lc_time = 'C'; SET extra_float_digits = 0; SET bytea_output = 'escape'; SET timezone = '-03:17'",
]


class Rows:
    def __init__(self, connection: asyncpg.Connection[Any], owner: UUID) -> None:
        self.connection = connection
        self.owner = owner

    async def store(self, **columns: Any) -> UUID:
        columns = dict[str, Any](user_id=self.owner, id=uuid4(), title="a") | columns
        names = ", ".join(columns)
        places = ", ".join(f"${number}" for number in range(1, len(columns) + 1))
        await self.connection.execute(f"INSERT INTO tasks ({names}) VALUES ({places})", *columns.values())
        stored: UUID = columns["id"]
        return stored

    async def json(self, task_id: UUID) -> str:
        arguments = tasks.READ.arguments({"owner": self.owner, "id": task_id})
        return str(await self.connection.fetchval(tasks.READ.sql, *arguments))

    async def shown(self, task_id: UUID) -> TaskRead:
        """The same row as the driver gives it, validated and ready to be printed by Pydantic."""
        row = await self.connection.fetchrow(
            "SELECT * FROM tasks WHERE user_id = $1 AND id = $2", self.owner, task_id
        )
        assert row is not None
        return TaskRead.model_validate(dict(row))


async def rows_of(url: str) -> AsyncIterator[Rows]:
    connection = await asyncpg.connect(url)
    owner = await connection.fetchval("INSERT INTO users (email) VALUES ('a@example.com') RETURNING id")
    yield Rows(connection, owner)
    await connection.close()


@pytest.fixture
async def rows(database_url: str) -> AsyncIterator[Rows]:
    async for opened in rows_of(database_url):
        yield opened


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_timestamp_is_written_alike_under_every_setting(
    rows: Rows, moment: str, setting: str
) -> None:
    task_id = uuid4()
    await rows.connection.execute(
        f"INSERT INTO tasks (user_id, id, title, created_at, updated_at)"
        f" VALUES ('{rows.owner}', '{task_id}', 'a', '{moment}', '{moment}')"
    )
    await rows.connection.execute(setting)
    by_postgresql, shown = await rows.json(task_id), await rows.shown(task_id)
    assert by_postgresql == shown.model_dump_json()
    assert TaskRead.model_validate_json(by_postgresql) == shown


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    title=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40),
    description=st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    is_completed=st.booleans(),
    version=st.integers(1, 2**31 - 1),
)
async def test_every_text_is_written_alike(
    rows: Rows, title: str, description: str | None, is_completed: bool, version: int
) -> None:
    task_id = await rows.store(
        title=f"x{title}", description=description, is_completed=is_completed, version=version
    )
    by_postgresql, shown = await rows.json(task_id), await rows.shown(task_id)
    assert by_postgresql == shown.model_dump_json()
    assert TaskRead.model_validate_json(by_postgresql) == shown
    assert shown.title == f"x{title}"


async def test_a_page_is_written_as_pydantic_writes_a_list(rows: Rows) -> None:
    page: TypeAdapter[list[TaskRead]] = TypeAdapter(list[TaskRead])
    arguments = PAGE.arguments({"owner": rows.owner, "limit": 200})
    assert await rows.connection.fetchval(PAGE.sql, *arguments) == "[]"
    for number in range(3):
        await rows.store(title=f'"{number}",\n')
    text = await rows.connection.fetchval(PAGE.sql, *arguments)
    assert text == page.dump_json(page.validate_json(text)).decode()
    assert len(page.validate_json(text)) == 3


async def test_a_user_is_written_alike(rows: Rows) -> None:
    text = await rows.connection.fetchval(users.READ.sql, *users.READ.arguments({"owner": rows.owner}))
    assert text == UserRead.model_validate_json(text).model_dump_json()


async def test_no_column_that_a_statement_gives_has_the_type_of_a_tables_column(rows: Rows) -> None:
    for statement in everything():
        prepared = await rows.connection.prepare(statement.sql)
        kinds = [attribute.type.name for attribute in prepared.get_attributes()]
        assert kinds[0] == "text", statement
        assert set(kinds) <= {"text", "bool", "int8"}, statement


async def test_statements_survive_a_changed_column_type_and_a_new_column(rows: Rows) -> None:
    """Their result is text that they make, so a plan that was made before the change goes on working."""
    task_id = await rows.store(title="before")
    prepared = {statement: await rows.connection.prepare(statement.sql) for statement in everything()}
    values = {"owner": rows.owner, "id": task_id, "limit": 5, "email": "new@example.com", "title": "after"}
    values |= {"describe": True, "description": "d", "is_completed": True}
    values |= {"epoch": None, "key": "k", "request_hash": bytes(32), "kept_for": timedelta(hours=1)}
    await rows.connection.execute(
        "ALTER TABLE tasks ALTER title TYPE varchar(300), ALTER version TYPE bigint, ADD extra int DEFAULT 1"
    )
    await rows.connection.execute("ALTER TABLE users ALTER email TYPE varchar(300)")
    changed = await prepared[tasks.UPDATE].fetchval(*tasks.UPDATE.arguments(values))
    assert TaskRead.model_validate_json(changed).title == "after"
    values |= {"id": uuid4()}
    somebody = values | {"owner": uuid4()}
    assert await prepared[users.CREATE].fetchval(*users.CREATE.arguments(somebody)) is not None
    for statement in (users.PAGE, users.FIND, users.READ, tasks.CREATE, tasks.READ, PAGE):
        assert await prepared[statement].fetchval(*statement.arguments(values)) is not None
    assert (
        TaskRead.model_validate_json(
            await prepared[tasks.DELETE].fetchval(*tasks.DELETE.arguments(values))
        ).id
        == values["id"]
    )
    for once in (tasks.CREATE_ONCE, tasks.PUT, tasks.PUT_NEW):
        written = await prepared[once].fetchval(*once.arguments(values | {"id": uuid4()}))
        assert TaskRead.model_validate_json(written).title == "after"
    assert await prepared[users.DELETE].fetchval(*users.DELETE.arguments(values))


def everything() -> list[Statement]:
    found = [value for module in (users, tasks) for value in vars(module).values()]
    return [PAGE, *(value for value in found if isinstance(value, Statement))]


@pytest.mark.debian
async def test_postgresql_15_writes_the_same(private_postgres: Any) -> None:
    server = private_postgres(binaries=postgres_15_binaries(), options={"fsync": "off"})
    await schema.create_tables(parse(server.url))
    async for rows in rows_of(server.url):
        for setting in SETTINGS:
            for moment in MOMENTS:
                await test_a_timestamp_is_written_alike_under_every_setting(rows, moment, setting)
        await test_a_page_is_written_as_pydantic_writes_a_list(Rows(rows.connection, await _another(rows)))
        await test_no_column_that_a_statement_gives_has_the_type_of_a_tables_column(rows)
        await test_statements_survive_a_changed_column_type_and_a_new_column(rows)


async def _another(rows: Rows) -> UUID:
    owner: UUID = await rows.connection.fetchval(
        "INSERT INTO users (email) VALUES ('b@example.com') RETURNING id"
    )
    return owner
