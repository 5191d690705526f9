"""Users and tasks through `Database.session()`: created, read, changed and deleted, with no surprise loads."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import event
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import selectinload
from sqlmodel import col, delete, func, select, update

from src.errors import Conflict
from src.models import Task, TaskCreate, TaskRead, User
from src.services.database import Database


async def an_owner(database: Database, email: str = "ada@example.com") -> UUID:
    async with database.session() as session:
        user = User(email=email)
        session.add(user)
    return user.id


async def a_task(database: Database, owner: UUID, title: str = "Learn") -> UUID:
    async with database.session() as session:
        task = Task(user_id=owner, title=title)
        session.add(task)
    return task.id


async def test_a_user_is_created_read_changed_and_deleted(database: Database) -> None:
    owner = await an_owner(database)
    async with database.session() as session:
        user = await session.get(User, owner)
        assert user is not None
        assert (user.email, user.created_at) == ("ada@example.com", user.updated_at)
        before = user.updated_at
        user.email = "ada.lovelace@example.com"
    assert user.updated_at > before
    async with database.session() as session:
        assert (await session.exec(select(User.email))).all() == ["ada.lovelace@example.com"]
        await session.delete(await session.get_one(User, owner))
    async with database.session() as session:
        assert await session.get(User, owner) is None


async def test_a_task_is_created_read_changed_and_deleted(database: Database) -> None:
    owner = await an_owner(database)
    async with database.session() as session:
        create = TaskCreate(title="  Learn ", description="x\ny")
        task = Task.model_validate(create, update={"user_id": owner})
        session.add(task)
        await session.flush()
        # All that the database decided is there without another statement.
        assert (task.version, task.is_completed, task.created_at.tzinfo) == (1, False, UTC)
    async with database.session() as session:
        found = await session.get(Task, (owner, task.id))
        assert found is not None
        assert (found.title, found.description, found.user_id) == ("  Learn ", "x\ny", owner)
        found.is_completed = True
        await session.flush()
        assert found.version == 2
    assert found.updated_at > found.created_at
    assert TaskRead.model_validate(found, from_attributes=True).version == 2
    async with database.session() as session:
        await session.delete(await session.get_one(Task, (owner, task.id)))
    async with database.session() as session:
        assert await session.get(Task, (owner, task.id)) is None


async def test_updated_at_and_version_are_right_after_each_update_in_a_session(database: Database) -> None:
    owner = await an_owner(database)
    task_id = await a_task(database, owner)
    seen = []
    for title in ("one", "two"):
        async with database.session() as session:
            task = await session.get_one(Task, (owner, task_id))
            task.title = title
        # The session is closed: reading an attribute that had to be loaded would raise here.
        seen.append((task.version, task.updated_at))
    assert [version for version, _ in seen] == [2, 3]
    assert seen[0][1] < seen[1][1]
    async with database.session() as session:
        stored = await session.get_one(Task, (owner, task_id))
    assert (stored.version, stored.updated_at) == seen[1]


async def test_updated_at_and_version_rise_in_statements_too(database: Database) -> None:
    owner = await an_owner(database)
    task_id = await a_task(database, owner)
    async with database.session() as session:
        change = update(Task).where(col(Task.user_id) == owner).values(title="new").returning(Task)
        task = (await session.exec(change)).scalar_one()
        assert (task.version, task.title) == (2, "new")
    async with database.session() as session:
        task = await session.get_one(Task, (owner, task_id))
        await session.exec(update(Task).where(col(Task.id) == task_id).values(description="d"))
        await session.refresh(task)
        assert (task.version, task.description) == (3, "d")
        assert task.updated_at > task.created_at


async def test_two_sessions_that_change_what_both_have_read_do_not_lose_an_update(database: Database) -> None:
    owner = await an_owner(database)
    task_id = await a_task(database, owner)
    async with database.session() as session:
        early = await session.get_one(Task, (owner, task_id))
    async with database.session() as session:
        (await session.get_one(Task, (owner, task_id))).title = "theirs"
    with pytest.raises(Conflict):
        async with database.session() as session:
            session.add(early)
            early.title = "mine"
    async with database.session() as session:
        assert (await session.get_one(Task, (owner, task_id))).title == "theirs"


async def test_a_relationship_is_loaded_only_when_asked_for(database: Database) -> None:
    owner = await an_owner(database)
    for title in ("first", "second"):
        await a_task(database, owner, title)
    async with database.session() as session:
        user = await session.get_one(User, owner)
        with pytest.raises(InvalidRequestError, match="lazy='raise'"):
            _ = user.tasks
    async with database.session() as session:
        asked = select(User).options(selectinload(User.tasks))  # type: ignore[arg-type]
        user = (await session.exec(asked)).one()
    assert [task.title for task in user.tasks] == ["second", "first"]
    async with database.session() as session:
        task = (await session.exec(select(Task).options(selectinload(Task.user)).limit(1))).one()  # type: ignore[arg-type]
    assert task.user.email == "ada@example.com"


async def test_tasks_are_stored_through_their_owner(database: Database) -> None:
    async with database.session() as session:
        user = User(email="ada@example.com")
        user.tasks = [Task(user_id=user.id, title=title) for title in ("one", "two")]
        session.add(user)
    async with database.session() as session:
        loaded = (await session.exec(select(User).options(selectinload(User.tasks)))).one()  # type: ignore[arg-type]
        assert {task.user_id for task in loaded.tasks} == {user.id}
        loaded.tasks.pop()
    async with database.session() as session:
        assert (await session.exec(select(func.count()).select_from(Task))).one() == 1


@pytest.mark.parametrize("loaded", [False, True])
async def test_deleting_a_user_deletes_their_tasks_and_nobody_elses(database: Database, loaded: bool) -> None:
    ada, bob = await an_owner(database), await an_owner(database, "bob@example.com")
    for owner in (ada, ada, bob):
        await a_task(database, owner)
    async with database.session() as session:
        wanted: Any = select(User).where(col(User.id) == ada)
        if loaded:
            wanted = wanted.options(selectinload(User.tasks))  # type: ignore[arg-type]
        await session.delete((await session.exec(wanted)).one())
    async with database.session() as session:
        assert (await session.exec(select(Task.user_id))).all() == [bob]


async def test_deleting_a_user_leaves_the_tasks_to_the_database(database: Database) -> None:
    """They are neither loaded nor deleted one by one, however many there are."""
    owner = await an_owner(database)
    await a_task(database, owner)
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement.split()[0])

    async with database.session() as session:
        user = await session.get_one(User, owner)
        bind = (await session.connection()).sync_connection
        event.listen(bind, "before_cursor_execute", note)
        await session.delete(user)
        await session.flush()
    assert sent == ["DELETE"]


async def test_a_taken_address_is_a_conflict_by_name(database: Database) -> None:
    await an_owner(database)
    with pytest.raises(Conflict) as caught:
        await an_owner(database)
    assert caught.value.constraint == "uq_users_email"


async def test_a_task_without_an_owner_is_refused(database: Database) -> None:
    with pytest.raises(Conflict) as caught:
        await a_task(database, uuid4())
    assert caught.value.constraint == "fk_tasks_user_id"


async def test_the_same_id_may_belong_to_two_owners(database: Database) -> None:
    """The owner is half of the key: nothing may look a task up by its id alone."""
    ada, bob = await an_owner(database), await an_owner(database, "bob@example.com")
    shared = uuid4()
    async with database.session() as session:
        session.add_all([Task(user_id=owner, id=shared, title=str(owner)) for owner in (ada, bob)])
    async with database.session() as session:
        await session.exec(delete(Task).where(col(Task.user_id) == ada, col(Task.id) == shared))
        assert await session.get(Task, (ada, shared)) is None
        assert (await session.get_one(Task, (bob, shared))).title == str(bob)


async def test_timestamps_are_utc_and_the_databases_own(database: Database) -> None:
    owner = await an_owner(database)
    async with database.session() as session:
        user = await session.get_one(User, owner)
        now = (await session.exec(select(func.now()))).one()
    assert user.created_at.tzinfo == UTC
    assert isinstance(now, datetime)
    assert user.created_at <= now
