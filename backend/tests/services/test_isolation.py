"""Two walls between users: each holds with the other one taken away, and without both the tests see it.

The first wall is the owner that every statement names, the second is row-level security. Ada has what Eve wants;
Eve asks with Ada's ids, by every service and by sessions, connected as the service is.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from pydantic import TypeAdapter
from sqlalchemy import Uuid, and_, bindparam, func
from sqlalchemy import delete as delete_from
from sqlalchemy import update as update_in
from sqlmodel import col, select

from clusters import PgBouncer, Proxy, postgres_15_binaries
from postgres_server import PostgresServer
from src.config.database import parse
from src.embedded.roles import APPLICATION
from src.errors import Conflict, Invalid, NotFound, PreconditionFailed, Refused
from src.models import Task, TaskCreate, TaskOperation, TaskPut, TaskUpdate, User
from src.models.isolation import OWNER_COLUMNS
from src.services import schema, task_pages, task_transfer, tasks, users
from src.services.database import Database, Limits
from src.services.ownership import me, mine
from src.services.statements import Statement
from src.services.tasks import IdempotencyKey, Known, PageQuery

SECRET = "Ada's secret"


@pytest.fixture
async def owner(database_url: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Who sees and may do everything, on the database under test."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


class Ada:
    """Somebody with a task and a kept answer, and what the tables hold of them."""

    def __init__(self, author: Known, task_id: UUID, etag: str, owner: asyncpg.Connection[Any]) -> None:
        self.author = author
        self.task_id = task_id
        self.etag = etag
        self._owner = owner

    async def everything(self) -> list[str]:
        found = []
        for table, column in sorted(OWNER_COLUMNS.items()):
            rows = await self._owner.fetch(
                f"SELECT t::text AS row FROM {table} t WHERE {column} = $1 ORDER BY 1", self.author.user_id
            )
            found += [f"{table} {row['row']}" for row in rows]
        return found


@pytest.fixture
async def ada(app_database: Database, owner: asyncpg.Connection[Any]) -> Ada:
    author = Known(uuid4(), "ada@example.com")
    key = IdempotencyKey.of("ada-1", "create_task", b"{}")
    made = await tasks.create(app_database, author, TaskCreate(title=SECRET), idempotency=key)
    return Ada(author, made.task_id, made.etag, owner)


@pytest.fixture
async def eve(app_database: Database) -> Known:
    """Somebody with a task of her own: she is known, and what she may see is not nothing."""
    author = Known(uuid4(), "eve@example.com")
    await tasks.create(app_database, author, TaskCreate(title="Eve's own"))
    return author


# What Eve tries. Each gives whatever came back, as text.

_operations: TypeAdapter[list[TaskOperation]] = TypeAdapter(list[TaskOperation])


async def _batch(db: Database, eve: Known, ada: Ada, *given: dict[str, Any]) -> str:
    return str(await tasks.batch(db, eve, _operations.validate_python(list(given))))


async def _export(db: Database, eve: Known, _: Ada) -> str:
    return b"".join([piece async for piece in tasks.export(db, eve.user_id)]).decode()


async def _session_sees(db: Database, eve: Known, ada: Ada) -> str:
    async with db.session(owner=eve.user_id) as session:
        all_tasks = (await session.exec(select(Task).where(Task.user_id == eve.user_id))).all()
        return f"{all_tasks} {await session.get(Task, (eve.user_id, ada.task_id))}"


async def _session_changes(db: Database, eve: Known, ada: Ada) -> str:
    async with db.session(owner=eve.user_id) as session:
        mine = col(Task.user_id) == eve.user_id
        await session.exec(
            update_in(Task).where(mine, col(Task.id) == ada.task_id).values(title="Eve was here")
        )
        await session.exec(delete_from(Task).where(mine, col(Task.id) == ada.task_id))
    return ""


Deed = Callable[[Database, Known, Ada], Awaitable[object]]
DEEDS: dict[str, Deed] = {
    "read": lambda db, eve, ada: tasks.read(db, eve.user_id, ada.task_id),
    "list": lambda db, eve, ada: tasks.page(db, eve.user_id, PageQuery(limit=200)),
    "count": lambda db, eve, ada: tasks.page(db, eve.user_id, PageQuery(count="exact", sort="updated_at")),
    "open ones": lambda db, eve, ada: tasks.page(db, eve.user_id, PageQuery(is_completed=False)),
    "search": lambda db, eve, ada: tasks.page(db, eve.user_id, PageQuery(q="secret")),
    "update": lambda db, eve, ada: tasks.update(db, eve, ada.task_id, TaskUpdate(title="Eve was here")),
    "update this version": lambda db, eve, ada: tasks.update(
        db, eve, ada.task_id, TaskUpdate(title="Eve was here"), if_match=ada.etag
    ),
    "put this version": lambda db, eve, ada: tasks.put(
        db, eve, ada.task_id, TaskPut(title="Eve was here"), if_match=ada.etag
    ),
    "put": lambda db, eve, ada: tasks.put(db, eve, ada.task_id, TaskPut(title="Eve was here")),
    "delete": lambda db, eve, ada: tasks.delete(db, eve, ada.task_id),
    "delete this version": lambda db, eve, ada: tasks.delete(db, eve, ada.task_id, if_match=ada.etag),
    "batch": lambda db, eve, ada: _batch(
        db, eve, ada, {"op": "update", "id": ada.task_id, "task": {"title": "Eve was here"}}
    ),
    "batch of deletes": lambda db, eve, ada: _batch(db, eve, ada, {"op": "delete", "id": ada.task_id}),
    "export": _export,
    "a session reads": _session_sees,
    "a session writes": _session_changes,
    "her key": lambda db, eve, ada: tasks.create(
        db, eve, TaskCreate(title="Eve's"), idempotency=IdempotencyKey.of("ada-1", "create_task", b"{}")
    ),
}


async def tried(deed: str, db: Database, eve: Known, ada: Ada) -> list[str]:
    """What of Ada's Eve got hold of, or changed, by this deed; `[]` when nothing."""
    before = await ada.everything()
    try:
        said = str(await DEEDS[deed](db, eve, ada))
    except (NotFound, PreconditionFailed, Conflict, Invalid) as refusal:
        said = str(refusal)
    reached = ["seen"] if SECRET in said or str(ada.author.user_id) in said else []
    return reached + (["changed"] if await ada.everything() != before else [])


# The walls, and how they are taken away

NAMES_OWNER = re.compile(r"\w+\.(?:user_id|id) = (?:\(SELECT me\.v\s+FROM me\)|'[-0-9a-f]{36}'(?:::UUID)?)")


@pytest.fixture
def statements_forget_their_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every statement of the services without the condition that names its owner."""
    whole, everything = Statement.sql, task_transfer._everything
    monkeypatch.setattr(
        Statement,
        "sql",
        property(lambda self: NAMES_OWNER.sub("true", whole.fget(self))),  # type: ignore[attr-defined]
    )
    monkeypatch.setattr(
        task_transfer, "_everything", lambda owner: NAMES_OWNER.sub("true", everything(owner))
    )


@pytest.fixture
async def no_policy(owner: asyncpg.Connection[Any], ada: Ada, eve: Known) -> None:
    """PostgreSQL asks nobody whose row it is."""
    for table in OWNER_COLUMNS:
        await owner.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")


async def test_taking_the_owner_out_of_a_statement_leaves_no_word_of_it(eve: Known, ada: Ada) -> None:
    changed = {
        statement.name: NAMES_OWNER.subn("true", statement.sql) for statement, _ in each_statement(eve, ada)
    }
    assert [name for name, (_, times) in changed.items() if not times] == []
    assert not [name for name, (text, _) in changed.items() if re.search(r"user_id = \(SELECT", text)]
    assert len(NAMES_OWNER.findall(task_transfer._everything(uuid4()))) == 1


@pytest.mark.parametrize("deed", DEEDS)
async def test_with_both_walls_eve_reaches_nothing(
    app_database: Database, eve: Known, ada: Ada, deed: str
) -> None:
    assert await tried(deed, app_database, eve, ada) == []


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.usefixtures("statements_forget_their_owner")
async def test_without_the_owner_in_the_statements_eve_reaches_nothing(
    app_database: Database, eve: Known, ada: Ada, deed: str
) -> None:
    assert await tried(deed, app_database, eve, ada) == []


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.usefixtures("no_policy")
async def test_without_the_policies_eve_reaches_nothing(
    app_database: Database, eve: Known, ada: Ada, deed: str
) -> None:
    assert await tried(deed, app_database, eve, ada) == []


# A deed that names Eve in other ways too (her key, the version held before) has a third wall.
BY_ID = [
    "read", "list", "open ones", "search", "update", "update this version", "put this version", "delete",
    "delete this version", "export",
]  # fmt: skip


@pytest.mark.parametrize("deed", BY_ID)
@pytest.mark.usefixtures("statements_forget_their_owner", "no_policy")
async def test_without_both_walls_eve_does_reach_it(
    app_database: Database, eve: Known, ada: Ada, deed: str
) -> None:
    """So the tests above would have seen it."""
    assert await tried(deed, app_database, eve, ada) != []


@pytest.mark.usefixtures("statements_forget_their_owner")
async def test_the_policies_alone_still_show_eve_her_own(
    app_database: Database, eve: Known, ada: Ada
) -> None:
    page = await tasks.page(app_database, eve.user_id)
    assert "Eve's own" in page.items


# Sessions and transactions


async def test_a_session_that_names_no_owner_in_its_statements_meets_only_its_owners_rows(
    app_database: Database, eve: Known, ada: Ada
) -> None:
    before = await ada.everything()
    async with app_database.session(owner=eve.user_id) as session:
        assert [task.title for task in (await session.exec(select(Task))).all()] == ["Eve's own"]
        assert [user.id for user in (await session.exec(select(User))).all()] == [eve.user_id]
        assert await session.get(Task, (ada.author.user_id, ada.task_id)) is None
        await session.exec(update_in(Task).values(title="Eve was here"))
        # The owner stays named in a second transaction of the same session, and in a nested one.
        await session.commit()
        async with session.begin_nested():
            assert [task.title for task in (await session.exec(select(Task))).all()] == ["Eve was here"]
        await session.exec(delete_from(Task))
        await session.exec(delete_from(User))
    assert await ada.everything() == before


@pytest.mark.parametrize("owned", ["task", "user"])
async def test_a_session_adds_nothing_to_another_user(
    app_database: Database, eve: Known, ada: Ada, owned: str
) -> None:
    before = await ada.everything()
    row = Task(user_id=ada.author.user_id, title="Eve's gift") if owned == "task" else User(id=uuid4())
    with pytest.raises(Refused):
        async with app_database.session(owner=eve.user_id) as session:
            session.add(row)
    assert await ada.everything() == before


@pytest.mark.usefixtures("ada")
async def test_who_names_no_owner_meets_no_row(app_database: Database, eve: Known) -> None:
    async with app_database.session(owner=eve.user_id) as session:
        assert (await session.exec(select(Task))).all()
    for _ in range(3):
        async with app_database.session() as session:
            assert (await session.exec(select(Task))).all() == []
            assert (await session.exec(select(User))).all() == []
        async with app_database.transaction() as connection:
            assert await connection.fetchval("SELECT count(*) FROM tasks") == 0
        async with app_database.transaction(owner=eve.user_id, read_only=True) as connection:
            assert await connection.fetchval("SELECT count(*) FROM tasks") == 1


COUNT = Statement("count", lambda: select(func.count()).select_from(Task), repeatable=True)


async def nothing_stays(database: Database, author: Known) -> None:
    """Whoever gets the connection next, and names nobody, meets no row: nothing of the last owner is left on it."""
    for _ in range(3):
        assert (await tasks.page(database, author.user_id)).items != "[]"
        assert await database.value(COUNT) == 0
        async with database.session(owner=author.user_id) as session:
            assert (await session.exec(select(Task))).all()
        assert await database.value(COUNT) == 0
        async with database.transaction(owner=author.user_id) as connection:
            assert await connection.fetchval("SELECT count(*) FROM tasks")
            # What a give-back would wipe is not to be there in the first place.
            await connection.execute("COMMIT")
            assert await connection.fetchval("SELECT count(*) FROM tasks") == 0
            await connection.execute("BEGIN")
        assert await database.value(COUNT) == 0


async def test_nothing_of_an_owner_stays_on_the_connection(app_database_url: str, eve: Known) -> None:
    async with Database(parse(app_database_url), Limits(pool_size=1)) as database:
        await nothing_stays(database, eve)


async def test_naming_the_owner_costs_no_round_trip(
    postgres: PostgresServer, app_database_url: str, eve: Known
) -> None:
    spent: dict[str, set[int]] = {"transaction": set(), "session": set()}
    with Proxy(postgres.port) as proxy:
        async with Database(parse(proxy.through(app_database_url))) as database:
            for owner in (None, eve.user_id, None, eve.user_id):
                async with database.session(owner=owner) as session:  # the statement is prepared by now
                    await session.exec(select(Task.id))
                with proxy.counting() as count:
                    async with database.transaction(owner=owner) as connection:
                        await connection.execute("SELECT 1")
                spent["transaction"].add(count().round_trips)
                with proxy.counting() as count:
                    async with database.session(owner=owner) as session:
                        await session.exec(select(Task.id))
                spent["session"].add(count().round_trips)
    assert [len(trips) for trips in spent.values()] == [1, 1], spent


async def test_an_owner_is_a_uuid_and_nothing_else(app_database: Database) -> None:
    with pytest.raises(ValueError, match="badly formed"):
        async with app_database.transaction(owner="', false); DROP TABLE tasks; --"):  # type: ignore[arg-type]
            pass


# One statement, whichever way PostgreSQL plans it

PLANNED = {
    "as it likes": (),
    "without indexes": ("enable_indexscan", "enable_indexonlyscan", "enable_bitmapscan"),
    "without scans of tables": ("enable_seqscan",),
    "without nested loops": ("enable_nestloop",),
    "without nested loops and hashes": ("enable_nestloop", "enable_hashjoin"),
}


async def every_form(db: Database, eve: Known, ada: Ada) -> None:
    """Eve reads, lists, changes, replaces and deletes what is hers, and finds it each time."""
    for title in ("a", "b"):
        made = await tasks.create(db, eve, TaskCreate(title=title))
        task_id = made.task_id
        assert (await tasks.read(db, eve.user_id, task_id)).etag == made.etag
        assert str(task_id) in (await tasks.page(db, eve.user_id)).items
        assert (await tasks.page(db, eve.user_id, PageQuery(count="exact"))).count == 2
        changed = await tasks.update(db, eve, task_id, TaskUpdate(title="c"))
        matched = await tasks.update(db, eve, task_id, TaskUpdate(title="d"), if_match=changed.etag)
        replaced = await tasks.put(db, eve, task_id, TaskPut(title="e"), if_match=matched.etag)
        assert not (await tasks.put(db, eve, task_id, TaskPut(title="f"))).created
        with pytest.raises(PreconditionFailed):
            await tasks.delete(db, eve, task_id, if_match=replaced.etag)
        await tasks.delete(db, eve, task_id)
        with pytest.raises(NotFound):
            await tasks.read(db, eve.user_id, ada.task_id)


@pytest.mark.parametrize("size", [0, 5000], ids=["a few rows", "thousands"])
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_every_statement_finds_its_owners_rows_however_it_is_planned(
    app_database_url: str, owner: asyncpg.Connection[Any], eve: Known, ada: Ada, mode: str, size: int
) -> None:
    await owner.execute(
        "INSERT INTO users (id) SELECT gen_random_uuid() FROM generate_series(1, $1::int)", size
    )
    await owner.execute("INSERT INTO tasks (user_id, title) SELECT id, 'x' FROM users WHERE email IS NULL")
    await owner.execute("ANALYZE")
    for off in PLANNED.values():
        options = "".join(f" -c {setting}=off" for setting in off)
        # What is off costs so much that a server with a compiler would compile for seconds.
        options = f"-c jit=off -c plan_cache_mode={mode}{options}".replace(" ", "%20")
        url = f"{app_database_url}?options={options}"
        async with Database(parse(url)) as database:
            await every_form(database, eve, ada)


def bare(verb: str) -> Statement:
    """The plainest statements of the form, with nothing but `mine` to say when they may begin."""

    def build() -> Any:
        who = me()
        this = and_(mine(who, Task.user_id), col(Task.id) == bindparam("id", type_=Uuid))
        if verb == "read":
            return select(Task.title).where(this)
        if verb == "join":
            both = select(Task.title).join(User, col(User.id) == col(Task.user_id))
            return both.where(this, mine(who, User.id))
        if verb == "change":
            return update_in(Task).where(this).values(title="changed").returning(col(Task.title))
        if verb == "change what was held":
            held = select(Task.id).where(this).with_for_update().cte("held").prefix_with("MATERIALIZED")
            changed = update_in(Task).where(mine(who, Task.user_id), col(Task.id) == held.c.id)
            return changed.values(title="changed").returning(col(Task.title))
        return delete_from(Task).where(this).returning(col(Task.title))

    return Statement(verb, build, repeatable=False)


@pytest.mark.parametrize("off", PLANNED.values(), ids=PLANNED)
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_the_condition_alone_sets_the_owner_before_the_first_row_is_read(
    app_database_url: str, ada: Ada, eve: Known, mode: str, off: tuple[str, ...]
) -> None:
    settings = {"plan_cache_mode": mode} | dict.fromkeys(off, "off")
    connection = await asyncpg.connect(app_database_url, server_settings=settings)
    try:
        for verb in ("read", "join", "change", "change what was held", "delete"):
            statement = bare(verb)
            for author, found in ((ada.author, True), (eve, False), (ada.author, verb != "delete")):
                values = {"owner": author.user_id, "id": ada.task_id}
                title = await connection.fetchval(statement.sql, *statement.arguments(values))
                assert (title is not None) == found, verb
    finally:
        await connection.close()


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_under_the_policies_every_statement_goes_by_an_index(
    app_database_url: str, owner: asyncpg.Connection[Any], eve: Known, ada: Ada, mode: str
) -> None:
    await owner.execute("INSERT INTO users (id) SELECT gen_random_uuid() FROM generate_series(1, 20000)")
    await owner.execute("INSERT INTO tasks (user_id, title) SELECT id, 'x' FROM users WHERE email IS NULL")
    await owner.execute(
        "INSERT INTO idempotency_keys (user_id, key, request_hash)"
        " SELECT id, 'x', decode(repeat('00', 32), 'hex') FROM users WHERE email IS NULL"
    )
    await owner.execute("INSERT INTO deleted_users SELECT gen_random_uuid() FROM generate_series(1, 20000)")
    await owner.execute("ANALYZE")
    connection = await asyncpg.connect(app_database_url, server_settings={"plan_cache_mode": mode})
    seen: set[str] = set()
    try:
        for statement, values in each_statement(eve, ada):
            # Only a statement that the server has prepared has a generic plan.
            await connection.execute(f"PREPARE one AS {statement.sql}")
            given = ", ".join(literal(value) for value in statement.arguments(values))
            rows = await connection.fetch(f"EXPLAIN (COSTS OFF) EXECUTE one ({given})")
            generic = await connection.fetchval(
                "SELECT generic_plans FROM pg_prepared_statements WHERE name = 'one'"
            )
            assert generic == (mode == "force_generic_plan")
            await connection.execute("DEALLOCATE one")
            plan = "\n".join(row[0] for row in rows)
            assert "Seq Scan" not in plan, f"{statement.name}\n{plan}"
            seen.add(statement.name)
    finally:
        await connection.close()
    assert len(seen) > 10


def literal(value: Any) -> str:
    """As it stands in SQL; the parameter it is for has a type of its own."""
    if value is None:
        return "NULL"
    text = "\\x" + value.hex() if isinstance(value, bytes) else str(value)
    return f"'{text}'"


def each_statement(eve: Known, ada: Ada) -> Iterator[tuple[Statement, dict[str, Any]]]:
    """The statements of the services, with values for whatever they bind."""
    values: dict[str, Any] = {
        "owner": eve.user_id, "epoch": eve.epoch, "email": eve.email, "id": ada.task_id, "title": "x",
        "description": None,
        "is_completed": False, "describe": False, "if_match": ada.etag, "key": "k", "request_hash": b"x" * 32,
        "limit": 50, "kept_for": timedelta(hours=1),
    }  # fmt: skip
    for found in vars(tasks).values():
        if isinstance(found, Statement):
            yield found, values
    for found in (users.READ, users.DELETE):
        yield found, values
    for query in (PageQuery(), PageQuery(sort="updated_at"), PageQuery(is_completed=False, descending=False)):
        yield task_pages.statement_for(task_pages.form_of(query)), values


# Other servers, and a pooler between


@pytest.fixture
def server15(private_postgres: Callable[..., PostgresServer]) -> PostgresServer:
    return private_postgres(binaries=postgres_15_binaries(), options={"fsync": "off"})


@pytest.mark.debian
@pytest.mark.parametrize("way", ["direct", "pgbouncer"])
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_on_postgresql_15_and_behind_a_pooler_each_finds_their_own(
    server15: PostgresServer, way: str, mode: str
) -> None:
    await schema.create_tables(parse(server15.url))
    administration = await asyncpg.connect(server15.url)
    await administration.execute(f"ALTER ROLE {APPLICATION} SET plan_cache_mode = {mode}")
    with ExitStack() as stack:
        url = server15.application_url
        if way == "pgbouncer":
            pooler = stack.enter_context(PgBouncer(server15, settings={"default_pool_size": "2"}))
            url = pooler.url_for("groundwork", role=APPLICATION)
        async with Database(parse(url)) as database:
            adas = Known(uuid4(), "ada@example.com")
            made = await tasks.create(database, adas, TaskCreate(title=SECRET))
            ada = Ada(adas, made.task_id, made.etag, administration)
            eve = Known(uuid4(), "eve@example.com")
            await tasks.create(database, eve, TaskCreate(title="Eve's own"))
            await every_form(database, eve, ada)
            for deed in DEEDS:
                assert await tried(deed, database, eve, ada) == [], deed
            for _ in range(10):  # the same few backends, used by one and the other
                assert SECRET in (await tasks.page(database, adas.user_id)).items
                assert SECRET not in (await tasks.page(database, eve.user_id)).items
                async with database.session() as session:
                    assert (await session.exec(select(Task))).all() == []
            await nothing_stays(database, eve)
    await administration.close()
