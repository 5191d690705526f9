"""Rows I1 to I18 of docs/reliability.md over HTTP: what comes in is taken as it was meant, or refused."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

import naughty
from asking import TASKS, Caller, hold, people, problem, served
from src.config.settings import load_settings
from src.services.signing import SigningKeys
from waiting import PATIENCE, until

if TYPE_CHECKING:
    from tests.api.conftest import MakeApp, Serve

PAGE = "https://app.example.com"
MARK = "zebra-7f3a"


@pytest.fixture
async def ana(
    make_app: MakeApp, serve: Serve, app_database_url: str, database_url: str
) -> AsyncIterator[Caller]:
    app = make_app(
        database_url=app_database_url,
        database_migration_url=database_url,
        cors_origins=[PAGE],
        max_body_bytes=1 << 20,
    )
    async with people(serve, app) as (opened, _):
        yield opened
        # Nothing of what was refused has left a task behind.
        assert [task for task in await opened.all() if MARK in task["title"]] == []


async def refused(ana: Caller, status: int, body: bytes, **headers: str) -> None:
    """Sent in every way that takes a task, this body is refused so, and comes back in no answer."""
    task = await ana.create()
    for method, path in (
        ("POST", TASKS),
        ("PUT", f"{TASKS}/{uuid4()}"),
        ("PUT", f"{TASKS}/{task['id']}"),
        ("PATCH", f"{TASKS}/{task['id']}"),
    ):
        answer = await ana(method, path, content=body, headers=headers, expect=status)
        assert MARK not in answer.text
        assert "\\ud8" not in answer.text.lower()
    assert (await ana("GET", f"{TASKS}/{task['id']}")).json() == task


async def test_i1_nul_is_422(ana: Caller) -> None:
    await refused(ana, 422, json.dumps({"title": f"{MARK}\0"}).encode())
    await refused(ana, 422, json.dumps({"title": "a", "description": f"\0{MARK}"}).encode())
    await ana("GET", f"{TASKS}?q=%00", expect=422)
    await ana("GET", f"{TASKS}?cursor=%00", expect=422)
    await ana("GET", f"{TASKS}/%00", expect=404)
    await ana("POST", json={"title": "a"}, headers={"idempotency-key": "a b"}, expect=422)


async def test_i2_a_lone_surrogate_is_422_and_not_echoed(ana: Caller) -> None:
    await refused(ana, 422, b'{"title": "%s\\ud800"}' % MARK.encode())
    await refused(ana, 422, b'{"title": "a", "description": "\\udfff%s"}' % MARK.encode())
    await refused(ana, 422, b'{"title": "a", "\\ud800%s": 1}' % MARK.encode())


async def test_i3_invalid_utf_8_is_400(ana: Caller) -> None:
    for bad in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xe2\x82"):
        await refused(ana, 400, b'{"title": "%s%s"}' % (MARK.encode(), bad))
    await ana("GET", f"{TASKS}?q=%ff", expect=(200, 422))


async def test_i4_numbers_that_are_not_finite_are_422(ana: Caller) -> None:
    for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999"):
        await refused(ana, 422, b'{"title": %s}' % number)
        await refused(ana, 422, b'{"title": "%s", "unknown": [%s]}' % (MARK.encode(), number))


async def test_i5_integers_beyond_64_bits_are_422(ana: Caller) -> None:
    for number in (str(2**63), str(-(2**63) - 1), "9" * 5000, "-" + "9" * 5000):
        await refused(ana, 422, b'{"title": "%s", "is_completed": %s}' % (MARK.encode(), number.encode()))
        await ana("GET", f"{TASKS}?limit={number}", expect=422)


@pytest.mark.parametrize("opening", [b"[", b'{"title":'])
async def test_i6_json_a_hundred_thousand_deep_is_400(ana: Caller, opening: bytes) -> None:
    await refused(ana, 400, opening * 100_000)
    await refused(ana, 400, b'{"title": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


async def test_i7_a_body_over_the_limit_is_413_before_it_is_buffered(ana: Caller) -> None:
    taken = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield b" " * (1 << 16)

    answer = await ana("POST", content=pieces(), expect=413)
    assert problem(answer) == "too-large"
    assert taken <= 18  # A megabyte, and not the 62 that were offered.
    taken = 0
    await ana("POST", content=pieces(), headers={"content-length": str(1000 << 16)}, expect=413)
    assert taken == 0
    # Up to the limit it is read, and judged by what is in it.
    await ana("POST", content=b'{"title": "a"}' + b" " * ((1 << 20) - 14), expect=201)


async def test_i8_a_name_twice_in_an_object_is_422(ana: Caller) -> None:
    for body in (
        '{"title": "a", "title": "MARK"}',
        '{"title": "MARK", "\\u0074itle": "b"}',
        '{"title": "MARK", "description": {"a": 1, "a": 1}}',
    ):
        await refused(ana, 422, body.replace("MARK", MARK).encode())


async def test_i9_an_unknown_field_is_422_and_not_named(ana: Caller) -> None:
    for name in ("unknown", MARK, "id", "user_id", "version", "created_at", "Title", "__proto__", ""):
        await refused(ana, 422, json.dumps({"title": MARK, name: 1}).encode())
    await ana("GET", f"{TASKS}?{MARK}=1", expect=422)


@pytest.mark.parametrize(
    "declared",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=latin-1",
        "application/json, text/plain",
        "application/problem+json",
        "application/x-ndjson",
        "json",
        "",
    ],
)
async def test_i10_a_wrong_content_type_is_415(ana: Caller, declared: str) -> None:
    await refused(ana, 415, json.dumps({"title": MARK}).encode(), **{"content-type": declared})
    await refused(ana, 415, json.dumps({"title": MARK}).encode(), **{"content-encoding": "gzip"})
    for right in ("application/json;charset=UTF-8", 'Application/JSON; charset="utf-8"'):
        await ana("POST", content=b'{"title": "a"}', headers={"content-type": right}, expect=201)


@pytest.mark.parametrize(
    "limit", ["-1", "0", "201", "99999999999", "1e1", "5.0", "0x5", "+5", " 5", "٥", "", "five", "5&limit=6"]
)
async def test_i11_an_odd_limit_is_422(ana: Caller, limit: str) -> None:
    await ana("GET", f"{TASKS}?limit={limit}", expect=422)


async def test_i11_a_forged_cursor_is_422(ana: Caller) -> None:
    for _ in range(3):
        await ana.create()
    cursor = (await ana("GET", params={"limit": 1})).json()["next_cursor"]
    follow = f"{TASKS}?limit=1&cursor="
    assert len((await ana("GET", follow + cursor, expect=200)).json()["items"]) == 1
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for place, letter in enumerate(cursor):
        forged = cursor[:place] + letters[(letters.index(letter) + 1) % 64] + cursor[place + 1 :]
        await ana("GET", follow + forged, expect=422)
    for forged in (
        "",
        "x",
        cursor[:-1],
        cursor + "A",
        cursor + "=",
        cursor * 2,
        cursor[4:],
        "A" * 10_000,
        "%F0%9F%92%A5",
    ):
        await ana("GET", follow + forged, expect=422)
    # It belongs to one person's one list.
    await ana.stranger()("GET", follow + cursor, expect=422)
    for other in (
        "&sort=updated_at",
        "&order=asc",
        "&is_completed=false",
        "&q=a",
        "&created_after=2020-01-01T00:00:00Z",
    ):
        await ana("GET", follow + cursor + other, expect=422)


async def test_i14_a_foreign_page_gets_no_cors_header_and_none_gets_credentials(ana: Caller) -> None:
    task = await ana.create()
    one = f"{TASKS}/{task['id']}"
    asking = {"access-control-request-method": "PATCH", "access-control-request-headers": "authorization"}
    foreign = (
        "https://evil.example",
        "null",
        PAGE + ".evil.example",
        PAGE.replace("https", "http"),
        PAGE + ":444",
        "*",
    )
    for origin in foreign:
        for method, path in (
            ("GET", TASKS),
            ("GET", one),
            ("DELETE", f"{TASKS}/{uuid4()}"),
            ("GET", "/nowhere"),
        ):
            answer = await ana(method, path, headers={"origin": origin})
            assert [name for name in answer.headers if name.startswith("access-control")] == []
        answer = await ana.client.options(one, headers={"origin": origin, **asking})
        assert [name for name in answer.headers if name.startswith("access-control")] == []
    for method, path in (("GET", one), ("GET", f"{TASKS}/{uuid4()}"), ("POST", TASKS)):
        answer = await ana(method, path, headers={"origin": PAGE})
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "origin" in answer.headers["vary"].lower()
        assert "access-control-allow-credentials" not in answer.headers
        assert "etag" in answer.headers["access-control-expose-headers"].lower()
    # What a browser asks before: it needs no token, which it could not send.
    answer = await ana.client.options(one, headers={"origin": PAGE, **asking})
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "PATCH" in answer.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in answer.headers


async def test_i14_every_page_may_be_let_in_but_never_with_credentials(
    make_app: MakeApp, serve: Serve, app_database_url: str, database_url: str
) -> None:
    app = make_app(database_url=app_database_url, database_migration_url=database_url, cors_origins=["*"])
    async with people(serve, app) as (ana, _):
        answer = await ana("GET", headers={"origin": "https://anywhere.example"})
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers


def test_i15_line_breaks_and_escapes_leave_one_clean_line(app_database_url: str, database_url: str) -> None:
    """Through the real server, its parser included."""
    token = SigningKeys.from_settings(load_settings()).mint(uuid4(), None, 600)
    with served(database_url=app_database_url, database_migration_url=database_url) as service:
        before = len(service.log.splitlines())
        place = urlsplit(service.address)
        title = json.dumps({"title": '\r\n\x1b[31m{"event":"forged"}\n'}).encode()
        heads = [
            b"GET /v1/tasks/%0d%0aforged:%201%1b[31m HTTP/1.1\r\n",
            b"GET /v1/tasks?q=%0d%0a%1b[2Jforged HTTP/1.1\r\n",
            b"GET /v1/tasks HTTP/1.1\r\nUser-Agent: \x1b[31mforged\tagent\r\n",
            b"GET /v1/tasks HTTP/1.1\r\nX-Request-ID: \x1b[31mforged\r\n",
            b"POST /v1/tasks HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
            % len(title),
        ]
        for head in heads:
            with socket.create_connection((place.hostname, place.port or 80), timeout=PATIENCE) as connection:
                connection.sendall(
                    head
                    + b"Host: localhost\r\nConnection: close\r\nAuthorization: Bearer %s\r\n\r\n"
                    % token.encode()
                    + (title if head.startswith(b"POST") else b"")
                )
                answer = b"".join(iter(lambda: connection.recv(65536), b""))
            assert b" 500 " not in answer.split(b"\r\n", 1)[0]
            head_lines = answer.partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
            assert not any(line.startswith(b"forged") for line in head_lines)

        def requests_logged() -> int:
            return sum('"event":"request"' in line for line in service.log.splitlines()[before:])

        # A request is logged after its answer.
        until(lambda: requests_logged() == len(heads), lambda: service.log)
        lines = service.log.splitlines()[before:]
        events = [json.loads(line) for line in lines]  # Each line is one event.
        assert [event["event"] for event in events if event["event"] == "request"] == ["request"] * len(heads)
        assert not any("forged" in line or "\x1b" in line or "\\u001b" in line for line in lines)
        assert not any(token in line for line in lines)


async def test_i16_unused_methods_are_405_with_a_list_that_is_true(ana: Caller) -> None:
    every = {
        "GET",
        "HEAD",
        "POST",
        "PUT",
        "PATCH",
        "DELETE",
        "OPTIONS",
        "TRACE",
        "CONNECT",
        "PROPFIND",
        "BREW",
    }
    paths = ana.client._transport.app.openapi()["paths"]  # type: ignore[attr-defined]
    for template, item in paths.items():
        path = template.replace("{task_id}", str(uuid4()))
        used = {verb.upper() for verb in item if verb in ("get", "put", "post", "delete", "patch")}
        used |= {"HEAD"} if "GET" in used else set()
        for method in sorted(every - used):
            answer = await ana(method, path, expect=405)
            # `/v1/tasks/batch` and its like also lie where an id would.
            assert set(answer.headers["allow"].split(", ")) == used, (method, path)


async def test_i17_naughty_strings_round_trip_unchanged(ana: Caller) -> None:
    taken = 0
    for text in naughty.strings():
        made = await ana("POST", json={"title": text, "description": text})
        if made.status_code == 422:
            # Only what PostgreSQL cannot hold, or what shows nothing, or what is too long.
            assert not text.strip() or len(text) > 255, ascii(text)
            continue
        task = (await ana("GET", f"{TASKS}/{made.json()['id']}", expect=200)).json()
        assert (task["title"], task["description"]) == (text, text)
        changed = await ana(
            "PATCH",
            f"{TASKS}/{task['id']}",
            content=json.dumps({"title": text}, ensure_ascii=False).encode(),
            expect=200,
        )
        assert changed.json()["title"] == text
        taken += 1
    assert taken > 150
    listed = {task["description"] for task in await ana.all()}
    assert len(listed) == taken
    # A search takes it as text, too.
    for text in ("%", "_", "\\", "'", "💥" * 200, "$1"):
        found = {task["title"] for task in await ana.all(q=text)}
        assert found == {title for title in listed if text in title}, text


async def test_i18_what_is_no_json_is_refused_and_what_is_json_is_no_fault_of_ours(ana: Caller) -> None:
    broken = naughty.broken_documents()
    assert len(broken) >= 188
    for document in broken:
        answer = await ana("POST", content=document)
        assert answer.status_code in (400, 422), document
        answer = await ana("PATCH", f"{TASKS}/{uuid4()}", content=document)
        assert answer.status_code in (400, 422), document
    assert await ana.all() == []
    valid = naughty.valid_documents()
    assert len(valid) >= 95
    for document in valid:
        assert naughty.is_json(document)
        answer = await ana("POST", content=document)  # Held to the contract: never 500.
        assert answer.status_code in (201, 422), document


async def test_a_helper_that_would_let_a_bad_answer_pass_is_no_helper(ana: Caller) -> None:
    answer = await ana("GET", f"{TASKS}/{uuid4()}", expect=404)
    for spoil in (
        lambda: answer.headers.pop("x-request-id"),
        lambda: answer.headers.update({"content-type": "application/json"}),
        lambda: answer.headers.update({"retry-after": "1"}),
        lambda: setattr(answer, "_content", answer.content.replace(b"not-found", b"nothing")),
        lambda: setattr(answer, "_content", answer.content.replace(b'"title"', b'"titel"')),
    ):
        headers, content = dict(answer.headers), answer.content
        hold(answer)
        spoil()
        with pytest.raises((AssertionError, KeyError, ValueError)):
            hold(answer)
        answer.headers.clear()
        answer.headers.update(headers)
        answer._content = content
    assert hold(answer) is answer
    assert isinstance(answer.json(), dict)
