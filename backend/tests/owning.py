"""People and their tasks, for tests of the services: in a sentence what would take three."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID, uuid4

from pydantic import TypeAdapter

from src.models import TaskBatch, TaskCreate, TaskOperation, TaskRead, TaskUpdate
from src.services import tasks
from src.services.database import Database
from src.services.tasks import Known, PageQuery

TASKS: TypeAdapter[list[TaskRead]] = TypeAdapter(list[TaskRead])


def somebody(email: str | None = None) -> Known:
    """Who has never been here: their first write makes the account."""
    return Known(uuid4(), email)


def shown(body: str) -> TaskRead:
    return TaskRead.model_validate_json(body)


async def create(database: Database, author: Known, **fields: Any) -> TaskRead:
    new = TaskCreate(**{"title": "Learn"} | fields)
    return shown((await tasks.create(database, author, new)).body)


async def read(database: Database, author: Known, task_id: UUID) -> TaskRead:
    return shown((await tasks.read(database, author.user_id, task_id)).body)


async def update(database: Database, author: Known, task_id: UUID, **fields: Any) -> TaskRead:
    return shown((await tasks.update(database, author, task_id, TaskUpdate(**fields))).body)


async def listed(database: Database, author: Known, **query: Any) -> list[TaskRead]:
    return TASKS.validate_json((await tasks.page(database, author.user_id, PageQuery(**query))).items)


async def owned(database: Database, author: Known) -> dict[UUID, TaskRead]:
    """All that is theirs, by id; they have 200 at most."""
    page = await tasks.page(database, author.user_id, PageQuery(limit=200))
    assert not page.has_more
    return {task.id: task for task in TASKS.validate_json(page.items)}


async def exported(database: Database, author: Known) -> bytes:
    return b"".join([piece async for piece in tasks.export(database, author.user_id)])


def operations(*given: dict[str, Any]) -> list[TaskOperation]:
    """As they come in over the wire."""
    return TaskBatch.model_validate_json(json.dumps({"operations": given}, default=str)).operations
