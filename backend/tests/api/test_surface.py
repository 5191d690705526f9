"""Rows I17 and I18 of docs/reliability.md on every operation: thousands of hostile texts and documents, in every place.

The places are found by walking the routes and OpenAPI, so what is added is walked too. Each place meets a part of the
texts, and the next place another: each text meets many places, if not every place. `make fuzz` brings larger parts,
others in each round: after some rounds each place has met all of them.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from fastapi import APIRouter, FastAPI, Request
from starlette.responses import Response

import corpora
import naughty
import surface
from asking import TASKS, Caller, people
from src.api import problems
from src.config.settings import Settings
from src.main import create_app
from surface import Answer, Asked, Operation, Wire

if TYPE_CHECKING:
    from tests.api.conftest import Log, MakeApp, Serve

ROUND = os.environ.get("GROUNDWORK_FUZZ_ROUND")
OPERATIONS = surface.operations(create_app(Settings()))
WITH_BODY = [operation for operation in OPERATIONS if operation.media_type is not None]
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:=+/-]{1,128}")
ANSWERED = frozenset({200, 201, 204, 304, 400, 401, 403, 404, 405, 406, 409, 412, 413, 415, 422, 428, 429})

Check = Callable[["Walk", Operation], Awaitable[None]]


def of_each(operations: Sequence[Operation]) -> Callable[[Check], Callable[[Walk], Awaitable[None]]]:
    """One test of them all, in one application: what fails names its operation, and `check` is the test of one."""

    def made(check: Check) -> Callable[[Walk], Awaitable[None]]:
        async def test(walk: Walk) -> None:
            assert operations
            for operation in operations:
                try:
                    await walk.begin()
                    await check(walk, operation)
                    walk.read_log()
                except BaseException as error:
                    error.add_note(f"This was {operation.name}.")
                    raise

        test.__doc__, test.check = check.__doc__, check  # type: ignore[attr-defined]
        return test

    return made


each_operation = of_each(OPERATIONS)
each_with_body = of_each(WITH_BODY)


def part(of: Sequence[Any], place: int, operation: Operation) -> Sequence[Any]:
    """What this place meets of it in this round."""
    step = 7 if operation.template.startswith("/v1/") else 29
    # What is slow on purpose would take minutes.
    step *= 20 if operation.has_password else 1
    if ROUND is None:
        step *= 4
        place += sum(operation.name.encode())
    return of[(place + int(ROUND or 0)) % step :: step]


class Walk:
    """One person in front of the application, and what may be said back."""

    def __init__(self, app: FastAPI, caller: Caller, log: Log) -> None:
        self.wire = Wire(app)
        self.caller = caller
        self.log = log
        self.texts: set[str] = set()
        self.ids: dict[str, dict[str, str]] = {}
        self.vocabulary = "\n".join(
            [
                json.dumps(app.openapi()),
                json.dumps([problems.example(kind) for kind in problems.kinds()]),
                *problems.SENTENCES.values(),
                " ".join(surface.IGNORED + surface.READ),
                "max-age=3600 no-store private, no-cache nosniff no-referrer content-length content-type true",
            ]
        )

    async def begin(self) -> None:
        """With somebody new, who has a task: a list and an export have something to say."""
        self.caller = self.caller.stranger()
        self.ids.clear()
        await self.caller.create()

    def read_log(self) -> None:
        """One line for each request, whatever was in it, and nothing of it."""
        text = self.log.text
        lines = [json.loads(line) for line in text.splitlines()]
        assert {line["level"] for line in lines} <= {"debug", "info", "warning"}
        assert sum(line["event"] == "request" for line in lines) >= len(self.texts)
        found = [given for given in self.texts if not self.is_common(given) and given in text]
        # An id of the client's own is kept, and a number may be a duration: neither can break a line.
        assert [given for given in found if not SANE_REQUEST_ID.fullmatch(given)] == []
        self.texts.clear()
        self.log.stream.seek(0)
        self.log.stream.truncate()

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(name.encode(), value.encode()) for name, value in self.caller.headers.items()]

    async def request(
        self, operation: Operation, place: surface.Pointer | None = None, value: Any = None
    ) -> Asked:
        """One that is as described, on what is there; by somebody new where it may end an account or a session."""
        if operation.verb == "DELETE":
            self.caller = self.caller.stranger()
        if operation.verb == "DELETE" or operation.name not in self.ids:
            there = "task_id" in surface.path_parameters(operation) and operation.verb != "PUT"
            self.ids[operation.name] = {"task_id": (await self.caller.create())["id"]} if there else {}
        return operation.request(self.headers(), place, value, self.ids[operation.name])

    async def answered(self, asked: Asked, text: str) -> Answer:
        """The answer: held to the contract, no fault of ours, and silent about the text where it was refused."""
        self.texts.add(text)
        keyed = any(name == b"idempotency-key" for name, _ in asked.headers)
        answer = (await self.wire.ask(asked)).held(keyed=keyed)
        assert answer.status in ANSWERED, (answer, ascii(text))
        said = [value for name, value in answer.headers if name not in (b"x-request-id", b"link")]
        if answer.status >= 400:
            said.append(answer.body.replace(answer.header(b"x-request-id") or b"\0", b""))
        self.silent(b"\n".join(said), text)
        return answer

    def silent(self, said: bytes, text: str) -> None:
        if self.is_common(text):
            return
        for form in (
            text,
            json.dumps(text)[1:-1],
            quote(text.encode("utf-8", "surrogatepass")),
            html.escape(text),
        ):
            assert form.encode("utf-8", "surrogatepass") not in said, (said, ascii(text))

    def is_common(self, text: str) -> bool:
        """What is short, or a word of ours, may be said for its own sake."""
        return len(text) < 4 or text in self.vocabulary or text.isdigit()


@pytest.fixture
def app(make_app: MakeApp, app_database_url: str, database_url: str) -> FastAPI:
    # All of the documents are read (250 kB is the longest), and nobody is told to come again later.
    unlimited = dict.fromkeys(
        ("login_rate_limit", "login_address_rate_limit", "sign_up_rate_limit", "refresh_rate_limit"), "off"
    )
    return make_app(
        database_url=app_database_url,
        database_migration_url=database_url,
        max_body_bytes=1 << 20,
        password_hash_queue=1000,
        **unlimited,
    )


@pytest.fixture
async def walk(app: FastAPI, serve: Serve, log: Log) -> AsyncIterator[Walk]:
    async with people(serve, app) as (ana, _):
        yield Walk(app, ana, log)


# Texts


@each_with_body
async def test_i17_a_naughty_text_in_any_field_comes_back_as_it_was_or_is_refused(
    walk: Walk, operation: Operation
) -> None:
    places = operation.values("string")
    assert places
    taken = 0
    for number, place in enumerate(places):
        for text in part(corpora.strings(), number, operation):
            asked = await walk.request(operation, place, text)
            answer = await walk.answered(asked, text)
            if answer.status not in (200, 201) or not answer.body:
                continue
            taken += 1
            shown = surface.at(json.loads(answer.body), place)
            if shown is not None:
                assert shown == text, (operation.name, place, ascii(text), ascii(shown))
            location = answer.header(b"location")
            if location is not None:
                read = await walk.answered(Asked("GET", location, headers=walk.headers()), "")
                assert surface.at(json.loads(read.body), place) == shown, (operation.name, place, ascii(text))
    if operation.template.startswith(TASKS):
        assert taken > (15 if ROUND is None else 60)
        stored = [task["title"] for task in await walk.caller.all()]
        assert set(stored) <= {*corpora.strings(), "a task", "correct horse battery staple"}


@each_with_body
async def test_a_naughty_text_as_the_name_of_a_field_is_refused(walk: Walk, operation: Operation) -> None:
    for text in part(corpora.strings(), 0, operation):
        asked = await walk.request(operation)
        first, brace, rest = asked.body.partition(b"{")
        comma = b"" if rest.startswith(b"}") else b", "
        asked.body = first + brace + json.dumps(text).encode() + b": 1" + comma + rest
        answer = await walk.answered(asked, text)
        assert answer.status == 422, (answer, ascii(text))


@each_operation
async def test_a_naughty_text_as_a_parameter_is_no_fault_of_ours(walk: Walk, operation: Operation) -> None:
    for number, name in enumerate([*operation.query_names(), "unknown"]):
        for text in part(corpora.strings(), number, operation):
            asked = await walk.request(operation)
            asked.query = surface.in_query(name, text)
            answer = await walk.answered(asked, text)
            if operation.query_names():
                assert answer.status in (200, 422), (answer, name, ascii(text))
    for text in part(corpora.strings(), 1, operation):
        asked = await walk.request(operation)
        # As a name, and as all of the query, whatever it may then mean.
        for query in (
            surface.in_query(text, "1"),
            quote(text.encode("utf-8", "surrogatepass"), safe="&=;+%").encode(),
        ):
            asked.query = query
            await walk.answered(asked, text)


@each_operation
async def test_a_naughty_text_in_the_path_leads_nowhere_else(walk: Walk, operation: Operation) -> None:
    known = {other.template for other in OPERATIONS}
    for number, name in enumerate([*surface.path_parameters(operation), ""]):
        for text in part(corpora.strings(), number, operation):
            for safe in ("", "/;:@&=+$,!*'()~"):
                path = surface.in_path(operation, name, text, safe=safe)
                if not name:
                    path += b"/" + quote(text.encode("utf-8", "surrogatepass"), safe=safe).encode()
                asked = operation.request(walk.headers())
                asked.path = path
                answer = await walk.answered(asked, text)
                if name and path.decode() not in known:
                    assert answer.status in (404, 405), (answer, path)


@each_operation
async def test_a_naughty_text_in_a_header_that_nobody_reads_makes_no_difference(
    walk: Walk, operation: Operation
) -> None:
    for text in part(corpora.strings(), 0, operation):
        value = surface.in_header(text)
        plain = await walk.request(operation)
        without = await walk.answered(plain, "")
        asked = await walk.request(operation)
        asked.headers += [(name.encode(), value) for name in surface.IGNORED]
        asked.headers.append((b"host", value))
        answer = await walk.answered(asked, text)
        assert answer.status == without.status, (answer, ascii(text))


@each_operation
async def test_a_naughty_text_in_a_header_that_is_read_is_taken_or_refused(
    walk: Walk, operation: Operation
) -> None:
    for number, name in enumerate(operation.header_names()):
        for text in part(corpora.strings(), number, operation):
            value = surface.in_header(text)
            asked = await walk.request(operation)
            asked.headers = [(given, held) for given, held in asked.headers if given.decode() != name]
            asked.headers.append((name.encode(), value))
            answer = await walk.answered(asked, text)
            if name == "x-request-id":
                sane = bool(SANE_REQUEST_ID.fullmatch(value.decode("utf-8", "replace")))
                assert (answer.header(b"x-request-id") == value) == sane
            if name == "authorization" and operation.described.get("security"):
                assert answer.status == 401


# Documents


@each_with_body
async def test_i18_every_document_that_is_no_json_is_refused(walk: Walk, operation: Operation) -> None:
    for number, place in enumerate([None, *operation.values("any")]):
        for document in part(corpora.broken(), number, operation) if place is not None else corpora.broken():
            asked = await walk.request(operation)
            asked.body = document if place is None else operation.document(place, document)
            if operation.media_type != surface.JSON and not document.strip() and place is None:
                continue  # No line is no faulty line.
            answer = await walk.answered(asked, "")
            assert answer.status in (400, 422), (operation.name, place, answer, document[:200])


@each_with_body
async def test_i18_every_document_that_may_be_json_is_no_fault_of_ours(
    walk: Walk, operation: Operation
) -> None:
    documents = [*corpora.documents("y"), *corpora.documents("i"), *naughty.valid_documents()]
    assert len(corpora.documents("y")) == 95
    for number, place in enumerate([None, *operation.values("any")]):
        for document in part(documents, number, operation) if place is not None else documents:
            asked = await walk.request(operation)
            asked.body = document if place is None else operation.document(place, document)
            answer = await walk.answered(asked, "")
            assert answer.status in ANSWERED - {405, 429}, (operation.name, place, answer)


# Whether a fault would be found


async def test_a_service_that_stumbles_or_repeats_what_it_was_given_would_be_found(
    make_app: MakeApp, serve: Serve, app_database_url: str, database_url: str, log: Log
) -> None:
    app = make_app(database_url=app_database_url, database_migration_url=database_url)
    router = APIRouter()

    @router.get("/v1/naive", operation_id="naive")
    async def naive(request: Request, number: str = "1") -> Response:
        """Takes what it is given for a number, and says it back."""
        agent = request.headers.get("user-agent", "")
        return Response(str(int(number)), headers={"x-agent": agent.replace("\x00", "")})

    app.include_router(router)
    app.openapi_schema = None
    (operation,) = [one for one in surface.operations(app) if one.template == "/v1/naive"]
    async with people(serve, app) as (ana, _):
        walk = Walk(app, ana, log)
        for test in (
            test_a_naughty_text_as_a_parameter_is_no_fault_of_ours,
            test_a_naughty_text_in_a_header_that_nobody_reads_makes_no_difference,
        ):
            with pytest.raises(AssertionError) as failure:
                await of_each([operation])(test.check)(walk)  # type: ignore[attr-defined]
            assert failure.value.__notes__ == ["This was GET /v1/naive."]


def test_every_body_has_places_and_every_place_is_named_once() -> None:
    """The walk sees what OpenAPI shows, and the lines that it cannot show."""
    named = {operation.name: operation.values("any") for operation in WITH_BODY}
    assert named[f"POST {TASKS}"] == [("title",), ("description",), ("is_completed",)]
    assert ("created_at",) in named[f"POST {TASKS}/import"]
    assert ("operations", 1, "task", "description") in named[f"POST {TASKS}/batch"]
    assert all(len(set(places)) == len(places) > 0 for places in named.values())
    assert {operation.template for operation in OPERATIONS} >= {
        "/docs/{asset}",
        "/problems/{slug}",
        "/metrics",
    }
