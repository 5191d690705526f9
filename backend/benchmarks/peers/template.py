"""FastAPI + synchronous SQLModel + psycopg, in the manner of FastAPI's official full-stack template.

Endpoints are plain functions, which FastAPI runs in threads; each has a session by dependency, loads or makes ORM
objects, commits, refreshes, and returns them for `response_model` to write. The engine is a module's global.
What the template does on top is left out, in its favour: the user read from the database for every request, and the
count beside every list.
"""

import os
import uuid
from collections.abc import Generator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, HTTPException
from sqlalchemy import DateTime
from sqlmodel import Field, Session, SQLModel, col, create_engine, select

engine = create_engine(
    os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://"),
    pool_size=int(os.environ["POOL_SIZE"]),
    # A bound on the pool is a trap here: a request keeps its connection until a thread closes its session, and with
    # more requests than connections all threads may be waiting for one. FastAPI then stands still for 30 s.
    max_overflow=-1,
)


def get_session() -> Generator[Session]:
    with Session(engine) as session:
        yield session


SessionDep = Annotated[Session, Depends(get_session)]
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
def read_tasks(session: SessionDep, owner: OwnerDep, skip: int = 0, limit: int = 100) -> Any:
    newest = (col(Task.created_at).desc(), col(Task.id).desc())
    statement = select(Task).where(Task.user_id == owner).order_by(*newest).offset(skip).limit(limit)
    return TasksPublic(items=[TaskPublic.model_validate(task) for task in session.exec(statement).all()])


@app.get("/v1/tasks/{task_id}", response_model=TaskPublic)
def read_task(session: SessionDep, owner: OwnerDep, task_id: uuid.UUID) -> Any:
    task = session.get(Task, (owner, task_id))
    if not task:
        raise HTTPException(status_code=404, detail="Task not found")
    return task


@app.post("/v1/tasks", response_model=TaskPublic, status_code=201)
def create_task(session: SessionDep, owner: OwnerDep, task_in: TaskCreate) -> Any:
    task = Task.model_validate(task_in, update={"user_id": owner})
    session.add(task)
    session.commit()
    session.refresh(task)
    return task


@app.patch("/v1/tasks/{task_id}", response_model=TaskPublic)
def update_task(session: SessionDep, owner: OwnerDep, task_id: uuid.UUID, task_in: TaskUpdate) -> Any:
    task = session.get(Task, (owner, task_id))
    if not task:
        raise HTTPException(status_code=404, detail="Task not found")
    changes = task_in.model_dump(exclude_unset=True)
    task.sqlmodel_update(changes, update={"version": task.version + 1, "updated_at": now()})
    session.add(task)
    session.commit()
    session.refresh(task)
    return task


@app.post("/v1/tasks/batch", response_model=Results)
def create_tasks(session: SessionDep, owner: OwnerDep, batch: Batch) -> Any:
    tasks = [
        Task.model_validate(operation.task, update={"user_id": owner, "id": operation.id})
        for operation in batch.operations
    ]
    session.add_all(tasks)
    # Refreshing each would be a round trip a task; what was given is what is stored.
    session.expire_on_commit = False
    session.commit()
    return Results(
        results=[Result(op="create", id=task.id, task=TaskPublic.model_validate(task)) for task in tasks]
    )
