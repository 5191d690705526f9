"""Checks that write: the service's own statements for a throw-away owner, in a transaction that is rolled back."""

from __future__ import annotations

import json
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID, uuid4

from ..errors import Conflict, NotFound
from ..models import TaskCreate, TaskUpdate, UserCreate
from ..services import tasks, users
from ..services.faults import as_request_error, diagnose
from .check import CheckContext, CheckResult, failed, passed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import asyncpg

    from ..services.database import Database
    from ..services.statements import Statement

_REPAIR = "Compare the check `tables`: a constraint or trigger was changed by hand; restore it, or a backup."


class _TransactionDatabase:
    """`Database` for the services' functions on one connection, with a savepoint around each statement."""

    def __init__(self, connection: asyncpg.Connection[Any]) -> None:
        self._connection = connection

    async def rows(self, statement: Statement, **values: Any) -> list[asyncpg.Record]:
        try:
            async with self._connection.transaction():
                return list(await self._connection.fetch(statement.sql, *statement.arguments(values)))
        except Exception as error:
            raise as_request_error(diagnose(error), sent=True, writing=False) from error

    async def row(self, statement: Statement, **values: Any) -> asyncpg.Record | None:
        return next(iter(await self.rows(statement, **values)), None)

    async def value(self, statement: Statement, **values: Any) -> Any:
        row = await self.row(statement, **values)
        return None if row is None else row[0]


@asynccontextmanager
async def rolled_back(context: CheckContext) -> AsyncIterator[Database]:
    """A database whose writes are undone when the block ends, and by the server if the connection is lost."""
    transaction = context.connection.transaction()
    await transaction.start()
    try:
        await context.limit_lock_wait()
        yield cast("Database", _TransactionDatabase(context.connection))
    finally:
        if not context.connection.is_closed():
            await transaction.rollback()


def _owner() -> tasks.Known:
    user_id = uuid4()
    return tasks.Known(user_id, f"verify-{user_id.hex}@example.com")


async def crud(context: CheckContext) -> CheckResult:
    """Create, read, list, update and delete a task and its user."""
    started = time.perf_counter()
    owner, query = _owner(), tasks.PageQuery()
    async with rolled_back(context) as database:
        created = await tasks.create(database, owner, TaskCreate(title="Verify ✓"))
        change = TaskUpdate(title="Verified ✓", is_completed=True)
        await tasks.update(database, owner, created.task_id, change, if_match=created.etag)
        stored = json.loads((await tasks.read(database, owner.user_id, created.task_id)).body)
        if (stored["title"], stored["is_completed"], stored["version"]) != ("Verified ✓", True, 2):
            return failed("wrong value", "A task read back differs from what was written.", _REPAIR)
        listed = await _listed(database, owner.user_id, query)
        if listed != [str(created.task_id)]:
            return failed("wrong list", "The list of tasks differs from what was written.", _REPAIR)
        await tasks.delete(database, owner, created.task_id)
        if not await _is_gone(tasks.read(database, owner.user_id, created.task_id)):
            return failed("not deleted", "A deleted task can still be read.", _REPAIR)
        if json.loads(await users.read(database, owner.user_id))["email"] != owner.email:
            return failed("wrong user", "The first write did not create the user of its token.", _REPAIR)
        await users.delete(database, owner)
        if not await _is_gone(users.read(database, owner.user_id)):
            return failed("not deleted", "A deleted user can still be read.", _REPAIR)
    elapsed = 1000 * (time.perf_counter() - started)
    return passed(f"user and task created, read, listed, updated, deleted in {elapsed:.0f} ms, rolled back")


async def cascade(context: CheckContext) -> CheckResult:
    owner = _owner()
    async with rolled_back(context) as database:
        for number in (1, 2):
            await tasks.create(database, owner, TaskCreate(title=f"Task {number}"))
        await users.delete(database, owner)
        left = await _listed(database, owner.user_id, tasks.PageQuery())
    if left:
        return failed("tasks remain", "Deleting a user leaves the user's tasks behind.", _REPAIR)
    return passed("deleting a user deletes the user's tasks")


async def uniqueness(context: CheckContext) -> CheckResult:
    async with rolled_back(context) as database:
        user = UserCreate(email=f"verify-{uuid4().hex}@example.com")
        await users.create(database, user)
        try:
            await users.create(database, user)
        except Conflict as conflict:
            return passed(
                f"a second user with the same e-mail is refused ({conflict.constraint or 'unique'})"
            )
    return failed("not unique", "Two users can have one e-mail address.", _REPAIR)


async def _listed(database: Database, owner: UUID, query: tasks.PageQuery) -> list[str]:
    page = await tasks.page(database, owner, query)
    return [item["id"] for item in json.loads(page.items)]


async def _is_gone(read: Any) -> bool:
    try:
        await read
    except NotFound:
        return True
    return False
