"""Pages are bounded in bytes: one ends before the task that would exceed the bound, and the next continues there."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from src.services import tasks
from src.services.database import Database
from src.services.paging import PAGE_BYTES
from src.services.tasks import PageQuery, PageText

# What could be taken for the text between two tasks, what JSON escapes to six bytes, and four bytes a character.
HOSTILE = """E'},{"id":"\\\\","id":"' || repeat(E',{"id":"', 5)"""
DESCRIPTIONS = (
    f"CASE i % 5 WHEN 0 THEN repeat('\U0001f600', 10000) WHEN 1 THEN repeat(E'\\x01', 10000)"
    f" WHEN 2 THEN {HOSTILE} WHEN 3 THEN repeat('a', 9000) END"
)
FIRST_LARGE = "CASE WHEN i % 97 < 30 THEN repeat('\U0001f600', 10000) ELSE repeat(E'\\x01', 10000) END"
FIRST_SMALL = "CASE WHEN i % 97 < 30 THEN repeat('a', 10000) ELSE repeat('\U0001f600', 10000) END"


async def fill(connection: asyncpg.Connection[Any], count: int, description: str) -> UUID:
    owner = uuid4()
    await connection.execute("INSERT INTO users (id) VALUES ($1)", owner)
    await connection.execute(
        "INSERT INTO tasks (user_id, title, description, is_completed, created_at, updated_at)"
        f" SELECT $1, 'a task ' || i, {description}, i % 3 = 0,"
        " timestamptz '2026-01-01Z' + (i / 3) * interval '1 second',"
        " timestamptz '2026-02-01Z' + (i * 7 % 50) * interval '1 second'"
        f" FROM generate_series(1, {count}) i",
        owner,
    )
    return owner


async def pages(database: Database, owner: UUID, **query: Any) -> list[PageText]:
    found = [await tasks.page(database, owner, PageQuery(**query))]
    while found[-1].has_more:
        assert found[-1].last is not None
        found.append(await tasks.page(database, owner, PageQuery(**query | {"after": found[-1].last})))
        assert len(found) < 500
    return found


@pytest.mark.parametrize(
    "description", [DESCRIPTIONS, FIRST_LARGE, FIRST_SMALL], ids=["mixed", "large first", "small first"]
)
@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("sort", ["created_at", "updated_at"])
async def test_pages_of_large_tasks_are_bounded_and_hold_every_task_once(
    either: Database, owner: asyncpg.Connection[Any], sort: str, descending: bool, description: str
) -> None:
    person = await fill(owner, 260, description)
    order = "DESC" if descending else "ASC"
    for query, condition, count in (
        ({}, "true", "none"),
        ({"is_completed": False}, "NOT is_completed", "exact"),
        ({"q": "a TASK"}, "true", "estimated"),
    ):
        rows = await owner.fetch(
            f"SELECT id, title, description FROM tasks WHERE user_id = $1 AND {condition}"
            f" ORDER BY {sort} {order}, id {order}",
            person,
        )
        found = await pages(either, person, limit=200, sort=sort, descending=descending, count=count, **query)
        assert max(len(page.items.encode()) for page in found) <= PAGE_BYTES
        shown = [task for page in found for task in json.loads(page.items)]
        assert [(UUID(task["id"]), task["title"], task["description"]) for task in shown] == [
            tuple(row) for row in rows
        ]
        # Large ones are not cut much too early either: nearly every page holds a quarter of the bound.
        assert len(found) <= 1 + sum(len(page.items.encode()) for page in found) // (PAGE_BYTES // 5)
        assert {page.count for page in found} == {None if count == "none" else len(rows)}


async def test_a_page_that_just_fits_is_whole_and_one_byte_more_cuts_it(
    either: Database, owner: asyncpg.Connection[Any]
) -> None:
    person = await fill(owner, 150, "repeat('a', 6000)")
    (whole,) = await pages(either, person, limit=200)
    # The brackets and the commas are what the bound leaves out: it is of the tasks, joined by commas.
    missing = PAGE_BYTES - (len(whole.items.encode()) - 2)
    for more, sizes in ((missing, [150]), (missing + 1, [149, 1])):
        await owner.execute(
            "UPDATE tasks SET description = repeat('a', 6000 + $2::int / 150"
            " + (title = 'a task 1')::int * ($2::int % 150)) WHERE user_id = $1",
            person,
            more,
        )
        found = await pages(either, person, limit=200)
        assert [len(json.loads(page.items)) for page in found] == sizes


async def test_the_row_that_tells_of_a_next_page_may_be_the_one_too_large(
    either: Database, owner: asyncpg.Connection[Any]
) -> None:
    person = await fill(owner, 260, "repeat('\U0001f600', 10000)")
    for limit in (1, 2, 25, 26, 27, 200):
        found = await pages(either, person, limit=limit)
        sizes = [len(json.loads(page.items)) for page in found]
        assert sum(sizes) == 260
        assert max(sizes) == min(limit, 26)
        assert found[-1].has_more is False


async def test_pages_of_ordinary_tasks_are_cut_by_their_limit_alone(
    either: Database, owner: asyncpg.Connection[Any]
) -> None:
    person = await fill(owner, 450, "repeat('words and ', 20)")
    found = await pages(either, person, limit=200)
    assert [len(json.loads(page.items)) for page in found] == [200, 200, 50]
