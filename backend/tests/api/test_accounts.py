"""Accounts of our own over HTTP: what an application without an identity provider does all day, and what it may not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import asyncpg
import jwt
import pytest
from fastapi import FastAPI

from accounting import EMAIL, ME, OTHER, PASSWORD, REFRESH, REVOKE, TOKENS, USERS, Visitor, member, running
from asking import TASKS, problem

if TYPE_CHECKING:
    from tests.api.conftest import Log, MakeApp


@pytest.fixture
async def app(make_app: MakeApp, app_database_url: str, database_url: str) -> AsyncIterator[FastAPI]:
    made = make_app(database_url=app_database_url, database_migration_url=database_url)
    async with running(made):
        yield made


@pytest.fixture
async def owner(database_url: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def test_an_account_signs_up_logs_in_works_goes_on_and_ends(app: FastAPI) -> None:
    ana = Visitor(app)
    made = await ana.sign_up()
    assert made.headers["location"] == ME
    assert made.headers["cache-control"] == "no-store"
    granted = (await ana.log_in()).json()
    assert granted["token_type"] == "Bearer"
    assert granted["expires_in"] == 300
    assert granted.keys() == {"access_token", "token_type", "expires_in", "refresh_token"}
    assert (await ana.ask("GET", ME, 200)).json() == made.json()
    task = (await ana.ask("POST", TASKS, 201, json={"title": "Learn"})).json()
    assert task["user_id"] == made.json()["id"]
    first = ana.refresh_token
    await ana.refresh()
    assert ana.refresh_token != first
    assert (await ana.ask("GET", f"{TASKS}/{task['id']}", 200)).json() == task
    await ana.ask("DELETE", ME, 204)
    assert problem(await ana.log_in(401)) == "log-in-failed"
    await ana.refresh(401)
    await ana.ask("POST", TASKS, 401, json={"title": "again"})


async def test_an_access_token_ends_after_minutes_and_says_whose_it_is_and_of_which_epoch(
    app: FastAPI,
) -> None:
    ana = await member(app)
    claims = jwt.decode(ana.access, options={"verify_signature": False})
    assert claims["exp"] - claims["iat"] == 300
    assert claims["epoch"] == 0
    assert claims["email"] == EMAIL


async def test_the_published_keys_verify_our_tokens_elsewhere(app: FastAPI) -> None:
    ana = await member(app)
    answer = await ana.ask("GET", "/.well-known/jwks.json", 200, token="")
    keys = jwt.PyJWKSet.from_dict(answer.json())
    kid = jwt.get_unverified_header(ana.access)["kid"]
    claims = jwt.decode(
        ana.access, keys[kid].key, algorithms=["EdDSA"], audience="groundwork", issuer="groundwork"
    )
    # Nobody has proven that it is theirs.
    assert (claims["email"], claims["email_verified"]) == (EMAIL, False)
    assert "d" not in answer.json()["keys"][0]


async def test_two_keys_are_published_while_they_are_rotated(make_app: MakeApp) -> None:
    from src.services.signing import new_key

    async with running(make_app(signing_keys=f"{new_key()},{new_key()}")) as app:
        answer = await Visitor(app).ask("GET", "/.well-known/jwks.json", 200, token="")
        kids = [key["kid"] for key in answer.json()["keys"]]
        assert len(set(kids)) == 2
        assert jwt.get_unverified_header((await member(app)).access)["kid"] == kids[0]


async def test_x1_of_50_sign_ups_with_one_address_one_is_201_and_49_are_409(
    make_app: MakeApp, app_database_url: str, owner: asyncpg.Connection[Any]
) -> None:
    settings = {"sign_up_rate_limit": "off", "password_hash_queue": 100}
    async with running(make_app(database_url=app_database_url, **settings)) as app:
        answers = await asyncio.gather(
            *(Visitor(app, f"192.0.2.{n}").ask("POST", USERS, token="", json={
                "email": "Ana@Example.com" if n % 2 else EMAIL, "password": PASSWORD
            }) for n in range(50))
        )  # fmt: skip
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 49
    assert {answer.json()["constraint"] for answer in answers if answer.status_code == 409} == {
        "uq_users_email"
    }
    assert await owner.fetchval("SELECT count(*) FROM users") == 1
    assert await owner.fetchval("SELECT count(*) FROM credentials") == 1


# What ends a token


WRITES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", TASKS, {"json": {"title": "a"}}),
    ("POST", TASKS, {"json": {"title": "a"}, "headers": {"idempotency-key": "k"}}),
    ("PATCH", f"{TASKS}/{{id}}", {"json": {"title": "b"}}),
    ("PATCH", f"{TASKS}/{{id}}", {"json": {"title": "b"}, "headers": {"if-match": "*"}}),
    ("PUT", f"{TASKS}/{{id}}", {"json": {"title": "c"}}),
    ("PUT", f"{TASKS}/{{id}}", {"json": {"title": "c"}, "headers": {"if-match": "*"}}),
    ("PUT", f"{TASKS}/{{new}}", {"json": {"title": "c"}, "headers": {"if-none-match": "*"}}),
    ("DELETE", f"{TASKS}/{{id}}", {}),
    ("DELETE", f"{TASKS}/{{id}}", {"headers": {"if-match": "*"}}),
    ("POST", f"{TASKS}/batch", {"json": {"operations": [{"op": "create", "task": {"title": "d"}}]}}),
    (
        "POST",
        f"{TASKS}/import",
        {"content": b'{"title": "e"}\n', "headers": {"content-type": "application/x-ndjson"}},
    ),
    ("DELETE", TOKENS, {}),
    ("PATCH", ME, {"json": {"current_password": PASSWORD, "email": "other@example.com"}}),
    ("DELETE", ME, {}),
]


def test_every_operation_that_writes_and_asks_for_a_token_is_held_to_it(make_app: MakeApp) -> None:
    paths = make_app().openapi()["paths"]
    writing = {
        (verb.upper(), path.replace("{task_id}", "{id}"))
        for path, item in paths.items()
        for verb, operation in item.items()
        if verb != "get" and operation.get("security")
    }
    assert {(method, path.replace("{new}", "{id}")) for method, path, _ in WRITES} == writing


async def revoked(app: FastAPI, owner: asyncpg.Connection[Any], ana: Visitor, how: str) -> str:
    """Ends what `ana` holds, and gives what is then said of a write."""
    match how:
        case "password":
            await ana.ask("PATCH", ME, 200, json={"current_password": PASSWORD, "password": OTHER})
            return "The token was revoked. Log in again."
        case "everywhere":
            await ana.ask("DELETE", TOKENS, 204)
            return "The token was revoked. Log in again."
        case "deleted":
            await ana.ask("DELETE", ME, 204)
            return "The account was deleted."
        case _:
            await owner.execute("UPDATE users SET disabled_at = now()")
            return "The account is disabled."


@pytest.mark.parametrize("how", ["password", "everywhere", "deleted", "disabled"])
async def test_a3_what_was_revoked_writes_nothing_from_that_moment_on(
    app: FastAPI, owner: asyncpg.Connection[Any], how: str
) -> None:
    ana = await member(app)
    task = (await ana.ask("POST", TASKS, 201, json={"title": "before"})).json()
    said = await revoked(app, owner, ana, how)
    before = await owner.fetch("SELECT t::text FROM tasks t")
    people = await owner.fetch("SELECT u::text FROM users u")
    for method, path, sent in WRITES:
        answer = await ana.ask(method, path.format(id=task["id"], new=uuid4()), **sent)
        assert answer.status_code == 401, (method, path, answer.text)
        assert answer.json()["detail"] == said, (method, path)
    assert await owner.fetch("SELECT t::text FROM tasks t") == before
    assert await owner.fetch("SELECT u::text FROM users u") == people
    assert await owner.fetchval("SELECT count(*) FROM idempotency_keys") == 0
    # Reading ends with the token itself, and goes on until then for whoever is still there.
    status = 404 if how == "deleted" else 200
    await ana.ask("GET", f"{TASKS}/{task['id']}", status)


@pytest.mark.parametrize("how", ["password", "everywhere", "deleted", "disabled"])
async def test_a3_no_session_survives_what_ends_them_all(
    app: FastAPI, owner: asyncpg.Connection[Any], how: str
) -> None:
    ana, phone = await member(app), Visitor(app, "192.0.2.7")
    await phone.log_in()
    await revoked(app, owner, ana, how)
    for device in (ana, phone):
        assert (await device.refresh(401)).json()["detail"].startswith("The refresh token")


async def test_a3_a_session_that_opens_while_the_password_changes_does_not_outlive_it(
    app: FastAPI, owner: asyncpg.Connection[Any]
) -> None:
    """Log-ins with the old password race with the change; whichever came first, none is left afterwards."""
    ana = await member(app)
    late = [Visitor(app, f"192.0.2.{n}") for n in range(20, 26)]
    change = {"current_password": PASSWORD, "password": OTHER}
    await asyncio.gather(
        *(
            visitor.ask("POST", TOKENS, token="", json={"email": EMAIL, "password": PASSWORD})
            for visitor in late
        ),
        ana.ask("PATCH", ME, 200, json=change),
    )
    assert await owner.fetchval("SELECT count(*) FROM sessions") == 0
    await late[0].log_in(401)
    await late[0].log_in(password=OTHER)
    await late[0].ask("POST", TASKS, 201, json={"title": "new epoch"})


async def test_after_a_new_password_the_old_one_opens_nothing(app: FastAPI) -> None:
    ana = await member(app)
    await ana.ask("PATCH", ME, 200, json={"current_password": PASSWORD, "password": OTHER})
    await ana.log_in(401)
    await ana.log_in(password=OTHER)
    await ana.ask("POST", TASKS, 201, json={"title": "b"})


async def test_a_changed_address_is_the_one_to_log_in_with_and_tokens_stay_good(app: FastAPI) -> None:
    ana = await member(app)
    changed = await ana.ask("PATCH", ME, 200, json={"current_password": PASSWORD, "email": "New@Example.com"})
    assert changed.json()["email"] == "new@example.com"
    await ana.ask("POST", TASKS, 201, json={"title": "still me"})
    await ana.log_in(401)
    await ana.log_in(email="new@example.com")
    await ana.refresh()


async def test_an_address_that_another_has_is_409_and_changes_nothing(app: FastAPI) -> None:
    ana = await member(app)
    await member(app, "192.0.2.2", "ben@example.com")
    change = {"current_password": PASSWORD, "email": "ben@example.com", "password": OTHER}
    assert (await ana.ask("PATCH", ME, 409, json=change)).json()["constraint"] == "uq_users_email"
    await ana.log_in()
    await ana.ask("POST", TASKS, 201, json={"title": "a"})


@pytest.mark.parametrize(
    "change", [{}, {"email": None}, {"password": None}, {"email": "x"}, {"password": "short"}, {"id": 1}]
)
async def test_a_change_of_nothing_or_to_nothing_is_422(app: FastAPI, change: dict[str, Any]) -> None:
    ana = await member(app)
    await ana.ask("PATCH", ME, 422, json={"current_password": PASSWORD, **change})


async def test_a_wrong_current_password_is_403_and_so_is_any_of_an_account_without_one(
    app: FastAPI, owner: asyncpg.Connection[Any]
) -> None:
    ana = await member(app)
    change = {"current_password": OTHER, "email": "new@example.com"}
    assert problem(await ana.ask("PATCH", ME, 403, json=change)) == "wrong-password"
    await owner.execute("DELETE FROM credentials")
    assert problem(await ana.ask("PATCH", ME, 403, json=change)) == "wrong-password"
    assert (await ana.ask("GET", ME, 200)).json()["email"] == EMAIL


# Refresh tokens


async def test_a_refresh_token_that_comes_again_ends_its_session_and_no_other(
    app: FastAPI, owner: asyncpg.Connection[Any]
) -> None:
    ana, phone = await member(app), Visitor(app, "192.0.2.7")
    await phone.log_in()
    stolen = ana.refresh_token
    await ana.refresh()
    newest = ana.refresh_token
    await ana.refresh(401, stolen)
    await ana.refresh(401, newest)
    assert await owner.fetchval("SELECT count(*) FROM sessions") == 1
    await phone.refresh()


async def test_of_two_exchanges_of_one_token_at_once_one_succeeds_and_the_session_ends(
    app: FastAPI, owner: asyncpg.Connection[Any]
) -> None:
    ana = await member(app)
    given = {"refresh_token": ana.refresh_token}
    answers = await asyncio.gather(*(ana.ask("POST", REFRESH, token="", json=given) for _ in range(2)))
    assert sorted(answer.status_code for answer in answers) == [200, 401]
    assert await owner.fetchval("SELECT count(*) FROM sessions") == 0


async def test_an_exchange_whose_answer_was_lost_is_asked_for_again_by_its_key(app: FastAPI) -> None:
    ana = await member(app)
    first = ana.refresh_token
    lost = (await ana.refresh(key="exchange-1")).json()["refresh_token"]
    # However often, and however late the first one arrives: it is the same token, and not a new one for each.
    answers = await asyncio.gather(
        *(ana.ask("POST", REFRESH, 200, token="", json={"refresh_token": first},
                  headers={"idempotency-key": "exchange-1"}) for _ in range(8))
    )  # fmt: skip
    assert {answer.json()["refresh_token"] for answer in answers} == {lost}
    await ana.refresh(200, lost, key="exchange-2")
    # It was good for one exchange, as every other.
    await ana.refresh(401, lost)


@pytest.mark.parametrize("key", [None, "another"])
async def test_a_used_token_with_another_key_or_none_ends_the_session(app: FastAPI, key: str | None) -> None:
    ana = await member(app)
    first = ana.refresh_token
    await ana.refresh(key="exchange-1")
    newest = ana.refresh_token
    assert problem(await ana.refresh(401, first, key=key)) == "unauthenticated"
    assert problem(await ana.refresh(401, newest, key="exchange-2")) == "unauthenticated"


async def test_a_guessed_secret_of_a_session_ends_it(app: FastAPI) -> None:
    """Whoever knows the session knows it from a token."""
    from src.services.accounts import _Ticket

    ana = await member(app)
    held = _Ticket.read(ana.refresh_token)
    assert held is not None
    await ana.refresh(401, _Ticket.new(held.session).text)
    await ana.refresh(401)


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "gwr_",
        "gwr_AAAA",
        "gwr_" + "A" * 64,
        "gwr_" + "A" * 63 + "B",
        "gwr_" + "é" * 64,
        "GWR_" + "A" * 64,
    ],
)
async def test_what_is_no_refresh_token_is_401(app: FastAPI, token: str) -> None:
    await Visitor(app).refresh(401, token)
    await Visitor(app).ask("POST", REVOKE, 204, token="", json={"refresh_token": token})


async def test_an_access_token_is_no_refresh_token_nor_the_other_way_round(app: FastAPI) -> None:
    ana = await member(app)
    assert problem(await ana.ask("POST", REFRESH, token="", json={"refresh_token": ana.access})) in (
        "unauthenticated",
        "invalid",
    )
    await ana.ask("GET", TASKS, 401, token=ana.refresh_token)


async def test_logging_out_ends_this_session_only_and_may_be_said_twice(app: FastAPI) -> None:
    ana, phone = await member(app), Visitor(app, "192.0.2.7")
    await phone.log_in()
    for _ in range(2):
        await ana.ask("POST", REVOKE, 204, token="", json={"refresh_token": ana.refresh_token})
    await ana.refresh(401)
    await phone.refresh()


async def test_an_expired_session_is_over_and_is_swept(app: FastAPI, owner: asyncpg.Connection[Any]) -> None:
    from src.services import accounts

    ana = await member(app)
    await owner.execute("UPDATE sessions SET expires_at = now() - interval '1 second'")
    await ana.refresh(401)
    assert await accounts.sweep(owner) == 1
    assert await owner.fetchval("SELECT count(*) FROM sessions") == 0


async def test_a_session_lives_no_longer_than_its_bound_however_often_it_is_refreshed(
    make_app: MakeApp, owner: asyncpg.Connection[Any]
) -> None:
    async with running(make_app(session_idle_days=2, session_max_days=5)) as app:
        ana = await member(app)
        row = await owner.fetchrow(
            "SELECT expires_at - opened_at AS idle, ends_at - opened_at AS most FROM sessions"
        )
        assert row is not None
        assert (row["idle"].days, row["most"].days) == (2, 5)
        await owner.execute("UPDATE sessions SET ends_at = now() + interval '1 day'")
        await ana.refresh()
        assert await owner.fetchval("SELECT expires_at = ends_at FROM sessions")


async def test_an_account_has_a_hundred_sessions_at_most_and_the_longest_unused_goes(
    make_app: MakeApp, owner: asyncpg.Connection[Any]
) -> None:
    async with running(make_app(login_rate_limit="off", login_address_rate_limit="off")) as app:
        ana = await member(app)
        await owner.execute(
            "INSERT INTO sessions (id, user_id, current_hash, refreshed_at, expires_at, ends_at)"
            " SELECT gen_random_uuid(), user_id, current_hash, now() - n * interval '1 minute', expires_at, ends_at"
            " FROM sessions, generate_series(1, 99) n"
        )
        oldest = await owner.fetchval("SELECT id FROM sessions ORDER BY refreshed_at LIMIT 1")
        await ana.log_in()
        assert await owner.fetchval("SELECT count(*) FROM sessions") == 100
        assert not await owner.fetchval("SELECT EXISTS (SELECT FROM sessions WHERE id = $1)", oldest)


# Who may sign up


async def test_where_signing_up_is_closed_it_is_403_and_logging_in_goes_on(
    make_app: MakeApp, owner: asyncpg.Connection[Any]
) -> None:
    async with running(make_app()) as app:
        await member(app)
    async with running(make_app(sign_up="closed")) as app:
        ben = Visitor(app, email="ben@example.com")
        assert problem(await ben.sign_up(403)) == "sign-up-closed"
        await Visitor(app).log_in()
    assert await owner.fetchval("SELECT count(*) FROM users") == 1


async def test_where_another_issuer_is_trusted_signing_up_is_closed_unless_it_is_opened(
    make_app: MakeApp,
) -> None:
    shared = {"auth_shared_secret": token_urlsafe(32), "auth_shared_issuer": "https://app.example.com"}
    for sign_up, status in (("auto", 403), ("open", 201)):
        async with running(make_app(**shared, sign_up=sign_up)) as app:
            await Visitor(app, email=f"{sign_up}@example.com").sign_up(status)


# What is said of it


async def test_the_log_tells_what_happened_by_id_and_never_by_address_token_or_password(
    make_app: MakeApp, log: Log
) -> None:
    async with running(make_app()) as app:
        ana = Visitor(app, email="canary.address@example.com")
        user_id = (await ana.sign_up()).json()["id"]
        await ana.sign_up(409)
        await ana.log_in()
        spent, access = ana.refresh_token, ana.access
        await ana.log_in(401, OTHER)
        await ana.log_in(401, email="nobody.canary@example.com")
        await ana.refresh()
        await ana.refresh(401, spent)
        await ana.log_in()
        await ana.ask("PATCH", ME, 403, json={"current_password": OTHER, "email": "canary.two@example.com"})
        await ana.ask("PATCH", ME, 200, json={"current_password": PASSWORD, "password": OTHER})
        await ana.log_in(200, OTHER)
        last = ana.refresh_token
        await ana.ask("POST", REVOKE, 204, token="", json={"refresh_token": last})
        await ana.log_in(200, OTHER)
        await ana.ask("DELETE", TOKENS, 204)
        await ana.log_in(200, OTHER)
        await ana.ask("DELETE", ME, 204)
    lines = [json.loads(line) for line in log.text.splitlines()]
    told = [line for line in lines if line["event"].startswith(("account.", "session."))]
    assert [line["event"] for line in told] == [
        "account.signed-up",
        "account.logged-in",
        "account.log-in-failed",
        "account.log-in-failed",
        "session.refreshed",
        "session.reused",
        "account.logged-in",
        "account.change-refused",
        "account.changed",
        "account.logged-in",
        "session.closed",
        "account.logged-in",
        "session.all-ended",
        "account.logged-in",
        "account.deleted",
    ]
    assert all(line["request_id"] for line in told)
    assert [line.get("user_id") for line in told].count(user_id) == len(told) - 1
    assert "user_id" not in told[3]
    for secret in ("canary", PASSWORD, OTHER, spent, access, last, ana.access, ana.refresh_token):
        assert secret not in log.text
