"""What nobody should send, byte by byte, to the service as it is deployed.

Whatever comes: an answer of ours or the end of the connection, in time; never a 500, never an answer too many.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from asking import Served, served
from conftest import Administrator
from postgres_server import PostgresServer
from speaking import Answer, Line, answers_in
from src.embedded.roles import APPLICATION
from src.server.protocol import MAX_PIPELINED
from src.services.signing import SigningKeys, new_key, seeds

KEY = new_key()
HOST = b"Host: a\r\n"
LIVEZ = b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\n" + HOST + b"\r\n"
REFUSED = {400, 408, 413, 414, 415, 422, 429, 431}


@pytest.fixture(scope="module")
def service(postgres: PostgresServer, administrator: Administrator, template: str) -> Iterator[Served]:
    name = f"test_{uuid4().hex[:16]}"
    administrator.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    with served(
        database_url=postgres.url_for(name, role=APPLICATION),
        database_migration_url=postgres.url_for(name),
        signing_keys=KEY,
        header_timeout_seconds="3",
        body_timeout_seconds="3",
        keep_alive_seconds="3",
    ) as started:
        yield started
    administrator.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@contextlib.asynccontextmanager
async def connected(service: Served):  # type: ignore[no-untyped-def]
    host, _, port = service.address.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Line(reader, writer)
    finally:
        # Not closed politely: that would wait, after the loop's end, for a service that does not read on.
        writer.transport.abort()


async def sent(service: Served, *parts: bytes, pause: float = 0.0) -> list[Answer]:
    """What is answered until the service ends the connection; fails when it does not."""
    async with connected(service) as line:
        answers = asyncio.create_task(line.rest(60))
        for part in parts:
            if answers.done():
                break
            line.writer.write(part)
            await asyncio.sleep(pause)
        return answers_in(await answers)


def post(*headers: bytes, body: bytes = b"", path: bytes = b"/v1/tasks") -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"POST " + path + b" HTTP/1.1\r\n" + HOST + lines + b"\r\n" + body


CHUNKED = b"Transfer-Encoding: chunked"
AMBIGUOUS = {
    "a length and chunks": post(b"Content-Length: 4", CHUNKED, body=b"0\r\n\r\n" + SMUGGLED),
    "chunks and a length": post(CHUNKED, b"Content-Length: 4", body=b"0\r\n\r\n" + SMUGGLED),
    "two lengths": post(b"Content-Length: 0", b"Content-Length: 44", body=SMUGGLED),
    "a length twice": post(b"Content-Length: 44", b"Content-Length: 44", body=SMUGGLED),
    "a length in hex": post(b"Content-Length: 0x2c", body=SMUGGLED),
    "a length with an underscore": post(b"Content-Length: 4_4", body=SMUGGLED),
    "a length with a comma": post(b"Content-Length: 0,44", body=SMUGGLED),
    "a length with a point": post(b"Content-Length: 44.0", body=SMUGGLED),
    "no length in the length": post(b"Content-Length:", body=SMUGGLED),
    "chunked with a space before the colon": post(
        b"Transfer-Encoding : chunked", body=b"0\r\n\r\n" + SMUGGLED
    ),
    "chunked after a vertical tab": post(b"Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n" + SMUGGLED),
    "chunked in quotes": post(b'Transfer-Encoding: "chunked"', body=b"0\r\n\r\n" + SMUGGLED),
    "chunked with a parameter": post(b"Transfer-Encoding: chunked;q=1", body=b"0\r\n\r\n" + SMUGGLED),
    "chunked, and then not": post(b"Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n" + SMUGGLED),
    "chunked twice": post(CHUNKED, CHUNKED, body=b"0\r\n\r\n" + SMUGGLED),
    "chunked twice in one": post(b"Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n" + SMUGGLED),
    "chunked with a NUL": post(b"Transfer-Encoding: chunked\x00", body=b"0\r\n\r\n" + SMUGGLED),
    "chunked on a folded line": post(b"X: y", b" Transfer-Encoding: chunked", body=b"0\r\n\r\n" + SMUGGLED),
    "chunked after a bare LF": post(b"X: y\nTransfer-Encoding: chunked", body=b"0\r\n\r\n" + SMUGGLED),
    "chunked after a bare CR": post(b"X: y\rTransfer-Encoding: chunked", body=b"0\r\n\r\n" + SMUGGLED),
    "a chunk in hex with its prefix": post(CHUNKED, body=b"0x3\r\nabc\r\n0\r\n\r\n" + SMUGGLED),
    "a chunk with a sign": post(CHUNKED, body=b"+3\r\nabc\r\n0\r\n\r\n" + SMUGGLED),
    "a chunk after a space": post(CHUNKED, body=b" 3\r\nabc\r\n0\r\n\r\n" + SMUGGLED),
    "a chunk that is longer than it says": post(CHUNKED, body=b"3\r\nabcdef\r\n0\r\n\r\n" + SMUGGLED),
    "a chunk without its end": post(CHUNKED, body=b"3\r\nabc0\r\n\r\n" + SMUGGLED),
    "a chunk that ends by LF": post(CHUNKED, body=b"3\nabc\n0\n\n" + SMUGGLED),
    "a last chunk that ends by LF": post(CHUNKED, body=b"3\r\nabc\r\n0\r\n\n" + SMUGGLED),
    "a chunk of a size beyond 64 bits": post(CHUNKED, body=b"1" + b"0" * 17 + b"\r\nabc\r\n" + SMUGGLED),
    "a length in the trailers": post(CHUNKED, body=b"0\r\nContent-Length: 44\r\n\r\n" + SMUGGLED),
    "an extension with a bare LF": post(CHUNKED, body=b"3;a=b\nabc\r\n0\r\n\r\n" + SMUGGLED),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
async def test_i12_what_two_readers_could_divide_differently_is_one_400_and_the_end(
    service: Served, name: str
) -> None:
    answers = await sent(service, AMBIGUOUS[name])
    # A body may break after the head of it has been answered; nothing that came behind it is.
    assert 1 <= len(answers) <= 2
    assert {status for status, _, _ in answers} <= {400, 401}
    assert answers[-1][0] == 400 or len(answers) == 1
    assert "smuggled" not in service.log


WELL_FORMED = {
    "small letters": (post(b"transfer-encoding: CHUNKED", body=b"0\r\n\r\n"), 401),
    "an extension": (post(CHUNKED, body=b'3;a=b;c="d"\r\nabc\r\n0\r\n\r\n'), 401),
    "trailers that pretend": (
        post(CHUNKED, body=b"0\r\nHost: b\r\nAuthorization: Bearer x\r\nConnection: close\r\n\r\n"),
        401,
    ),
    "zeros before a size": (post(CHUNKED, body=b"0000003\r\nabc\r\n0\r\n\r\n"), 401),
    "a body where none is used": (b"GET /livez HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc", 200),
    "an absolute target": (b"GET http://elsewhere/livez HTTP/1.1\r\n" + HOST + b"\r\n", 200),
    "a star for a path": (b"GET * HTTP/1.1\r\n" + HOST + b"\r\n", 404),
    "empty lines first": (b"\r\n\r\n" + LIVEZ, 200),
    "an expectation that nobody knows": (b"GET /livez HTTP/1.1\r\n" + HOST + b"Expect: miracles\r\n\r\n", 200),
    "HTTP/1.0": (b"GET /livez HTTP/1.0\r\n\r\n", 200),
    "TRACE": (b"TRACE /livez HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "a method of WebDAV": (b"PROPFIND /livez HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "a NUL in the path, encoded": (b"GET /%00 HTTP/1.1\r\n" + HOST + b"\r\n", 404),
    "a path that is no UTF-8, encoded": (b"GET /%ff%fe HTTP/1.1\r\n" + HOST + b"\r\n", 404),
    "a path that climbs": (b"GET /../../etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n", 404),
    "a path of slashes": (b"GET //////// HTTP/1.1\r\n" + HOST + b"\r\n", 404),
}  # fmt: skip


@pytest.mark.parametrize("name", WELL_FORMED)
async def test_what_is_odd_and_allowed_is_answered_once(service: Served, name: str) -> None:
    said, status = WELL_FORMED[name]
    assert [answer[0] for answer in await sent(service, said)] == [status]


HOSTILE = {
    "a header of 20 MB": [b"GET / HTTP/1.1\r\n" + HOST + b"X: ", *[b"a" * (1 << 20)] * 20],
    "a hundred thousand headers": [b"GET / HTTP/1.1\r\n" + HOST, *[b"X: y\r\n" * 10_000] * 10, b"\r\n"],
    "a target of 20 MB": [b"GET /", *[b"a" * (1 << 20)] * 20],
    "a method of 20 MB": [*[b"G" * (1 << 20)] * 20],
    "a trailer of 20 MB": [post(CHUNKED, body=b"0\r\nX: "), *[b"a" * (1 << 20)] * 20],
    "an extension of 20 MB": [post(CHUNKED, body=b"1;a="), *[b"a" * (1 << 20)] * 20],
    "a method in small letters": [b"get /livez HTTP/1.1\r\n" + HOST + b"\r\n"],
    "a method with a NUL": [b"GE\x00T /livez HTTP/1.1\r\n" + HOST + b"\r\n"],
    "no method": [b" /livez HTTP/1.1\r\n" + HOST + b"\r\n"],
    "no target": [b"GET HTTP/1.1\r\n" + HOST + b"\r\n"],
    "a target with a space": [b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n"],
    "a target that is an authority": [b"GET a:80 HTTP/1.1\r\n" + HOST + b"\r\n"],
    "a target that is a broken address": [b"GET http://[::1 HTTP/1.1\r\n" + HOST + b"\r\n"],
    "CONNECT": [b"CONNECT a:80 HTTP/1.1\r\n" + HOST + b"\r\n" + SMUGGLED],
    "HTTP/0.9": [b"GET /livez\r\n"],
    "HTTP/1.2": [b"GET /livez HTTP/1.2\r\n" + HOST + b"\r\n"],
    "HTTP/9.9": [b"GET /livez HTTP/9.9\r\n" + HOST + b"\r\n"],
    "HTTP/2's preface": [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"],
    "a TLS hello": [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2],
    "SSH": [b"SSH-2.0-OpenSSH_9.2\r\n"],
    "SMTP": [b"EHLO a.example\r\nMAIL FROM:<a@example.com>\r\n"],
    "a thousand NULs": [b"\x00" * 1000],
    "a header without a name": [b"GET /livez HTTP/1.1\r\n" + HOST + b": x\r\n\r\n"],
    "a header without a colon": [b"GET /livez HTTP/1.1\r\n" + HOST + b"nothing\r\n\r\n"],
    "a header's name with a space": [b"GET /livez HTTP/1.1\r\n" + HOST + b"a b: c\r\n\r\n"],
    "a DEL in a header's name": [b"GET /livez HTTP/1.1\r\n" + HOST + b"a\x7f: c\r\n\r\n"],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
async def test_what_is_no_request_is_refused_and_costs_its_connection(service: Served, name: str) -> None:
    answers = await sent(service, *HOSTILE[name], pause=0.001)
    # A client that goes on sending megabytes may be cut before it reads why.
    assert len(answers) <= 1 or name.startswith(("a trailer", "an extension"))
    assert {status for status, _, _ in answers} <= REFUSED | {401}
    assert "smuggled" not in service.log


async def test_a_star_for_options_is_answered_without_a_fault(service: Served) -> None:
    answers = await sent(service, b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n")
    assert [status for status, _, _ in answers] in ([400], [404], [405])


async def test_noise_gets_no_500_and_no_hang(service: Served) -> None:
    chance = random.Random(20261125)
    pieces = [
        b"GET ",
        b"POST ",
        b"/",
        b" HTTP/1.1\r\n",
        HOST,
        b"\r\n",
        b": ",
        b"Content-Length: ",
        CHUNKED,
        b"0",
        b"\x00",
    ]

    def noise() -> bytes:
        if chance.random() < 0.3:
            return chance.randbytes(chance.randrange(1, 300))
        return b"".join(
            chance.choice(pieces) if chance.random() < 0.85 else chance.randbytes(chance.randrange(1, 6))
            for _ in range(chance.randrange(1, 40))
        )

    for _ in range(10):
        for answers in await asyncio.gather(*(sent(service, noise()) for _ in range(50))):
            assert not {status for status, _, _ in answers} & {500, 502, 504}


async def test_nothing_that_is_sent_becomes_a_header_of_the_answer(service: Served) -> None:
    injected = b"GET /%0d%0aX-Injected:%201?a=%0d%0aX-Injected:%201 HTTP/1.1\r\n" + HOST
    injected += b"X-Request-ID: a%0d%0aX-Injected: 1\r\nOrigin: https://a%0d%0aX-Injected: 1\r\n"
    injected += b"X-Request-ID: b\tX-Injected: 1\r\nConnection: close\r\n\r\n"
    ((status, headers, body),) = await sent(service, injected)
    assert status == 404
    assert "njected" not in repr(headers) + body.decode()


async def test_requests_that_come_at_once_are_answered_in_their_order(service: Served) -> None:
    paths = [
        [b"/livez", b"/nowhere", b"/readyz", b"/v1/tasks"][number % 4] for number in range(MAX_PIPELINED)
    ]
    asked = b"".join(
        b"GET %b HTTP/1.1\r\n%bX-Request-ID: n%d\r\n\r\n" % (path, HOST, n) for n, path in enumerate(paths)
    )
    answers = await sent(service, asked)
    assert [headers["x-request-id"] for _, headers, _ in answers] == [f"n{n}" for n in range(MAX_PIPELINED)]
    assert [status for status, _, _ in answers] == [200, 404, 200, 401] * (MAX_PIPELINED // 4)


async def test_a_pipeline_without_end_is_cut_after_what_was_taken_is_answered(service: Served) -> None:
    answers = await sent(service, LIVEZ * 10_000)
    *answered, last = [status for status, _, _ in answers]
    assert set(answered) == {200}
    assert last == 429
    assert answers[-1][1]["retry-after"]


async def test_a_request_that_comes_byte_by_byte_in_time_is_answered(service: Served) -> None:
    assert [status for status, _, _ in await sent(service, *(bytes([byte]) for byte in LIVEZ))] == [200]


async def test_client_that_expects_100_continue_gets_it_or_an_early_response(service: Served) -> None:
    expecting = (b"Expect: 100-continue", b"Content-Type: application/json", b"Content-Length: 13")
    async with connected(service) as line:
        # An import authenticates before its body is read.
        await line.say(post(*expecting, path=b"/v1/tasks/import"))
        status, headers, _ = await line.answer()
        assert (status, headers["connection"]) == (401, "close")
    async with connected(service) as line:
        await line.say(post(bearer(), *expecting))
        assert await line.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await line.say(b'{"title":"a"}')
        assert (await line.answer())[0] == 201


def bearer() -> bytes:
    token = SigningKeys(seeds(KEY)).mint(uuid4(), None, 3600)
    return f"Authorization: Bearer {token}".encode()


BIG = 100 << 20
MEGABYTE = b"x" * (1 << 20)


@pytest.mark.parametrize("path", [b"/v1/tasks", b"/v1/tasks/batch", b"/v1/tasks/import"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_i7_a_body_of_100_mb_costs_less_than_5_mb(service: Served, path: bytes, framing: str) -> None:
    kind = b"application/x-ndjson" if path.endswith(b"import") else b"application/json"
    length = b"Content-Length: %d" % BIG if framing == "length" else CHUNKED
    head = post(bearer(), b"Content-Type: " + kind, length, path=path)
    chunk = MEGABYTE if framing == "length" else b"100000\r\n" + MEGABYTE + b"\r\n"
    await sent(
        service, head.replace(b"%d" % BIG, b"1"), b"x"
    )  # Whatever is loaded at the first such request.
    (worker,) = psutil.Process(service.pid).children()
    before = worker.memory_info().rss
    Path(f"/proc/{worker.pid}/clear_refs").write_text("5")  # The highest from here on.
    answers = await sent(service, head, *[chunk] * 100, pause=0.001)
    highest = next(
        int(line.split()[1]) << 10
        for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    assert highest - before < 5 << 20
    assert {status for status, _, _ in answers} <= {413}
