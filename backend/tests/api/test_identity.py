"""Who asks, over HTTP: 401 without a reason and without a connection, and nothing of a token in any log."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid5

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from issuers import Issuer, JwksServer, by_hand, hs256
from src.api.deps import DatabaseDep, PrincipalDep
from src.config.settings import load_settings
from src.errors import ConfigurationError
from src.main import create_app
from src.services.identity import NAMESPACE

if TYPE_CHECKING:
    from tests.api.conftest import Log, MakeApp, Serve

ANA = UUID("018f4e6a-7c11-7bbd-9d0e-3a52cf7d9e10")
CHALLENGE = 'Bearer realm="groundwork"'


def with_routes(app: FastAPI) -> FastAPI:
    """An application with one route that says who asks, and one that needs the database as well."""
    router = APIRouter()

    @router.get("/who")
    async def who(principal: PrincipalDep) -> dict[str, Any]:
        return {"id": str(principal.user_id), "own": principal.own}

    @router.post("/count")
    async def count(principal: PrincipalDep, database: DatabaseDep) -> dict[str, Any]:
        async with database.transaction() as connection:
            return {"found": await connection.fetchval("SELECT count(*) FROM users")}

    app.include_router(router)
    return app


def own(app: FastAPI, seconds: int = 60, email: str | None = "ana@example.com") -> str:
    token: str = app.state.identity.signing.mint(ANA, email, seconds)
    return token


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
async def app(make_app: MakeApp) -> FastAPI:
    return with_routes(make_app(database_pool_size=1, database_pool_timeout_seconds=0.5))


@pytest.fixture
async def asking(app: FastAPI, serve: Serve) -> AsyncIterator[httpx.AsyncClient]:
    async with serve(app) as client:
        yield client


async def test_our_own_token_is_all_it_takes(app: FastAPI, asking: httpx.AsyncClient) -> None:
    answer = await asking.get("/who", headers=bearer(own(app)))
    assert (answer.status_code, answer.json()) == (200, {"id": str(ANA), "own": True})


async def test_a_request_without_a_token_is_asked_for_one(asking: httpx.AsyncClient) -> None:
    for headers in ({}, {"Authorization": ""}, {"Authorization": "Bearer "}):
        answer = await asking.get("/who", headers=headers)
        assert answer.status_code == 401
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["www-authenticate"] == CHALLENGE
        assert answer.json()["type"] == "/problems/unauthenticated"
        assert "cache-control" in answer.headers


async def test_a_bad_token_is_refused_without_saying_why(app: FastAPI, asking: httpx.AsyncClient) -> None:
    good = own(app)
    now = int(time.time())
    bad = [
        "x", "a.b.c", good[:-4] + "AAAA", good + ".x", "x" * 9000,
        by_hand({"alg": "none"}, {"sub": str(ANA), "exp": now + 60}),
        by_hand({"alg": "EdDSA"}, {"iss": "groundwork", "aud": "groundwork", "sub": str(ANA), "exp": now - 3600}),
        by_hand({"alg": "HS256"}, {"sub": str(ANA), "exp": now + 60}, hs256(b"")),
    ]  # fmt: skip
    bodies = set()
    for token in bad:
        answer = await asking.get("/who", headers=bearer(token))
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == f'{CHALLENGE}, error="invalid_token"'
        body = answer.json()
        del body["request_id"]
        bodies.add(json.dumps(body))
    assert len(bodies) == 1


async def test_two_authorization_headers_are_none(app: FastAPI, asking: httpx.AsyncClient) -> None:
    header = ("Authorization", f"Bearer {own(app)}")
    for pair in ([header, header], [("Authorization", "Basic eDp4"), header]):
        assert (await asking.get("/who", headers=pair)).status_code == 401


async def test_a_bad_token_takes_no_connection_also_where_there_is_none(
    app: FastAPI, asking: httpx.AsyncClient
) -> None:
    headers = bearer(own(app))
    assert (await asking.post("/count", headers=headers)).status_code == 200
    taken, enough = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with app.state.database.transaction():
            taken.set()
            await enough.wait()

    holding = asyncio.create_task(hold())
    await taken.wait()  # The pool's only connection is ours now.
    assert (await asking.post("/count", headers=headers)).status_code == 503
    refused = [asking.post("/count", headers=bearer(f"{n}.b.c")) for n in range(50)]
    answers = await asyncio.wait_for(asyncio.gather(*refused, asking.post("/count")), 60)
    assert {answer.status_code for answer in answers} == {401}
    assert app.state.database.observe().pool.waiting == 0
    assert (await asking.get("/who", headers=headers)).status_code == 200
    enough.set()
    await holding
    assert (await asking.post("/count", headers=headers)).status_code == 200


async def test_nothing_of_a_token_is_ever_logged(make_app: MakeApp, serve: Serve, log: Log) -> None:
    issuer = Issuer()
    secret = secrets.token_urlsafe(32)
    with JwksServer(issuer.jwks) as server:
        app = with_routes(
            make_app(auth_issuers=json.dumps([server.entry(issuer)]), auth_shared_secret=secret)
        )
        canary = {"sub": "canary-sub", "email": "canary@example.com", "name": "canary-name"}
        sent = [
            issuer.token(**canary), issuer.token(**canary, exp=1), issuer.token(**canary, aud="canary-aud"),
            issuer.token(**canary, iss="canary-iss"), issuer.token(**canary)[:-20] + "canary" + issuer.token()[-14:],
            by_hand({"alg": "canary-alg", "kid": "canary-kid"}, issuer.claims(**canary)),
            by_hand({"alg": "EdDSA", "kid": "canary-kid"}, issuer.claims(**canary)),
            by_hand({"alg": "HS256", "typ": "canary"}, {**canary, "exp": 1}, hs256(secret.encode())),
            "canary", "canary.canary.canary",
        ]  # fmt: skip
        async with serve(app) as client:
            statuses = [(await client.get("/who", headers=bearer(each))).status_code for each in sent]
            server.answer = lambda handler: handler.send_error(500, "canary")
            statuses.append((await client.get("/who", headers=bearer(sent[6]))).status_code)
            sent.append(own(app))
            assert (await client.get("/who", headers=bearer(sent[-1]))).status_code == 200
    assert statuses == [200, *[401] * 9, 503]
    for part in {piece for each in sent for piece in each.split(".") if len(piece) > 5}:
        assert part not in log.text
    assert "canary" not in log.text
    assert secret not in log.text
    # The operator still learns why, in words of ours.
    reasons = {line.get("reason") for line in log.requests}
    assert {"expired", "wrong-audience", "bad-signature", "malformed", "unknown-key"} <= reasons


async def test_tokens_of_an_issuer_and_of_a_shared_secret_are_taken_as_configured(
    make_app: MakeApp, serve: Serve
) -> None:
    issuer = Issuer(first="ES256")
    secret = secrets.token_urlsafe(32)
    with JwksServer(issuer.jwks) as server:
        app = with_routes(
            make_app(auth_issuers=json.dumps([server.entry(issuer)]), auth_shared_secret=secret)
        )
        async with serve(app) as client:
            theirs = await client.get("/who", headers=bearer(issuer.token(sub="ana")))
            assert theirs.json() == {"id": str(uuid5(uuid5(NAMESPACE, issuer.name), "ana")), "own": False}
            claims = {"sub": "ana", "exp": int(time.time()) + 60}
            shared = await client.get(
                "/who", headers=bearer(by_hand({"alg": "HS256"}, claims, hs256(secret.encode())))
            )
            assert shared.json() == {"id": str(uuid5(uuid5(NAMESPACE, ""), "ana")), "own": False}
            issuer.rotate("second", "RS256")
            answers = [client.get("/who", headers=bearer(issuer.token(sub=str(n)))) for n in range(20)]
            assert {answer.status_code for answer in await asyncio.gather(*answers)} == {200}


async def test_while_an_issuer_is_down_its_users_are_asked_to_come_again(
    make_app: MakeApp, serve: Serve
) -> None:
    issuer = Issuer()
    entry = {"issuer": issuer.name, "jwks_url": "http://127.0.0.1:1/", "audience": issuer.audience}
    app = with_routes(make_app(auth_issuers=json.dumps([entry])))
    async with serve(app) as client:
        answer = await client.get("/who", headers=bearer(issuer.token()))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "20")
        assert answer.json()["type"] == "/problems/unavailable"
        assert "www-authenticate" not in answer.headers
        assert (await client.get("/who", headers=bearer(own(app)))).status_code == 200


async def test_production_does_not_start_without_a_key_of_its_own(
    database_url: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SIGNING_KEYS")
    app = create_app(load_settings(database_url=database_url, environment="production"))
    with pytest.raises(ConfigurationError) as caught:
        async with serve(app):
            pass
    assert [fault.variable for fault in caught.value.faults] == ["SIGNING_KEYS"]


def test_openapi_says_how_to_prove_who_one_is(make_app: MakeApp) -> None:
    document = with_routes(make_app()).openapi()
    scheme = document["components"]["securitySchemes"]["bearer"]
    assert (scheme["type"], scheme["scheme"], scheme["bearerFormat"]) == ("http", "bearer", "JWT")
    assert document["paths"]["/who"]["get"]["security"] == [{"bearer": []}]
    assert "parameters" not in document["paths"]["/who"]["get"]
    assert not document["paths"]["/health"]["get"].get("security")
