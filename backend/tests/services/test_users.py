"""What can be done with users, on a real database."""

from __future__ import annotations

import asyncio
import json
from uuid import uuid4

import pytest

from src.errors import Conflict, Invalid, NotFound, Unauthenticated
from src.models import TaskCreate, UserCreate, UserRead
from src.services import tasks, users
from src.services.database import Database
from src.services.ownership import Known


async def create(database: Database, email: str) -> UserRead:
    return UserRead.model_validate_json(await users.create(database, UserCreate(email=email)))


async def test_a_user_is_created_and_read_back(database: Database) -> None:
    ada = await create(database, "Ada@Example.com")
    assert ada.email == "ada@example.com"
    assert ada.id.version == 7
    assert ada.created_at == ada.updated_at
    assert UserRead.model_validate_json(await users.read(database, ada.id)) == ada


@pytest.mark.parametrize("written", ["ada@exämple.com", "ADA@EXÄMPLE.com", "ada@xn--exmple-cua.com"])
async def test_a_user_is_found_however_the_address_is_written(database: Database, written: str) -> None:
    ada = await create(database, "ada@exämple.com")
    assert UserRead.model_validate_json(await users.find(database, written)) == ada


@pytest.mark.parametrize("address", ["bob@example.com", "no address", "", "a\x00@example.com"])
async def test_an_address_that_nobody_has_is_not_found(database: Database, address: str) -> None:
    with pytest.raises(NotFound):
        await users.find(database, address)


async def test_a_taken_address_is_a_conflict_by_name(database: Database) -> None:
    await create(database, "ada@example.com")
    with pytest.raises(Conflict) as caught:
        await create(database, "ADA@example.com")
    assert caught.value.constraint == "uq_users_email"


async def test_of_30_sign_ups_at_once_with_one_address_one_succeeds(database: Database) -> None:
    outcomes = await asyncio.gather(
        *(create(database, "ada@example.com") for _ in range(30)), return_exceptions=True
    )
    assert sum(isinstance(outcome, UserRead) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 29


async def test_users_are_listed_by_address(database: Database) -> None:
    assert await users.page(database) == "[]"
    for name in ("c", "a", "b"):
        await create(database, f"{name}@example.com")
    page = json.loads(await users.page(database, limit=2))
    assert [user["email"] for user in page] == ["a@example.com", "b@example.com"]


@pytest.mark.parametrize("limit", [0, -1, 201, 2**63])
async def test_a_page_is_bounded(database: Database, limit: int) -> None:
    with pytest.raises(Invalid):
        await users.page(database, limit=limit)


async def test_a_deleted_user_is_gone_with_all_tasks(database: Database) -> None:
    ada, bob = await create(database, "ada@example.com"), await create(database, "bob@example.com")
    for owner in (ada, bob):
        await tasks.create(database, tasks.Known(owner.id), TaskCreate(title="a"))
    await users.delete(database, Known(ada.id))
    with pytest.raises(NotFound):
        await users.read(database, ada.id)
    assert (await tasks.page(database, ada.id)).items == "[]"
    assert len(json.loads((await tasks.page(database, bob.id)).items)) == 1
    with pytest.raises(Unauthenticated, match="deleted"):
        await users.delete(database, Known(ada.id))


async def test_an_unknown_user_is_not_found(database: Database) -> None:
    with pytest.raises(NotFound):
        await users.read(database, uuid4())
