"""Row C3 over HTTP: no secret of the settings and none of a user is in any answer of any operation, or in the log.

Every operation is asked in every way that leads somewhere else: with and without a token, well and badly, while the
database is there and when it is gone.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import pytest

import leaks
import surface
from asking import Caller, people
from src.services.signing import new_key
from surface import Asked, Operation, Wire

if TYPE_CHECKING:
    from tests.api.conftest import Log, MakeApp, Serve

SHARED = "zebra-Q7x!vN2#pL9@kT4$wR8%mJ3^hB6&"
PASSWORD = "zebra and nine quiet rivers"


def ways(operation: Operation, caller: Caller) -> list[Asked]:
    token = (b"authorization", caller.headers["authorization"].encode())
    signed = (b"authorization", f"Bearer {SHARED}".encode())
    plain = operation.request([token])
    asked = [operation.request(), plain, operation.request([signed]), operation.request([token, token])]
    for change in (b"", b"{", b'{"title": "\\ud800"}', b'{"password": "%b"}' % PASSWORD.encode()):
        changed = operation.request([token])
        changed.body = change
        asked.append(changed)
    for query in (b"limit=x", b"cursor=x", b"access_token=" + SHARED.encode()[:5]):
        changed = operation.request([token])
        changed.query = query
        asked.append(changed)
    for verb in ("HEAD", "OPTIONS", "TRACE"):
        asked.append(Asked(verb, plain.path, headers=[token]))
    return asked


@pytest.mark.parametrize("environment", ["development", "production"])
async def test_c3_no_operation_says_a_secret_of_the_settings_or_of_a_user(
    make_app: MakeApp, serve: Serve, log: Log, app_database_url: str, database_url: str, environment: str
) -> None:
    key = new_key()
    app = make_app(
        database_url=app_database_url,
        database_migration_url=database_url,
        environment=environment,
        signing_keys=key,
        auth_shared_secret=SHARED,
        auth_shared_issuer="https://app.example.com",
        auth_shared_audience="groundwork",
        sign_up="open",
        login_rate_limit="off",
        cors_origins=["https://app.example.com"],
    )
    secrets = {
        "the database's password": unquote(urlsplit(app_database_url).password or ""),
        "the owner's password": unquote(urlsplit(database_url).password or ""),
        "the signing key": key,
        "the shared secret": SHARED,
        "the user's password": PASSWORD,
    }
    assert all(len(secret) > 10 for secret in secrets.values())
    said: list[bytes] = []
    own: dict[str, str] = {}

    async with people(serve, app) as (ana, _):
        wire = Wire(app)
        account = {"email": f"ana-{uuid4().hex}@example.com", "password": PASSWORD}
        for path in ("/v1/users", "/v1/tokens"):
            made = await ana.client.post(path, json=account)
            assert made.status_code in (200, 201)
            own.update({f"{path} {name}": value for name, value in tokens_in(made.json()).items()})
        assert any("refresh" in name for name in own)

        async def walk() -> None:
            for operation in surface.operations(app):
                for asked in ways(operation, ana.stranger()):
                    answer = await wire.ask(asked)
                    said.append(repr(answer.headers).encode())
                    said.append(answer.body)

        await walk()
        await app.state.database.close()
        await walk()
    everything = b"\n".join(said)
    assert len(said) > 400
    for name, secret in {**secrets, **own}.items():
        assert leaks.found_of(secret, everything) == [], name
        assert leaks.found_of(secret, log.text.encode()) == [], name


def tokens_in(answer: dict[str, Any]) -> dict[str, str]:
    """Every token in an answer that gives some."""
    return {
        name: value for name, value in answer.items() if name.endswith("_token") and isinstance(value, str)
    }


async def test_a_secret_that_an_operation_says_would_be_found(make_app: MakeApp, serve: Serve) -> None:
    app = make_app(auth_shared_secret=SHARED, auth_shared_issuer="https://app.example.com")

    @app.get("/v1/leak")
    async def leak() -> dict[str, str]:
        return {"value": json.dumps(SHARED)}

    async with people(serve, app) as (ana, _):
        (operation,) = [one for one in surface.operations(app) if one.template == "/v1/leak"]
        answers = [await Wire(app).ask(asked) for asked in ways(operation, ana)]
    assert leaks.found_of(SHARED, b"\n".join(answer.body for answer in answers))
