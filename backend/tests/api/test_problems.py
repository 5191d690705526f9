"""Every error is a problem+json body with the same members, and says nothing of what was sent."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Query
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, EmailStr, Field, create_model, field_validator
from starlette.exceptions import HTTPException

from src import errors
from src.api import problems, reference

if TYPE_CHECKING:
    from tests.api.conftest import Log, MakeApp, Serve

CANARY = "hunter2-canary"


class Thing(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: str = Field(min_length=1, max_length=10)
    email: EmailStr | None = None
    count: int = Field(0, ge=0, le=100)
    tags: list[str] = []

    @field_validator("title")
    @classmethod
    def refuse(cls, value: str) -> str:
        if value == "shout":
            raise ValueError(f"do not say {value}")
        return value


Many = create_model("Many", **{f"field_{n}": (int, ...) for n in range(50)})  # type: ignore[call-overload]

RAISED: dict[str, errors.RequestError | Exception] = {
    "invalid": errors.Invalid(
        "Two dates are swapped.", faults=[errors.InputFault("/to", "Is before /from.")]
    ),
    "not-found": errors.NotFound(),
    "conflict": errors.Conflict(constraint="uq_users_email"),
    "unavailable": errors.Unavailable("connection-refused", retry_after_seconds=7),
    "overloaded": errors.Overloaded("pool-empty"),
    "refused": errors.Refused("disk-full"),
    "outcome-unknown": errors.OutcomeUnknown("connection-lost"),
    "internal": errors.InternalFault("42P01"),
    "unexpected": RuntimeError(f"with {CANARY} in it"),
    "teapot": HTTPException(418, detail=CANARY, headers={"x-tea": "green"}),
}


def with_routes(app: FastAPI) -> FastAPI:
    router = APIRouter(prefix="/v1", responses=problems.responses(errors.NotFound, errors.Unavailable))

    @router.post("/things")
    async def make(thing: Thing) -> Thing:
        return thing

    @router.get("/things")
    async def find(limit: Annotated[int, Query(ge=1, le=10)] = 1) -> int:
        return limit

    @router.delete("/things/{number}")
    async def drop(number: int) -> int:
        return number

    @router.post("/many")
    async def many(body: Many) -> None:  # type: ignore[valid-type]
        pass

    @router.get("/raise/{name}")
    async def fail(name: str) -> None:
        raise RAISED[name]

    app.include_router(router)
    return app


@pytest.fixture
async def client(make_app: MakeApp, serve: Serve) -> Any:
    async with serve(with_routes(make_app())) as opened:
        yield opened


def check(answer: httpx.Response, status: int, slug: str | None) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    problems.Problem.model_validate(body)
    assert body["status"] == status
    assert body["type"] == (f"/problems/{slug}" if slug else "about:blank")
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["title"]
    assert CANARY not in answer.text
    return body


@pytest.mark.parametrize("name", [name for name in RAISED if name not in ("unexpected", "teapot")])
async def test_each_error_of_the_family_is_answered_as_its_kind(client: httpx.AsyncClient, name: str) -> None:
    error = RAISED[name]
    assert isinstance(error, errors.RequestError)
    answer = await client.get(f"/v1/raise/{name}")
    body = check(answer, error.status, name)
    assert (answer.headers.get("retry-after") is not None) == (error.status == 503)
    if name == "unavailable":
        assert answer.headers["retry-after"] == "7"
    if name == "conflict":
        assert body["constraint"] == "uq_users_email"
    if name == "invalid":
        assert body["detail"] == "Two dates are swapped."
        assert body["errors"] == [{"pointer": "/to", "detail": "Is before /from."}]


async def test_an_unexpected_exception_is_a_500_that_tells_the_client_nothing(
    client: httpx.AsyncClient, log: Log
) -> None:
    answer = await client.get("/v1/raise/unexpected", headers={"x-request-id": "seen-in-the-log"})
    check(answer, 500, "internal")
    (line,) = log.requests
    assert line["request_id"] == "seen-in-the-log"
    assert line["level"] == "error"
    assert "RuntimeError" in line["exception"]
    assert "test_problems.py" in line["exception"]


async def test_a_status_without_a_kind_keeps_its_number_and_headers_and_not_its_detail(
    client: httpx.AsyncClient,
) -> None:
    answer = await client.get("/v1/raise/teapot")
    assert check(answer, 418, None)["title"] == "I'm a Teapot"
    assert answer.headers["x-tea"] == "green"


async def test_an_unknown_path_is_404_and_is_not_repeated(client: httpx.AsyncClient) -> None:
    check(await client.get(f"/{CANARY}?q={CANARY}"), 404, "not-found")
    check(await client.get("/health/"), 404, "not-found")


async def test_405_lists_every_method_of_the_path(client: httpx.AsyncClient) -> None:
    answer = await client.request("PATCH", "/v1/things")
    check(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "GET, HEAD, POST"
    for method in ("OPTIONS", "TRACE", "DELETE", "BREW"):
        answer = await client.request(method, "/health")
        check(answer, 405, "method-not-allowed")
        assert answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None, CANARY])
async def test_a_body_that_is_not_declared_json_is_415(
    client: httpx.AsyncClient, content_type: str | None
) -> None:
    headers = {"content-type": content_type} if content_type else {}
    answer = await client.post("/v1/things", content=json.dumps({"title": CANARY}), headers=headers)
    check(answer, 415, "unsupported-media-type")


@pytest.mark.parametrize(
    "body",
    [b'{"title": "' + CANARY.encode(), b"\xff\xfe", b"[" * 60_000, b'{"title": "\xc3\x28"}', b"9" * 5000],
    ids=["cut off", "not UTF-8", "deep", "bad UTF-8", "5,000 digits"],
)
async def test_a_body_that_cannot_be_read_is_400(client: httpx.AsyncClient, body: bytes) -> None:
    answer = await client.post("/v1/things", content=body, headers={"content-type": "application/json"})
    check(answer, 400, "malformed")


@pytest.mark.parametrize(
    ("body", "pointer", "detail"),
    [
        ({}, "/title", "Is required."),
        ({"title": CANARY * 9}, "/title", "Has to have at most 10 characters."),
        ({"title": ""}, "/title", "Has to have at least 1 character(s)."),
        ({"title": [CANARY]}, "/title", "Has to be a text."),
        ({"title": "shout"}, "/title", "Is not acceptable."),
        ({"title": "a", "email": CANARY}, "/email", "Is not acceptable."),
        ({"title": "a", "count": 101}, "/count", "Has to be 100 or less."),
        ({"title": "a", "count": CANARY}, "/count", "Has to be a whole number."),
        ({"title": "a", "count": 10**30}, "/count", "Has to be 100 or less."),
        ({"title": "a", "tags": ["x", 1]}, "/tags/1", "Has to be a text."),
        ({"title": "a", CANARY: 1}, "", "Has a field that is not known here."),
        ([CANARY], "", "Has to be an object."),
        (None, "", "Has to be an object."),
    ],
)
async def test_bad_input_is_pointed_at_and_not_repeated(
    client: httpx.AsyncClient, body: Any, pointer: str, detail: str
) -> None:
    answer = await client.post(
        "/v1/things", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert check(answer, 422, "invalid")["errors"] == [{"pointer": pointer, "detail": detail}]


@pytest.mark.parametrize(
    ("method", "path", "name", "place"),
    [
        ("GET", f"/v1/things?limit={CANARY}", "limit", "query"),
        ("DELETE", f"/v1/things/{CANARY}", "number", "path"),
    ],
)
async def test_a_bad_parameter_is_named(
    client: httpx.AsyncClient, method: str, path: str, name: str, place: str
) -> None:
    body = check(await client.request(method, path), 422, "invalid")
    assert body["errors"] == [{"pointer": name, "detail": f"In the {place}: Has to be a whole number."}]


async def test_at_most_twenty_faults_are_listed_and_the_rest_is_counted(client: httpx.AsyncClient) -> None:
    body = check(await client.post("/v1/many", json={}), 422, "invalid")
    assert len(body["errors"]) == problems.MAX_LISTED_FAULTS
    assert "50" in body["detail"]


@pytest.mark.parametrize("text", ["\\ud800", "\\u0000", "\\udfff\\ud800", "\\u001b[31m\\r\\n"])
async def test_odd_text_in_any_place_is_answered_and_not_repeated(
    client: httpx.AsyncClient, text: str
) -> None:
    for raw in (f'{{"title": "a", "{text}": 1}}', f'{{"title": 1, "email": "{text}"}}', f'["{text}"]'):
        answer = await client.post("/v1/things", content=raw, headers={"content-type": "application/json"})
        check(answer, 422, "invalid")
        assert text not in answer.text


@given(
    body=st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whatever_json_is_sent_no_string_of_it_comes_back(client: httpx.AsyncClient, body: Any) -> None:
    marked = json.loads(json.dumps(body))

    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return CANARY + value
        if isinstance(value, list):
            return [mark(item) for item in value]
        if isinstance(value, dict):
            return {CANARY + key: mark(item) for key, item in value.items()}
        return value

    answer = await client.post(
        "/v1/things", content=json.dumps(mark(marked)), headers={"content-type": "application/json"}
    )
    check(answer, 422, "invalid")


async def test_every_type_of_problem_has_its_page_on_this_service(client: httpx.AsyncClient) -> None:
    catalogue = (await client.get("/problems")).text
    for kind in problems.kinds():
        page = await client.get(problems.path_of(kind))
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert problems.path_of(kind) in page.text
        assert problems.path_of(kind) in catalogue


def test_every_error_an_answer_can_carry_is_in_the_catalogue() -> None:
    def walk(kind: type[errors.RequestError]) -> list[type[errors.RequestError]]:
        return [kind, *(below for child in kind.__subclasses__() for below in walk(child))]

    slugs = {kind.slug for kind in problems.kinds()}
    assert {kind.slug for kind in walk(errors.RequestError)} == slugs
    assert len(slugs) == len(problems.kinds())
    for kind in problems.kinds():
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", kind.slug)
        assert kind.title
        assert kind.meaning


def test_the_catalogue_in_docs_is_what_the_code_prints() -> None:
    page = Path(__file__).parents[3] / "docs" / "problems.md"
    assert page.read_text(encoding="utf-8") == reference.markdown()


async def test_openapi_lists_the_problems_of_every_operation_in_the_right_shape(
    client: httpx.AsyncClient,
) -> None:
    document = (await client.get("/openapi.json")).json()
    assert "HTTPValidationError" not in json.dumps(document)
    schema = {"$ref": "#/components/schemas/Problem"}
    operations = {
        (method, path): set(operation["responses"])
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }
    assert operations["post", "/v1/things"] == {"200", "400", "404", "413", "415", "422", "500", "503"}
    assert operations["get", "/v1/things"] == {"200", "404", "422", "500", "503"}
    assert operations["get", "/livez"] == {"200", "500"}
    for item in document["paths"].values():
        for operation in item.values():
            for status, response in operation["responses"].items():
                for media, content in response.get("content", {}).items():
                    if media == problems.MEDIA_TYPE:
                        assert content["schema"] == schema
                        for example in content["examples"].values():
                            assert str(example["value"]["status"]) == status
                            problems.Problem.model_validate(example["value"])
