"""Whatever is done over HTTP, in whatever order: what comes back is what a simple model says."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from asking import TASKS, Caller, people
from src.models.task import DESCRIPTION_MAX_LENGTH, TITLE_MAX_LENGTH

if TYPE_CHECKING:
    from tests.api.conftest import MakeApp, Serve

# Each example has people of its own, so that one application serves them all.
shared = settings(
    deadline=None,
    # Making a failure small would take longer than a test may, and the failure would not be seen.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
few = settings(shared, max_examples=30)


@pytest.fixture
async def ana(
    make_app: MakeApp, serve: Serve, app_database_url: str, database_url: str
) -> AsyncIterator[Caller]:
    app = make_app(database_url=app_database_url, database_migration_url=database_url)
    async with people(serve, app) as (opened, _):
        yield opened


# A task reads back equal

any_text = st.text(st.characters(codec=None), max_size=300)
odd_text = st.one_of(
    any_text,
    st.text(st.sampled_from(" \t\n\u00a0\u2003\u3000\u200b\ufeff\u202e\x7f\x85\\\"'%_/é́🏳️‍🌈"), max_size=40),
    st.integers(TITLE_MAX_LENGTH - 2, TITLE_MAX_LENGTH + 2).map(lambda length: "💥" * length),
)


@shared
@given(
    title=odd_text,
    description=st.one_of(
        st.none(),
        odd_text,
        st.just("d" * DESCRIPTION_MAX_LENGTH),
        st.just("d" * (DESCRIPTION_MAX_LENGTH + 1)),
    ),
    is_completed=st.booleans(),
    escaped=st.booleans(),
    put=st.booleans(),
)
async def test_any_accepted_task_reads_back_equal(
    ana: Caller, title: str, description: str | None, is_completed: bool, escaped: bool, put: bool
) -> None:
    sent = {"title": title, "description": description, "is_completed": is_completed}
    content = json.dumps(sent, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    made = await ana(*(("PUT", f"{TASKS}/{uuid4()}") if put else ("POST", TASKS)), content=content)
    texts = [text for text in (title, description) if text is not None]
    surrogate = any("\ud800" <= character <= "\udfff" for text in texts for character in text)
    if surrogate and not escaped:
        assert made.status_code == 400
        return
    storable = not surrogate and not any("\0" in text for text in texts)
    fits = 1 <= len(title) <= TITLE_MAX_LENGTH and len(description or "") <= DESCRIPTION_MAX_LENGTH
    assert made.status_code == (201 if storable and fits and title.strip() else 422)
    if made.status_code == 201:
        task = made.json()
        assert {name: task[name] for name in sent} == sent
        read = await ana("GET", f"{TASKS}/{task['id']}", expect=200)
        assert read.json() == task
        assert read.headers["etag"] == made.headers["etag"]


# Sequences agree with a model

titles = st.sampled_from(["a", "b", "wärme", "100 %"])
descriptions = st.sampled_from([None, "", "more"])
slots = st.integers(0, 3)
matches = st.sampled_from(["none", "none", "current", "stale", "any"])
changes = st.fixed_dictionaries(
    {}, optional={"title": titles, "description": descriptions, "is_completed": st.booleans()}
)
whole = st.fixed_dictionaries(
    {"title": titles}, optional={"description": descriptions, "is_completed": st.booleans()}
)
operations = st.one_of(
    st.tuples(st.just("create"), whole, st.sampled_from([None, "k1", "k2"])),
    st.tuples(st.just("put"), slots, whole, matches),
    st.tuples(st.just("new"), slots, whole),
    st.tuples(st.just("patch"), slots, changes, matches),
    st.tuples(st.just("delete"), slots, matches),
    st.tuples(st.just("read"), slots, st.booleans()),
    st.tuples(st.just("list"), st.sampled_from([None, True, False]), st.integers(1, 3)),
    st.tuples(st.just("search"), titles),
)


class Model:
    """What one person's tasks have to be, and what every answer to this person has to say."""

    def __init__(self, caller: Caller, ids: list[UUID]) -> None:
        self.caller = caller
        self.ids: list[str] = [str(task_id) for task_id in ids]
        self.tasks: dict[str, dict[str, Any]] = {}
        self.tags: dict[str, str] = {}
        self.every_tag: dict[str, str] = {}
        self.kept: dict[str, tuple[dict[str, Any], str]] = {}

    async def do(self, operation: tuple[Any, ...]) -> None:
        await getattr(self, f"do_{operation[0]}")(*operation[1:])

    def seen(self, answer: Any, **expected: Any) -> None:
        task = answer.json()
        assert {name: task[name] for name in expected} == expected
        assert task["user_id"] == str(self.caller.id)
        assert task["updated_at"] >= task["created_at"]
        before = self.tasks.get(task["id"])
        if before is not None:
            assert task["created_at"] == before["created_at"]
        tag = answer.headers["etag"]
        # A tag stands for one content, for ever.
        assert self.every_tag.setdefault(tag + task["id"], answer.text) == answer.text
        self.tasks[task["id"]], self.tags[task["id"]] = task, tag

    def condition(self, task_id: str, match: str) -> tuple[dict[str, str], bool]:
        """The header, and whether it holds."""
        if match == "none":
            return {}, True
        if match == "any":
            return {"if-match": "*"}, task_id in self.tasks
        if match == "current" and task_id in self.tags:
            return {"if-match": self.tags[task_id]}, task_id in self.tasks
        return {"if-match": '"stale"'}, False

    async def do_create(self, body: dict[str, Any], key: str | None) -> None:
        headers = {} if key is None else {"idempotency-key": key}
        answer = await self.caller("POST", json=body, headers=headers)
        if key is not None and key in self.kept:
            before, text = self.kept[key]
            if before == body:
                assert answer.status_code == 201
                assert answer.text == text
                assert answer.headers["idempotency-replayed"] == "true"
            else:
                assert answer.status_code == 422
            return
        assert answer.status_code == 201
        assert answer.json()["id"] not in self.tasks
        self.seen(answer, description=body.get("description"), title=body["title"], version=1)
        assert answer.headers["location"] == f"{TASKS}/{answer.json()['id']}"
        self.ids[len(self.tasks) % 4] = answer.json()["id"]
        if key is not None:
            self.kept[key] = (body, answer.text)

    async def do_put(self, slot: int, body: dict[str, Any], match: str) -> None:
        task_id = self.ids[slot]
        headers, holds = self.condition(task_id, match)
        answer = await self.caller("PUT", f"{TASKS}/{task_id}", json=body, headers=headers)
        if not holds:
            assert answer.status_code == 412
            return
        before = self.tasks.get(task_id)
        assert answer.status_code == (201 if before is None else 200)
        self.seen(
            answer,
            id=task_id,
            title=body["title"],
            description=body.get("description"),
            is_completed=body.get("is_completed", False),
            version=1 if before is None else before["version"] + 1,
        )

    async def do_new(self, slot: int, body: dict[str, Any]) -> None:
        task_id = self.ids[slot]
        headers = {"if-none-match": "*"}
        answer = await self.caller("PUT", f"{TASKS}/{task_id}", json=body, headers=headers)
        assert answer.status_code == (412 if task_id in self.tasks else 201)
        if answer.status_code == 201:
            self.seen(answer, id=task_id, title=body["title"], version=1)

    async def do_patch(self, slot: int, body: dict[str, Any], match: str) -> None:
        task_id = self.ids[slot]
        headers, holds = self.condition(task_id, match)
        answer = await self.caller("PATCH", f"{TASKS}/{task_id}", json=body, headers=headers)
        before = self.tasks.get(task_id)
        if before is None:
            assert answer.status_code == 404  # And never 412: there is nothing whose version could differ.
        elif not holds:
            assert answer.status_code == 412
        else:
            assert answer.status_code == 200
            same = ("title", "description", "is_completed")
            expected = {**{name: before[name] for name in same}, **body}
            self.seen(answer, **expected, version=before["version"] + bool(body))

    async def do_delete(self, slot: int, match: str) -> None:
        task_id = self.ids[slot]
        headers, holds = self.condition(task_id, match)
        answer = await self.caller("DELETE", f"{TASKS}/{task_id}", headers=headers)
        if task_id not in self.tasks:
            assert answer.status_code == 404
        elif not holds:
            assert answer.status_code == 412
        else:
            assert answer.status_code == 204
            del self.tasks[task_id]

    async def do_read(self, slot: int, conditional: bool) -> None:
        task_id = self.ids[slot]
        headers = {"if-none-match": self.tags.get(task_id, '"x"')} if conditional else {}
        answer = await self.caller("GET", f"{TASKS}/{task_id}", headers=headers)
        if task_id not in self.tasks:
            assert answer.status_code == 404
        elif conditional:
            assert answer.status_code == 304
        else:
            assert answer.status_code == 200
            assert answer.json() == self.tasks[task_id]
            assert answer.headers["etag"] == self.tags[task_id]

    async def do_list(self, completed: bool | None, limit: int) -> None:
        asked = {} if completed is None else {"is_completed": str(completed).lower()}
        found = await self.caller.all(limit=limit, **asked)
        wanted = [task for task in self.tasks.values() if completed in (None, task["is_completed"])]
        assert found == sorted(wanted, key=lambda task: (task["created_at"], task["id"]), reverse=True)

    async def do_search(self, text: str) -> None:
        found = await self.caller.all(q=text)
        wanted = [
            task["id"]
            for task in self.tasks.values()
            if text in task["title"] or text in (task["description"] or "")
        ]
        assert sorted(task["id"] for task in found) == sorted(wanted)


@shared
@given(steps=st.lists(st.tuples(st.booleans(), operations), max_size=25))
async def test_any_sequence_of_operations_agrees_with_a_model(
    ana: Caller, steps: list[tuple[bool, tuple[Any, ...]]]
) -> None:
    # Both use the same ids, so that whatever one does could reach the other.
    ids = [uuid4() for _ in range(4)]
    models = [Model(ana.stranger(), ids), Model(ana.stranger(), ids)]
    for second, operation in steps:
        await models[second].do(operation)
    for model in models:
        await model.do_list(None, 200)


# Cursors visit every row exactly once

between = st.sampled_from(["add", "add many", "delete", "change", "change all"])


@few
@given(
    steady=st.integers(0, 25),
    limit=st.integers(1, 9),
    sort=st.sampled_from(["created_at", "updated_at"]),
    order=st.sampled_from(["asc", "desc"]),
    only_open=st.booleans(),
    ties=st.integers(1, 12),
    meanwhile=st.lists(between, max_size=40),
)
async def test_cursors_visit_every_row_exactly_once_while_rows_come_and_go(
    ana: Caller,
    database_url: str,
    steady: int,
    limit: int,
    sort: str,
    order: str,
    only_open: bool,
    ties: int,
    meanwhile: list[str],
) -> None:
    caller = ana.stranger()
    passing = [(await caller.create("passing"))["id"] for _ in range(3)]
    connection = await asyncpg.connect(database_url)
    try:
        # Many with one and the same time, before, among and after the passing ones.
        rows = await connection.fetch(
            "INSERT INTO tasks (user_id, title, created_at, updated_at) "
            "SELECT $1, 'steady', now() + ((n / $3) - 1) * interval '1 second', "
            "now() + ((n / $3) - 1) * interval '1 second' FROM generate_series(1, $2) AS n RETURNING id",
            caller.id,
            steady,
            ties,
        )
    finally:
        await connection.close()
    there = {str(row["id"]) for row in rows}
    params: dict[str, Any] = {"limit": limit, "sort": sort, "order": order}
    if only_open:
        params["is_completed"] = "false"
    visited: list[str] = []
    todo = iter(meanwhile)
    path = TASKS
    while True:
        answer = await caller("GET", path, params=params, expect=200)
        page = answer.json()
        visited += [task["id"] for task in page["items"]]
        assert len(page["items"]) <= limit
        stamps = [(task[sort], task["id"]) for task in page["items"]]
        assert stamps == sorted(stamps, reverse=order == "desc")
        assert ("link" in answer.headers) == (page["next_cursor"] is not None)
        if page["next_cursor"] is None:
            break
        # The link leads to the same page as the cursor does.
        path = answer.headers["link"].removeprefix("<").partition(">")[0]
        params = {}
        match next(todo, None):
            case "add":
                passing.append((await caller.create("passing"))["id"])
            case "add many":
                passing += [(await caller.create("passing"))["id"] for _ in range(limit + 1)]
            case "delete" if passing:
                await caller("DELETE", f"{TASKS}/{passing.pop()}", expect=204)
            case "change" if passing:
                await caller("PATCH", f"{TASKS}/{passing[0]}", json={"title": "p"}, expect=200)
            case "change all" if sort == "created_at":
                for task_id in sorted(there):
                    await caller("PATCH", f"{TASKS}/{task_id}", json={"description": "d"}, expect=200)
        assert len(visited) < 500
    assert sorted(task_id for task_id in visited if task_id in there) == sorted(there)
