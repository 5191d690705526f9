"""Entity tags and keys as clients may write them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from src.api.conditions import Repeat, Tags
from src.models import TaskBatch, TaskCreate

if TYPE_CHECKING:
    from tests.api.conftest import MakeApp, Person, Serve


@pytest.mark.parametrize(
    ("values", "strong", "weak"),
    [
        (['"a"'], {"a"}, set()),
        (['W/"a"'], set(), {"a"}),
        ([' "a" , W/"b","c"'], {"a", "c"}, {"b"}),
        (['"a"', '"b"'], {"a", "b"}, set()),
        (['"a,b"'], {"a,b"}, set()),
        (['""'], {""}, set()),
        ([',"a",,'], {"a"}, set()),
        (["a"], set(), set()),
        (['"a" "b"'], set(), set()),
        (['w/"a"'], set(), set()),
        (['"a'], set(), set()),
        (['"a", b'], set(), set()),
        (['"a", *'], set(), set()),
        ([""], set(), set()),
    ],
)
def test_lists_of_tags_are_read_as_the_standard_writes_them(
    values: list[str], strong: set[str], weak: set[str]
) -> None:
    tags = Tags.of(values)
    assert (tags.any, tags.strong, tags.weak) == (False, strong, weak)


@pytest.mark.parametrize("rest", [" " * 32_000 + "b", '"a' * 16_000, "," * 32_000 + "b", "W/" * 16_000])
def test_a_long_header_of_no_tags_is_read_in_no_time(rest: str) -> None:
    began = time.process_time()
    assert not Tags.of(['"a",' + rest]).hold("a")
    assert time.process_time() - began < 1.0


def test_a_star_stands_for_any_tag_only_when_alone() -> None:
    assert Tags.of(["*"]).any
    assert Tags.of([" * "]).hold("whatever")
    assert not Tags.of(['*, "a"']).any


def test_one_request_is_told_from_another_by_what_was_sent_and_not_by_how_it_is_written() -> None:
    def hashed(operation: str, shape: type[TaskCreate] | type[TaskBatch], text: str) -> bytes:
        key = Repeat("k", 24).of(operation, shape.model_validate_json(text))
        assert key is not None
        return key.request_hash

    one = hashed("create_task", TaskCreate, '{"title": "a", "is_completed": true}')
    assert hashed("create_task", TaskCreate, '{ "is_completed":true,"title":"\\u0061" }') == one
    assert hashed("create_task", TaskCreate, '{"title": "a"}') != one
    assert hashed("batch_tasks", TaskCreate, '{"title": "a", "is_completed": true}') != one
    batch = '{"operations": [{"op": "create", "task": {"title": "a"}}]}'
    assert hashed("batch_tasks", TaskBatch, batch) == hashed("batch_tasks", TaskBatch, batch)


async def test_who_has_the_current_task_gets_304_and_no_body(ana: Person) -> None:
    task = await ana.create()
    path = f"/v1/tasks/{task['id']}"
    read = await ana.ask("GET", path)
    tag = read.headers["etag"]
    assert (read.status_code, read.json()) == (200, task)
    for same in (tag, f"W/{tag}", f'"x", {tag}', "*"):
        answer = await ana.ask("GET", path, headers={"if-none-match": same})
        assert (answer.status_code, answer.content) == (304, b"")
        for name in ("etag", "cache-control", "vary"):
            assert answer.headers[name] == read.headers[name]
    for other in ('"x"', tag.strip('"'), f"{tag} {tag}", ""):
        answer = await ana.ask("GET", path, headers={"if-none-match": other})
        assert (answer.status_code, answer.json()) == (200, task)
    changed = await ana.ask("PATCH", path, json={"title": "b"})
    assert changed.headers["etag"] != tag
    assert (await ana.ask("GET", path, headers={"if-none-match": tag})).status_code == 200


@pytest.mark.parametrize("method", ["PATCH", "PUT", "DELETE"])
async def test_a_write_for_another_version_is_412_and_writes_nothing(ana: Person, method: str) -> None:
    task = await ana.create()
    path = f"/v1/tasks/{task['id']}"
    body = {} if method == "DELETE" else {"json": {"title": "b"}}
    tag = (await ana.ask("GET", path)).headers["etag"]
    for other in ('"x"', f"W/{tag}", tag.strip('"'), "", f"{tag} {tag}"):
        answer = await ana.ask(method, path, headers={"if-match": other}, **body)
        assert (answer.status_code, answer.json()["type"]) == (412, "/problems/precondition-failed"), other
    assert (await ana.ask("GET", path)).json() == task
    answer = await ana.ask(method, path, headers={"if-match": tag}, **body)
    assert answer.status_code in (200, 204)


@pytest.mark.parametrize("method", ["PATCH", "DELETE"])
async def test_a_condition_on_nothing_is_404_and_not_412(ana: Person, ben: Person, method: str) -> None:
    theirs = (await ben.create())["id"]
    body = {} if method == "DELETE" else {"json": {"title": "b"}}
    for id_ in (theirs, "00000000-0000-4000-8000-000000000000"):
        for tag in ("*", '"1-abc"'):
            answer = await ana.ask(method, f"/v1/tasks/{id_}", headers={"if-match": tag}, **body)
            assert answer.status_code == 404


async def test_a_put_may_ask_for_something_or_for_nothing_to_be_there(ana: Person) -> None:
    path = "/v1/tasks/019ac0de-7a10-7c55-8a1c-0d6f3b9e4a21"

    async def put(**headers: str) -> int:
        return (await ana.ask("PUT", path, json={"title": "a"}, headers=headers)).status_code

    assert await put(**{"if-match": "*"}) == 412
    assert await put(**{"if-match": '"1-abc"'}) == 412
    assert await put(**{"if-none-match": "*"}) == 201
    assert await put(**{"if-none-match": "*"}) == 412
    assert await put(**{"if-match": "*"}) == 200
    assert await put(**{"if-match": "*", "if-none-match": "*"}) == 412
    assert await put(**{"if-none-match": '"x"'}) == 422


async def test_a_condition_that_cannot_be_kept_is_refused_and_not_passed_over(ana: Person) -> None:
    task = await ana.create()
    path = f"/v1/tasks/{task['id']}"
    for method, headers in (
        ("PATCH", {"if-none-match": "*"}),
        ("DELETE", {"if-none-match": "*"}),
        ("PATCH", {"if-match": '"a", "b"'}),
    ):
        body = {} if method == "DELETE" else {"json": {"title": "b"}}
        answer = await ana.ask(method, path, headers=headers, **body)
        assert answer.status_code == 422
        (header,) = headers
        assert [fault["pointer"].lower() for fault in answer.json()["errors"]] == [header]
    assert (await ana.ask("GET", path)).json() == task


async def test_the_operator_may_ask_for_a_condition_on_every_change(
    make_app: MakeApp, serve: Serve, somebody: type[Person]
) -> None:
    async with serve(make_app(require_if_match=True)) as client:
        ana = somebody(client)
        task = await ana.create()
        path = f"/v1/tasks/{task['id']}"
        for method in ("PATCH", "PUT", "DELETE"):
            body = {} if method == "DELETE" else {"json": {"title": "b"}}
            answer = await ana.ask(method, path, **body)
            assert (answer.status_code, answer.json()["type"]) == (428, "/problems/precondition-required")
            headers = {"if-match": (await ana.ask("GET", path)).headers["etag"]}
            assert (await ana.ask(method, path, headers=headers, **body)).status_code in (200, 204)
        new = await ana.ask("PUT", path, json={"title": "b"}, headers={"if-none-match": "*"})
        assert new.status_code == 201


@pytest.mark.parametrize("key", ["a", "A-1_2.3:4/5", "!" * 255, '"quoted"', '"', "a\\b"])
async def test_a_key_of_visible_characters_is_taken(ana: Person, key: str) -> None:
    first = await ana.ask("POST", "/v1/tasks", json={"title": "a"}, headers={"idempotency-key": key})
    again = await ana.ask("POST", "/v1/tasks", json={"title": "a"}, headers={"idempotency-key": key})
    assert (first.status_code, again.status_code) == (201, 201)
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert again.content == first.content
    for name in ("location", "etag", "content-type", "cache-control"):
        assert again.headers[name] == first.headers[name]


@pytest.mark.parametrize("key", ["", '""', "a b", "\t", "é", "a" * 256, '"' + "a" * 256 + '"', "\x7f"])
async def test_any_other_key_is_422_and_writes_nothing(ana: Person, key: str) -> None:
    headers = {"idempotency-key": key.encode("latin-1")}
    answer = await ana.ask("POST", "/v1/tasks", json={"title": "a"}, headers=headers)
    assert answer.status_code == 422
    assert [fault["pointer"] for fault in answer.json()["errors"]] == ["Idempotency-Key"]
    assert (await ana.ask("GET", "/v1/tasks")).json()["items"] == []


async def test_a_key_in_quotes_is_the_same_key(ana: Person) -> None:
    for key in ("k", '"k"'):
        answer = await ana.ask("POST", "/v1/tasks", json={"title": "a"}, headers={"idempotency-key": key})
        assert answer.status_code == 201
    assert answer.headers["idempotency-replayed"] == "true"
    two = [("idempotency-key", "k"), ("idempotency-key", "k"), ("authorization", f"Bearer {ana.token}")]
    refused = await ana.client.post("/v1/tasks", json={"title": "a"}, headers=two)  # type: ignore[arg-type]
    assert refused.status_code == 422
