"""Batches: all or none, in their order, each operation meeting what those before it left."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from owning import create, listed, operations, owned, read, somebody
from postgres_server import PostgresServer
from proxies import Proxy
from src.config.database import parse
from src.errors import BatchRefused, KeyReused, OutcomeUnknown, Unauthenticated
from src.models import TaskBatchRead, TaskCreate, TaskRead
from src.services import tasks
from src.services.database import Database
from src.services.tasks import IdempotencyKey, Known

KEY = IdempotencyKey.of("k", "batch_tasks", b"")


async def batch(database: Database, author: Known, *given: dict[str, Any], **more: Any) -> TaskBatchRead:
    done = await tasks.batch(database, author, operations(*given), **more)
    return TaskBatchRead.model_validate_json(done.body)


async def refusal(database: Database, author: Known, *given: dict[str, Any]) -> list[tuple[str, str]]:
    with pytest.raises(BatchRefused) as caught:
        await batch(database, author, *given)
    return [(fault.pointer, fault.detail) for fault in caught.value.faults]


def make(task_id: UUID | None = None, **task: Any) -> dict[str, Any]:
    chosen = {} if task_id is None else {"id": task_id}
    return {"op": "create", "task": {"title": "a"} | task, **chosen}


def change(task_id: UUID, if_match: str | None = None, **task: Any) -> dict[str, Any]:
    return {"op": "update", "id": task_id, "task": task, "if_match": if_match}


def remove(task_id: UUID, if_match: str | None = None) -> dict[str, Any]:
    return {"op": "delete", "id": task_id, "if_match": if_match}


async def test_each_operation_is_answered_with_what_it_left(either: Database) -> None:
    ada = somebody("ada@example.com")
    old, gone = await create(either, ada, title="old", description="d"), await create(either, ada)
    done = await batch(either, ada, make(title="new"), change(old.id, title="newer"), remove(gone.id))
    made, changed, removed = done.results
    assert [result.op for result in done.results] == ["create", "update", "delete"]
    assert (removed.id, removed.etag, removed.task) == (gone.id, None, None)
    assert made.task is not None
    assert changed.task is not None
    assert (changed.task.title, changed.task.description, changed.task.version) == ("newer", "d", 2)
    assert changed.task.created_at == old.created_at
    assert await owned(either, ada) == {made.id: made.task, old.id: changed.task}
    for result in (made, changed):
        assert (await tasks.read(either, ada.user_id, result.id)).etag == result.etag


async def test_operations_on_one_task_meet_what_those_before_them_left(either: Database) -> None:
    ada, task_id = somebody(), uuid4()
    done = await batch(
        either,
        ada,
        make(task_id, title="one"),
        change(task_id, title="two"),
        change(task_id),
        change(task_id, is_completed=True),
        remove(task_id),
        make(task_id, title="three"),
        change(task_id, description="d"),
    )
    states = [
        None
        if (task := result.task) is None
        else (task.title, task.description, task.is_completed, task.version)
        for result in done.results
    ]
    assert states == [
        ("one", None, False, 1),
        ("two", None, False, 2),
        ("two", None, False, 2),
        ("two", None, True, 3),
        None,
        ("three", None, False, 4),
        ("three", "d", False, 5),
    ]
    tags = [result.etag for result in done.results if result.task is not None]
    assert len(set(tags)) == 5  # the third operation changed nothing
    assert await owned(either, ada) == {task_id: done.results[-1].task}


async def test_a_batch_may_undo_itself(either: Database) -> None:
    ada, task_id = somebody(), uuid4()
    kept = await create(either, ada)
    await batch(either, ada, make(task_id), remove(task_id), change(kept.id))
    assert await owned(either, ada) == {kept.id: kept}


async def test_a_task_deleted_and_made_again_is_another(either: Database) -> None:
    ada = somebody()
    old = await create(either, ada, title="old", description="d")
    done = await batch(either, ada, remove(old.id), make(old.id, title="new"))
    new = done.results[1].task
    assert new is not None
    assert (new.title, new.description, new.version) == ("new", None, 1)
    assert new.created_at > old.created_at
    assert await read(either, ada, old.id) == new


async def test_every_operation_that_cannot_be_done_is_named_and_none_is_done(either: Database) -> None:
    ada, bob = somebody(), somebody()
    his = await create(either, bob)
    mine = await tasks.create(either, ada, TaskCreate(title="a"))
    before = await owned(either, ada)
    faults = await refusal(
        either,
        ada,
        make(title="would be"),
        make(mine.task_id),
        change(uuid4(), title="b"),
        change(his.id, title="b"),
        remove(his.id),
        change(mine.task_id, if_match="1-0", title="b"),
        remove(mine.task_id, if_match="1-0"),
        remove(mine.task_id, if_match=mine.etag),
        remove(mine.task_id),
    )
    assert faults == [
        ("/operations/1/id", "There is a task of this id."),
        ("/operations/2/id", "There is no such task."),
        ("/operations/3/id", "There is no such task."),
        ("/operations/4/id", "There is no such task."),
        ("/operations/5/if_match", "The task is of another version."),
        ("/operations/6/if_match", "The task is of another version."),
        ("/operations/8/id", "There is no such task."),
    ]
    assert await owned(either, ada) == before
    assert await owned(either, bob) == {his.id: his}


async def test_a_tag_within_a_batch_is_that_of_the_operation_before(either: Database) -> None:
    ada = somebody()
    task = await create(either, ada)
    etag = (await tasks.read(either, ada.user_id, task.id)).etag
    done = await batch(
        either, ada, change(task.id, if_match=etag, title="b"), change(task.id, if_match="*", title="c")
    )
    assert [result.task.version for result in done.results if result.task] == [2, 3]
    assert await refusal(
        either,
        ada,
        change(task.id, if_match=done.results[1].etag, title="d"),
        remove(task.id, if_match=done.results[1].etag),
    ) == [("/operations/1/if_match", "The task is of another version.")]


async def test_a_first_batch_makes_the_account_and_a_refused_one_does_not(
    either: Database, database: Database
) -> None:
    ada, eve = somebody("ada@example.com"), somebody("eve@example.com")
    await batch(either, ada, make())
    await refusal(either, eve, make(), remove(uuid4()))
    async with database.transaction() as connection:
        assert await connection.fetchval("SELECT array_agg(email) FROM users") == ["ada@example.com"]
        await connection.execute("DELETE FROM users")
    for idempotency in (None, KEY):
        with pytest.raises(Unauthenticated):
            await batch(either, ada, make(), idempotency=idempotency)


async def test_a_repeated_batch_is_given_the_first_answer(either: Database) -> None:
    ada, bob = somebody(), somebody()
    given = operations(make(title="a"), make(title="b"))
    first = await tasks.batch(either, ada, given, idempotency=KEY)
    again = await tasks.batch(either, ada, operations(make(title="a"), make(title="b")), idempotency=KEY)
    assert (first.replayed, again.replayed) == (False, True)
    assert again.body == first.body
    assert len(await listed(either, ada)) == 2
    with pytest.raises(KeyReused):
        await tasks.batch(either, ada, given, idempotency=IdempotencyKey.of("k", "batch_tasks", b"other"))
    # Ids are the owner's own: the same batch is somebody else's too.
    assert not (await tasks.batch(either, bob, given, idempotency=KEY)).replayed


async def test_a_refused_batch_does_not_use_up_its_key(either: Database) -> None:
    ada, task_id = somebody(), uuid4()
    with pytest.raises(BatchRefused):
        await batch(either, ada, change(task_id, title="b"), idempotency=KEY)
    await batch(either, ada, make(task_id))
    done = await batch(either, ada, change(task_id, title="b"), idempotency=KEY)
    assert done.results[0].task is not None


async def test_x2_one_key_at_once_makes_one_batch(either: Database) -> None:
    for _ in range(4):
        ada = somebody()
        given = operations(*(make() for _ in range(20)))
        answers = await asyncio.gather(*(tasks.batch(either, ada, given, idempotency=KEY) for _ in range(40)))
        assert len({answer.body for answer in answers}) == 1
        assert sum(not answer.replayed for answer in answers) == 1
        assert len(await listed(either, ada, limit=200)) == 20


async def test_a_thousand_operations_take_a_handful_of_round_trips(
    postgres: PostgresServer, app_database_url: str
) -> None:
    ada = somebody()
    with Proxy(postgres.port) as proxy:
        async with Database(parse(proxy.through(app_database_url))) as database:
            await batch(database, ada, make(), idempotency=IdempotencyKey.of("warm", "", b""))
            before = proxy.traffic
            done = await batch(database, ada, *(make() for _ in range(1000)), idempotency=KEY)
            # BEGIN, what is there, what is written, COMMIT, and what keeps the connection clean for the next.
            assert (proxy.traffic - before).round_trips == 5
            ids = [result.id for result in done.results]
            before = proxy.traffic
            mixed = [change(task_id, title="b") for task_id in ids[:500]] + [remove(i) for i in ids[500:]]
            await batch(database, ada, *mixed, idempotency=IdempotencyKey.of("l", "", b""))
            assert (proxy.traffic - before).round_trips == 5
            page = await tasks.page(database, ada.user_id, tasks.PageQuery(count="exact"))
            assert page.count == 501


async def test_new_tasks_alone_take_one_round_trip(postgres: PostgresServer, app_database_url: str) -> None:
    ada = somebody()
    with Proxy(postgres.port) as proxy:
        async with Database(parse(proxy.through(app_database_url))) as database:
            await batch(database, ada, make())
            before = proxy.traffic
            done = await batch(database, ada, *(make(title=f"{number}") for number in range(1000)))
            assert (proxy.traffic - before).round_trips == 1
            made = {result.id: result.task for result in done.results}
            assert [task.title for task in made.values() if task] == [f"{number}" for number in range(1000)]
            page = await tasks.page(database, ada.user_id, tasks.PageQuery(count="exact"))
            assert page.count == 1001


async def test_new_tasks_alone_are_named_where_they_cannot_be_made(either: Database) -> None:
    ada, bob, taken, twice = somebody(), somebody(), uuid4(), uuid4()
    await batch(either, bob, make(taken))
    await batch(either, ada, make(taken), make())  # an id is taken by its owner only
    there = await owned(either, ada)
    exists = "There is a task of this id."
    assert await refusal(either, ada, make(), make(taken), make()) == [("/operations/1/id", exists)]
    assert await refusal(either, ada, make(twice), make(), make(twice)) == [("/operations/2/id", exists)]
    assert await owned(either, ada) == there


SLOW_COMMIT = """
    CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_sleep(2.5); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON tasks DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION slowly()
"""


async def test_n5_a_lost_answer_to_commit_is_unknown_and_a_key_makes_the_repeat_safe(
    postgres: PostgresServer, app_database_url: str, database: Database
) -> None:
    ada = somebody()
    await create(database, ada, title="first")
    async with database.transaction() as connection:
        await connection.execute(SLOW_COMMIT)
    with Proxy(postgres.port) as proxy:
        async with Database(parse(proxy.through(app_database_url))) as service:
            for given, key, seconds in (
                ([make()], None, None),
                ([make(task_id := uuid4()), change(task_id, title="b")], None, None),
                ([make()], KEY, 1),
            ):
                working = asyncio.create_task(batch(service, ada, *given, idempotency=key))
                await _committing(database)
                proxy.lose_replies(1)
                with pytest.raises(OutcomeUnknown) as caught:
                    await working
                assert caught.value.retry_after_seconds == seconds
            again = await tasks.batch(service, ada, operations(make()), idempotency=KEY)
            assert again.replayed
            # The first, the two without a key, and the one with it, once.
            assert len(await listed(service, ada)) == 4


async def _committing(database: Database) -> None:
    """Until somebody's COMMIT is under way, or that of a statement of its own."""
    busy = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND wait_event = 'PgSleep'"
    async with asyncio.timeout(60):
        counted = 0
        while not counted:
            async with database.transaction() as connection:
                counted = await connection.fetchval(busy)


TEXTS = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=30)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    title=TEXTS.map(lambda text: f"x{text}"),
    description=st.none() | TEXTS,
    done=st.booleans(),
    key=st.sampled_from([None, KEY]),
)
async def test_the_answers_bytes_are_those_that_reading_gives(
    app_database: Database, title: str, description: str | None, done: bool, key: IdempotencyKey | None
) -> None:
    ada = somebody()
    given = make(title=title, description=description, is_completed=done)
    answer = await tasks.batch(app_database, ada, operations(given), idempotency=key)
    (result,) = json.loads(answer.body)["results"]
    stored = await tasks.read(app_database, ada.user_id, UUID(result["id"]))
    assert f'"task":{stored.body}}}' in answer.body
    assert f'"etag":"{stored.etag}"' in answer.body
    assert TaskRead.model_validate_json(stored.body).model_dump_json() == stored.body
