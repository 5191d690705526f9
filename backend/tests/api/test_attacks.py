"""What an attacker tries at the edges: other spellings of a path, other verbs, two tokens, compressed bodies, caches.

On every operation, found by walking the routes and OpenAPI.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from fastapi import FastAPI

import surface
from asking import TASKS, Caller, people
from src.config.settings import Settings
from src.main import create_app
from surface import Asked, Operation, Wire

if TYPE_CHECKING:
    from tests.api.conftest import MakeApp, Serve

OPERATIONS = surface.operations(create_app(Settings()))
LOCKED = [operation for operation in OPERATIONS if operation.described.get("security")]
each_locked = pytest.mark.parametrize("operation", LOCKED, ids=lambda operation: operation.name)


@pytest.fixture
def app(make_app: MakeApp, app_database_url: str, database_url: str) -> FastAPI:
    return make_app(database_url=app_database_url, database_migration_url=database_url)


@pytest.fixture
async def ana(app: FastAPI, serve: Serve) -> AsyncIterator[Caller]:
    async with people(serve, app) as (opened, _):
        yield opened


def token(caller: Caller) -> tuple[bytes, bytes]:
    return (b"authorization", caller.headers["authorization"].encode())


def spellings(path: str) -> list[str]:
    """Ways to write a path that some router, proxy or file system takes for the same one, or for another."""
    first, _, rest = path[1:].partition("/")
    letters = "".join(f"%{ord(letter):02x}" for letter in first)
    return [
        *(
            f"/{path}",
            f"//{path[1:]}//",
            f"/./{path[1:]}",
            f"/x/..{path}",
            f"/livez/..{path}",
            f"/docs/..{path}",
        ),
        *(
            f"/docs/%2e%2e{path}",
            f"/docs/..%2f{path[1:]}",
            f"/docs/%2e%2e%2f{first}%2f{rest}",
            f"/problems/..{path}",
        ),
        *(
            f"{path}/",
            f"{path}/.",
            f"{path}/..",
            f"{path};x=1",
            f"/{first};x/{rest}",
            f"{path}%00",
            f"{path}%20",
        ),
        *(
            f"{path}%2f",
            f"/{first}%2f{rest}",
            f"/{letters}/{rest}",
            f"/{first.upper()}/{rest}",
            f"{path}.json",
        ),
        *(
            f"{path}%23",
            f"{path}%3fx=1",
            f"/{first}\\{rest}".replace("\\", "%5c"),
            f"{path}%0a",
            f"{path}%0d%0a",
        ),
        *(
            f"/%2f{path[1:]}",
            f"/{first}/{rest}%252f",
            f"/livez%00{path}",
            f"/livez;{path}",
            f"/livez%3b{path}",
        ),
        *(f"/%c0%ae%c0%ae{path}", f"/{first}/%2e/{rest}", f"/{first}/{first}/..%2f{rest}"),
    ]


@each_locked
async def test_no_other_spelling_of_a_path_goes_round_the_token(ana: Caller, operation: Operation) -> None:
    wire = Wire(ana.client._transport.app)  # type: ignore[attr-defined]
    plain = operation.request()
    assert (await wire.ask(plain)).held().status == 401
    for path in spellings(plain.path.decode()):
        for query in (b"", b"access_token=x", b"token=" + token(ana)[1]):
            asked = Asked(operation.verb, path.encode(), query, list(plain.headers), plain.body)
            assert (await wire.ask(asked)).held().status in (401, 404, 405), path


@each_locked
async def test_neither_head_nor_options_nor_an_overridden_verb_goes_round_the_token(
    ana: Caller, operation: Operation
) -> None:
    wire = Wire(ana.client._transport.app)  # type: ignore[attr-defined]
    for verb in ("HEAD", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get", "Get", "G E T", "*"):
        asked = operation.request()
        asked.verb = verb
        asked.headers += [
            (b"x-http-method-override", operation.verb.encode()),
            (b"x-method-override", b"GET"),
        ]
        asked.headers += [(b"x-original-url", asked.path), (b"x-rewrite-url", asked.path)]
        answer = await wire.ask(asked)
        assert answer.status in (401, 404, 405), verb
        assert b"location" not in dict(answer.headers)
        for path in (b"/livez", b"/problems"):
            asked.path = path
            answer = await wire.ask(asked)
            assert answer.status in (200, 405)
            assert b'"items"' not in answer.body


@each_locked
async def test_two_tokens_are_none_in_whatever_order(ana: Caller, operation: Operation) -> None:
    wire = Wire(ana.client._transport.app)  # type: ignore[attr-defined]
    good, other, bad = token(ana), token(ana.stranger()), (b"authorization", b"Bearer x")
    for pair in ([good, good], [good, bad], [bad, good], [good, other], [other, good]):
        assert (await wire.ask(operation.request(pair))).held().status == 401
    # Nor is it taken from where it would be logged or sent along: a query, a cookie.
    value = good[1].removeprefix(b"Bearer ")
    asked = operation.request([(b"cookie", b"access_token=%b; token=%b" % (value, value))])
    asked.query = b"access_token=%b&authorization=Bearer+%b" % (value, value)
    assert (await wire.ask(asked)).held().status == 401


@each_locked
async def test_no_answer_to_somebody_with_a_token_may_be_given_to_another(
    ana: Caller, operation: Operation
) -> None:
    """Nor kept by a proxy in between."""
    wire = Wire(ana.client._transport.app)  # type: ignore[attr-defined]
    task = await ana.create()
    requests = [operation.request([token(ana)]), operation.request([token(ana)], ids={"task_id": task["id"]})]
    requests += [operation.request(), operation.request([token(ana), (b"content-type", b"text/plain")])]
    requests.append(operation.request([token(ana), (b"if-none-match", b"*")], ids={"task_id": task["id"]}))
    seen = set()
    for asked in requests:
        answer = (await wire.ask(asked)).held()
        seen.add(answer.status)
        kept = (answer.header(b"cache-control") or b"").decode()
        if kept == "private, no-cache":
            assert b"authorization" in (answer.header(b"vary") or b"").lower()
        else:
            assert kept == "no-store", (answer.status, answer.headers)
    assert 401 in seen
    assert seen & {200, 201, 204, 304} or operation.has_password


@pytest.mark.parametrize("operation", [one for one in LOCKED if one.media_type], ids=lambda one: one.name)
async def test_a_compressed_body_is_refused_unread(ana: Caller, operation: Operation) -> None:
    wire = Wire(ana.client._transport.app)  # type: ignore[attr-defined]
    bomb = gzip.compress(b"[" * (1 << 24))
    assert len(bomb) < 20_000
    plain = operation.request([token(ana)])
    for coding, body in (
        *(
            ("gzip", bomb),
            ("x-gzip", bomb),
            ("deflate", zlib.compress(plain.body)),
            ("br", b"\x0b"),
            ("zstd", b"(\xb5/"),
        ),
        *(("gzip, gzip", gzip.compress(bomb)), ("identity, gzip", bomb), ("compress", b"\x1f\x9d")),
    ):
        asked = operation.request([token(ana), (b"content-encoding", coding.encode())])
        asked.body = body
        assert (await wire.ask(asked)).held().status == 415, coding
    # Undeclared, it is no JSON.
    asked = operation.request([token(ana)])
    asked.body = bomb
    assert (await wire.ask(asked)).held().status in (400, 422)


@pytest.mark.parametrize(
    "digits", ["9" * 20, "9" * 5_000, "-" + "1" * 30_000, "0" * 30_000, "1e99999", "0x" + "f" * 9_999]
)
@pytest.mark.parametrize("name", ["limit", "created_after", "updated_before", "cursor", "is_completed"])
async def test_a_number_or_date_of_any_length_is_refused(ana: Caller, name: str, digits: str) -> None:
    for value in (
        digits,
        f"{digits}-01-01T00:00:00Z",
        f"2026-01-01T00:00:00.{digits}Z",
        f"2026-01-01T00:00:00+{digits}",
    ):
        answer = await ana("GET", f"{TASKS}?{name}={value.replace('+', '%2B')}")
        assert answer.status_code == 422, value[:50]


async def test_only_the_files_of_the_reference_are_served(ana: Caller) -> None:
    wire = Wire(ana.client._transport.app)  # type: ignore[attr-defined]
    for up in (
        "..",
        "%2e%2e",
        "..%2f..",
        "%2e%2e%2f%2e%2e%2f%2e%2e",
        "....//",
        "..%5c..",
        "%252e%252e",
        "/etc",
    ):
        for name in ("README.md", "main.py", "passwd", "swagger-ui/README.md", "start.js"):
            for join in ("/", "%2f"):
                answer = (await wire.ask(Asked("GET", f"/docs/{up}{join}{name}".encode()))).held()
                assert answer.status == 404
    assert (await wire.ask(Asked("GET", b"/docs/start.js"))).status == 200
    assert (await wire.ask(Asked("GET", b"/docs/README.md"))).status == 404


async def test_what_is_guessed_looks_like_what_is_there_but_for_its_owner(ana: Caller) -> None:
    """A cursor and an ETag of one person's are nothing in another's hands."""
    for _ in range(2):
        await ana.create()
    bob = ana.stranger()
    mine = await bob.create()
    page = (await ana("GET", params={"limit": 1})).json()
    await bob("GET", f"{TASKS}?limit=1&cursor={page['next_cursor']}", expect=422)
    task = page["items"][0]
    tag = (await ana("GET", f"{TASKS}/{task['id']}")).headers["etag"]
    await bob("GET", f"{TASKS}/{task['id']}", headers={"if-none-match": tag}, expect=404)
    await bob("PATCH", f"{TASKS}/{task['id']}", json={"title": "x"}, headers={"if-match": tag}, expect=404)
    await bob("PATCH", f"{TASKS}/{mine['id']}", json={"title": "x"}, headers={"if-match": tag}, expect=412)
    await bob("GET", f"{TASKS}/{uuid4()}", headers={"if-none-match": tag}, expect=404)
