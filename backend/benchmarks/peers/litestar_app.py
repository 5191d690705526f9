"""Litestar + msgspec + asyncpg: typed structs in and out, SQL by hand, a pool on the application's state."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID, uuid4

import asyncpg
import msgspec
from litestar import Litestar, get, patch, post
from litestar.datastructures import State
from litestar.exceptions import NotFoundException
from litestar.params import Parameter

Title = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
Description = Annotated[str, msgspec.Meta(max_length=10_000)]
Owner = Annotated[UUID, Parameter(header="X-User-Id")]

FIELDS = "id, user_id, title, description, is_completed, version, created_at, updated_at"
READ = f"SELECT {FIELDS} FROM tasks WHERE user_id = $1 AND id = $2"
LIST = f"SELECT {FIELDS} FROM tasks WHERE user_id = $1 ORDER BY created_at DESC, id DESC LIMIT $2"
LATER = (
    f"SELECT {FIELDS} FROM tasks WHERE user_id = $1 AND (created_at, id) < ($3, $4)"
    " ORDER BY created_at DESC, id DESC LIMIT $2"
)
CREATE = (
    "INSERT INTO tasks (user_id, id, title, description, is_completed) VALUES ($1, $2, $3, $4, $5)"
    f" RETURNING {FIELDS}"
)
UPDATE = (
    "UPDATE tasks SET title = coalesce($3, title), is_completed = coalesce($4, is_completed),"
    " description = CASE WHEN $5 THEN $6 ELSE description END, version = version + 1, updated_at = now()"
    f" WHERE user_id = $1 AND id = $2 RETURNING {FIELDS}"
)
BATCH = (
    "INSERT INTO tasks (user_id, id, title, description, is_completed)"
    " SELECT $1, * FROM unnest($2::uuid[], $3::text[], $4::text[], $5::boolean[])"
    f" RETURNING {FIELDS}"
)


class Task(msgspec.Struct, gc=False):
    id: UUID
    user_id: UUID
    title: str
    description: str | None
    is_completed: bool
    version: int
    created_at: datetime
    updated_at: datetime


class Page(msgspec.Struct):
    items: list[Task]


class NewTask(msgspec.Struct, forbid_unknown_fields=True):
    title: Title
    description: Description | None = None
    is_completed: bool = False


class Change(msgspec.Struct, forbid_unknown_fields=True):
    title: Title | msgspec.UnsetType = msgspec.UNSET
    description: Description | msgspec.UnsetType | None = msgspec.UNSET
    is_completed: bool | msgspec.UnsetType = msgspec.UNSET


class Operation(msgspec.Struct, forbid_unknown_fields=True):
    op: Literal["create"]
    id: UUID
    task: NewTask


class Batch(msgspec.Struct, forbid_unknown_fields=True):
    operations: Annotated[list[Operation], msgspec.Meta(min_length=1, max_length=1000)]


class Result(msgspec.Struct):
    op: str
    id: UUID
    task: Task


class Results(msgspec.Struct):
    results: list[Result]


def of(row: asyncpg.Record) -> Task:
    return Task(*row)


@get("/livez", sync_to_thread=False)
def livez() -> dict[str, str]:
    return {"status": "ok"}


@get("/v1/tasks")
async def read_tasks(
    state: State, owner: Owner, limit: int = 50, before: datetime | None = None, before_id: UUID | None = None
) -> Page:
    if before is None:
        rows = await state.pool.fetch(LIST, owner, limit)
    else:
        rows = await state.pool.fetch(LATER, owner, limit, before, before_id)
    return Page([of(row) for row in rows])


@get("/v1/tasks/{task_id:uuid}")
async def read_task(state: State, owner: Owner, task_id: UUID) -> Task:
    row = await state.pool.fetchrow(READ, owner, task_id)
    if row is None:
        raise NotFoundException
    return of(row)


@post("/v1/tasks")
async def create_task(state: State, owner: Owner, data: NewTask) -> Task:
    row = await state.pool.fetchrow(CREATE, owner, uuid4(), data.title, data.description, data.is_completed)
    return of(row)


@patch("/v1/tasks/{task_id:uuid}")
async def update_task(state: State, owner: Owner, task_id: UUID, data: Change) -> Task:
    def given(value: object) -> object:
        return None if value is msgspec.UNSET else value

    described = data.description is not msgspec.UNSET
    row = await state.pool.fetchrow(
        UPDATE,
        owner,
        task_id,
        given(data.title),
        given(data.is_completed),
        described,
        given(data.description),
    )
    if row is None:
        raise NotFoundException
    return of(row)


@post("/v1/tasks/batch", status_code=200)
async def create_tasks(state: State, owner: Owner, data: Batch) -> Results:
    asked = data.operations
    rows = await state.pool.fetch(
        BATCH,
        owner,
        [one.id for one in asked],
        [one.task.title for one in asked],
        [one.task.description for one in asked],
        [one.task.is_completed for one in asked],
    )
    return Results([Result("create", row["id"], of(row)) for row in rows])


async def nothing(connection: asyncpg.Connection) -> None:
    """Statements here leave nothing behind in a connection, so none has to be reset: one round trip less."""


@asynccontextmanager
async def lifespan(app: Litestar) -> AsyncIterator[None]:
    size = int(os.environ["POOL_SIZE"])
    pool = asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=size, max_size=size, reset=nothing)
    async with pool:
        app.state.pool = pool
        yield


app = Litestar(
    [livez, read_tasks, read_task, create_task, update_task, create_tasks],
    lifespan=[lifespan],
    openapi_config=None,
    logging_config=None,
)
