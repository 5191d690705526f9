"""What an owner may do with tasks, on a real database."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from pydantic import TypeAdapter

from src.errors import Invalid, NotFound
from src.models import TaskCreate, TaskRead, TaskUpdate, UserCreate
from src.services import tasks, users
from src.services.database import Database
from src.services.embedded import EmbeddedPostgres
from src.services.statements import Statement
from src.services.tasks import Known, PageQuery

PAGE: TypeAdapter[list[TaskRead]] = TypeAdapter(list[TaskRead])


async def an_owner(database: Database, name: str = "ada") -> UUID:
    return UUID(json.loads(await users.create(database, UserCreate(email=f"{name}@example.com")))["id"])


async def create(database: Database, owner: UUID, **fields: Any) -> TaskRead:
    new = TaskCreate(**{"title": "Learn"} | fields)
    return TaskRead.model_validate_json((await tasks.create(database, Known(owner), new)).body)


async def read(database: Database, owner: UUID, task_id: UUID) -> TaskRead:
    return TaskRead.model_validate_json((await tasks.read(database, owner, task_id)).body)


async def listed(database: Database, owner: UUID, **query: Any) -> list[TaskRead]:
    return PAGE.validate_json((await tasks.page(database, owner, PageQuery(**query))).items)


async def update(database: Database, owner: UUID, task_id: UUID, **fields: Any) -> TaskRead:
    change = TaskUpdate(**fields)
    return TaskRead.model_validate_json((await tasks.update(database, owner, task_id, change)).body)


async def test_a_task_is_created_as_it_was_sent(database: Database) -> None:
    owner = await an_owner(database)
    task = await create(database, owner, title="  Bücher\n ", description="")
    assert (task.title, task.description, task.user_id) == ("  Bücher\n ", "", owner)
    assert (task.version, task.is_completed, task.id.version) == (1, False, 7)
    assert task.created_at == task.updated_at
    assert (await create(database, owner)).description is None
    assert (await create(database, owner, is_completed=True)).is_completed
    assert await read(database, owner, task.id) == task


async def test_an_update_changes_what_was_sent_and_nothing_else(database: Database) -> None:
    owner = await an_owner(database)
    task = await create(database, owner, description="d")
    renamed = await update(database, owner, task.id, title="New")
    assert renamed == task.model_copy(update={"title": "New", "version": 2, "updated_at": renamed.updated_at})
    assert renamed.updated_at > task.updated_at
    done = await update(database, owner, task.id, is_completed=True)
    assert (done.title, done.description, done.is_completed, done.version) == ("New", "d", True, 3)
    cleared = await update(database, owner, task.id, description=None, is_completed=False)
    assert (cleared.title, cleared.description, cleared.is_completed) == ("New", None, False)
    described = await update(database, owner, task.id, description="e")
    assert (described.title, described.description, described.version) == ("New", "e", 5)


async def test_an_update_of_nothing_makes_no_new_version(database: Database) -> None:
    owner = await an_owner(database)
    task = await create(database, owner)
    assert await update(database, owner, task.id) == task
    with pytest.raises(NotFound):
        await update(database, owner, uuid4())


async def test_updates_at_once_each_make_a_version(database: Database) -> None:
    owner = await an_owner(database)
    task = await create(database, owner)
    seen = await asyncio.gather(*(update(database, owner, task.id, title=str(n)) for n in range(20)))
    assert sorted(change.version for change in seen) == list(range(2, 22))


async def test_a_deleted_task_is_gone(database: Database) -> None:
    owner = await an_owner(database)
    task = await create(database, owner)
    await tasks.delete(database, owner, task.id)
    for attempt in (tasks.read, tasks.delete):
        with pytest.raises(NotFound):
            await attempt(database, owner, task.id)


async def test_another_owners_task_is_as_if_it_were_not(database: Database) -> None:
    ada, bob = await an_owner(database), await an_owner(database, "bob")
    task = await create(database, ada)
    said = []
    for task_id in (task.id, uuid4()):
        for attempt in (
            tasks.read(database, bob, task_id),
            tasks.update(database, bob, task_id, TaskUpdate(title="mine")),
            tasks.update(database, bob, task_id, TaskUpdate()),
            tasks.delete(database, bob, task_id),
        ):
            with pytest.raises(NotFound) as caught:
                await attempt
            said.append(str(caught.value))
    assert len(set(said)) == 1
    assert (await tasks.page(database, bob)).items == "[]"
    assert await read(database, ada, task.id) == task


async def test_a_page_holds_the_newest_first(database: Database) -> None:
    owner = await an_owner(database)
    made = [await create(database, owner, is_completed=n % 2 == 0) for n in range(6)]
    newest_first = made[::-1]
    assert await listed(database, owner) == newest_first
    assert await listed(database, owner, limit=2) == newest_first[:2]
    done = await listed(database, owner, is_completed=True)
    assert done == [task for task in newest_first if task.is_completed]
    todo = await listed(database, owner, is_completed=False)
    assert todo == [task for task in newest_first if not task.is_completed]


async def test_tasks_of_one_instant_have_an_order(database: Database) -> None:
    owner = await an_owner(database)
    ids = [uuid4() for _ in range(20)]
    async with database.transaction() as connection:
        insert = "INSERT INTO tasks (user_id, id, title) SELECT $1, unnest($2::uuid[]), 'a'"
        await connection.execute(insert, owner, ids)
    page = await listed(database, owner)
    assert [task.id for task in page] == sorted(ids, reverse=True)


@pytest.mark.parametrize("limit", [0, -1, 201, 2**63])
async def test_a_page_of_tasks_is_bounded(database: Database, limit: int) -> None:
    with pytest.raises(Invalid):
        await tasks.page(database, uuid4(), PageQuery(limit=limit))


# Which way the server goes. Thousands of rows of many owners, analysed, as in a system that is in use.


FILL = """
    INSERT INTO users (email) SELECT 'user' || n || '@example.com' FROM generate_series(1, 3000) n;
    INSERT INTO tasks (user_id, title, is_completed, created_at, updated_at)
    SELECT u.id, 'A task', n % 3 <> 0, now() - n * interval '1 hour', now() - n * interval '1 minute'
    FROM users u, generate_series(1, CASE u.email WHEN 'user7@example.com' THEN 2000 ELSE 3 END) n
    ORDER BY n, u.id;
    ANALYZE users, tasks
"""


@pytest.fixture(scope="module")
def filled_url(postgres: EmbeddedPostgres, administrator: Any, template: str) -> Iterator[str]:
    async def fill() -> None:
        connection = await asyncpg.connect(postgres.url_for("filled"))
        await connection.execute(FILL)
        await connection.close()

    administrator.execute(f'CREATE DATABASE filled TEMPLATE "{template}"')
    administrator.run(fill())
    yield postgres.url_for("filled")
    administrator.execute("DROP DATABASE filled WITH (FORCE)")


@pytest.fixture
async def filled(filled_url: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await asyncpg.connect(filled_url)
    yield connection
    await connection.close()


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan] + [node for child in plan.get("Plans", []) for node in nodes(child)]


async def planned(
    connection: asyncpg.Connection[Any], sql: str, *arguments: Any
) -> tuple[set[str], set[str]]:
    """The kinds of the plan's nodes, and the indexes it uses, but for what looks for an account."""
    explained = json.loads(await connection.fetchval(f"EXPLAIN (FORMAT JSON) {sql}", *arguments))
    found = nodes(explained[0]["Plan"])
    return {node["Node Type"] for node in found}, {
        node["Index Name"] for node in found if "Index Name" in node
    } - {"pk_deleted_users"}


@pytest.mark.parametrize("plans", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize(
    ("statement", "index"),
    [
        (tasks.READ, "pk_tasks"),
        (tasks.UPDATE, "pk_tasks"),
        (tasks.DELETE, "pk_tasks"),
        (users.READ, "pk_users"),
        (users.FIND, "uq_users_email"),
        (users.PAGE, "uq_users_email"),
        (users.DELETE, "pk_users"),
    ],
    ids=lambda value: value.name if isinstance(value, Statement) else None,
)
async def test_each_statement_goes_by_its_index_and_sorts_nothing(
    filled: asyncpg.Connection[Any], statement: Statement, index: str, plans: str
) -> None:
    await filled.execute(f"SET plan_cache_mode = {plans}")
    owner = await filled.fetchval("SELECT id FROM users WHERE email = 'user7@example.com'")
    task_id = await filled.fetchval("SELECT id FROM tasks WHERE user_id = $1 LIMIT 1", owner)
    values = {"owner": owner, "limit": 20, "email": "user7@example.com", "title": "New", "describe": False}
    values |= {"id": task_id if statement.name.startswith("tasks") else owner}
    arguments = statement.arguments(values | {"description": None, "is_completed": None})
    kinds, used = await planned(filled, statement.sql, *arguments)
    assert used == {index}
    assert not kinds & {"Sort", "Incremental Sort", "Seq Scan"}


async def test_what_changed_since_goes_by_its_index(filled: asyncpg.Connection[Any]) -> None:
    """Nothing asks for it yet, but a client that synchronises will."""
    owner = await filled.fetchval("SELECT id FROM users WHERE email = 'user7@example.com'")
    since = "SELECT id FROM tasks WHERE user_id = $1 AND updated_at > $2 ORDER BY updated_at, id LIMIT 100"
    kinds, used = await planned(filled, since, owner, datetime.now(UTC) - timedelta(hours=5))
    assert used == {"ix_tasks_user_id_updated_at_id"}
    assert "Sort" not in kinds


async def test_deleting_a_user_finds_the_tasks_by_the_key(filled: asyncpg.Connection[Any]) -> None:
    kinds, used = await planned(filled, "DELETE FROM tasks WHERE user_id = $1", uuid4())
    assert "Seq Scan" not in kinds
    assert used
