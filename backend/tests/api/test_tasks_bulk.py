"""Many tasks at once over HTTP: batches, exports and imports, bounded in size and in number."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest

from src.api import transfers
from src.api.transfers import IMPORTS_AT_ONCE
from src.models import TaskBatchRead
from waiting import eventually

if TYPE_CHECKING:
    from fastapi import FastAPI

    from tests.api.conftest import Log, MakeApp, Person, Serve

TASKS, BATCH, EXPORT, IMPORT = "/v1/tasks", "/v1/tasks/batch", "/v1/tasks/export", "/v1/tasks/import"
LINES = {"content-type": "application/x-ndjson"}


def slug(answer: httpx.Response) -> str:
    return str(answer.json()["type"]).removeprefix("/problems/")


async def all_of(person: Person) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = (await person.ask("GET", f"{TASKS}?limit=200&order=asc")).json()["items"]
    return items


def open_spools() -> int:
    """The unnamed files that this process holds open."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
        count += "(deleted)" in name and "postgres" not in name and "/dev/shm" not in name
    return count


# Batches


async def test_a_batch_is_done_whole_and_tells_each_result(ana: Person) -> None:
    kept, gone = await ana.create("kept"), await ana.create("gone")
    tag = (await ana.ask("GET", f"{TASKS}/{kept['id']}")).headers["etag"].strip('"')
    new = str(uuid4())
    answer = await ana.ask("POST", BATCH, json={"operations": [
        {"op": "create", "id": new, "task": {"title": "new"}},
        {"op": "update", "id": kept["id"], "task": {"is_completed": True}, "if_match": tag},
        {"op": "update", "id": new, "task": {"description": "changed at once"}},
        {"op": "delete", "id": gone["id"]},
    ]})  # fmt: skip
    assert answer.status_code == 200
    results = TaskBatchRead.model_validate(answer.json()).results
    assert [(result.op, str(result.id)) for result in results] == [
        ("create", new), ("update", kept["id"]), ("update", new), ("delete", gone["id"]),
    ]  # fmt: skip
    tasks = {task["id"]: task for task in await all_of(ana)}
    assert set(tasks) == {kept["id"], new}
    assert tasks[kept["id"]]["is_completed"]
    assert tasks[new]["description"] == "changed at once"
    for result in answer.json()["results"][1:3]:
        assert result["task"] == tasks[result["id"]]
        read = await ana.ask("GET", f"{TASKS}/{result['id']}")
        assert read.headers["etag"] == f'"{result["etag"]}"'


async def test_a_batch_that_cannot_be_done_is_done_in_no_part_and_names_what_cannot(
    ana: Person, ben: Person
) -> None:
    mine, theirs = await ana.create("mine"), await ben.create("theirs")
    answer = await ana.ask("POST", BATCH, json={"operations": [
        {"op": "create", "task": {"title": "never"}},
        {"op": "delete", "id": mine["id"], "if_match": "1-0"},
        {"op": "update", "id": theirs["id"], "task": {"title": "never"}},
        {"op": "create", "id": mine["id"], "task": {"title": "never"}},
    ]})  # fmt: skip
    assert (answer.status_code, slug(answer)) == (422, "batch-refused")
    assert [fault["pointer"].rpartition("/")[0] for fault in answer.json()["errors"]] == [
        "/operations/1", "/operations/2", "/operations/3",
    ]  # fmt: skip
    assert (await all_of(ana), await all_of(ben)) == ([mine], [theirs])


@pytest.mark.parametrize(
    ("operations", "pointer"),
    [
        ([], "/operations"),
        ([{"op": "create", "task": {"title": ""}}], "/operations/0/task/title"),
        ([{"op": "create", "task": {}}], "/operations/0/task/title"),
        ([{"op": "create"}], "/operations/0/task"),
        ([{"op": "delete", "id": str(uuid4())}, {"op": "delete", "id": "x"}], "/operations/1/id"),
        ([{"op": "update", "id": str(uuid4()), "task": {"title": None}}], "/operations/0/task/title"),
        ([{"op": "delete", "id": str(uuid4()), "task": {}}], "/operations/0"),
        ([{"op": "explode"}], "/operations/0"),
        ([{}], "/operations/0"),
        ([3], "/operations/0"),
        ([{"op": "create", "task": {"title": "a"}}] * 1001, "/operations"),
    ],
)
async def test_a_bad_operation_is_pointed_at(ana: Person, operations: list[Any], pointer: str) -> None:
    answer = await ana.ask("POST", BATCH, json={"operations": operations})
    assert (answer.status_code, slug(answer)) == (422, "invalid")
    assert [fault["pointer"] for fault in answer.json()["errors"]] == [pointer]
    assert await all_of(ana) == []


async def test_a_batch_with_a_key_is_done_once_and_answered_alike(ana: Person) -> None:
    batch = {"operations": [{"op": "create", "task": {"title": "a"}}]}
    headers = {"idempotency-key": "k"}
    answers = await asyncio.gather(*(ana.ask("POST", BATCH, json=batch, headers=headers) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert len(await all_of(ana)) == 1
    single = await ana.ask("POST", TASKS, json={"title": "a"}, headers=headers)
    assert (single.status_code, slug(single)) == (422, "idempotency-key-reused")


async def test_batch_and_import_have_bounds_of_their_own(
    make_app: MakeApp, serve: Serve, somebody: type[Person]
) -> None:
    app = make_app(max_body_bytes=2048, max_batch_bytes=20_000, max_import_bytes=30_000)
    async with serve(app) as client:
        ana = somebody(client)
        task = {"title": "a", "description": "x" * 5000}
        assert (await ana.ask("POST", TASKS, json=task)).status_code == 413
        batch = {"operations": [{"op": "create", "task": task}] * 3}
        assert (await ana.ask("POST", BATCH, json=batch)).status_code == 200
        assert (await ana.ask("POST", BATCH, json={"operations": batch["operations"] * 2})).status_code == 413
        line = json.dumps(task).encode() + b"\n"
        assert (await ana.ask("POST", IMPORT, content=line * 5, headers=LINES)).status_code == 200

        async def pieces(count: int) -> AsyncIterator[bytes]:
            for _ in range(count):
                yield line

        for content in (line * 7, pieces(7)):
            assert (await ana.ask("POST", IMPORT, content=content, headers=LINES)).status_code == 413
        assert (await ana.ask("POST", IMPORT, content=pieces(5), headers=LINES)).status_code == 200
        assert len(await all_of(ana)) == 13


# Exports and imports


async def test_what_is_exported_can_be_imported_by_anybody_and_is_the_same(ana: Person, ben: Person) -> None:
    for number in range(5):
        await ana.create(
            f'{number} \u2028 \x02 \x01 \\ " 💩', description="a\nb", is_completed=number % 2 == 0
        )
    exported = await ana.ask("GET", EXPORT)
    assert exported.headers["content-type"] == "application/x-ndjson"
    assert exported.headers["content-disposition"] == 'attachment; filename="tasks.ndjson"'
    assert [json.loads(line) for line in exported.content.splitlines()] == await all_of(ana)
    imported = await ben.ask("POST", IMPORT, content=exported.content, headers=LINES)
    assert (imported.status_code, imported.json()) == (200, {"count": 5})
    assert await all_of(ben) == [{**task, "user_id": str(ben.id)} for task in await all_of(ana)]
    again = await ben.ask("POST", IMPORT, content=exported.content, headers=LINES)
    assert (again.status_code, len(again.json()["errors"])) == (422, 5)
    assert len(await all_of(ben)) == 5


async def test_an_export_of_nothing_is_empty(ana: Person) -> None:
    answer = await ana.ask("GET", EXPORT)
    assert (answer.status_code, answer.content) == (200, b"")


async def test_an_import_is_made_whole_or_not_at_all_and_faults_are_named_by_line(ana: Person) -> None:
    lines = [
        b'{"title":"a"}',
        b"",
        b"nope",
        b'{"title":"a","titel":1}',
        b'{"title":"\xff"}',
        b'{"title":"a"}',
    ]
    answer = await ana.ask("POST", IMPORT, content=b"\n".join(lines), headers=LINES)
    assert (answer.status_code, slug(answer)) == (422, "invalid")
    assert [fault["pointer"].split("/")[1] for fault in answer.json()["errors"]] == ["2", "3", "4"]
    assert "titel" not in answer.text
    assert await all_of(ana) == []


@pytest.mark.parametrize(
    "content_type", ["application/json", "text/plain", "application/x-ndjson; charset=x", ""]
)
async def test_an_import_that_is_not_declared_as_lines_is_415(ana: Person, content_type: str) -> None:
    answer = await ana.ask("POST", IMPORT, content=b'{"title":"a"}', headers={"content-type": content_type})
    assert (answer.status_code, slug(answer)) == (415, "unsupported-media-type")


async def spoken(
    app: FastAPI,
    person: Person,
    method: str,
    path: str,
    receive: Any,
    *headers: tuple[bytes, bytes],
    send: Any = None,
) -> list[dict[str, Any]]:
    """Speaks ASGI with the application, so that a test decides when a piece comes or is taken."""
    sent: list[dict[str, Any]] = []

    async def keep(message: dict[str, Any]) -> None:
        sent.append(message)
        if send is not None:
            await send(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": method, "path": path,
        "root_path": "", "query_string": b"",
        "headers": [(b"authorization", f"Bearer {person.token}".encode()), *headers],
    }  # fmt: skip
    await app(scope, receive, keep)
    return sent


async def test_only_so_many_imports_are_received_at_a_time_and_their_files_go(
    make_app: MakeApp, serve: Serve, somebody: type[Person]
) -> None:
    app = make_app()
    declared = (b"content-type", b"application/x-ndjson")
    before = open_spools()
    async with serve(app) as client:
        ana = somebody(client)
        hold = asyncio.Event()

        async def slowly() -> dict[str, Any]:
            if hold.is_set():
                return {"type": "http.disconnect"}
            await hold.wait()
            return {"type": "http.request", "body": b'{"title":"a"}', "more_body": True}

        waiting = [
            asyncio.create_task(spoken(app, ana, "POST", IMPORT, slowly, declared))
            for _ in range(IMPORTS_AT_ONCE)
        ]
        while open_spools() < before + IMPORTS_AT_ONCE:
            await asyncio.sleep(0.01)
        busy = await ana.ask("POST", IMPORT, content=b'{"title":"a"}', headers=LINES)
        assert (busy.status_code, slug(busy)) == (429, "too-many-requests")
        assert busy.headers["retry-after"].isdigit()
        stranger = await client.post(IMPORT, content=b"x", headers=LINES)
        assert stranger.status_code == 401
        hold.set()
        answers = [sent[0]["status"] for sent in await asyncio.gather(*waiting)]
        assert answers == [400] * IMPORTS_AT_ONCE
        assert open_spools() == before
        assert (await ana.ask("POST", IMPORT, content=b'{"title":"a"}', headers=LINES)).status_code == 200
        assert len(await all_of(ana)) == 1


async def test_an_export_waits_for_its_reader_and_ends_with_them(
    make_app: MakeApp, serve: Serve, somebody: type[Person], log: Log
) -> None:
    app = make_app()
    async with serve(app) as client:
        ana = somebody(client)
        operations = [{"op": "create", "task": {"title": "a", "description": "x" * 10_000}}] * 100
        for _ in range(4):
            assert (await ana.ask("POST", BATCH, json={"operations": operations})).status_code == 200
        taken = 0
        gone, stuck = asyncio.Event(), asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal taken
            taken += len(message.get("body", b""))
            if taken > 100_000:
                stuck.set()
                await asyncio.Event().wait()

        exporting = asyncio.create_task(spoken(app, ana, "GET", EXPORT, receive, send=send))
        await asyncio.wait_for(stuck.wait(), 60)
        seen = taken
        await asyncio.sleep(0.2)
        assert taken == seen < 4_000_000
        other = await ana.ask("GET", EXPORT)
        assert (other.status_code, slug(other)) == (429, "too-many-requests")
        assert app.state.database.observe().pool.in_use == 1
        gone.set()
        sent = await asyncio.wait_for(exporting, 60)
        assert sent[0]["status"] == 200
        assert not any(message.get("more_body") is False for message in sent[1:])
        await eventually(lambda: not app.state.database.observe().pool.in_use)
        whole = await ana.ask("GET", EXPORT)
        assert len(whole.content.splitlines()) == 400


async def test_an_export_that_cannot_begin_is_a_problem(
    make_app: MakeApp, serve: Serve, somebody: type[Person]
) -> None:
    app = make_app(database_pool_size=1, database_pool_timeout_seconds=0.2)
    async with serve(app) as client:
        ana = somebody(client)
        held, done = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with app.state.database.transaction():
                held.set()
                await done.wait()

        holding = asyncio.create_task(hold())
        await held.wait()
        answer = await ana.ask("GET", EXPORT)
        done.set()
        await holding
        assert (answer.status_code, slug(answer)) == (503, "overloaded")
        assert (await ana.ask("GET", EXPORT)).status_code == 200


async def test_an_export_whose_reader_stalls_but_stays_ends(
    make_app: MakeApp,
    serve: Serve,
    somebody: type[Person],
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfers, "STALL_SECONDS", 0.3)
    app = make_app()
    async with serve(app) as client:
        ana = somebody(client)
        await ana.create()

        async def stay() -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            if message.get("body"):
                await asyncio.Event().wait()

        sent = await asyncio.wait_for(spoken(app, ana, "GET", EXPORT, stay, send=send), 60)
        assert not any(message.get("more_body") is False for message in sent[1:])
        # Whoever reads may take as long as a busy machine lets him.
        monkeypatch.setattr(transfers, "STALL_SECONDS", 60.0)
        assert (await ana.ask("GET", EXPORT)).status_code == 200
    assert "export-stalled" in log.text
