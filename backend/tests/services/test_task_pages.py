"""Pages of tasks: every one exactly once, whatever comes and goes; filters, search, counts, and their bounds."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from owning import TASKS, create, listed, somebody, update
from src.config.database import parse
from src.errors import Invalid, Unavailable
from src.models import TaskRead
from src.models.rendering import render_timestamp
from src.services import task_pages, tasks
from src.services.database import Database
from src.services.task_pages import COUNT_BOUND, Form, form_of, statement_for
from src.services.tasks import Known, PageQuery, PageText, Position
from waiting import eventually

START = datetime(2026, 1, 1, tzinfo=UTC)


async def store(
    database: Database, owner: Known, *moments: tuple[datetime, datetime], **columns: Any
) -> None:
    """Tasks with these `created_at` and `updated_at`, straight into the table."""
    await create(database, owner, title="first")
    async with database.transaction(owner=owner.user_id) as connection:
        await connection.execute("DELETE FROM tasks WHERE user_id = $1", owner.user_id)
        await connection.executemany(
            "INSERT INTO tasks (user_id, id, title, description, is_completed, created_at, updated_at)"
            " VALUES ($1, $2, $3, $4, $5, $6::text::timestamptz, $7::text::timestamptz)",
            [
                (
                    owner.user_id,
                    uuid4(),
                    columns.get("title", "a"),
                    columns.get("description"),
                    number % 3 == 0,
                    render_timestamp(created),
                    render_timestamp(updated),
                )
                for number, (created, updated) in enumerate(moments)
            ],
        )


async def pages(database: Database, owner: Known, **query: Any) -> list[PageText]:
    """Page after page, until there is no more."""
    found = [await tasks.page(database, owner.user_id, PageQuery(**query))]
    while found[-1].has_more:
        assert found[-1].last is not None
        after = PageQuery(**query | {"after": found[-1].last})
        found.append(await tasks.page(database, owner.user_id, after))
        assert len(found) < 1000
    return found


async def walked(database: Database, owner: Known, **query: Any) -> list[TaskRead]:
    return [
        task for page in await pages(database, owner, **query) for task in TASKS.validate_json(page.items)
    ]


async def test_a_page_holds_the_newest_first(either: Database) -> None:
    ada = somebody()
    made = [await create(either, ada, is_completed=n % 2 == 0) for n in range(6)]
    newest_first = made[::-1]
    assert await listed(either, ada) == newest_first
    assert await listed(either, ada, limit=2) == newest_first[:2]
    assert await listed(either, ada, descending=False) == made
    done = await listed(either, ada, is_completed=True)
    assert done == [task for task in newest_first if task.is_completed]
    todo = await listed(either, ada, is_completed=False)
    assert todo == [task for task in newest_first if not task.is_completed]
    changed = await update(either, ada, made[2].id, title="b")
    assert (await listed(either, ada, sort="updated_at"))[0] == changed


async def test_a_page_ends_between_two_tasks_whatever_they_say(either: Database) -> None:
    ada = somebody()
    title = '","x":1},{"id":"a\\",{"'
    await create(either, ada, title=title, description=title)
    last = await create(either, ada, title=title, description=title)
    page = await tasks.page(either, ada.user_id, PageQuery(limit=1))
    assert page.has_more
    assert TASKS.validate_json(page.items) == [last]
    assert last.title == title


async def test_an_empty_page_says_that_it_is(either: Database) -> None:
    page = await tasks.page(either, uuid4(), PageQuery(count="exact"))
    assert page == PageText("[]", None, False, 0)


async def test_a_page_says_whether_there_is_more_and_where_it_ended(either: Database) -> None:
    ada = somebody()
    made = [await create(either, ada) for _ in range(3)]
    page = await tasks.page(either, ada.user_id, PageQuery(limit=2))
    assert page.has_more
    assert page.last == Position(json.loads(page.items)[1]["created_at"], made[1].id)
    page = await tasks.page(either, ada.user_id, PageQuery(limit=2, after=page.last))
    assert not page.has_more
    assert page.last is not None
    assert page.last.id == made[0].id
    page = await tasks.page(either, ada.user_id, PageQuery(limit=3))
    assert (page.has_more, len(json.loads(page.items)), page.count) == (False, 3, None)


@pytest.mark.parametrize("limit", [0, -1, 201, 2**63])
async def test_a_page_of_tasks_is_bounded(either: Database, limit: int) -> None:
    with pytest.raises(Invalid):
        await tasks.page(either, uuid4(), PageQuery(limit=limit))


@pytest.mark.parametrize("sort", ["created_at", "updated_at"])
@pytest.mark.parametrize("descending", [True, False])
async def test_every_task_is_seen_once_in_order_though_many_are_of_one_instant(
    either: Database, sort: Any, descending: bool
) -> None:
    ada = somebody()
    # To the microsecond, and both ways round.
    moments = [
        (START + timedelta(microseconds=n // 7), START - timedelta(microseconds=n // 5)) for n in range(60)
    ]
    await store(either, ada, *moments)
    for limit in (1, 4, 60, 200):
        seen = await walked(either, ada, sort=sort, descending=descending, limit=limit)
        assert seen == sorted(seen, key=lambda task: (getattr(task, sort), task.id), reverse=descending)
        assert len({task.id for task in seen}) == 60


async def test_the_ends_of_time_can_be_paged_past(either: Database) -> None:
    ada = somebody()
    ends = [datetime.min.replace(tzinfo=UTC), START, datetime.max.replace(tzinfo=UTC)]
    await store(either, ada, *((end, end) for end in ends))
    assert [task.created_at for task in await walked(either, ada, limit=1)] == ends[::-1]
    assert [task.created_at for task in await walked(either, ada, limit=1, descending=False)] == ends


async def test_what_comes_and_goes_moves_nothing_to_another_page(either: Database) -> None:
    ada = somebody()
    stays = {(await create(either, ada)).id for _ in range(30)}
    goes = [(await create(either, ada)).id for _ in range(10)]
    for descending in (True, False):
        seen: list[UUID] = []
        query = PageQuery(limit=3, descending=descending)
        while True:
            page = await tasks.page(either, ada.user_id, query)
            seen += [task.id for task in TASKS.validate_json(page.items)]
            if not page.has_more:
                break
            await create(either, ada)
            if goes:
                await tasks.delete(either, ada, goes.pop())
            query = PageQuery(limit=3, descending=descending, after=page.last)
            assert len(seen) < 200
        assert stays <= set(seen)
        assert len(seen) == len(set(seen))


SECONDS = st.integers(0, 12)
BOUND = st.none() | SECONDS.map(lambda n: START + timedelta(seconds=n))


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    stamps=st.lists(st.tuples(SECONDS, SECONDS), max_size=25),
    query=st.fixed_dictionaries(
        {
            "created_after": BOUND,
            "created_before": BOUND,
            "updated_after": BOUND,
            "updated_before": BOUND,
            "is_completed": st.none() | st.booleans(),
            "sort": st.sampled_from(["created_at", "updated_at"]),
            "descending": st.booleans(),
            "limit": st.integers(1, 8),
            "q": st.sampled_from([None, "A", "nowhere"]),
            "count": st.sampled_from(["none", "exact", "estimated"]),
        }
    ),
)
async def test_any_filters_find_what_a_list_comprehension_finds(
    app_database: Database, stamps: list[tuple[int, int]], query: dict[str, Any]
) -> None:
    ada = somebody()
    await store(
        app_database, ada, *((START + timedelta(seconds=a), START + timedelta(seconds=b)) for a, b in stamps)
    )
    everything = await listed(app_database, ada, limit=200)
    wanted = [
        task
        for task in everything
        if (query["created_after"] is None or task.created_at > query["created_after"])
        and (query["created_before"] is None or task.created_at < query["created_before"])
        and (query["updated_after"] is None or task.updated_at > query["updated_after"])
        and (query["updated_before"] is None or task.updated_at < query["updated_before"])
        and (query["is_completed"] is None or task.is_completed is query["is_completed"])
        and query["q"] != "nowhere"
    ]
    wanted.sort(key=lambda task: (getattr(task, query["sort"]), task.id), reverse=query["descending"])
    found = await pages(app_database, ada, **query)
    assert [task for page in found for task in TASKS.validate_json(page.items)] == wanted
    count = None if query["count"] == "none" else len(wanted)
    assert {page.count for page in found} == {count}


# Search


@pytest.mark.parametrize(
    ("title", "description", "q", "matches"),
    [
        ("Buy MILK", None, "milk", True),
        ("Buy", "oat milk", "MILK", True),
        ("Buy", None, "milk", False),
        ("100%", None, "0%", True),
        ("100", None, "0%", False),
        ("a_b", None, "a_b", True),
        ("axb", None, "a_b", False),
        ("C:\\temp", None, ":\\t", True),
        ("C:/temp", None, "\\", False),
        ("back\\%slash", None, "\\%", True),
        ("Größe", None, "größe", True),
        ("ÉTÉ", None, "été", True),
        ("🎉 party", None, "🎉", True),
        ("two\nlines", "x", "two\nli", True),
        ("it's", None, "'", True),
        ("a", None, "", True),
    ],
)
async def test_a_search_takes_its_words_as_they_are(
    either: Database, title: str, description: str | None, q: str, matches: bool
) -> None:
    ada, bob = somebody(), somebody()
    await create(either, bob, title=title, description=description)
    await create(either, ada, title=title, description=description)
    found = await listed(either, ada, q=q)
    assert len(found) == matches
    assert {task.user_id for task in found} <= {ada.user_id}


async def test_a_search_that_takes_too_long_is_given_up_and_the_pool_stays_whole(
    app_database_url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = somebody()
    await create(database, ada)
    async with database.transaction() as connection:
        await connection.execute(
            "INSERT INTO tasks (user_id, id, title, description)"
            " SELECT $1, gen_random_uuid(), 'a', repeat('abcdefgh', 1000) FROM generate_series(1, 3000)",
            ada.user_id,
        )
    monkeypatch.setattr(task_pages, "SEARCH_SECONDS", 0.02)
    statement_for.cache_clear()
    try:
        async with Database(parse(app_database_url)) as service:
            given_up = await asyncio.gather(
                *(tasks.page(service, ada.user_id, PageQuery(q="nowhere at all")) for _ in range(6)),
                *(tasks.page(service, ada.user_id, PageQuery(limit=1)) for _ in range(6)),
                return_exceptions=True,
            )
            reasons = [answer.reason for answer in given_up[:6] if isinstance(answer, Unavailable)]
            assert reasons == ["statement-timeout"] * 6
            assert all(isinstance(answer, PageText) for answer in given_up[6:])
            assert service.observe().status == "up"
            await eventually(lambda: not service.observe().pool.in_use)
            # Nothing goes on in the server, either.
            async with asyncio.timeout(60):
                while await running(database):
                    await asyncio.sleep(0.05)
            assert len(await listed(service, ada, limit=5)) == 5
    finally:
        statement_for.cache_clear()


async def running(database: Database) -> int:
    async with database.transaction() as connection:
        count: int = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '/* tasks.search%'"
        )
    return count


# Counts


async def test_a_count_is_of_all_pages_and_an_estimated_one_is_bounded(
    either: Database, database: Database
) -> None:
    ada = somebody()
    await create(either, ada)
    async with database.transaction() as connection:
        await connection.execute(
            "INSERT INTO tasks (user_id, id, title, is_completed)"
            " SELECT $1, gen_random_uuid(), 'a', n % 4 = 0 FROM generate_series(1, $2) n",
            ada.user_id,
            COUNT_BOUND + 199,
        )
    counts = {}
    for is_completed in (None, True, False):
        for count in ("exact", "estimated"):
            page = await tasks.page(
                either,
                ada.user_id,
                PageQuery(limit=3, is_completed=is_completed, count=count),  # type: ignore[arg-type]
            )
            assert page.last is not None
            # The same on the next page.
            after = PageQuery(limit=3, is_completed=is_completed, count=count, after=page.last)  # type: ignore[arg-type]
            assert (await tasks.page(either, ada.user_id, after)).count == page.count
            counts[is_completed, count] = page.count
    assert counts == {
        (None, "exact"): COUNT_BOUND + 200,
        (None, "estimated"): COUNT_BOUND,
        (True, "exact"): 299,
        (True, "estimated"): 299,
        (False, "exact"): COUNT_BOUND - 99,
        (False, "estimated"): COUNT_BOUND - 99,
    }


# Statements


def test_a_form_of_query_is_one_statement_compiled_once() -> None:
    one = PageQuery(limit=3, created_after=START, q="a", after=Position("2026-01-01T00:00:00Z", UUID(int=1)))
    other = PageQuery(limit=9, created_after=datetime.now(UTC), q="b", after=Position("x", UUID(int=2)))
    assert statement_for(form_of(one)) is statement_for(form_of(other))
    assert statement_for(form_of(one)).sql is statement_for(form_of(other)).sql
    assert statement_for(form_of(one)) is not statement_for(form_of(PageQuery(descending=False)))
    assert statement_for.cache_info().maxsize == 512
    assert isinstance(form_of(one), Form)
