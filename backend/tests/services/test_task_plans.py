"""Which way the server goes: by its indexes, whatever it knows of the parameters, bound by row-level security.

Tens of thousands of rows of many owners, analysed, as in a system that is in use.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from postgres_server import PostgresServer
from src.embedded.roles import APPLICATION
from src.services import task_batches, task_transfer, tasks, users
from src.services.statements import Statement
from src.services.task_pages import COUNT_BOUND, PageQuery, Position, form_of, statement_for

FILL = """
    INSERT INTO users (email) SELECT 'user' || n || '@example.com' FROM generate_series(1, 3000) n;
    INSERT INTO tasks (user_id, title, is_completed, created_at, updated_at)
    SELECT u.id, 'A task', n % 3 <> 0, now() - n * interval '1 hour', now() - n * interval '1 minute'
    FROM users u, generate_series(1, CASE u.email WHEN 'user7@example.com' THEN 30000 ELSE 10 END) n
    ORDER BY n, u.id;
    INSERT INTO idempotency_keys (user_id, key, request_hash, response, status)
    SELECT id, n::text, sha256('x'), '{}', 201
    FROM users, generate_series(1, CASE email WHEN 'user7@example.com' THEN 5000 ELSE 2 END) n;
    VACUUM ANALYZE
"""
NOW = datetime.now(UTC)
PLANS = ["force_custom_plan", "force_generic_plan"]
SORTS = {"Sort", "Incremental Sort"}


@pytest.fixture(scope="module")
def filled_url(postgres: PostgresServer, administrator: Any, template: str) -> Iterator[str]:
    async def fill() -> None:
        connection = await asyncpg.connect(postgres.url_for("filled"))
        for statement in FILL.split(";"):
            await connection.execute(statement)
        await connection.close()

    administrator.execute(f'CREATE DATABASE filled TEMPLATE "{template}"')
    administrator.run(fill())
    yield postgres.url_for("filled", role=APPLICATION)
    administrator.execute("DROP DATABASE filled WITH (FORCE)")


class Filled:
    """A connection as the service has it, and the owner of very many tasks."""

    def __init__(self, connection: asyncpg.Connection[Any], owner: UUID, ids: list[UUID]) -> None:
        self.connection = connection
        self.owner = owner
        self.ids = ids

    async def plan(self, statement: Statement, values: dict[str, Any]) -> dict[str, Any]:
        """What EXPLAIN ANALYZE tells of the statement; it is rolled back.

        Of its second run: in its first a backend reads the catalogue for what the functions in it are made of. By
        PREPARE and EXECUTE: to a statement that EXPLAIN itself prepares, `plan_cache_mode` means nothing.
        """
        arguments = ", ".join(
            map(literal, statement.arguments({"owner": self.owner, "epoch": None} | values))
        )
        transaction = self.connection.transaction()
        await transaction.start()
        try:
            await self.connection.execute(f"PREPARE explained AS {statement.sql}")
            sql = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE explained({arguments})"
            await self.connection.execute("SAVEPOINT before")
            await self.connection.execute(sql)
            await self.connection.execute("ROLLBACK TO before")
            found: dict[str, Any] = json.loads(await self.connection.fetchval(sql))[0]["Plan"]
        finally:
            await transaction.rollback()
            await self.connection.execute("DEALLOCATE explained")
        return found


def literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return "'{" + ",".join("NULL" if each is None else f'"{each}"' for each in value) + "}'"
    if isinstance(value, bytes):
        value = f"\\x{value.hex()}"
    return f"'{value}'"


@pytest.fixture
async def filled(filled_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Filled]:
    connection = await asyncpg.connect(filled_url)
    owner_connection = await asyncpg.connect(request.getfixturevalue("postgres").url_for("filled"))
    owner = await owner_connection.fetchval("SELECT id FROM users WHERE email = 'user7@example.com'")
    ids = await owner_connection.fetch("SELECT id FROM tasks WHERE user_id = $1 LIMIT 300", owner)
    # Rows that were rolled back lie at the head of every list, and the first to read past them pays for it.
    await owner_connection.execute("VACUUM tasks")
    await owner_connection.close()
    yield Filled(connection, owner, [row["id"] for row in ids])
    await connection.close()


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan] + [node for child in plan.get("Plans", []) for node in nodes(child)]


def indexes(plan: dict[str, Any]) -> set[str]:
    return {node["Index Name"] for node in nodes(plan) if "Index Name" in node}


def buffers(plan: dict[str, Any]) -> int:
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def assert_bounded(plan: dict[str, Any], most_rows: int) -> None:
    """No table is read whole, and no node sees more rows than are asked for."""
    for node in nodes(plan):
        assert node["Node Type"] != "Seq Scan" or node["Relation Name"] == "deleted_users", node
        assert node["Actual Rows"] * node["Actual Loops"] <= most_rows, node
        assert node.get("Rows Removed by Filter", 0) <= most_rows, node


ONE = {
    "email": None,
    "title": "New",
    "describe": False,
    "description": None,
    "is_completed": None,
    "if_match": "*",
    "key": "k",
    "request_hash": bytes(32),
    "kept_for": timedelta(hours=24),
}


@pytest.mark.parametrize("plans", PLANS)
@pytest.mark.parametrize(
    "statement",
    [
        tasks.READ,
        tasks.UPDATE,
        tasks.UPDATE_MATCHED,
        tasks.PUT_MATCHED,
        tasks.DELETE,
        tasks.DELETE_MATCHED,
        tasks.PUT,
        tasks.PUT_NEW,
        tasks.CREATE,
        tasks.CREATE_ONCE,
    ],
    ids=lambda statement: statement.name,
)
async def test_what_is_done_with_one_task_looks_at_one_task(
    filled: Filled, statement: Statement, plans: str
) -> None:
    await filled.connection.execute(f"SET plan_cache_mode = {plans}")
    new = statement in (tasks.CREATE, tasks.CREATE_ONCE, tasks.PUT_NEW)
    values = ONE | {"id": UUID(int=1) if new else filled.ids[17]}
    if statement in (tasks.CREATE, tasks.CREATE_ONCE, tasks.PUT, tasks.PUT_NEW, tasks.PUT_MATCHED):
        values |= {"is_completed": False}
    plan = await filled.plan(statement, values)
    assert plan["Actual Rows"] == 1
    assert_bounded(plan, 1)
    assert not {"Sort", "Incremental Sort"} & {node["Node Type"] for node in nodes(plan)}
    assert buffers(plan) < 200


@pytest.mark.parametrize("plans", PLANS)
async def test_a_batch_looks_at_the_tasks_that_it_names(filled: Filled, plans: str) -> None:
    await filled.connection.execute(f"SET plan_cache_mode = {plans}")
    ids = filled.ids[:200]
    for look in (task_batches.LOOK, task_batches.LOOK_ONCE):
        assert_bounded(await filled.plan(look, ONE | {"wanted_id": ids}), 200)
    made = {"id": [UUID(int=n) for n in range(1, 51)], "title": ["a"] * 50, "description": [None] * 50}
    made |= {"is_completed": [False] * 50, "version": [1] * 50}
    changed = {name: value[:1] * 100 for name, value in made.items()} | {"id": ids[:100]}
    changed |= {"created_at": [NOW] * 100}
    values = ONE | {f"made_{name}": value for name, value in made.items()}
    values |= {f"changed_{name}": value for name, value in changed.items()}
    values |= {"gone_id": ids[100:], "response": "{}"}
    for write in (task_batches.WRITE, task_batches.WRITE_ONCE):
        plan = await filled.plan(write, values)
        assert_bounded(plan, 250)
        assert "pk_tasks" in indexes(plan)


# Pages

BY_CREATED, BY_UPDATED = "ix_tasks_user_id_created_at_id", "ix_tasks_user_id_updated_at_id"
FAR = Position((NOW - timedelta(hours=15_000)).isoformat(timespec="microseconds"), UUID(int=0))
MIDDLE = Position((NOW - timedelta(minutes=15_000)).isoformat(timespec="microseconds"), UUID(int=0))


def values_of(query: PageQuery) -> dict[str, Any]:
    form = form_of(query)
    values: dict[str, Any] = {"limit": query.limit} | {name: getattr(query, name) for name in form.bounds}
    if query.after is not None:
        values |= {"after_at": query.after.timestamp, "after_id": query.after.id}
    return values


@pytest.mark.parametrize("plans", PLANS)
@pytest.mark.parametrize("descending", [True, False], ids=["newest first", "oldest first"])
@pytest.mark.parametrize(
    ("query", "index"),
    [
        ({}, BY_CREATED),
        ({"after": FAR}, BY_CREATED),
        ({"is_completed": False}, "ix_tasks_open"),
        ({"is_completed": False, "after": FAR}, "ix_tasks_open"),
        ({"is_completed": True}, BY_CREATED),
        ({"is_completed": True, "after": FAR}, BY_CREATED),
        ({"created_after": NOW - timedelta(hours=20_000)}, BY_CREATED),
        (
            {"created_after": NOW - timedelta(hours=20_000), "created_before": NOW - timedelta(hours=50)},
            BY_CREATED,
        ),
        ({"sort": "updated_at"}, BY_UPDATED),
        ({"sort": "updated_at", "after": MIDDLE}, BY_UPDATED),
        ({"sort": "updated_at", "updated_after": NOW - timedelta(minutes=20_000)}, BY_UPDATED),
        ({"sort": "updated_at", "is_completed": False, "after": MIDDLE}, BY_UPDATED),
        ({"count": "estimated"}, BY_CREATED),
    ],
    # Without the values, which hold the time of the run: processes that share the tests have to agree on names.
    ids=lambda value: " ".join(value) or "all" if isinstance(value, dict) else value,
)
async def test_a_page_is_read_in_its_order_and_no_further(
    filled: Filled, query: dict[str, Any], index: str, descending: bool, plans: str
) -> None:
    await filled.connection.execute(f"SET plan_cache_mode = {plans}")
    asked = PageQuery(limit=50, descending=descending, **query)
    plan = await filled.plan(statement_for(form_of(asked)), values_of(asked))
    assert index in indexes(plan)
    assert not SORTS & {node["Node Type"] for node in nodes(plan)}
    # At most every third row is a match; a count goes on to its bound.
    most = COUNT_BOUND if asked.count == "estimated" else 160
    assert_bounded(plan, most)


@pytest.mark.parametrize("plans", PLANS)
async def test_page_1000_costs_what_page_1_costs(filled: Filled, plans: str) -> None:
    await filled.connection.execute(f"SET plan_cache_mode = {plans}")
    for query in ({}, {"is_completed": False}, {"sort": "updated_at"}):
        by = timedelta(minutes=1) if "sort" in query else timedelta(hours=1)
        costs = []
        # 29 rows a page: the thousandth begins 29,000 rows further.
        for page in (2, 500, 1000):
            after = Position((NOW - by * 29 * (page - 1)).isoformat(timespec="microseconds"), UUID(int=0))
            asked = PageQuery(limit=29, after=after, **query)  # type: ignore[arg-type]
            costs.append(buffers(await filled.plan(statement_for(form_of(asked)), values_of(asked))))
        first = PageQuery(limit=29, **query)  # type: ignore[arg-type]
        costs.append(buffers(await filled.plan(statement_for(form_of(first)), values_of(first))))
        # A heap page for each row at worst, and a way down the index: wherever in the list it is.
        assert max(costs) <= 30 + 6, (query, costs)
        assert max(costs[1:3]) <= costs[0] + 3, (query, costs)


async def test_a_search_reads_its_owners_rows_and_nobody_elses(filled: Filled) -> None:
    asked = PageQuery(q="nowhere")
    plan = await filled.plan(statement_for(form_of(asked)), {"limit": 50, "pattern": "%nowhere%"})
    assert_bounded(plan, 30_000)


# Others


@pytest.mark.parametrize("plans", PLANS)
@pytest.mark.parametrize(
    ("statement", "index"),
    [
        (users.READ, "pk_users"),
        (users.FIND, "uq_users_email"),
        (users.PAGE, "uq_users_email"),
        (users.DELETE, "pk_users"),
    ],
    ids=lambda value: value.name if isinstance(value, Statement) else None,
)
async def test_users_are_found_by_their_indexes(
    filled: Filled, statement: Statement, index: str, plans: str, request: pytest.FixtureRequest
) -> None:
    """As the operator, who is not bound."""
    connection = await asyncpg.connect(request.getfixturevalue("postgres").url_for("filled"))
    try:
        await connection.execute(f"SET plan_cache_mode = {plans}")
        values = {
            "owner": filled.owner,
            "epoch": None,
            "id": filled.owner,
            "email": "user7@example.com",
            "limit": 20,
        }
        explained = await connection.fetchval(
            f"EXPLAIN (FORMAT JSON) {statement.sql}", *statement.arguments(values)
        )
        plan = json.loads(explained)[0]["Plan"]
    finally:
        await connection.close()
    assert indexes(plan) == {index}
    assert not {"Sort", "Seq Scan"} & {node["Node Type"] for node in nodes(plan)}


async def test_deleting_a_user_finds_the_tasks_by_the_key(filled: Filled) -> None:
    explained = await filled.connection.fetchval(
        "EXPLAIN (FORMAT JSON) DELETE FROM tasks WHERE user_id = $1", UUID(int=1)
    )
    plan = json.loads(explained)[0]["Plan"]
    assert "Seq Scan" not in {node["Node Type"] for node in nodes(plan)}
    assert indexes(plan)


async def test_an_import_looks_for_each_id_once(filled: Filled) -> None:
    columns = {"id": [UUID(int=n) for n in range(1, 101)], "title": ["a"] * 100, "description": [None] * 100}
    columns |= {"is_completed": [False] * 100, "version": [1] * 100}
    columns |= {"created_at": [None] * 100, "updated_at": [None] * 100}
    plan = await filled.plan(task_transfer.STORE, {f"new_{name}": value for name, value in columns.items()})
    assert_bounded(plan, 100)
