"""What happens around every request: its id, the bound of its body, its log line, and how it may fail."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import structlog
from fastapi import APIRouter, FastAPI, Request
from starlette.responses import Response, StreamingResponse

from src.api.deps import RepeatDep
from src.errors import Unavailable
from waiting import eventually

if TYPE_CHECKING:
    from tests.api.conftest import Log, MakeApp, Person, Serve

LIMIT = 2048


def with_routes(app: FastAPI) -> FastAPI:
    router = APIRouter()

    @router.post("/echo/{number}")
    async def echo(number: int, request: Request) -> int:
        return len(await request.body())

    @router.get("/boom")
    async def boom() -> None:
        raise KeyError("boom")

    @router.get("/half")
    async def half() -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"half"
            raise KeyError("boom")

        return StreamingResponse(parts())

    @router.api_route("/slow", methods=["GET", "POST"], operation_id="slow", include_in_schema=False)
    async def slow(request: Request) -> None:
        request.app.state.inside += 1
        await asyncio.sleep(60)

    @router.get("/until")
    async def until(request: Request) -> str:
        request.app.state.inside += 1
        await request.app.state.gate.wait()
        return "through"

    @router.post("/slow/kept")
    async def kept(repeat: RepeatDep, request: Request) -> None:
        request.app.state.inside += 1
        await asyncio.sleep(60)

    @router.get("/away")
    async def away() -> None:
        raise Unavailable("connection-refused")

    app.include_router(router, prefix="/v1")
    app.state.inside = 0  # How many requests have come as far as those that stay.
    return app


@pytest.fixture
async def client(make_app: MakeApp, serve: Serve) -> Any:
    async with serve(with_routes(make_app(max_body_bytes=LIMIT))) as opened:
        yield opened


async def call(
    app: FastAPI, method: str, path: str, chunks: list[bytes], *headers: tuple[bytes, bytes]
) -> Any:
    """Speaks ASGI with the application: the messages it sent, and how many chunks of the body it took."""
    sent: list[dict[str, Any]] = []
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        if not left:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": list(headers),
        "server": ("test", 80),
        "client": ("test", 1),
    }
    await app(scope, receive, send)
    return sent, len(chunks) - len(left)


@pytest.mark.parametrize("given", ["a", "A-b_c.d:e=f/g+h", "0199f0c2-77aa-7bbb-8ccc-0123456789ab", "x" * 128])
async def test_a_sane_request_id_is_kept(client: httpx.AsyncClient, log: Log, given: str) -> None:
    answer = await client.get("/nope", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == given
    assert answer.json()["request_id"] == given
    assert [line["request_id"] for line in log.requests] == [given]


@pytest.mark.parametrize(
    "given", [b"", b"x" * 129, b"a b", b"<script>", b"\x1b[31m", "é".encode(), b"a,b", b"{}"]
)
async def test_any_other_request_id_is_replaced(client: httpx.AsyncClient, given: bytes) -> None:
    answer = await client.get("/livez", headers={"x-request-id": given})
    assert re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]+", answer.headers["x-request-id"])


async def test_request_ids_are_unique_also_between_processes(make_app: MakeApp, serve: Serve) -> None:
    seen = []
    for _ in range(2):
        async with serve(make_app()) as client:
            seen += [(await client.get("/livez")).headers["x-request-id"] for _ in range(20)]
    assert len(set(seen)) == 40


async def test_every_answer_forbids_content_sniffing(client: httpx.AsyncClient) -> None:
    for path in ("/livez", "/nope", "/docs", "/v1/boom"):
        assert (await client.get(path)).headers["x-content-type-options"] == "nosniff"


async def test_a_body_up_to_the_limit_is_taken(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/echo/1", content=b"x" * LIMIT)
    assert (answer.status_code, answer.json()) == (200, LIMIT)


async def test_an_announced_body_over_the_limit_is_refused_before_any_of_it_is_read(
    make_app: MakeApp, serve: Serve
) -> None:
    app = with_routes(make_app(max_body_bytes=LIMIT))
    async with serve(app):
        for length in (b"2049", b"9" * 4000):
            sent, taken = await call(app, "POST", "/v1/echo/1", [b"x" * 4096], (b"content-length", length))
            assert sent[0]["status"] == 413
            headers = dict(sent[0]["headers"])
            assert headers[b"content-type"] == b"application/problem+json"
            assert headers[b"connection"] == b"close"
            assert json.loads(sent[1]["body"])["type"] == "/problems/too-large"
            assert taken == 0


async def test_a_chunked_body_is_refused_as_soon_as_it_passes_the_limit(
    make_app: MakeApp, serve: Serve
) -> None:
    app = with_routes(make_app(max_body_bytes=LIMIT))
    async with serve(app):
        sent, taken = await call(app, "POST", "/v1/echo/1", [b"x" * 1000] * 50)
    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["type"] == "/problems/too-large"
    assert taken == 3


async def test_one_log_line_a_request_with_facts_and_nothing_of_the_request(
    client: httpx.AsyncClient, log: Log
) -> None:
    await client.post(
        "/v1/echo/471147114711?token=hunter2", content=b"body-canary", headers={"authorization": "Bearer t0p"}
    )
    (line,) = log.requests
    assert line["level"] == "info"
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/echo/{number}", 200)
    assert isinstance(line["duration_ms"], float)
    assert line["request_id"]
    for secret in ("hunter2", "471147114711", "body-canary", "t0p"):
        assert secret not in json.dumps(line)


async def test_probes_are_logged_at_debug_level(client: httpx.AsyncClient, log: Log) -> None:
    for path in ("/livez", "/readyz", "/health", "/metrics"):
        await client.get(path)
    assert [line["level"] for line in log.requests] == ["debug"] * 4


async def test_odd_paths_methods_and_agents_leave_one_clean_line(
    make_app: MakeApp, serve: Serve, log: Log
) -> None:
    app = make_app()
    async with serve(app):
        odd = "\r\nfake: line \x1b[31m"
        sent, _ = await call(app, odd, f"/{odd}", [b""], (b"user-agent", odd.encode()))
    assert sent[0]["status"] == 404
    (line,) = log.requests
    assert (line["method"], line["route"]) == ("OTHER", "unmatched")
    assert "fake" not in log.text


async def test_the_log_says_which_problem_and_why(client: httpx.AsyncClient, log: Log) -> None:
    await client.get("/v1/away")
    (line,) = log.requests
    assert (line["status"], line["problem"], line["reason"]) == (503, "unavailable", "connection-refused")
    assert (line["level"], line["severity"]) == ("warning", "WARNING")


async def test_request_lines_hold_the_address_and_the_user(
    client: httpx.AsyncClient, log: Log, ana: Person
) -> None:
    await client.get("/v1/tasks")
    await ana.ask("GET", "/v1/tasks")
    anonymous, known = log.requests
    assert (anonymous["client"], "user_id" in anonymous) == ("127.0.0.1", False)
    assert (known["client"], known["user_id"]) == ("127.0.0.1", str(ana.id))


async def test_an_answer_that_breaks_off_is_left_unfinished_and_logged_once(
    make_app: MakeApp, serve: Serve, log: Log
) -> None:
    app = with_routes(make_app())
    async with serve(app):
        sent, _ = await call(app, "GET", "/v1/half", [b""])
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[-1]["more_body"] is True
    (line,) = log.requests
    assert (line["level"], line["status"]) == ("error", 200)
    assert "KeyError" in line["exception"]


@pytest.mark.parametrize(
    ("method", "path", "key", "status", "slug", "again"),
    [
        ("GET", "/v1/slow", "k", 503, "unavailable", True),
        ("POST", "/v1/slow", "k", 504, "outcome-unknown", False),
        ("POST", "/v1/slow/kept", "", 504, "outcome-unknown", False),
        ("POST", "/v1/slow/kept", "k", 504, "outcome-unknown", True),
    ],
)
async def test_a_request_cut_off_by_the_server_says_whether_it_may_have_written_and_may_be_repeated(
    make_app: MakeApp,
    serve: Serve,
    log: Log,
    method: str,
    path: str,
    key: str,
    status: int,
    slug: str,
    again: bool,
) -> None:
    app = with_routes(make_app())
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"idempotency-key", key.encode())] if key else []
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}
    async with serve(app):
        request = asyncio.create_task(app(scope, receive, send))
        await eventually(lambda: app.state.inside == 1)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
    assert sent[0]["status"] == status
    assert (b"retry-after" in dict(sent[0]["headers"])) == again
    assert json.loads(sent[1]["body"])["type"] == f"/problems/{slug}"
    (line,) = log.requests
    assert line["cancelled"] is True


async def test_the_request_id_of_one_request_is_in_no_other_line(client: httpx.AsyncClient, log: Log) -> None:
    names = [f"request-{n}" for n in range(20)]
    await asyncio.gather(*(client.get("/nope", headers={"x-request-id": name}) for name in names))
    assert sorted(line["request_id"] for line in log.requests) == sorted(names)


async def test_a_request_leaves_nothing_behind_in_the_context(make_app: MakeApp, serve: Serve) -> None:
    app = make_app()
    async with serve(app):
        await call(app, "GET", "/nope", [b""])
        assert structlog.contextvars.get_contextvars() == {}
