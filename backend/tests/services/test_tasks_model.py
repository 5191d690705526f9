"""Any sequence of operations agrees with a model: a dictionary for each of two people, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from owning import owned, shown, somebody
from src.errors import BatchRefused, KeyReused, NotFound, PreconditionFailed, RequestError
from src.models import TaskBatch, TaskCreate, TaskPut, TaskRead, TaskUpdate
from src.services import tasks
from src.services.database import Database
from src.services.tasks import ANY_VERSION, IdempotencyKey, Known

IDS = [UUID(int=number) for number in range(1, 3)]
Step = dict[str, Any]


@dataclass
class Model:
    """What one person has, by the rules; `tags` are all that they were ever told, by id and in order."""

    author: Known
    tasks: dict[UUID, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    tags: dict[UUID, list[str]] = field(default_factory=dict)
    current: dict[UUID, str] = field(default_factory=dict)

    def tag(self, task_id: UUID, which: str | None) -> str | None:
        """`if_match` as somebody would send it: none, any, the current one, or the one before."""
        seen = self.tags.get(task_id, [])
        if which == "current":
            return self.current.get(task_id, "1-0")
        if which == "old":
            old = [tag for tag in seen if tag != self.current.get(task_id)]
            return old[-1] if old else "1-0"
        return ANY_VERSION if which == "any" else None

    def fits(self, task_id: UUID, if_match: str | None) -> bool:
        return if_match in (None, ANY_VERSION, self.current.get(task_id))

    def expected(self, step: Step, if_match: str | None) -> type[RequestError] | None:
        task_id, there = step["id"], step["id"] in self.tasks
        if step["do"] == "put":
            return (
                None if if_match is None or (there and self.fits(task_id, if_match)) else PreconditionFailed
            )
        if not there:
            return NotFound
        return None if self.fits(task_id, if_match) else PreconditionFailed

    def store(self, task_id: UUID, fields: dict[str, Any], *, again: bool) -> None:
        old = self.tasks.get(task_id)
        whole = {"title": "", "description": None, "is_completed": False}
        start = old if old is not None and again else whole
        version = 1 if old is None else old["version"] + 1
        self.tasks[task_id] = start | fields | {"version": version}

    def meet(self, body: str, etag: str) -> None:
        task = shown(body)
        wanted = self.tasks[task.id]
        assert {name: getattr(task, name) for name in wanted} == wanted
        assert task.user_id == self.author.user_id
        if self.current.get(task.id) != etag:
            # A tag that was there before stands for what was there before.
            assert etag not in self.tags.get(task.id, [])
            self.tags.setdefault(task.id, []).append(etag)
            self.current[task.id] = etag

    def forget(self, task_id: UUID) -> None:
        del self.tasks[task_id]
        self.current.pop(task_id, None)


FIELDS = st.fixed_dictionaries(
    {"title": st.sampled_from(["a", "b", "c"])},
    optional={"description": st.none() | st.sampled_from(["d", "e"]), "is_completed": st.booleans()},
)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "title": st.sampled_from(["a", "b", "c"]),
        "description": st.none() | st.sampled_from(["d", "e"]),
        "is_completed": st.booleans(),
    },
)
TAGS = st.sampled_from([None, "any", "current", "old"])
ID = st.sampled_from(IDS)
OPERATION = st.one_of(
    st.fixed_dictionaries({"op": st.just("create"), "id": ID, "task": FIELDS}),
    st.fixed_dictionaries({"op": st.just("update"), "id": ID, "task": CHANGES}),
    st.fixed_dictionaries({"op": st.just("delete"), "id": ID}),
)
STEP = st.one_of(
    st.fixed_dictionaries(
        {"do": st.just("create"), "key": st.sampled_from([None, "k", "l"]), "task": FIELDS}
    ),
    st.fixed_dictionaries({"do": st.just("put"), "id": ID, "task": FIELDS, "tag": TAGS}),
    st.fixed_dictionaries({"do": st.just("update"), "id": ID, "task": CHANGES, "tag": TAGS}),
    st.fixed_dictionaries({"do": st.just("delete"), "id": ID, "tag": TAGS}),
    st.fixed_dictionaries({"do": st.just("read"), "id": ID}),
    st.fixed_dictionaries(
        {"do": st.just("batch"), "operations": st.lists(OPERATION, min_size=1, max_size=5)}
    ),
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(st.tuples(st.booleans(), STEP), min_size=12, max_size=40))
async def test_any_sequence_of_operations_agrees_with_a_model(
    app_database: Database, steps: list[tuple[bool, Step]]
) -> None:
    ada, bob = Model(somebody()), Model(somebody())
    for hers, step in steps:
        await take(app_database, ada if hers else bob, step)
    for model in (ada, bob):
        found = await owned(app_database, model.author)
        assert {task_id: plain(task, model.tasks.get(task_id, {})) for task_id, task in found.items()} == (
            model.tasks
        )


def plain(task: TaskRead, like: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(task, name) for name in like}


async def take(database: Database, model: Model, step: Step) -> None:
    if step["do"] == "create":
        await take_create(database, model, step)
    elif step["do"] == "batch":
        await take_batch(database, model, step["operations"])
    else:
        await take_one(database, model, step)


async def take_create(database: Database, model: Model, step: Step) -> None:
    key, body = step["key"], json.dumps(step["task"]).encode()
    idempotency = None if key is None else IdempotencyKey.of(key, "create", body)
    attempt = tasks.create(database, model.author, TaskCreate(**step["task"]), idempotency=idempotency)
    earlier = model.answers.get(key) if key is not None else None
    if earlier is not None and earlier[0] != body:
        await fails(attempt, KeyReused)
        return
    made = await attempt
    assert made.replayed == (earlier is not None)
    if earlier is not None:
        assert made.body == earlier[1]
        return
    if key is not None:
        model.answers[key] = (body, made.body)
    assert made.task_id not in model.tasks
    model.store(made.task_id, step["task"], again=False)
    model.meet(made.body, made.etag)


async def take_one(database: Database, model: Model, step: Step) -> None:
    task_id, owner = step["id"], model.author.user_id
    if_match = model.tag(task_id, step.get("tag"))
    refused = model.expected(step, if_match)
    attempt: Awaitable[Any]
    if step["do"] == "put":
        attempt = tasks.put(database, model.author, task_id, TaskPut(**step["task"]), if_match=if_match)
    elif step["do"] == "update":
        attempt = tasks.update(
            database, tasks.Known(owner), task_id, TaskUpdate(**step["task"]), if_match=if_match
        )
    elif step["do"] == "delete":
        attempt = tasks.delete(database, tasks.Known(owner), task_id, if_match=if_match)
    else:
        attempt = tasks.read(database, owner, task_id)
    if refused is not None:
        await fails(attempt, refused)
        return
    answer = await attempt
    if step["do"] == "delete":
        model.forget(task_id)
        return
    if step["do"] == "put":
        assert answer.created == (task_id not in model.tasks)
    if step["do"] == "put" or step.get("task"):
        model.store(task_id, step["task"], again=step["do"] == "update")
    model.meet(answer[0], answer[1])


async def take_batch(database: Database, model: Model, given: list[dict[str, Any]]) -> None:
    """The model goes through it alone first: either all of it can be done, or these cannot."""
    before, last = dict(model.tasks), dict[UUID, int]()
    states: list[dict[str, Any] | None] = []
    refused = []
    for index, operation in enumerate(given):
        task_id = operation["id"]
        if (operation["op"] == "create") == (task_id in model.tasks):
            refused.append(index)
            continue
        if operation["op"] == "delete":
            gone = model.tasks.pop(task_id)
            if before.get(task_id) != gone:
                last[task_id] = gone["version"]
        elif operation["op"] == "create" or operation["task"]:
            model.store(task_id, operation["task"], again=operation["op"] == "update")
            if operation["op"] == "create" and task_id in last:
                model.tasks[task_id] |= {"version": last[task_id] + 1}
        state = model.tasks.get(task_id)
        states.append(None if state is None else dict(state))
    wire = json.dumps({"operations": given}, default=str)
    attempt = tasks.batch(database, model.author, TaskBatch.model_validate_json(wire).operations)
    if refused:
        model.tasks = before
        error = await fails(attempt, BatchRefused)
        assert isinstance(error, BatchRefused)
        assert [fault.pointer for fault in error.faults] == [f"/operations/{index}/id" for index in refused]
        return
    results = json.loads((await attempt).body)["results"]
    assert [result["op"] for result in results] == [operation["op"] for operation in given]
    for result, state in zip(results, states, strict=True):
        task = result["task"]
        assert (None if task is None else {name: task[name] for name in state or {}}) == state
    for task_id in {operation["id"] for operation in given}:
        if task_id in model.tasks:
            model.meet(*await tasks.read(database, model.author.user_id, task_id))
        else:
            model.current.pop(task_id, None)


async def fails(attempt: Awaitable[Any], kind: type[RequestError]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await attempt
    assert type(caught.value) is kind
    return caught.value
