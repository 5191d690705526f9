"""A real Better Auth server's real tokens, at a real service: who is believed, as whom, and who is not."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from uuid import UUID, uuid5

import asyncpg
import httpx
import jwt
import pytest

from asking import TASKS, Served, hold, problem, served
from better_auth_server import BetterAuth, Person
from conftest import Administrator, new_database
from issuers import encoded
from postgres_server import PostgresServer
from src.embedded.roles import APPLICATION
from src.services.identity import NAMESPACE

pytestmark = pytest.mark.node

SECONDS = 60


class World:
    """Services and Better Auth servers, each on a database of its own. All end with the test."""

    def __init__(
        self, stack: ExitStack, postgres: PostgresServer, administrator: Administrator, template: str
    ) -> None:
        self._stack = stack
        self._postgres = postgres
        self._administrator = administrator
        self._template = template

    def issuer(self, options: dict[str, Any] | None = None, *, started: bool = True) -> BetterAuth:
        name = self._stack.enter_context(new_database(self._administrator))
        server = BetterAuth(self._postgres.url_for(name), options)
        self._stack.push(server)
        if started:
            server.start()
        return server

    def service(self, *entries: Mapping[str, str], **settings: str) -> Service:
        name = self._stack.enter_context(new_database(self._administrator, template=self._template))
        owner = self._postgres.url_for(name)
        running = self._stack.enter_context(
            served(
                database_url=self._postgres.url_for(name, role=APPLICATION),
                database_migration_url=owner,
                auth_issuers=json.dumps(entries),
                **settings,
            )
        )
        client = self._stack.enter_context(httpx.Client(base_url=running.address, timeout=SECONDS))
        return Service(running, client, lambda statement: self.rows(owner, statement))

    def rows(self, url: str, statement: str) -> list[dict[str, Any]]:
        """What a statement gives to the owner of a database, whom no policy binds."""

        async def fetched() -> list[dict[str, Any]]:
            connection = await asyncpg.connect(url)
            try:
                return [dict(row) for row in await connection.fetch(statement)]
            finally:
                await connection.close()

        return self._administrator.run(fetched())


class Service:
    """A running service that is asked with bearer tokens."""

    def __init__(
        self, running: Served, client: httpx.Client, rows: Callable[[str], list[dict[str, Any]]]
    ) -> None:
        self.rows = rows
        self._running = running
        self._client = client

    def ask(self, token: str, method: str = "GET", path: str = TASKS, **more: Any) -> httpx.Response:
        """The answer, held to the contract."""
        headers = {"authorization": f"Bearer {token}", **more.pop("headers", {})}
        return hold(self._client.request(method, path, headers=headers, **more))

    def status(self, token: str) -> int:
        return self.ask(token).status_code

    def refusal(self, token: str) -> str:
        """Why a token is refused, as the log has it. The answer says no more than that it is."""
        answer = self.ask(token)
        assert (answer.status_code, problem(answer)) == (401, "unauthenticated")
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]
        deadline = time.monotonic() + SECONDS
        while True:
            for line in self._running.log.splitlines():
                if f'"{answer.headers["x-request-id"]}"' in line and '"event":"request"' in line:
                    return str(json.loads(line)["reason"])
            assert time.monotonic() < deadline, self._running.log
            time.sleep(0.02)


@pytest.fixture
def world(postgres: PostgresServer, administrator: Administrator, template: str) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack, postgres, administrator, template)


@pytest.fixture(scope="module")
def shared(
    postgres: PostgresServer, administrator: Administrator, template: str
) -> Iterator[tuple[BetterAuth, Service]]:
    """One server as the guide configures it, and one service that trusts it: for tests that leave both as they are."""
    with ExitStack() as stack:
        world = World(stack, postgres, administrator, template)
        issuer = world.issuer()
        yield issuer, world.service(issuer.entry())


def claims_of(token: str) -> dict[str, Any]:
    found: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return found


def kid_of(token: str) -> str:
    return str(jwt.get_unverified_header(token)["kid"])


def user_id(person: Person) -> UUID:
    return uuid5(uuid5(NAMESPACE, person.server.url), person.id)


def expire_keys(world: World, issuer: BetterAuth) -> None:
    """What the rotation interval brings about when it has passed: the next token is signed by a new key."""
    world.rows(issuer.database_url, """UPDATE jwks SET "expiresAt" = now() - interval '1 second'""")


# Who is believed, and as whom


def test_a_first_write_with_a_better_auth_token_makes_the_user_with_their_address(
    shared: tuple[BetterAuth, Service],
) -> None:
    issuer, service = shared
    person = issuer.sign_up()
    token = person.token()
    listed = service.ask(token)
    assert (listed.status_code, listed.json()["items"]) == (200, [])
    mine = f"SELECT id, email FROM users WHERE id = '{user_id(person)}'"
    assert service.rows(mine) == []

    made = service.ask(token, "POST", json={"title": "Water the plants"})
    assert made.status_code == 201
    assert made.json()["user_id"] == str(user_id(person))
    assert service.rows(mine) == [{"id": user_id(person), "email": person.email}]

    # Another token, and another session, are the same person.
    assert service.ask(person.token()).json()["items"] == [made.json()]
    person.sign_in()
    assert service.ask(person.token()).json()["items"] == [made.json()]


def test_two_people_of_one_better_auth_never_see_each_others_tasks(
    shared: tuple[BetterAuth, Service],
) -> None:
    issuer, service = shared
    ana, ben = (issuer.sign_up().token() for _ in range(2))
    task = service.ask(ana, "POST", json={"title": "Ana's"}).json()
    theirs = service.ask(ben, "POST", json={"title": "Ben's"}).json()
    path = f"{TASKS}/{task['id']}"

    etag = {"if-match": "*"}
    answers = [
        service.ask(ben, "GET", path),
        service.ask(ben, "PATCH", path, json={"title": "taken"}),
        service.ask(ben, "PATCH", path, json={"is_completed": True}, headers=etag),
        service.ask(ben, "DELETE", path),
        service.ask(ben, "DELETE", path, headers=etag),
    ]
    missing = service.ask(ben, "GET", f"{TASKS}/{uuid5(NAMESPACE, 'nobody')}").json()
    for answer in answers:
        assert (answer.status_code, problem(answer)) == (404, "not-found")
        assert {**answer.json(), "request_id": ""} == {**missing, "request_id": ""}
    batch = {"operations": [{"op": "delete", "id": task["id"]}]}
    assert service.ask(ben, "POST", f"{TASKS}/batch", json=batch).status_code == 422
    # An id is nobody's alone: a PUT creates one's own under it.
    assert service.ask(ben, "PUT", path, json={"title": "Ben's too"}).status_code == 201
    assert service.ask(ben, "DELETE", path).status_code == 204

    assert service.ask(ben).json()["items"] == [theirs]
    assert [json.loads(line) for line in service.ask(ben, "GET", f"{TASKS}/export").text.splitlines()] == [
        theirs
    ]
    assert service.ask(ana, "GET", path).json() == task
    assert service.ask(ana).json()["items"] == [task]


def test_a_better_auth_with_uuids_may_keep_its_users_ids(world: World) -> None:
    issuer = world.issuer({"advanced": {"database": {"generateId": "uuid"}}})
    service = world.service(issuer.entry(issuer.url), auth_passthrough_issuer=issuer.url)
    person = issuer.sign_up()
    assert service.ask(person.token(), "POST", json={"title": "a"}).json()["user_id"] == person.id


def test_better_auth_as_it_comes_is_what_the_guide_says(world: World) -> None:
    issuer = world.issuer({})
    person = issuer.sign_up()
    token = person.token()
    assert jwt.get_unverified_header(token) == {"alg": "EdDSA", "kid": kid_of(token)}
    claims = claims_of(token)
    assert (claims["iss"], claims["aud"], claims["sub"]) == (issuer.url, issuer.url, person.id)
    assert claims["exp"] - claims["iat"] == 15 * 60
    assert (claims["email"], claims["emailVerified"]) == (person.email, False)
    assert re.fullmatch(r"[A-Za-z0-9]{32}", person.id)
    assert world.rows(issuer.database_url, 'SELECT "expiresAt" FROM jwks') == [{"expiresAt": None}]
    published = httpx.get(issuer.entry()["jwks_url"]).json()["keys"]
    assert [set(key) for key in published] == [{"alg", "crv", "kty", "x", "kid"}]

    # Nobody has shown yet that the address is theirs, so it is nobody's here.
    service = world.service(issuer.entry(issuer.url))
    assert service.ask(token, "POST", json={"title": "a"}).status_code == 201
    assert service.rows("SELECT id, email FROM users") == [{"id": user_id(person), "email": None}]


def test_better_auths_algorithms_are_believed_or_refused_as_the_guide_says(world: World) -> None:
    algorithms = ("EdDSA", "ES256", "RS256", "ES512", "PS256")
    issuers = {
        name: world.issuer({"jwt": {"jwks": {"keyPairConfig": {"alg": name}}}}, started=False)
        for name in algorithms
    }
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda issuer: issuer.start(), issuers.values()))
    service = world.service(*(issuer.entry(issuer.url) for issuer in issuers.values()))
    for name, issuer in issuers.items():
        token = issuer.sign_up("ana@example.com").token()
        assert jwt.get_unverified_header(token)["alg"] == name
        if name in ("ES512", "PS256"):
            assert service.refusal(token) == "wrong-algorithm"
        else:
            assert service.ask(token, "POST", json={"title": name}).status_code == 201
    # One address at three issuers is three users.
    assert service.rows("SELECT count(DISTINCT user_id) AS users FROM tasks") == [{"users": 3}]


# Who is not


def test_a_better_auth_token_that_was_changed_is_refused(shared: tuple[BetterAuth, Service]) -> None:
    issuer, service = shared
    ana, ben = issuer.sign_up(), issuer.sign_up()
    token = ana.token()
    head, body, signature = token.split(".")
    claims = claims_of(token)
    for change in (
        {"sub": ben.id},
        {"exp": claims["exp"] + 3600},
        {"email": ben.email},
        {"aud": ["tasks", "x"]},
    ):
        assert service.refusal(f"{head}.{encoded({**claims, **change})}.{signature}") == "bad-signature"
    flipped = bytearray(base64.urlsafe_b64decode(signature + "=="))
    flipped[7] ^= 1
    assert service.refusal(f"{head}.{body}.{encoded(bytes(flipped))}") == "bad-signature"
    other = encoded({"alg": "EdDSA", "kid": "another"})
    assert service.refusal(f"{other}.{body}.{signature}") == "unknown-key"
    none = encoded({"alg": "none", "kid": kid_of(token)})
    assert service.refusal(f"{none}.{body}.{signature}") == "wrong-algorithm"
    assert service.status(token) == 200


def test_a_better_auth_token_for_somebody_else_is_refused(world: World) -> None:
    issuer, stranger = world.issuer({}), world.issuer({"jwt": {"jwt": {"audience": "tasks"}}})
    service = world.service(issuer.entry("tasks"))
    assert service.refusal(issuer.sign_up().token()) == "wrong-audience"
    assert service.refusal(stranger.sign_up().token()) == "unknown-issuer"


def test_what_better_auth_signs_for_itself_is_no_access_token(world: World) -> None:
    by_secret = world.issuer({"session": {"cookieCache": {"enabled": True, "strategy": "jwt"}}})
    by_key = world.issuer(
        {
            "session": {"cookieCache": {"enabled": True, "strategy": "jwt"}},
            "jwt": {"sessionCookieCache": True},
        }
    )
    by_mail = world.issuer()
    # Misconfigured on purpose: Better Auth's own secret as the shared one, and the audience of its cookies as ours.
    service = world.service(by_key.entry("better-auth:session-cache"), auth_shared_secret=by_secret.secret)
    cookie = by_secret.sign_up().browser.cookies["better-auth.session_data"]
    assert jwt.get_unverified_header(cookie) == {"alg": "HS256"}
    assert jwt.decode(cookie, by_secret.secret, ["HS256"])["user"]
    assert service.refusal(cookie) == "bad-claim"

    cookie = by_key.sign_up().browser.cookies["better-auth.session_data"]
    assert jwt.get_unverified_header(cookie)["alg"] == "EdDSA"
    assert service.refusal(cookie) == "not-for-access"

    person = by_mail.sign_up()
    link = httpx.URL(by_mail.link_sent_to(person.email)).params["token"]
    assert jwt.decode(link, by_mail.secret, ["HS256"])["email"] == person.email
    mistaken = world.service(auth_shared_secret=by_mail.secret)
    assert mistaken.refusal(link) == "bad-claim"


def test_better_auth_has_no_access_tokens_by_secret(world: World) -> None:
    issuer = world.issuer({"jwt": {"jwks": {"keyPairConfig": {"alg": "HS256"}}}})
    assert issuer.sign_up().browser.get("/api/auth/token").status_code == 500
    assert "JOSENotSupported" in issuer.log


# Keys that change, and a server that is away


def test_no_valid_request_fails_while_better_auth_rotates_its_keys(world: World) -> None:
    issuer = world.issuer()
    service = world.service(issuer.entry())
    people = [issuer.sign_up() for _ in range(3)]
    old = [person.token() for person in people]
    assert [service.status(token) for token in old[:1]] == [200]

    expire_keys(world, issuer)
    new = [person.token() for person in people]
    assert {kid_of(token) for token in new}.isdisjoint(kid_of(token) for token in old)
    # Many at once meet the new key first; tokens by the old one, seen or not, go on until they end.
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(service.status, [*new, *old] * 4)) == {200}

    # A key that the operator throws away is replaced as well, and its tokens are over once that was seen.
    world.rows(issuer.database_url, "DELETE FROM jwks")
    newest = people[0].token()
    assert kid_of(newest) not in {kid_of(token) for token in (*old, *new)}
    assert service.status(newest) == 200
    assert [service.refusal(token) for token in (new[0], old[0])] == ["unknown-key", "unknown-key"]


def test_no_valid_request_fails_while_better_auths_interval_passes(world: World) -> None:
    issuer = world.issuer({"jwt": {"jwks": {"rotationInterval": 2}, "jwt": {"audience": "tasks"}}})
    service = world.service(issuer.entry())
    person = issuer.sign_up()
    kids: list[str] = []
    deadline = time.monotonic() + SECONDS
    # The third change in a minute is where our searches for keys begin to be rationed.
    while len(set(kids)) < 3:
        assert time.monotonic() < deadline, kids
        token = person.token()
        kids.append(kid_of(token))
        assert service.status(token) == 200
        time.sleep(0.1)


def test_while_better_auth_is_away_known_keys_go_on_and_other_keys_cannot_be_judged(world: World) -> None:
    issuer = world.issuer(started=False)
    # The service does not need it to start.
    service = world.service(issuer.entry())
    issuer.start()
    ana, ben = issuer.sign_up(), issuer.sign_up()
    seen, unseen = ana.token(), ben.token()
    assert service.status(seen) == 200
    expire_keys(world, issuer)
    by_new_key = ana.token()
    assert kid_of(by_new_key) != kid_of(seen)

    issuer.stop()
    assert service.ask(seen, "POST", json={"title": "a"}).status_code == 201
    assert service.ask(unseen, "POST", json={"title": "b"}).status_code == 201
    answer = service.ask(by_new_key, "POST", json={"title": "c"})
    assert (answer.status_code, problem(answer)) == (503, "unavailable")
    assert int(answer.headers["retry-after"]) > 0

    issuer.start()
    assert service.ask(by_new_key, "POST", json={"title": "c"}).status_code == 201
    assert [task["title"] for task in service.ask(seen).json()["items"]] == ["c", "a"]
