"""FastAPI + SQLModel's async session on asyncpg: the template's manner, carried over to async as most tutorials do it.

A session by dependency, ORM objects loaded or made, commit, refresh, `response_model`.
"""

import os
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, HTTPException
from sqlalchemy import DateTime
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import Field, SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession

engine = create_async_engine(
    os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+asyncpg://"),
    pool_size=int(os.environ["POOL_SIZE"]),
    max_overflow=0,
)


async def get_session() -> AsyncIterator[AsyncSession]:
    # Without `expire_on_commit` a refresh would be the only way to see anything after a commit.
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session


SessionDep = Annotated[AsyncSession, Depends(get_session)]
OwnerDep = Annotated[uuid.UUID, Header(alias="X-User-Id")]


def now() -> datetime:
    return datetime.now(UTC)


class TaskBase(SQLModel):
    title: str = Field(min_length=1, max_length=255)
    description: str | None = Field(default=None, max_length=10_000)
    is_completed: bool = False


class TaskCreate(TaskBase):
    pass


class TaskUpdate(SQLModel):
    title: str | None = Field(default=None, min_length=1, max_length=255)
    description: str | None = Field(default=None, max_length=10_000)
    is_completed: bool | None = None


class Task(TaskBase, table=True):
    __tablename__ = "tasks"

    user_id: uuid.UUID = Field(primary_key=True)
    id: uuid.UUID = Field(default_factory=uuid.uuid4, primary_key=True)
    version: int = 1
    created_at: datetime = Field(default_factory=now, sa_type=DateTime(timezone=True))
    updated_at: datetime = Field(default_factory=now, sa_type=DateTime(timezone=True))


class TaskPublic(TaskBase):
    id: uuid.UUID
    user_id: uuid.UUID
    version: int
    created_at: datetime
    updated_at: datetime


class TasksPublic(SQLModel):
    items: list[TaskPublic]


class CreateOperation(SQLModel):
    op: Literal["create"]
    id: uuid.UUID
    task: TaskCreate


class Batch(SQLModel):
    operations: list[CreateOperation] = Field(min_length=1, max_length=1000)


class Result(SQLModel):
    op: str
    id: uuid.UUID
    task: TaskPublic


class Results(SQLModel):
    results: list[Result]


app = FastAPI()


@app.get("/livez")
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@app.get("/v1/tasks", response_model=TasksPublic)
async def read_tasks(session: SessionDep, owner: OwnerDep, skip: int = 0, limit: int = 100) -> Any:
    newest = (col(Task.created_at).desc(), col(Task.id).desc())
    statement = select(Task).where(Task.user_id == owner).order_by(*newest).offset(skip).limit(limit)
    return {"items": (await session.exec(statement)).all()}


@app.get("/v1/tasks/{task_id}", response_model=TaskPublic)
async def read_task(session: SessionDep, owner: OwnerDep, task_id: uuid.UUID) -> Any:
    task = await session.get(Task, (owner, task_id))
    if task is None:
        raise HTTPException(status_code=404, detail="Task not found")
    return task


@app.post("/v1/tasks", response_model=TaskPublic, status_code=201)
async def create_task(session: SessionDep, owner: OwnerDep, task_in: TaskCreate) -> Any:
    task = Task.model_validate(task_in, update={"user_id": owner})
    session.add(task)
    await session.commit()
    await session.refresh(task)
    return task


@app.patch("/v1/tasks/{task_id}", response_model=TaskPublic)
async def update_task(session: SessionDep, owner: OwnerDep, task_id: uuid.UUID, task_in: TaskUpdate) -> Any:
    task = await session.get(Task, (owner, task_id))
    if task is None:
        raise HTTPException(status_code=404, detail="Task not found")
    changes = task_in.model_dump(exclude_unset=True)
    task.sqlmodel_update(changes, update={"version": task.version + 1, "updated_at": now()})
    session.add(task)
    await session.commit()
    await session.refresh(task)
    return task


@app.post("/v1/tasks/batch", response_model=Results)
async def create_tasks(session: SessionDep, owner: OwnerDep, batch: Batch) -> Any:
    tasks = [
        Task.model_validate(operation.task, update={"user_id": owner, "id": operation.id})
        for operation in batch.operations
    ]
    session.add_all(tasks)
    await session.commit()
    return {"results": [{"op": "create", "id": task.id, "task": task} for task in tasks]}
