"""What the HTTP parser refuses is a problem too, on real sockets, and what came before it is answered first."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from speaking import answers_in, ended
from src.api import problems
from src.server.app_protocol import AppProtocol
from src.server.protocol import MAX_HEAD_BYTES, MAX_HEADERS

Ask = Callable[..., Awaitable[list[tuple[int, dict[str, str], bytes]]]]
HOST = b"Host: a\r\n"


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers its path and the body's length; `/slow` takes its time, `/deaf` never reads the body."""
    read = 0
    if scope["path"] == "/slow":
        await asyncio.sleep(0.2)
    while scope["path"] != "/deaf":
        message = await receive()
        if message["type"] == "http.disconnect":
            scope["state"]["gone"].append(scope["path"])
            return
        read += len(message["body"])
        if not message["more_body"]:
            break
    trailing = [name for name, _ in scope["headers"] if name == b"x-trailing"]
    body = f"{scope['path']} {read} {len(trailing)}".encode()
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-length", str(len(body)).encode())],
        }
    )
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def gone() -> list[str]:
    """The paths of requests whose application was told that their client is gone."""
    return []


@pytest.fixture
async def ask(gone: list[str]) -> AsyncIterator[Ask]:
    """Sends bytes (with a pause between parts) on a new connection; gives every answer until it is closed."""
    config = uvicorn.Config(application, http=AppProtocol, log_config=None, lifespan="off")
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: AppProtocol(config=config, server_state=state, app_state={"gone": gone}), "127.0.0.1", 0
    )
    address = server.sockets[0].getsockname()

    async def speak(*parts: bytes) -> list[tuple[int, dict[str, str], bytes]]:
        reader, writer = await asyncio.open_connection(*address)
        try:
            for number, part in enumerate(parts):
                if number:
                    await asyncio.sleep(0.05)
                writer.write(part)
                await writer.drain()
            return answers_in(await asyncio.wait_for(reader.read(), 60))
        finally:
            writer.close()
            await writer.wait_closed()

    yield speak
    await ended(server, state)


def check(answer: tuple[int, dict[str, str], bytes], kind: type[Any]) -> None:
    status, headers, body = answer
    assert status == kind.status
    assert headers["content-type"] == problems.MEDIA_TYPE
    assert (headers["connection"], headers["cache-control"]) == ("close", "no-store")
    assert headers["x-content-type-options"] == "nosniff"
    said = json.loads(body)
    problems.Problem.model_validate(said)
    assert said["type"] == f"/problems/{kind.slug}"
    assert said["request_id"] == headers["x-request-id"]


POST = b"POST / HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"

BROKEN = {
    "both lengths": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both lengths, the other way round": POST
    + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "two equal lengths": POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "two lengths": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "a list of lengths": POST + b"Content-Length: 3, 3\r\n\r\nabc",
    "a signed length": POST + b"Content-Length: +3\r\n\r\nabc",
    "a negative length": POST + b"Content-Length: -3\r\n\r\nabc",
    "a length beyond 64 bits": POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\nabc",
    "a bare LF": b"GET / HTTP/1.1\nHost: a\n\n",
    "a bare LF after a header": b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n",
    "a bare CR": b"GET / HTTP/1.1\r\nHost: a\rX: y\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
    "two Hosts in HTTP/1.0": b"GET / HTTP/1.0\r\n" + HOST + HOST + b"\r\n",
    "chunks in HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "an unknown version": b"GET / HTTP/3.0\r\n" + HOST + b"\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a folded header": b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n z\r\n\r\n",
    "a space before the colon": b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    "a NUL in a header": b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
    "an unknown method": b"BREW / HTTP/1.1\r\n" + HOST + b"\r\n",
    "CONNECT": b"CONNECT a:80 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a raw byte in the path": b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "an unknown encoding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "another encoding before chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "another encoding in a header of its own": POST
    + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "no encoding before chunked": POST + b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n",
    "a Host with a path": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "a Host with a blank": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "a Host with markup": b"GET / HTTP/1.1\r\nHost: <script>\r\n\r\n",
    "a Host with half an address": b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n",
    "a Host with a port that is none": b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n",
    "two blanks before the target": b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n",
    "two blanks before the version": b"GET /  HTTP/1.1\r\n" + HOST + b"\r\n",
    "a blank before the method": b" GET / HTTP/1.1\r\n" + HOST + b"\r\n",
    "RTSP": b"OPTIONS / RTSP/1.0\r\n" + HOST + b"\r\n",
    "ICE": b"SOURCE / ICE/1.0\r\n" + HOST + b"\r\n",
    "a chunk without a size": CHUNKED + b"zz\r\n",
    "a chunk with a negative size": CHUNKED + b"-1\r\na\r\n0\r\n\r\n",
    "a chunk beyond 64 bits": CHUNKED + b"f" * 17 + b"\r\na\r\n0\r\n\r\n",
    "a chunk that ends by LF": CHUNKED + b"1\na\n0\n\n",
}


@pytest.mark.parametrize("name", BROKEN)
async def test_what_is_not_http_is_a_problem(ask: Ask, name: str) -> None:
    (answer,) = await ask(BROKEN[name])
    check(answer, problems.Malformed)


@pytest.mark.parametrize("name", BROKEN)
async def test_what_is_not_http_is_a_problem_also_byte_by_byte(ask: Ask, name: str) -> None:
    sent = BROKEN[name]
    (answer,) = await ask(sent[:1], sent[1 : len(sent) // 2], sent[len(sent) // 2 :])
    check(answer, problems.Malformed)


@pytest.mark.parametrize(
    "host", [b"a", b"a.example:8000", b"[::1]:80", b"[v1.a:b]", b"%61", b"a_b", b"", b"127.0.0.1"]
)
async def test_hosts_of_every_valid_form_are_accepted(ask: Ask, host: bytes) -> None:
    head = b"GET /quick HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n"
    ((status, _, _),) = await ask(head % host)
    assert status == 200


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: a%b\r\nConnection: close\r\n\r\n",
        POST + b"Connection: close\r\nContent-Length: 0%b\r\n\r\n",
        POST + b"Connection: close\r\nExpect: 100-continue%b\r\nContent-Length: 3\r\n\r\nabc",
    ],
    ids=["host", "content-length", "expect"],
)
@pytest.mark.parametrize("blanks", [b" ", b"\t", b" \t "])
async def test_blanks_behind_a_header_value_are_no_part_of_it(
    ask: Ask, request_: bytes, blanks: bytes
) -> None:
    answers = await ask(request_ % blanks)
    expected = [100, 200] if b"Expect" in request_ else [200]
    assert [status for status, _, _ in answers] == expected


async def test_blank_behind_the_transfer_coding_is_no_part_of_it(ask: Ask) -> None:
    sent = POST + b"Connection: close\r\nTransfer-Encoding: chunked \r\n\r\n0\r\n\r\n"
    ((status, _, _),) = await ask(sent)
    assert status == 200


TOO_LARGE = {
    "a header": b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n",
    "a name": b"GET / HTTP/1.1\r\n" + HOST + b"a" * MAX_HEAD_BYTES + b": x\r\n\r\n",
    "many headers of some size": b"GET / HTTP/1.1\r\n"
    + HOST
    + (b"X: " + b"a" * 400 + b"\r\n") * 90
    + b"\r\n",
    "too many headers": b"GET / HTTP/1.1\r\n" + HOST + b"X: y\r\n" * MAX_HEADERS + b"\r\n",
    "a target": b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "a head without end": b"GET / HTTP/1.1\r\nX: " + b"a" * 2 * MAX_HEAD_BYTES,
    "a trailer": CHUNKED + b"0\r\nX: " + b"a" * 300_000,
    "a chunk's extension": CHUNKED + b"1;x=" + b"a" * 300_000,
}


@pytest.mark.parametrize("name", TOO_LARGE)
async def test_a_head_over_the_bound_is_431(ask: Ask, name: str) -> None:
    (answer,) = await ask(TOO_LARGE[name])
    check(answer, problems.HeadersTooLarge)


@pytest.mark.parametrize("name", TOO_LARGE)
async def test_a_head_over_the_bound_is_431_also_in_parts(ask: Ask, name: str) -> None:
    sent = TOO_LARGE[name]
    half = len(sent) // 2
    (answer,) = await ask(sent[:half], sent[half:])
    check(answer, problems.HeadersTooLarge)


async def test_a_head_of_the_allowed_size_is_taken(ask: Ask) -> None:
    def head(target: int, headers: int) -> bytes:
        lines = HOST + b"Connection: close\r\n" + b"X: y\r\n" * (headers - 2)
        return b"GET /" + b"a" * (target - len(lines) - 1) + b" HTTP/1.1\r\n" + lines + b"\r\n"

    for count in (2, MAX_HEADERS):
        ((status, _, _),) = await ask(head(MAX_HEAD_BYTES, count))
        assert status == 200
        (answer,) = await ask(head(MAX_HEAD_BYTES + 1, count))
        check(answer, problems.HeadersTooLarge)


async def test_a_body_of_any_size_is_no_head(ask: Ask) -> None:
    close = b"Connection: close\r\n"
    ((status, _, body),) = await ask(POST + close + b"Content-Length: 500000\r\n\r\n" + b"a" * 500_000)
    assert (status, body) == (200, b"/ 500000 0")
    chunks = b"100;x=y\r\n" + b"a" * 256 + b"\r\n"
    sent = POST + close + b"Transfer-Encoding: chunked\r\n\r\n" + chunks * 1000 + b"0\r\n\r\n"
    ((status, _, body),) = await ask(sent)
    assert (status, body) == (200, b"/ 256000 0")


async def test_a_trailer_becomes_no_header(ask: Ask) -> None:
    sent = CHUNKED + b"1\r\na\r\n0\r\nX-Trailing: 1\r\n\r\n"
    (answer, *_) = await ask(sent + BROKEN["a bare LF"])
    assert (answer[0], answer[2]) == (200, b"/ 1 0")


@pytest.mark.parametrize("path", [b"/quick", b"/slow"])
async def test_what_was_asked_before_is_answered_before(ask: Ask, path: bytes) -> None:
    good = b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n"
    *answered, refused = await ask(good + good + BROKEN["a bare LF"])
    assert [(status, body) for status, _, body in answered] == [(200, path + b" 0 0")] * 2
    check(refused, problems.Malformed)
    *answered, refused = await ask(good, BROKEN["a chunk without a size"])
    assert [(status, body) for status, _, body in answered] == [(200, path + b" 0 0")]
    check(refused, problems.Malformed)


async def test_a_body_that_breaks_tells_the_application_that_nothing_more_comes(
    ask: Ask, gone: list[str]
) -> None:
    (answer,) = await ask(CHUNKED + b"1\r\na\r\n", b"zz\r\n")
    check(answer, problems.Malformed)
    assert gone == ["/"]


async def test_a_body_that_breaks_after_its_answer_gets_no_second_one(ask: Ask) -> None:
    deaf = CHUNKED.replace(b" / ", b" /deaf ")
    (answer,) = await ask(deaf + b"1\r\na\r\n", b"zz\r\n")
    assert (answer[0], answer[2]) == (200, b"/deaf 0 0")


async def test_client_that_offers_an_upgrade_with_each_request_keeps_its_connection(ask: Ask) -> None:
    sent = b"GET /up HTTP/1.1\r\n" + HOST + UPGRADE + b"\r\n"
    last = b"GET /last HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    for parts in ([sent, sent, last], [sent + sent + last]):
        *kept, closed = await ask(*parts)
        assert [(status, body) for status, _, body in kept] == [(200, b"/up 0 0")] * 2
        assert all("close" not in headers["connection"] for _, headers, _ in kept)
        assert (closed[1]["connection"], closed[2]) == ("close", b"/last 0 0")


UPGRADE = b"Connection: upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"


@pytest.mark.parametrize(
    "framed",
    [b"Content-Length: 5\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"],
)
async def test_a_body_that_comes_with_an_upgrade_is_read(ask: Ask, framed: bytes) -> None:
    head, _, content = framed.partition(b"\r\n\r\n")
    head = POST + UPGRADE + head + b"\r\n\r\n"
    behind = POST + b"Connection: close\r\n" + framed
    for parts in (
        [head + content + behind],
        [head, content, behind],
        [head, *(content[i : i + 1] for i in range(len(content)))],
    ):
        if parts[-1] is not behind and not parts[0].endswith(behind):
            parts.append(behind)
        first, second = await ask(*parts)
        assert [(status, body) for status, _, body in (first, second)] == [(200, b"/ 5 0")] * 2
        assert (first[1]["connection"], second[1]["connection"]) == ("keep-alive", "close")


async def test_a_body_that_breaks_after_an_upgrade_is_refused(ask: Ask, gone: list[str]) -> None:
    (answer,) = await ask(POST + UPGRADE + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n", b"zz\r\n")
    check(answer, problems.Malformed)
    assert gone == ["/"]


async def test_the_answer_survives_a_client_that_goes_on_sending(ask: Ask) -> None:
    (answer,) = await ask(BROKEN["a bare LF"], *[b"x" * 50_000] * 4)
    check(answer, problems.Malformed)
