"""Accounts that make themselves with their first write, and those that never come back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlalchemy import delete as delete_from
from sqlmodel import col

from src.config.database import parse
from src.errors import Conflict, NotFound, Unauthenticated
from src.models import TaskCreate, TaskPut, User
from src.services import tasks
from src.services.database import Database
from src.services.ownership import address
from src.services.tasks import IdempotencyKey, Known
from waiting import PATIENT, eventually


@pytest.fixture
async def wide(app_database_url: str) -> AsyncIterator[Database]:
    """Many writes really at once, not in a queue."""
    async with Database(parse(app_database_url), replace(PATIENT, pool_size=40)) as opened:
        yield opened


async def write(database: Database, author: Known) -> UUID:
    return (await tasks.create(database, author, TaskCreate(title="a"))).task_id


async def accounts(owner: asyncpg.Connection[Any]) -> dict[UUID, str | None]:
    return {row["id"]: row["email"] for row in await owner.fetch("SELECT id, email FROM users")}


async def test_before_the_first_write_there_is_no_account_and_after_it_there_is_one(
    app_database: Database, owner: asyncpg.Connection[Any]
) -> None:
    ada = Known(uuid4(), "ada@example.com")
    assert (await tasks.page(app_database, ada.user_id)).items == "[]"
    with pytest.raises(NotFound):
        await tasks.read(app_database, ada.user_id, uuid4())
    assert await accounts(owner) == {}
    for _ in range(3):
        await write(app_database, ada)
    assert await accounts(owner) == {ada.user_id: "ada@example.com"}


@pytest.mark.parametrize("email", [None, "ada@example.com"])
async def test_without_an_address_of_its_own_an_account_has_none(
    app_database: Database, owner: asyncpg.Connection[Any], email: str | None
) -> None:
    ada, eve = Known(uuid4(), "ada@example.com"), Known(uuid4(), email)
    await write(app_database, ada)
    await write(app_database, eve)
    assert await accounts(owner) == {ada.user_id: "ada@example.com", eve.user_id: None}


@pytest.mark.parametrize("round_", range(5))
async def test_of_100_first_writes_at_once_with_one_address_none_fails(
    wide: Database, owner: asyncpg.Connection[Any], round_: int
) -> None:
    people = [Known(uuid4(), "one@example.com") for _ in range(8 + round_)]
    written = await asyncio.gather(*(write(wide, people[number % len(people)]) for number in range(100)))
    assert len(set(written)) == 100
    found = await accounts(owner)
    assert found.keys() == {person.user_id for person in people}
    assert [email for email in found.values() if email is not None] == ["one@example.com"]
    assert await owner.fetchval("SELECT count(*) FROM tasks") == 100


async def test_first_writes_with_changing_addresses_at_once_never_fail(
    wide: Database, owner: asyncpg.Connection[Any]
) -> None:
    """The same person's tokens may state different addresses, and others theirs."""
    chance = random.Random(7)
    ids = [uuid4() for _ in range(6)]
    written = await asyncio.gather(
        *(write(wide, Known(chance.choice(ids), f"{chance.choice('abc')}@example.com")) for _ in range(200))
    )
    assert len(set(written)) == 200
    assert (await accounts(owner)).keys() <= set(ids)


@pytest.mark.parametrize(
    ("stated", "kept"),
    [
        ("Ada@Example.COM", "ada@example.com"),
        ("no address", None),
        ("", None),
        (None, None),
        ("a\x00@example.com", None),
        ("ä@example.com", None),
        ("a" * 300 + "@example.com", None),
    ],
)
def test_an_address_that_cannot_be_kept_is_none(stated: str | None, kept: str | None) -> None:
    assert address(stated) == kept


# Those who were deleted

DELETED_BY = [
    "DELETE FROM users WHERE id = $1",
    "WITH gone AS (DELETE FROM users WHERE id = $1 RETURNING id) SELECT id FROM gone",
    "MERGE INTO users USING (SELECT $1::uuid AS id) AS doomed ON users.id = doomed.id WHEN MATCHED THEN DELETE",
]


@pytest.mark.parametrize("statement", DELETED_BY)
async def test_whoever_is_deleted_is_remembered(
    app_database: Database, owner: asyncpg.Connection[Any], statement: str
) -> None:
    ada = Known(uuid4(), "ada@example.com")
    await write(app_database, ada)
    await owner.execute(statement, ada.user_id)
    await stays_gone(app_database, owner, ada)


async def test_so_is_who_deletes_themselves_in_a_session(
    app_database: Database, owner: asyncpg.Connection[Any]
) -> None:
    ada = Known(uuid4(), "ada@example.com")
    await write(app_database, ada)
    async with app_database.session(owner=ada.user_id) as session:
        await session.exec(delete_from(User).where(col(User.id) == ada.user_id))
    await stays_gone(app_database, owner, ada)


async def test_so_is_everybody_of_an_emptied_table(
    app_database: Database, owner: asyncpg.Connection[Any]
) -> None:
    ada = Known(uuid4(), "ada@example.com")
    await write(app_database, ada)
    await owner.execute("TRUNCATE users CASCADE")
    await stays_gone(app_database, owner, ada)


async def stays_gone(database: Database, owner: asyncpg.Connection[Any], person: Known) -> None:
    """No write of an old token makes them again, and their address is free for others."""
    key = IdempotencyKey.of("k", "create_task", b"{}")
    for idempotency in (None, key):
        with pytest.raises(Unauthenticated):
            await tasks.create(database, person, TaskCreate(title="a"), idempotency=idempotency)
    with pytest.raises(Unauthenticated):
        await tasks.put(database, person, uuid4(), TaskPut(title="a"))
    with pytest.raises(Conflict) as caught:
        async with database.session(owner=person.user_id) as session:
            session.add(User(id=person.user_id, email=person.email))
    assert caught.value.constraint == "ex_users_deleted"
    assert person.user_id not in await accounts(owner)
    assert await owner.fetchval("SELECT count(*) FROM tasks WHERE user_id = $1", person.user_id) == 0
    other = Known(uuid4(), person.email)
    await write(database, other)
    assert (await accounts(owner))[other.user_id] == person.email


async def test_no_first_write_slips_in_beside_a_deletion(
    wide: Database, owner: asyncpg.Connection[Any], database_url: str
) -> None:
    """People write for the first time while they are being deleted: nobody is ever both."""
    deleting = await asyncio.gather(*(asyncpg.connect(database_url) for _ in range(8)))
    refused = 0
    for _ in range(15):
        people = [Known(uuid4(), "one@example.com") for _ in range(8)]

        async def delete(connection: asyncpg.Connection[Any], person: Known) -> None:
            for _ in range(6):
                await connection.execute("DELETE FROM users WHERE id = $1", person.user_id)
                await asyncio.sleep(0)

        writes = [write(wide, person) for person in people for _ in range(6)]
        deletions = [delete(*pair) for pair in zip(deleting, people, strict=True)]
        outcomes = await asyncio.gather(*writes, *deletions, return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert all(isinstance(failure, Unauthenticated) for failure in failures), failures
        refused += len(failures)
    assert await owner.fetchval("SELECT count(*) FROM users JOIN deleted_users USING (id)") == 0
    assert refused > 0
    for connection in deleting:
        await connection.close()


async def test_a_deletion_waited_for_is_seen(wide: Database, owner: asyncpg.Connection[Any]) -> None:
    """The narrowest case: the write begins before the account is made and deleted, and waits for both."""
    ada = Known(uuid4(), "ada@example.com")
    holding = owner.transaction()
    await holding.start()
    await owner.execute("INSERT INTO users (id, email) VALUES ($1, $2)", ada.user_id, ada.email)
    waiting = asyncio.create_task(write(wide, ada))
    await eventually(lambda: owner.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))
    await owner.execute("DELETE FROM users WHERE id = $1", ada.user_id)
    await holding.commit()
    with pytest.raises(Unauthenticated):
        await waiting
    assert await accounts(owner) == {}
