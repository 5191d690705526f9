"""Bodies mean one thing only: what two readers could understand differently is refused, and never repeated."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from src.api import bodies, problems
from src.errors import Invalid, RequestError
from src.models import TaskBatch, TaskCreate
from src.models.task import BATCH_MAX_OPERATIONS

if TYPE_CHECKING:
    from tests.api.conftest import MakeApp, Person, Serve

CANARY = "hunter2-canary"
JSON = {"content-type": "application/json"}
GOOD = b'{"title": "a"}'


ID = "0197f3a2-6c1e-7b34-9d52-3f8e4a1b2c7d"
MAKING = f'{{"op":"create","id":"{ID}"'


def _batch_of(*operations: str) -> str:
    return '{"operations":[' + ",".join(operations) + "]}"


def _object_of(members: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f"{name}:{value}" for name, value in members) + "}"


def refused(body: bytes) -> RequestError:
    with pytest.raises(RequestError) as error:
        bodies.parse(body)
    return error.value


async def post(ana: Person, body: bytes, **headers: str) -> httpx.Response:
    return await ana.ask("POST", "/v1/tasks", content=body, headers={**JSON, **headers})


def check(answer: httpx.Response, kind: type[RequestError]) -> dict[str, Any]:
    assert answer.status_code == kind.status, answer.text
    body: dict[str, Any] = answer.json()
    assert body["type"] == f"/problems/{kind.slug}"
    assert CANARY not in answer.text
    return body


# Reading


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=20,
    )
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_what_json_says_is_read_as_it_is(value: Any) -> None:
    assert bodies.parse(json.dumps(value).encode()) == value
    assert (
        bodies.parse(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")) is not NotImplemented
    )


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_bytes_are_read_as_json_or_refused(body: bytes) -> None:
    value: Any = NotImplemented
    with contextlib.suppress(problems.Malformed, Invalid):
        value = bodies.parse(body)
    assert value is NotImplemented or json.loads(body.decode()) == value


MALFORMED = {
    "nothing": b"",
    "blank": b" \n",
    "cut off": b'{"title": "' + CANARY.encode(),
    "two values": b"{} {}",
    "single quotes": b"{'title': 'a'}",
    "a trailing comma": b'{"title": "a",}',
    "a comment": b'{"title": "a"} // x',
    "no quotes": b"{title: 1}",
    "a leading zero": b"[01]",
    "hexadecimal": b"[0x10]",
    "a raw control character": b'["\x01"]',
    "a bad escape": b'["\\x41"]',
    "a mark of byte order": b"\xef\xbb\xbf{}",
    "UTF-16": '{"title": "a"}'.encode("utf-16"),
    "Latin-1": b'{"title": "\xe9"}',
    "an overlong form": b'["\xc0\xaf"]',
    "an encoded surrogate": b'["\xed\xa0\x80"]',
    "brackets that do not pair up": b"[" * 40 + b"}" * 40,
    "an unended string of quotes": b'["' + b'\\"' * 30_000,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_json_in_utf8_is_400(name: str) -> None:
    assert isinstance(refused(MALFORMED[name]), problems.Malformed)


def nested(opening: str, depth: int) -> bytes:
    closing = {"[": "]", "{": "}", '{"a":': "}", '[{"a":': "}]"}[opening]
    return f"{opening * depth}1{closing * depth}".encode()


WORDS = st.sampled_from(
    [
        "title",
        "description",
        "is_completed",
        "a",
        "[{,:",
        "]}",
        "\\u0061",
        '\\"',
        "\\\\",
        "\\ud800",
        "\\u0000",
        "\t",
        "\xe9",
        " ",
    ]
)
TEXT = st.lists(WORDS, max_size=3).map(lambda words: '"' + "".join(words) + '"')
ANYTHING = st.recursive(
    TEXT | st.sampled_from(["null", "true", "false", "1", "1e999", "NaN", "-0", "9" * 30, '"', "\\", "1 1"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda all_: "[" + ",".join(all_) + "]")
        | st.lists(st.tuples(TEXT, inner), max_size=3).map(_object_of)
    ),
    max_leaves=6,
)
TITLE = st.tuples(st.sampled_from(['"title"', '"t\\u0069tle"', ' "title" ']), TEXT)
FIELD = st.tuples(
    st.sampled_from(['"description"', '"is_completed"']), TEXT | st.sampled_from(["null", "true"])
)
MEMBERS = st.lists(TITLE | FIELD | st.tuples(TEXT, ANYTHING), min_size=1, max_size=4)


@given(
    st.one_of(
        st.lists(TITLE, min_size=1, max_size=2).map(_object_of),
        st.lists(TITLE | FIELD, min_size=1, max_size=3).map(_object_of),
        MEMBERS.map(_object_of),
        ANYTHING,
    )
)
@settings(max_examples=examples(2_000), deadline=None)
def test_what_is_read_in_one_step_is_what_is_found_step_by_step(text: str) -> None:
    for shape, around in ((TaskCreate, text), (TaskBatch, _batch_of(f'{MAKING},"task":{text}}}'))):
        body, strict = around.encode(), bodies.Strict(shape, {})
        quickly = strict._read(body)
        try:
            slowly = strict._examine(body)
        except RequestError:
            slowly = None
        assert quickly is None or quickly == slowly, body
        # Whoever sends what is well gets there in one step.
        assert (quickly is None) == (slowly is None) or body.count(b"\\") > 0, body


def test_a_name_that_comes_twice_is_found_wherever_it_stands() -> None:
    made = f'{MAKING},"task":{{"title":"a:b\\\\"}}}}'
    strict = bodies.Strict(TaskBatch, {})
    for first, second in (
        ('"op":"create"', '"op":"create","op":"create"'),
        ('"title":"a', '"title":"x","title":"a'),
        ('"title":"a', '"title":"x","\\u0074itle":"a'),
        (f'"id":"{ID}"', f'"id":"{ID}" , "id" : "{ID}"'),
    ):
        body = _batch_of(made, made.replace(first, second))
        assert first in made
        assert strict._read(body.replace(second, first).encode()) is not None
        assert strict._read(body.encode()) is None
        with pytest.raises(Invalid):
            strict._examine(body.encode())


def test_nesting_is_bounded_exactly() -> None:
    for opening in ("[", '{"a":'):
        bodies.parse(nested(opening, bodies.MAX_DEPTH))
        assert isinstance(refused(nested(opening, bodies.MAX_DEPTH + 1)), problems.Malformed)
    bodies.parse(nested('[{"a":', bodies.MAX_DEPTH // 2))
    assert isinstance(refused(nested('[{"a":', bodies.MAX_DEPTH // 2 + 1)), problems.Malformed)
    for body in (b"[" * 100_000, nested("[", 100_000), b'{"a":' * 100_000, b'["",' * 100_000):
        assert isinstance(refused(body), problems.Malformed)


def test_brackets_in_text_and_side_by_side_are_no_nesting() -> None:
    text = {"title": "[{" * 500 + '"\\' + "}]" * 3}
    assert bodies.parse(json.dumps(text).encode()) == text
    wide = [[[]], {}, "]"] * 1000
    assert bodies.parse(json.dumps(wide).encode()) == wide


MANY = {
    "fields": b'{"operations":[{' + b",".join(b'"%x":0' % number for number in range(200_000)) + b"}]}",
    "numbers": b'{"operations":[' + b"0," * 1_000_000 + b"0]}",
    "arrays": b"[" + b"[]," * 600_000 + b"[]]",
    "texts": b"[" + b'"",' * 600_000 + b'""]',
}


@pytest.mark.parametrize("name", MANY)
def test_more_values_than_any_batch_has_are_refused_before_they_are_made(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Never:
        def decode(self, _: str) -> None:
            raise AssertionError("it was decoded")

    monkeypatch.setattr(bodies, "_DECODER", Never())
    assert isinstance(refused(MANY[name]), Invalid)


def test_values_are_bounded_exactly_and_commas_in_text_are_none() -> None:
    many = [0] * bodies.MAX_VALUES
    assert bodies.parse(json.dumps(many).encode()) == many
    assert isinstance(refused(json.dumps([*many, 0]).encode()), Invalid)
    text = {"title": ",[" * bodies.MAX_VALUES}
    assert bodies.parse(json.dumps(text).encode()) == text
    task = {"title": "a", "description": "b", "is_completed": True}
    operation = {"op": "update", "id": "x", "if_match": "y", "task": task}
    largest = {"operations": [operation] * BATCH_MAX_OPERATIONS}
    assert bodies.parse(json.dumps(largest).encode()) == largest


AMBIGUOUS = {
    "a name twice": b'{"title": "a", "title": "b"}',
    "a name twice, once escaped": b'{"title": "a", "titl\\u0065": "b"}',
    "a name twice, deep inside": b'{"x": [{"y": {"a": 1, "b": 2, "a": 1}}]}',
    "NaN": b'{"title": NaN}',
    "Infinity": b"[Infinity]",
    "-Infinity": b"[-Infinity]",
    "a number that only a float could not hold": b"[1e400]",
    "one more than 64 bits hold": b"[9223372036854775808]",
    "one less than 64 bits hold": b"[-9223372036854775809]",
    "5,000 digits": b"[" + b"9" * 5000 + b"]",
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_json_that_readers_differ_about_is_422(name: str) -> None:
    error = refused(AMBIGUOUS[name])
    assert isinstance(error, Invalid)
    assert [fault.pointer for fault in error.faults] == [""]


def test_the_largest_numbers_are_taken() -> None:
    assert bodies.parse(b"[9223372036854775807,-9223372036854775808]") == [2**63 - 1, -(2**63)]


def test_no_body_of_the_allowed_size_holds_the_loop_for_long() -> None:
    size = 65_536
    costly = [
        b"[" * size,
        b'{"a":' * (size // 5),
        b"[" + b"[]," * (size // 3) + b"[]]",
        b'"' + b'\\"' * (size // 2),
        b'"' * size,
        b"[" * 40 + b'"' + b'\\"' * (size // 2),
        b"9" * size,
        b"1." + b"9" * size,
        b"1e" + b"9" * size,
        b"[" + b"1," * (size // 2) + b"1]",
        b"{" + b'"a":1,' * (size // 6) + b'"a":1}',
        b'[{"": ' * 10_000,
        json.dumps({str(number): number for number in range(5000)}).encode(),
    ]
    for body in costly:
        began = time.process_time()
        with contextlib.suppress(RequestError, ValueError):
            TaskCreate.model_validate(bodies.parse(body))
        # Quadratic work, which is what this looks for, takes minutes.
        assert time.process_time() - began < 1


# Over HTTP


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
        "application/json ; charset=utf8;",
        "application/json; profile=x",
    ],
)
async def test_json_in_utf8_is_taken_however_it_is_declared(ana: Person, content_type: str) -> None:
    answer = await post(ana, GOOD, **{"content-type": content_type})
    assert answer.status_code == 201


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "application/jsonx",
        "application/problem+json",
        "application/merge-patch+json",
        "application/json; charset=latin-1",
        "application/json; charset=utf-16",
        "application/json, text/plain",
        "application/json; charset",
        "",
        CANARY,
    ],
)
async def test_any_other_declaration_is_415(ana: Person, content_type: str) -> None:
    check(await post(ana, GOOD, **{"content-type": content_type}), problems.UnsupportedMediaType)


async def test_two_declarations_and_compressed_bodies_are_415(ana: Person) -> None:
    check(await post(ana, GOOD, **{"content-encoding": "gzip"}), problems.UnsupportedMediaType)
    assert (await post(ana, GOOD, **{"content-encoding": "identity"})).status_code == 201
    twice = [("content-type", "application/json"), ("content-type", "application/json")]
    headers = [*twice, ("authorization", f"Bearer {ana.token}")]
    check(
        await ana.client.post("/v1/tasks", content=GOOD, headers=headers),  # type: ignore[arg-type]
        problems.UnsupportedMediaType,
    )


async def test_no_body_at_all_is_400_and_an_undeclared_one_415(ana: Person) -> None:
    check(await ana.ask("POST", "/v1/tasks"), problems.Malformed)
    check(await ana.ask("POST", "/v1/tasks", content=GOOD), problems.UnsupportedMediaType)
    check(await ana.ask("POST", "/v1/tasks", headers=JSON), problems.Malformed)


@pytest.mark.parametrize(
    ("body", "pointer", "detail"),
    [
        (b"{}", "/title", "Is required."),
        (b"null", "", "Has to be an object."),
        (b"[]", "", "Has to be an object."),
        (b'{"title": 1}', "/title", "Has to be a text."),
        (b'{"title": null}', "/title", "Has to be a text."),
        (b'{"title": "a", "is_completed": "true"}', "/is_completed", "Has to be true or false."),
        (b'{"title": "a", "is_completed": 1}', "/is_completed", "Has to be true or false."),
        (b'{"title": "hunter2-canary\\u0000"}', "/title", "Has to be without the character U+0000."),
        (b'{"title": "hunter2-canary\\ud800"}', "/title", "Has to be valid Unicode."),
        (b'{"title": "a", "description": "\\udfff\\ud800"}', "/description", "Has to be valid Unicode."),
        (b'{"title": " \\u2003"}', "/title", "Has to hold more than white space."),
        (b'{"title": "a", "hunter2-canary": 1}', "", "Has a field that is not known here."),
        (b'{"title": "a", "\\ud800": 1}', "", "Has to be valid Unicode."),
        (b'{"title": "a", "user_id": "x"}', "", "Has a field that is not known here."),
    ],
)
async def test_what_is_not_of_the_shape_is_pointed_at_and_not_repeated(
    ana: Person, body: bytes, pointer: str, detail: str
) -> None:
    found = check(await post(ana, body), Invalid)
    assert found["errors"] == [{"pointer": pointer, "detail": detail}]


async def test_every_bad_body_is_answered_so_on_every_operation_that_takes_one(ana: Person) -> None:
    task = await ana.create()
    for method, path in (
        ("POST", "/v1/tasks"),
        ("PATCH", f"/v1/tasks/{task['id']}"),
        ("PUT", f"/v1/tasks/{task['id']}"),
    ):
        for body, kind in (
            (b"\xff", problems.Malformed),
            (b"[" * 50_000, problems.Malformed),
            (b'{"title": NaN}', Invalid),
            (b'{"title": "a", "title": "a"}', Invalid),
            (b'{"nope": 1}', Invalid),
        ):
            check(await ana.ask(method, path, content=body, headers=JSON), kind)
        check(await ana.ask(method, path, content=GOOD), problems.UnsupportedMediaType)
    assert (await ana.ask("GET", f"/v1/tasks/{task['id']}")).json() == task


async def test_a_body_is_bounded_before_it_is_read_by_announcement_and_by_count(ana: Person) -> None:
    async def pieces() -> Any:
        for _ in range(100):
            yield b" " * 1024

    check(await post(ana, b" " * 65_537), problems.TooLarge)
    check(await ana.ask("POST", "/v1/tasks", content=pieces(), headers=JSON), problems.TooLarge)
    title = json.dumps({"title": "a", "description": "é" * 10_000}, ensure_ascii=False).encode()
    assert (await post(ana, title + b" " * (65_536 - len(title)))).status_code == 201


async def test_no_body_is_read_for_who_is_not_known(make_app: MakeApp, serve: Serve) -> None:
    app = make_app()
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was asked for")

    async def send(message: Any) -> None:
        sent.append(message)

    async with serve(app):
        for method, path in (("POST", "/v1/tasks"), ("PUT", "/v1/tasks/" + "0" * 32)):
            sent.clear()
            scope = {
                "type": "http", "method": method, "path": path, "root_path": "", "query_string": b"",
                "headers": [(b"content-type", b"application/json"), (b"content-length", b"14")],
            }  # fmt: skip
            await asyncio.wait_for(app(scope, receive, send), 10)
            assert sent[0]["status"] == 401


async def test_a_client_that_goes_away_in_mid_body_is_no_fault_of_ours(
    make_app: MakeApp, serve: Serve, ana: Person, log: Any
) -> None:
    app = make_app()
    messages = [{"type": "http.request", "body": b'{"ti', "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        pass

    async with serve(app):
        scope = {
            "type": "http", "method": "POST", "path": "/v1/tasks", "root_path": "", "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"authorization", b"Bearer " + ana.token.encode())],
        }  # fmt: skip
        await app(scope, receive, send)
    (line,) = log.requests
    assert (line["level"], line["status"], line["problem"]) == ("info", 400, "malformed")
