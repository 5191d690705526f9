"""Scripts of other pages read answers only where the operator named their page, and never with cookies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

if TYPE_CHECKING:
    from tests.api.conftest import MakeApp, Person, Serve

OURS, FOREIGN = "https://app.example.com", "https://evil.example.com"
ASK = {"access-control-request-method": "PATCH", "access-control-request-headers": "authorization,if-match"}
PATHS = ("/v1/tasks", "/livez", "/nope")


def sharing(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


async def test_without_configured_origins_nobodys_scripts_may_read_anything(
    client: httpx.AsyncClient,
) -> None:
    for origin in (OURS, "null", "http://test"):
        for path in PATHS:
            assert sharing(await client.get(path, headers={"origin": origin})) == {}
            answer = await client.options(path, headers={"origin": origin, **ASK})
            assert (answer.status_code in (404, 405), sharing(answer)) == (True, {})
            assert "vary" not in answer.headers


async def test_a_configured_origin_may_read_every_answer_and_no_other_may(
    make_app: MakeApp, serve: Serve, somebody: type[Person]
) -> None:
    async with serve(make_app(cors_origins=f"{OURS},http://localhost:5173")) as client:
        ana = somebody(client)
        for path in PATHS:
            answer = await ana.ask("GET", path, headers={"origin": OURS})
            shared = sharing(answer)
            assert shared.pop("access-control-allow-origin") == OURS
            assert "etag" in shared.pop("access-control-expose-headers")
            assert shared == {}
            assert "origin" in answer.headers.get_list("vary", split_commas=True)
            for other in (
                FOREIGN,
                "null",
                OURS + ".evil.example.com",
                OURS.upper(),
                "http://app.example.com",
                "",
            ):
                answer = await client.get(path, headers={"origin": other})
                assert sharing(answer) == {}
                assert "origin" in answer.headers.get_list("vary", split_commas=True)
            answer = await client.get(path)
            assert sharing(answer) == {}
            assert "origin" in answer.headers.get_list("vary", split_commas=True)
        too_large = await ana.ask("POST", "/v1/tasks", content=b" " * 70_000, headers={"origin": OURS})
        assert (too_large.status_code, sharing(too_large)["access-control-allow-origin"]) == (413, OURS)


async def test_a_browser_that_asks_first_is_told_what_is_permitted(make_app: MakeApp, serve: Serve) -> None:
    async with serve(make_app(cors_origins=OURS)) as client:
        answer = await client.options("/v1/tasks", headers={"origin": OURS, **ASK})
        assert (answer.status_code, answer.content) == (204, b"")
        permitted = sharing(answer)
        assert permitted["access-control-allow-origin"] == OURS
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            assert method in permitted["access-control-allow-methods"].split(", ")
        for header in ("authorization", "content-type", "if-match", "if-none-match", "idempotency-key"):
            assert header in permitted["access-control-allow-headers"].split(", ")
        assert "access-control-allow-credentials" not in permitted
        for headers in ({"origin": FOREIGN, **ASK}, {"origin": OURS}, ASK):
            answer = await client.options("/v1/tasks", headers=headers)
            assert answer.status_code == 405
            assert "access-control-allow-methods" not in answer.headers


@pytest.mark.parametrize("origin", [OURS, FOREIGN, "null"])
async def test_every_page_may_be_let_in_but_never_with_credentials(
    make_app: MakeApp, serve: Serve, origin: str
) -> None:
    async with serve(make_app(cors_origins="*")) as client:
        for answer in (
            await client.get("/livez", headers={"origin": origin}),
            await client.options("/v1/tasks", headers={"origin": origin, **ASK}),
        ):
            assert answer.headers["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in answer.headers
