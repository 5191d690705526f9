"""What an owner may do with a task, on a real database, in whichever role."""

from __future__ import annotations

import io
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest

from owning import create, listed, owned, read, shown, somebody, update
from postgres_server import PostgresServer
from proxies import Proxy
from src.config.database import parse
from src.errors import Invalid, KeyReused, NotFound, OutcomeUnknown, PreconditionFailed, Unauthenticated
from src.models import TaskCreate, TaskPut, TaskUpdate
from src.services import tasks
from src.services.database import Database, Limits
from src.services.idempotency import SWEPT_AT_ONCE, IdempotencyKey
from src.services.tasks import ANY_VERSION, Known, PageQuery
from waiting import eventually

A_DAY_AGO = "UPDATE idempotency_keys SET created_at = created_at - interval '24 hours'"


def a_key(name: str = "k", body: bytes = b"{}", **more: Any) -> IdempotencyKey:
    return IdempotencyKey.of(name, "create_task", body, **more)


async def test_a_task_is_created_as_it_was_sent(either: Database) -> None:
    ada = somebody()
    task = await create(either, ada, title="  Bücher\n ", description="")
    assert (task.title, task.description, task.user_id) == ("  Bücher\n ", "", ada.user_id)
    assert (task.version, task.is_completed, task.id.version) == (1, False, 7)
    assert task.created_at == task.updated_at
    assert (await create(either, ada)).description is None
    assert (await create(either, ada, is_completed=True)).is_completed
    assert await read(either, ada, task.id) == task


async def test_a_first_write_makes_the_account(either: Database, database: Database) -> None:
    ada, eve, bob = somebody("ada@example.com"), somebody("ada@example.com"), somebody()
    writes: list[Callable[[Known], Awaitable[object]]] = [
        lambda who: tasks.create(either, who, TaskCreate(title="a")),
        lambda who: tasks.put(either, who, uuid4(), TaskPut(title="a")),
        lambda who: tasks.create(either, who, TaskCreate(title="a"), idempotency=a_key()),
    ]
    for write, who in zip(writes, (ada, eve, bob), strict=True):
        await write(who)
        assert len(await owned(either, who)) == 1
    async with database.transaction() as connection:
        kept = dict(await connection.fetch("SELECT id, email FROM users"))  # type: ignore[arg-type]
    assert kept == {ada.user_id: "ada@example.com", eve.user_id: None, bob.user_id: None}


async def test_what_was_read_and_not_written_makes_no_account(either: Database, database: Database) -> None:
    ada = somebody("ada@example.com")
    assert await listed(either, ada) == []
    for attempt in (
        tasks.read(either, ada.user_id, uuid4()),
        tasks.update(either, ada, uuid4(), TaskUpdate(title="a")),
        tasks.delete(either, ada, uuid4()),
    ):
        with pytest.raises(NotFound):
            await attempt
    async with database.transaction() as connection:
        assert await connection.fetchval("SELECT count(*) FROM users") == 0


async def test_a_deleted_users_writes_are_refused_and_make_nobody(
    either: Database, database: Database
) -> None:
    ada = somebody("ada@example.com")
    task = await create(either, ada)
    async with database.transaction() as connection:
        await connection.execute("DELETE FROM users WHERE id = $1", ada.user_id)
    for attempt in (
        tasks.create(either, ada, TaskCreate(title="a")),
        tasks.create(either, ada, TaskCreate(title="a"), idempotency=a_key()),
        tasks.put(either, ada, task.id, TaskPut(title="a")),
        tasks.put(either, ada, task.id, TaskPut(title="a"), only_new=True),
        tasks.put(either, ada, task.id, TaskPut(title="a"), if_match=ANY_VERSION),
        tasks.update(either, ada, task.id, TaskUpdate(title="a")),
        tasks.update(either, ada, task.id, TaskUpdate(title="a"), if_match=ANY_VERSION),
        tasks.delete(either, ada, task.id),
        tasks.delete(either, ada, task.id, if_match=ANY_VERSION),
    ):
        with pytest.raises(Unauthenticated):
            await attempt
    async with database.transaction() as connection:
        assert await connection.fetchval("SELECT count(*) FROM users") == 0


async def test_an_update_changes_what_was_sent_and_nothing_else(either: Database) -> None:
    ada = somebody()
    task = await create(either, ada, description="d")
    renamed = await update(either, ada, task.id, title="New")
    assert renamed == task.model_copy(update={"title": "New", "version": 2, "updated_at": renamed.updated_at})
    assert renamed.updated_at > task.updated_at
    done = await update(either, ada, task.id, is_completed=True)
    assert (done.title, done.description, done.is_completed, done.version) == ("New", "d", True, 3)
    cleared = await update(either, ada, task.id, description=None, is_completed=False)
    assert (cleared.title, cleared.description, cleared.is_completed) == ("New", None, False)
    described = await update(either, ada, task.id, description="e")
    assert (described.title, described.description, described.version) == ("New", "e", 5)


async def test_an_update_of_nothing_makes_no_new_version(either: Database) -> None:
    ada = somebody()
    made = await tasks.create(either, ada, TaskCreate(title="a"))
    for if_match in (None, ANY_VERSION, made.etag):
        same = await tasks.update(either, ada, made.task_id, TaskUpdate(), if_match=if_match)
        assert same == (made.body, made.etag)
    with pytest.raises(PreconditionFailed):
        await tasks.update(either, ada, made.task_id, TaskUpdate(), if_match="1-0")
    with pytest.raises(NotFound):
        await update(either, ada, uuid4())


async def test_a_deleted_task_is_gone(either: Database) -> None:
    ada = somebody()
    task = await create(either, ada)
    await tasks.delete(either, ada, task.id)
    with pytest.raises(NotFound):
        await tasks.read(either, ada.user_id, task.id)
    with pytest.raises(NotFound):
        await tasks.delete(either, ada, task.id)


async def test_a4_another_owners_task_is_as_if_it_were_not(either: Database) -> None:
    ada, bob = somebody(), somebody()
    made = await tasks.create(either, ada, TaskCreate(title="hers"))
    await create(either, bob)
    said = []
    for task_id in (made.task_id, uuid4()):
        for attempt in (
            tasks.read(either, bob.user_id, task_id),
            tasks.update(either, bob, task_id, TaskUpdate(title="mine")),
            tasks.update(either, bob, task_id, TaskUpdate(title="mine"), if_match=made.etag),
            tasks.update(either, bob, task_id, TaskUpdate()),
            tasks.delete(either, bob, task_id),
            tasks.delete(either, bob, task_id, if_match=made.etag),
        ):
            with pytest.raises(NotFound) as caught:
                await attempt
            said.append(str(caught.value))
    assert len(set(said)) == 1
    assert made.task_id not in await owned(either, bob)
    assert await tasks.read(either, ada.user_id, made.task_id) == (made.body, made.etag)


async def test_a4_a_put_on_anothers_id_makes_ones_own(either: Database) -> None:
    ada, bob = somebody(), somebody()
    made = await tasks.create(either, ada, TaskCreate(title="hers"))
    with pytest.raises(PreconditionFailed):
        await tasks.put(either, bob, made.task_id, TaskPut(title="his"), if_match=made.etag)
    put = await tasks.put(either, bob, made.task_id, TaskPut(title="his"), only_new=True)
    assert put.created
    assert (shown(put.body).user_id, shown(put.body).id) == (bob.user_id, made.task_id)
    assert await tasks.read(either, ada.user_id, made.task_id) == (made.body, made.etag)


async def test_a_put_makes_and_then_replaces(either: Database) -> None:
    ada, task_id = somebody(), uuid4()
    put = await tasks.put(either, ada, task_id, TaskPut(title="a", description="d", is_completed=True))
    first = shown(put.body)
    assert (put.created, first.id, first.version) == (True, task_id, 1)
    again = await tasks.put(either, ada, task_id, TaskPut(title="b"))
    second = shown(again.body)
    assert not again.created
    assert (second.title, second.description, second.is_completed, second.version) == ("b", None, False, 2)
    assert second.created_at == first.created_at
    assert second.updated_at > first.updated_at
    assert again.etag != put.etag
    assert await tasks.read(either, ada.user_id, task_id) == (again.body, again.etag)


async def test_a_put_minds_its_conditions(either: Database) -> None:
    ada, task_id = somebody(), uuid4()
    for if_match in (ANY_VERSION, "1-0"):
        with pytest.raises(PreconditionFailed):
            await tasks.put(either, ada, task_id, TaskPut(title="a"), if_match=if_match)
    first = await tasks.put(either, ada, task_id, TaskPut(title="a"), only_new=True)
    with pytest.raises(PreconditionFailed):
        await tasks.put(either, ada, task_id, TaskPut(title="b"), only_new=True)
    second = await tasks.put(either, ada, task_id, TaskPut(title="b"), if_match=first.etag)
    with pytest.raises(PreconditionFailed):
        await tasks.put(either, ada, task_id, TaskPut(title="c"), if_match=first.etag)
    third = await tasks.put(either, ada, task_id, TaskPut(title="c"), if_match=ANY_VERSION)
    assert (first.created, second.created, third.created) == (True, False, False)
    assert await tasks.read(either, ada.user_id, task_id) == (third.body, third.etag)


async def test_a_changed_and_a_missing_task_are_told_apart(either: Database) -> None:
    ada = somebody()
    made = await tasks.create(either, ada, TaskCreate(title="a"))
    now = await tasks.update(either, ada, made.task_id, TaskUpdate(title="b"), if_match=made.etag)
    for act in (
        lambda task_id, tag: tasks.update(either, ada, task_id, TaskUpdate(title="c"), if_match=tag),
        lambda task_id, tag: tasks.delete(either, ada, task_id, if_match=tag),
    ):
        with pytest.raises(PreconditionFailed):
            await act(made.task_id, made.etag)
        for if_match in (made.etag, now.etag, ANY_VERSION):
            with pytest.raises(NotFound):
                await act(uuid4(), if_match)
    assert await tasks.read(either, ada.user_id, made.task_id) == now
    await tasks.delete(either, ada, made.task_id, if_match=now.etag)
    assert await listed(either, ada) == []


async def test_an_etag_never_stands_for_another_content(either: Database) -> None:
    ada, task_id = somebody(), uuid4()
    seen: set[str] = set()
    for round_number in range(5):
        for title in ("a", "b"):
            seen.add((await tasks.put(either, ada, task_id, TaskPut(title=f"{title}{round_number}"))).etag)
        await tasks.delete(either, ada, task_id)
    assert len(seen) == 10


async def test_an_import_brings_no_etag_back_for_another_content(either: Database) -> None:
    ada = somebody()
    made = await tasks.create(either, ada, TaskCreate(title="a", description="b"))
    line = json.loads(made.body)
    seen = {made.etag}
    changes = {
        "title": "a,b",
        "description": None,
        "is_completed": True,
        "created_at": "2026-01-01T00:00:00Z",
    }
    for field, value in changes.items():
        await tasks.delete(either, ada, made.task_id)
        await tasks.load(either, ada, io.BytesIO(json.dumps(line | {field: value}).encode()))
        seen.add((await tasks.read(either, ada.user_id, made.task_id)).etag)
    assert len(seen) == 1 + len(changes)
    await tasks.delete(either, ada, made.task_id)
    await tasks.load(either, ada, io.BytesIO(made.body.encode()))
    assert await tasks.read(either, ada.user_id, made.task_id) == (made.body, made.etag)


# Idempotency


async def test_a_repeat_is_given_the_stored_answer_and_writes_nothing(either: Database) -> None:
    ada = somebody()
    first = await tasks.create(either, ada, TaskCreate(title="a", description="d"), idempotency=a_key())
    assert await tasks.read(either, ada.user_id, first.task_id) == (first.body, first.etag)
    await update(either, ada, first.task_id, title="b")
    again = await tasks.create(either, ada, TaskCreate(title="a", description="d"), idempotency=a_key())
    assert again == first._replace(replayed=True)
    await tasks.delete(either, ada, first.task_id)
    assert await tasks.create(either, ada, TaskCreate(title="a"), idempotency=a_key()) == again
    assert await listed(either, ada) == []


async def test_a_key_with_another_request_is_refused(either: Database) -> None:
    ada = somebody()
    await tasks.create(either, ada, TaskCreate(title="a"), idempotency=a_key())
    with pytest.raises(KeyReused):
        await tasks.create(either, ada, TaskCreate(title="b"), idempotency=a_key(body=b"other"))
    assert [task.title for task in await listed(either, ada)] == ["a"]


async def test_anothers_key_is_unknown(either: Database) -> None:
    ada, bob = somebody(), somebody()
    hers = await tasks.create(either, ada, TaskCreate(title="hers"), idempotency=a_key())
    his = await tasks.create(either, bob, TaskCreate(title="his"), idempotency=a_key(body=b"other"))
    assert (hers.replayed, his.replayed) == (False, False)
    assert [task.title for task in await listed(either, bob)] == ["his"]


async def test_a_key_older_than_its_time_is_new(either: Database, database: Database) -> None:
    ada = somebody()
    first = await tasks.create(either, ada, TaskCreate(title="a"), idempotency=a_key())
    async with database.transaction() as connection:
        await connection.execute(A_DAY_AGO)
    later = await tasks.create(either, ada, TaskCreate(title="b"), idempotency=a_key(body=b"other"))
    assert not later.replayed
    assert later.task_id != first.task_id
    assert await tasks.read(either, ada.user_id, later.task_id) == (later.body, later.etag)
    again = await tasks.create(either, ada, TaskCreate(title="b"), idempotency=a_key(body=b"other"))
    assert again == later._replace(replayed=True)
    assert len(await listed(either, ada)) == 2


async def test_ones_own_old_keys_are_swept_a_few_at_a_time(either: Database, database: Database) -> None:
    ada, bob = somebody(), somebody()
    for who in (ada, bob):
        await create(either, who)
        async with database.transaction() as connection:
            await connection.execute(
                "INSERT INTO idempotency_keys (user_id, key, request_hash, response, status, created_at)"
                " SELECT $1, n::text, sha256('x'), '{}', 201, now() - interval '25 hours'"
                " FROM generate_series(1, 30) n",
                who.user_id,
            )
    left = []
    for number in range(3):
        await tasks.create(either, ada, TaskCreate(title="a"), idempotency=a_key(f"new-{number}"))
        async with database.transaction() as connection:
            counted = "SELECT count(*) FROM idempotency_keys WHERE user_id = $1 AND key !~ '^new'"
            left.append(await connection.fetchval(counted, ada.user_id))
            assert await connection.fetchval(counted, bob.user_id) == 30
    assert left == [30 - SWEPT_AT_ONCE, 0, 0]


@pytest.mark.parametrize("key", ["", "a" * 256, "a b", "ä", "a\n", "\x7f"])
def test_a_key_is_visible_ascii(key: str) -> None:
    with pytest.raises(Invalid) as caught:
        a_key(key)
    assert [fault.pointer for fault in caught.value.faults] == ["Idempotency-Key"]


def test_a_key_tells_operations_and_bodies_apart() -> None:
    assert len({IdempotencyKey.of("k", operation, body).request_hash
                for operation in ("a", "ab") for body in (b"", b"b", b"bc")}) == 6  # fmt: skip


# One round trip


@pytest.fixture
def counted(postgres: PostgresServer, app_database_url: str) -> Iterator[tuple[Proxy, str]]:
    with Proxy(postgres.port) as proxy:
        yield proxy, proxy.through(app_database_url)


async def test_everything_is_one_round_trip(counted: tuple[Proxy, str]) -> None:
    proxy, url = counted
    ada = somebody()
    async with Database(parse(url)) as database:
        task_id = UUID(int=1)

        async def everything() -> dict[str, int]:
            spent: dict[str, int] = {}

            async def spend(name: str, act: Awaitable[Any]) -> Any:
                before = proxy.traffic
                result = await act
                spent[name] = (proxy.traffic - before).round_trips
                return result

            new, one = TaskCreate(title="a"), ada.user_id
            await spend("create", tasks.create(database, ada, new))
            await spend("create once", tasks.create(database, ada, new, idempotency=a_key()))
            await spend("replay", tasks.create(database, ada, new, idempotency=a_key()))
            made = await spend("put", tasks.put(database, ada, task_id, TaskPut(title="a")))
            await spend("read", tasks.read(database, one, task_id))
            now = await spend("update", tasks.update(database, Known(one), task_id, TaskUpdate(title="b")))
            assert made.etag != now.etag
            change = tasks.update(database, Known(one), task_id, TaskUpdate(title="c"), if_match=now.etag)
            now = await spend("update matched", change)
            await spend(
                "nothing", tasks.update(database, Known(one), task_id, TaskUpdate(), if_match=now.etag)
            )
            put = tasks.put(database, ada, task_id, TaskPut(title="c"), if_match=now.etag)
            now = await spend("put matched", put)
            await spend("page", tasks.page(database, one))
            await spend("search", tasks.page(database, one, PageQuery(q="a", count="exact")))
            await spend("delete matched", tasks.delete(database, Known(one), task_id, if_match=now.etag))
            await spend("put new", tasks.put(database, ada, task_id, TaskPut(title="a"), only_new=True))
            await spend("delete", tasks.delete(database, Known(one), task_id))
            return spent

        await everything()  # connects, and prepares each statement
        spent = await everything()
    assert spent == dict.fromkeys(spent, 1)
    assert len(spent) == 14


async def test_n5_a_lost_reply_of_a_create_with_a_key_is_asked_for_again(counted: tuple[Proxy, str]) -> None:
    """The write was committed and its answer was lost: the repeat finds the key, and the caller one task."""
    proxy, url = counted
    ada = somebody()
    async with Database(parse(url)) as database:
        await create(database, ada)
        await tasks.create(database, ada, TaskCreate(title="warm"), idempotency=a_key("warm"))
        proxy.lose_replies(1)
        made = await tasks.create(database, ada, TaskCreate(title="once"), idempotency=a_key())
        assert not made.replayed
        assert [task.title for task in await listed(database, ada, q="once")] == ["once"]
        assert await tasks.read(database, ada.user_id, made.task_id) == (made.body, made.etag)


async def test_n5_a_create_whose_outcome_stays_unknown_is_never_said_not_to_be_stored(
    counted: tuple[Proxy, str],
) -> None:
    """The answer is lost and the database cannot be reached again: not 503, which would promise that."""
    proxy, url = counted
    ada = somebody()
    async with Database(parse(url), Limits(pool_size=1)) as database:
        new = TaskCreate(title="once")
        for key, seconds in ((a_key(), 1), (None, None)):
            # Both statements are prepared on the one connection, so that the lost answer is the write's.
            await tasks.create(database, ada, new)
            await tasks.create(database, ada, new, idempotency=a_key("warm"))
            proxy.lose_replies(1)
            proxy.refuse()
            with pytest.raises(OutcomeUnknown) as caught:
                await tasks.create(database, ada, new, idempotency=key)
            assert caught.value.retry_after_seconds == seconds
            proxy.accept()
            await eventually(lambda: database.observe().ready)
        again = await tasks.create(database, ada, new, idempotency=a_key())
        assert again.replayed
        assert len(await listed(database, ada)) == 2 + 1 + 2
