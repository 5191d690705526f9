"""Many at the same time: every answer is one that some order of them gives, and none is empty."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest

from owning import create, listed, operations, owned, shown, somebody
from src.config.database import parse
from src.errors import KeyReused, NotFound, PreconditionFailed, RequestError, Unauthenticated, Unavailable
from src.models import TaskCreate, TaskPut, TaskUpdate
from src.services import tasks
from src.services.database import Database, Limits
from src.services.idempotency import IdempotencyKey
from src.services.tasks import Known
from waiting import PATIENT


@pytest.fixture
async def crowd(either_url: str) -> AsyncIterator[Database]:
    """A database with room for many at a time."""
    async with Database(parse(either_url), replace(PATIENT, pool_size=24)) as opened:
        yield opened


async def outcome(attempt: Awaitable[Any]) -> Any:
    """What it gave, or the kind of error."""
    try:
        return await attempt
    except RequestError as error:
        return type(error)


async def at_once(*attempts: Awaitable[Any]) -> list[Any]:
    return await asyncio.gather(*(outcome(attempt) for attempt in attempts))


async def versions(database: Database, owner: UUID) -> list[int]:
    return sorted(task.version for task in (await owned(database, Known(owner))).values())


async def test_x2_one_key_a_hundred_times_at_once_makes_one_task_and_one_answer(crowd: Database) -> None:
    taken = somebody("ada@example.com")
    await create(crowd, taken)
    for number in range(4):
        # The first write of somebody new, whose e-mail another has in every second round.
        ada = somebody("ada@example.com" if number % 2 else None)
        key = IdempotencyKey.of("k", "create_task", b"")
        new = TaskCreate(title="once")
        given = await at_once(*(tasks.create(crowd, ada, new, idempotency=key) for _ in range(100)))
        assert Counter(type(answer) for answer in given) == {tasks.Created: 100}
        assert len({(answer.body, answer.etag, answer.task_id) for answer in given}) == 1
        assert sum(not answer.replayed for answer in given) == 1
        (stored,) = await listed(crowd, ada)
        assert stored == shown(given[0].body)


async def test_x2_a_key_too_old_that_comes_again_at_once_makes_one_task_more(
    crowd: Database, database: Database
) -> None:
    ada, new = somebody(), TaskCreate(title="again")
    keys = [IdempotencyKey.of(name, "create_task", b"") for name in ("a", "b")]
    first = [await tasks.create(crowd, ada, new, idempotency=key) for key in keys]
    async with database.transaction() as connection:
        await connection.execute("UPDATE idempotency_keys SET created_at = created_at - interval '25 hours'")
    # Each sweeps its own key, and the other's by the way.
    given = await at_once(*(tasks.create(crowd, ada, new, idempotency=key) for key in keys * 20))
    assert Counter(type(answer) for answer in given) == {tasks.Created: 40}
    assert sum(not answer.replayed for answer in given) == 2
    made = {answer.task_id for answer in given}
    assert made.isdisjoint(answer.task_id for answer in first)
    assert {task.id for task in await listed(crowd, ada)} == made | {answer.task_id for answer in first}


async def test_x2_of_two_requests_with_one_key_one_is_taken(crowd: Database) -> None:
    for _ in range(4):
        ada = somebody()
        given = await at_once(
            *(
                tasks.create(
                    crowd,
                    ada,
                    TaskCreate(title=str(number % 2)),
                    idempotency=IdempotencyKey.of("k", "create_task", str(number % 2).encode()),
                )
                for number in range(60)
            )
        )
        assert sum(answer is KeyReused for answer in given) == 30
        (stored,) = await listed(crowd, ada)
        (said,) = {answer.body for answer in given if answer is not KeyReused}
        assert shown(said) == stored


async def test_x2_an_old_key_is_taken_over_once(crowd: Database, database: Database) -> None:
    for _ in range(3):
        ada = somebody()
        key = IdempotencyKey.of("k", "create_task", b"")
        await tasks.create(crowd, ada, TaskCreate(title="old"), idempotency=key)
        async with database.transaction() as connection:
            await connection.execute("UPDATE idempotency_keys SET created_at = now() - interval '2 days'")
        new = TaskCreate(title="new")
        given = await at_once(*(tasks.create(crowd, ada, new, idempotency=key) for _ in range(40)))
        assert len({answer.body for answer in given}) == 1
        assert sorted(task.title for task in await listed(crowd, ada)) == ["new", "old"]


async def test_first_writes_at_once_make_one_account(crowd: Database, database: Database) -> None:
    for number in range(4):
        people = [somebody(f"same{number}@example.com") for _ in range(3)]
        given = await at_once(*(tasks.create(crowd, who, TaskCreate(title="a")) for who in people * 15))
        assert Counter(type(answer) for answer in given) == {tasks.Created: 45}
        async with database.transaction() as connection:
            emails = await connection.fetch(
                "SELECT email FROM users WHERE id = ANY($1)", [who.user_id for who in people]
            )
        assert Counter(row["email"] for row in emails) == {f"same{number}@example.com": 1, None: 2}


async def test_x3_of_fifty_with_one_version_one_wins_and_the_others_are_told(crowd: Database) -> None:
    ada = somebody()
    for _ in range(6):
        made = await tasks.create(crowd, ada, TaskCreate(title="a"))
        given = await at_once(
            *(
                tasks.update(crowd, ada, made.task_id, TaskUpdate(title=str(number)), if_match=made.etag)
                if number % 3
                else tasks.put(crowd, ada, made.task_id, TaskPut(title=str(number)), if_match=made.etag)
                for number in range(50)
            )
        )
        won = [answer for answer in given if answer is not PreconditionFailed]
        assert len(won) == 1
        assert shown(won[0].body).version == 2
        assert await tasks.read(crowd, ada.user_id, made.task_id) == (won[0].body, won[0].etag)


async def test_x3_of_fifty_deletions_of_one_version_one_wins_and_the_others_find_nothing(
    crowd: Database,
) -> None:
    ada = somebody()
    for _ in range(6):
        made = await tasks.create(crowd, ada, TaskCreate(title="a"))
        given = await at_once(
            *(tasks.delete(crowd, ada, made.task_id, if_match=made.etag) for _ in range(50))
        )
        assert Counter(given) == {None: 1, NotFound: 49}


async def test_x3_updates_that_lose_to_a_deletion_find_nothing(crowd: Database) -> None:
    """Each knows the version: it meets the task as it was, changed by one of the others, or deleted."""
    ada = somebody()
    for _ in range(8):
        made = await tasks.create(crowd, ada, TaskCreate(title="a"))
        given = await at_once(
            *(
                tasks.delete(crowd, ada, made.task_id)
                if number == 10
                else tasks.update(crowd, ada, made.task_id, TaskUpdate(title="b"), if_match=made.etag)
                for number in range(40)
            )
        )
        assert given[10] is None
        changes = given[:10] + given[11:]
        assert sum(answer not in (PreconditionFailed, NotFound) for answer in changes) <= 1
        # Whoever comes after the deletion is told so, and never that the task is of another version.
        after = await outcome(
            tasks.update(crowd, ada, made.task_id, TaskUpdate(title="c"), if_match=made.etag)
        )
        assert after is NotFound


async def test_updates_at_once_each_make_a_version(crowd: Database) -> None:
    ada = somebody()
    made = await tasks.create(crowd, ada, TaskCreate(title="a"))
    given = await at_once(
        *(tasks.update(crowd, ada, made.task_id, TaskUpdate(title=str(n))) for n in range(50))
    )
    assert sorted(shown(answer.body).version for answer in given) == list(range(2, 52))
    assert len({answer.etag for answer in given}) == 50


async def test_puts_at_once_make_one_task_and_a_version_each(crowd: Database) -> None:
    for _ in range(4):
        ada, task_id = somebody(), uuid4()
        given = await at_once(
            *(tasks.put(crowd, ada, task_id, TaskPut(title=str(number))) for number in range(50))
        )
        assert sum(answer.created for answer in given) == 1
        assert sorted(shown(answer.body).version for answer in given) == list(range(1, 51))
        same = uuid4()
        only_new = [tasks.put(crowd, ada, same, TaskPut(title="a"), only_new=True) for _ in range(30)]
        assert Counter(answer is PreconditionFailed for answer in await at_once(*only_new)) == {
            True: 29,
            False: 1,
        }


async def test_puts_and_deletions_at_once_leave_no_answer_empty(crowd: Database) -> None:
    for _ in range(4):
        ada, task_id = somebody(), uuid4()
        given = await at_once(
            *(
                tasks.delete(crowd, ada, task_id)
                if number % 3 == 0
                else tasks.put(crowd, ada, task_id, TaskPut(title=str(number)))
                for number in range(60)
            )
        )
        puts = [answer for number, answer in enumerate(given) if number % 3]
        deletions = [answer for number, answer in enumerate(given) if number % 3 == 0]
        assert {type(answer) for answer in puts} == {tasks.Put}
        assert set(deletions) <= {None, NotFound}
        # Each deletion that found something ended what one PUT had begun.
        left = len(await listed(crowd, ada))
        assert sum(answer.created for answer in puts) == deletions.count(None) + left
        assert len({answer.etag for answer in puts}) == len(puts)


async def test_a_user_deleted_among_writes_leaves_nothing(crowd: Database, database: Database) -> None:
    for number in range(4):
        ada = somebody(f"ada{number}@example.com")
        await create(crowd, ada)

        async def leave(who: UUID) -> None:
            async with database.transaction() as connection:
                await connection.execute("DELETE FROM users WHERE id = $1", who)

        key = IdempotencyKey.of("k", "create_task", b"")
        given = await at_once(
            *(tasks.create(crowd, ada, TaskCreate(title="a")) for _ in range(15)),
            *(tasks.create(crowd, ada, TaskCreate(title="a"), idempotency=key) for _ in range(15)),
            leave(ada.user_id),
            *(tasks.put(crowd, ada, uuid4(), TaskPut(title="a")) for _ in range(15)),
            *(
                tasks.batch(crowd, ada, operations({"op": "create", "task": {"title": "a"}}))
                for _ in range(15)
            ),
        )
        assert {type(answer) if isinstance(answer, tuple) else answer for answer in given} <= {
            tasks.Created, tasks.Put, tasks.Batched, Unauthenticated, None,
        }  # fmt: skip
        async with database.transaction() as connection:
            for table in ("users WHERE id", "tasks WHERE user_id", "idempotency_keys WHERE user_id"):
                assert not await connection.fetchval(f"SELECT count(*) FROM {table} = $1", ada.user_id)
        assert await outcome(tasks.create(crowd, ada, TaskCreate(title="a"))) is Unauthenticated


async def test_batches_at_once_wait_for_each_other_and_never_in_a_circle(crowd: Database) -> None:
    """Each names the same tasks, in another order."""
    ada = somebody()
    made = [(await create(crowd, ada)).id for _ in range(8)]
    changes = [{"op": "update", "id": task_id, "task": {"title": "b"}} for task_id in made]
    given = await at_once(
        *(
            tasks.batch(crowd, ada, operations(*changes[turn % 8 :], *changes[: turn % 8]))
            for turn in range(40)
        )
    )
    assert {type(answer) for answer in given} == {tasks.Batched}
    assert await versions(crowd, ada.user_id) == [41] * 8


async def test_batches_at_once_that_make_the_same_tasks(crowd: Database) -> None:
    """One makes them, and each of the others finds them, whenever it looked."""
    for _ in range(4):
        ada = somebody()
        ids = [uuid4() for _ in range(5)]
        make = [{"op": "create", "id": task_id, "task": {"title": "a"}} for task_id in ids]
        given = await at_once(
            *(tasks.batch(crowd, ada, operations(*(make if n % 2 else make[::-1]))) for n in range(30))
        )
        assert Counter(getattr(answer, "__name__", "done") for answer in given) == {
            "done": 1,
            "BatchRefused": 29,
        }


async def test_d9_a_lock_held_by_another_is_waited_for_within_its_bound(
    app_database_url: str, database: Database
) -> None:
    limits = Limits(lock_timeout_seconds=0.3)
    async with Database(parse(app_database_url), limits) as impatient:
        ada = somebody()
        made = await tasks.create(impatient, ada, TaskCreate(title="a"))
        async with database.transaction() as holder:
            await holder.execute("SELECT FROM tasks WHERE id = $1 FOR UPDATE", made.task_id)
            for attempt in (
                tasks.update(impatient, ada, made.task_id, TaskUpdate(title="b")),
                tasks.update(impatient, ada, made.task_id, TaskUpdate(title="b"), if_match=made.etag),
                tasks.delete(impatient, ada, made.task_id),
                tasks.put(impatient, ada, made.task_id, TaskPut(title="b")),
                tasks.batch(impatient, ada, operations({"op": "delete", "id": made.task_id})),
            ):
                with pytest.raises(Unavailable) as caught:
                    await attempt
                assert caught.value.reason == "lock-timeout"
            # Reading waits for nobody.
            assert await tasks.read(impatient, ada.user_id, made.task_id) == (made.body, made.etag)
        assert await tasks.read(impatient, ada.user_id, made.task_id) == (made.body, made.etag)
