"""An issuer's keys, fetched from a real server: rotating, flooded, slow, down, wrong, and malicious."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from issuers import Issuer, JwksServer, by_hand, hs256, private_key, public_jwk
from src.config.settings import load_settings
from src.errors import Unauthenticated, Unavailable
from src.services import fetching
from src.services.fetching import Fetcher, FetchFailed
from src.services.identity import Identity, Trust
from src.services.jwks import AT_ONCE, FRESH_SECONDS, PAUSE_SECONDS, RETRY_SECONDS, PublishedKeys, key_set
from src.services.signing import SigningKeys, new_key
from waiting import eventually

_SOMEBODY = UUID(int=7)


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
def server(issuer: Issuer) -> Iterator[JwksServer]:
    with JwksServer(issuer.jwks) as running:
        yield running


class Watch:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def trusting(issuer: Issuer, url: str, watch: Watch | None = None) -> AsyncIterator[Identity]:
    keys = PublishedKeys(issuer.name, url, Fetcher().fetch, clock=watch or time.monotonic)
    trusted = {issuer.name: Trust(keys, frozenset({issuer.audience}))}
    async with Identity(SigningKeys([b"\x00" * 32]), trusted, published=[keys]) as identity:
        yield identity


async def outcome(identity: Identity, sent: str) -> str:
    """`ok`, or the reason of the refusal."""
    try:
        await identity.principal(sent)
    except (Unauthenticated, Unavailable) as refusal:
        return refusal.reason
    return "ok"


def made_up(issuer: Issuer, number: int) -> str:
    """A token that only its key id gives away."""
    return "Bearer " + by_hand({"alg": "EdDSA", "kid": f"made-up-{number}"}, issuer.claims())


# Rotation


async def test_the_keys_are_fetched_once_for_everybody(issuer: Issuer, server: JwksServer) -> None:
    server.held.clear()
    async with trusting(issuer, server.url) as identity:
        waiting = [asyncio.create_task(outcome(identity, issuer.bearer(sub=f"user-{n}"))) for n in range(50)]
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in waiting)
        server.held.set()
        assert set(await asyncio.gather(*waiting)) == {"ok"}
        assert [await outcome(identity, issuer.bearer(sub=f"later-{n}")) for n in range(20)] == ["ok"] * 20
    assert len(server.asked) == 1


async def test_a_rotation_fails_no_valid_request(issuer: Issuer, server: JwksServer) -> None:
    async with trusting(issuer, server.url) as identity:
        assert await outcome(identity, issuer.bearer()) == "ok"
        for kid in ("second", "third"):
            issuer.add(kid)
            sent = [issuer.bearer(kid, sub=f"user-{n}") for n in range(50)]
            sent += [issuer.bearer("first", sub=f"user-{n}") for n in range(50)]
            assert set(await asyncio.gather(*(outcome(identity, each) for each in sent))) == {"ok"}
    assert len(server.asked) == 3


async def test_a_key_published_while_an_older_answer_is_on_its_way_is_found(
    issuer: Issuer, server: JwksServer
) -> None:
    async with trusting(issuer, server.url) as identity:
        assert await outcome(identity, issuer.bearer()) == "ok"
        server.held.clear()
        # The server has chosen its answer, without the new key, and is slow to send it.
        early = asyncio.create_task(outcome(identity, made_up(issuer, 1)))
        while len(server.asked) < 2:
            await asyncio.sleep(0.01)
        issuer.add("second")
        late = asyncio.create_task(outcome(identity, issuer.bearer("second")))
        await asyncio.sleep(0.1)
        server.held.set()
        assert await late == "ok"
        assert await early == "unknown-key"


async def test_a_lone_key_without_an_id_may_be_replaced(issuer: Issuer) -> None:
    def nameless() -> dict[str, Any]:
        return {"keys": [{k: v for k, v in key.items() if k != "kid"} for key in issuer.jwks()["keys"]]}

    def sent() -> str:
        _, key = next(iter(issuer.keys.values()))
        return "Bearer " + by_hand({"alg": "EdDSA"}, issuer.claims(), key.sign)

    with JwksServer(nameless) as server:
        async with trusting(issuer, server.url) as identity:
            assert await outcome(identity, sent()) == "ok"
            issuer.rotate("other")
            assert await outcome(identity, sent()) == "ok"
            assert len(server.asked) == 2


async def test_a_withdrawn_key_is_believed_no_longer_also_where_it_was_remembered(
    issuer: Issuer, server: JwksServer
) -> None:
    watch = Watch()
    async with trusting(issuer, server.url, watch) as identity:
        issuer.add("second")
        stolen, kept = issuer.bearer("first"), issuer.bearer("second")
        assert [await outcome(identity, each) for each in (stolen, kept)] == ["ok", "ok"]
        remembered = await identity.principal(kept)

        async def fetched_again() -> None:
            asked = len(server.asked)
            watch.now += FRESH_SECONDS + 1
            assert await outcome(identity, issuer.bearer("second", sub=f"user-{asked}")) == "ok"
            await eventually(lambda: len(server.asked) > asked and identity._published[0]._flight is None)

        # Unchanged: the keys stay those that tokens were verified by.
        await fetched_again()
        assert await outcome(identity, stolen) == "ok"
        del issuer.keys["first"]
        await fetched_again()
        assert await outcome(identity, stolen) == "unknown-key"
        assert await identity.principal(kept) is remembered


async def test_old_keys_are_looked_at_again_without_anybody_waiting(
    issuer: Issuer, server: JwksServer
) -> None:
    watch = Watch()
    async with trusting(issuer, server.url, watch) as identity:
        assert await outcome(identity, issuer.bearer()) == "ok"
        watch.now += FRESH_SECONDS + 1
        server.held.clear()
        assert await asyncio.wait_for(outcome(identity, issuer.bearer(sub="bob")), 30) == "ok"
        await eventually(lambda: len(server.asked) >= 2)
        assert len(server.asked) == 2


# Floods


async def test_a_flood_of_unknown_keys_costs_a_handful_of_fetches_and_hides_a_rotation_for_seconds_only(
    issuer: Issuer, server: JwksServer
) -> None:
    watch = Watch()
    async with trusting(issuer, server.url, watch) as identity:
        assert await outcome(identity, issuer.bearer()) == "ok"
        seen = 0
        for second in range(60):
            watch.now += 1
            flood = [outcome(identity, made_up(issuer, n)) for n in range(second * 50, second * 50 + 50)]
            assert set(await asyncio.gather(*flood)) == {"unknown-key"}
            assert await outcome(identity, issuer.bearer(sub=f"known-{second}")) == "ok"
            if second == 10:
                issuer.add("second")
            if second > 10 and await outcome(identity, issuer.bearer("second")) == "ok":
                seen = seen or second
        assert 10 < seen <= 10 + PAUSE_SECONDS
    assert len(server.asked) <= 1 + AT_ONCE + 60 / PAUSE_SECONDS


async def test_after_a_flood_a_rotation_fails_nobody_again(issuer: Issuer, server: JwksServer) -> None:
    watch = Watch()
    async with trusting(issuer, server.url, watch) as identity:
        for number in range(20):
            assert await outcome(identity, made_up(issuer, number)) == "unknown-key"
        watch.now += PAUSE_SECONDS
        issuer.add("second")
        assert await outcome(identity, issuer.bearer("second")) == "ok"


async def test_tokens_that_cannot_be_valid_make_nobody_fetch(issuer: Issuer, server: JwksServer) -> None:
    async with trusting(issuer, server.url) as identity:
        assert await outcome(identity, issuer.bearer()) == "ok"
        for changes in ({"exp": 1}, {"aud": "other"}, {"sub": ...}, {"iss": "https://other.example.com"}):
            header = {"alg": "EdDSA", "kid": "made-up"}
            assert await outcome(identity, "Bearer " + by_hand(header, issuer.claims(**changes))) != "ok"
        for algorithm in ("none", "HS256", "RS512"):
            header = {"alg": algorithm, "kid": "made-up"}
            assert await outcome(identity, "Bearer " + by_hand(header, issuer.claims())) == "wrong-algorithm"
        several = {"alg": "EdDSA"}
        issuer.add("second")
        assert await outcome(identity, issuer.bearer("second")) == "ok"
        assert await outcome(identity, "Bearer " + by_hand(several, issuer.claims())) == "unknown-key"
    assert len(server.asked) == 2


# Down, slow, and wrong


async def test_while_the_address_is_down_the_service_starts_and_says_503_and_recovers(issuer: Issuer) -> None:
    watch = Watch()
    with JwksServer(issuer.jwks) as server:
        url = server.url
        server.answer = lambda handler: handler.send_error(503)
        async with trusting(issuer, url, watch) as identity:
            with pytest.raises(Unavailable) as caught:
                await identity.principal(issuer.bearer())
            assert (caught.value.reason, caught.value.retry_after_seconds) == ("issuer-unreachable", 20)
            mine = identity.signing.mint(user_id=_SOMEBODY, email=None, lifetime_seconds=60)
            assert await outcome(identity, f"Bearer {mine}") == "ok"
            for _ in range(50):
                assert await outcome(identity, issuer.bearer()) == "issuer-unreachable"
            assert len(server.asked) <= 1 + AT_ONCE
            server.answer = None
            watch.now += PAUSE_SECONDS
            assert await outcome(identity, issuer.bearer()) == "ok"


async def test_known_keys_outlive_their_address(issuer: Issuer) -> None:
    watch = Watch()
    with JwksServer(issuer.jwks) as server:
        async with trusting(issuer, server.url, watch) as identity:
            assert await outcome(identity, issuer.bearer()) == "ok"
            for number, answer in enumerate(
                (lambda h: h.send_error(500), lambda h: h.wfile.write(b"not HTTP"))
            ):
                server.answer = answer
                watch.now += FRESH_SECONDS + RETRY_SECONDS
                for hour in range(3):
                    sent = issuer.bearer(sub=f"user-{number}-{hour}")
                    assert await outcome(identity, sent) == "ok"
                    watch.now += 3600
                    await asyncio.sleep(0.05)
            # Whether this one is new or made up cannot be known, and a 401 would say that it is.
            assert await outcome(identity, made_up(issuer, 1)) == "issuer-unreachable"


def _drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(400):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def _drip_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(400):
        handler.wfile.write(b"X-%d: y\r\n" % number)
        handler.wfile.flush()
        time.sleep(0.05)


def _endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(10_000):
        handler.wfile.write(b" " * 65536)


def _endless_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(1_000_000):
        handler.wfile.write(b"X-%d: %s\r\n" % (number, b"y" * 1000))


def _cut_off(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"keys": []}')


def _status(code: int) -> Any:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        if code in (204, 304):
            handler.end_headers()
            return
        handler.send_header("Content-Length", "12")
        handler.end_headers()
        handler.wfile.write(b'{"keys": []}')

    return answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (_drip, "timeout"), (_drip_headers, "timeout"), (lambda _: time.sleep(3), "timeout"),
        (_endless, "too-large"), (_endless_headers, "too-large"), (_cut_off, "cut-off"), (lambda _: None, "cut-off"),
        (lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n"), "not-http"),
        (_status(404), "status-404"), (_status(500), "status-500"), (_status(204), "status-204"),
        (_status(401), "status-401"), (_status(304), "redirected"),
    ],
)  # fmt: skip
async def test_a_bad_answer_is_given_up_in_bounded_time_and_memory(
    server: JwksServer, monkeypatch: pytest.MonkeyPatch, answer: Any, reason: str
) -> None:
    monkeypatch.setattr(fetching, "SECONDS", 1.0 if reason == "timeout" else 60.0)
    server.answer = answer
    with pytest.raises(FetchFailed) as caught:
        await asyncio.wait_for(Fetcher().fetch(server.url), 60)
    assert caught.value.reason == reason


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_no_redirect_is_followed(issuer: Issuer, server: JwksServer, code: int) -> None:
    with JwksServer(issuer.jwks) as elsewhere:

        def redirect(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(code)
            handler.send_header("Location", elsewhere.url)
            handler.end_headers()

        server.answer = redirect
        async with trusting(issuer, server.url) as identity:
            assert await outcome(identity, issuer.bearer()) == "issuer-unreachable"
        assert elsewhere.asked == []


async def test_an_answer_may_come_in_pieces_or_end_with_the_connection(server: JwksServer) -> None:
    def chunked(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in (b'{"keys"', b": []}"):
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            handler.wfile.flush()
            time.sleep(0.05)
        handler.wfile.write(b"0\r\n\r\n")

    for answer in (chunked, lambda handler: handler.wfile.write(b'HTTP/1.0 200 OK\r\n\r\n{"keys": []}')):
        server.answer = answer
        assert await Fetcher().fetch(server.url) == b'{"keys": []}'


async def test_nobody_else_waits_for_a_slow_issuer(issuer: Issuer, server: JwksServer) -> None:
    server.held.clear()
    async with trusting(issuer, server.url) as identity:
        slow = asyncio.create_task(outcome(identity, issuer.bearer()))
        mine = identity.signing.mint(user_id=_SOMEBODY, email=None, lifetime_seconds=60)
        for _ in range(20):
            assert await asyncio.wait_for(outcome(identity, f"Bearer {mine}"), 30) == "ok"
            await asyncio.sleep(0.005)
        assert not slow.done()
        # Who gives up waiting takes the fetch from nobody else.
        other = asyncio.create_task(outcome(identity, issuer.bearer(sub="bob")))
        await asyncio.sleep(0.05)
        slow.cancel()
        await asyncio.sleep(0.05)
        server.held.set()
        assert await other == "ok"
    assert len(server.asked) == 1


async def test_the_service_ends_also_while_an_issuer_hangs(
    issuer: Issuer, server: JwksServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "SECONDS", 60.0)
    server.held.clear()
    threads = threading.active_count()
    async with asyncio.timeout(20), trusting(issuer, server.url):
        while not server.asked:
            await asyncio.sleep(0.01)
    # Nothing is left that the end of the process would wait for; the server has one for the request.
    assert threading.active_count() <= threads + 1


# Over TLS


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    """What the system trusts, for this test."""
    made = trustme.CA()
    made.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    return made


def certified(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


async def test_keys_are_fetched_over_verified_tls(issuer: Issuer, authority: trustme.CA) -> None:
    with JwksServer(issuer.jwks, certified(authority, "localhost")) as server:
        configured = load_settings(auth_issuers=json.dumps([server.entry(issuer)]), signing_keys=new_key())
        async with Identity.from_settings(configured) as identity:
            assert await outcome(identity, issuer.bearer()) == "ok"


@pytest.mark.parametrize("case", ["another authority", "another name"])
async def test_keys_of_an_impostor_are_not_taken(issuer: Issuer, authority: trustme.CA, case: str) -> None:
    context = (
        certified(trustme.CA(), "localhost")
        if case == "another authority"
        else certified(authority, "evil.example.com")
    )
    with JwksServer(issuer.jwks, context) as server:
        with pytest.raises(FetchFailed) as caught:
            await Fetcher().fetch(server.url)
        assert caught.value.reason == "certificate-rejected"
        async with trusting(issuer, server.url) as identity:
            assert await outcome(identity, issuer.bearer()) == "issuer-unreachable"
        assert server.asked == []


async def test_what_cannot_be_reached_has_a_reason(server: JwksServer) -> None:
    for url, reason in (
        ("http://127.0.0.1:1/", "connection-refused"),
        (server.url.replace("http:", "https:"), "tls-failed"),
        (f"https://{'a' * 70}.localhost/", "unreachable"),
        ("https://no-such-host.invalid/", "unreachable"),
    ):
        with pytest.raises(FetchFailed) as caught:
            await Fetcher().fetch(url)
        assert caught.value.reason == reason


# What is published


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"<html>", b"{}", b'{"keys": null}', b'{"keys": {}}', b"\xff", b"[" * 100_000,
        json.dumps({"keys": [{}] * 101}).encode(),
    ],
    ids=lambda body: str(body[:16]),
)  # fmt: skip
def test_what_is_no_jwks_replaces_none(body: bytes) -> None:
    with pytest.raises(FetchFailed):
        key_set(body)


def _unusable() -> dict[str, Any]:
    edwards = private_key("EdDSA")
    public = public_jwk(edwards, kid="x")
    big = public_jwk(private_key("RS256"), kid="x")
    small = public_jwk(rsa.generate_private_key(65537, 1024), kid="x")
    return {
        "secret-published": {"kty": "oct", "k": "c2VjcmV0", "kid": "x", "alg": "HS256"},
        "private-key-published": {**public, "d": "AAAA"},
        "not-an-object": "key",
        "other-kind": public_jwk(ec.generate_private_key(ec.SECP384R1()), kid="x"),
        "other-kind ": {**public, "crv": "Ed448"},
        "other-kind  ": {**public, "kty": ["OKP"]},
        "other-kind   ": {"kid": "x"},
        "other-kind    ": {**public, "kty": "RSA"},
        "other-use": {**public, "use": "enc"},
        "other-use ": {**public, "key_ops": ["sign"]},
        "other-use  ": {**public, "key_ops": "verify"},
        "other-algorithm": {**big, "alg": "RS512"},
        "other-algorithm ": {**public, "alg": "HS256"},
        "other-algorithm  ": {**big, "alg": None},
        "bad-kid": {**public, "kid": 7},
        "bad-kid ": {**public, "kid": "k" * 257},
        "bad-kid  ": {**public, "kid": ""},
        "malformed": {**public, "x": "AAAA"},
        "malformed ": {**public, "x": 5},
        "malformed  ": {**big, "n": ""},
        "malformed   ": {name: value for name, value in big.items() if name != "e"},
        "malformed    ": {**public, "x": "\ud800"},
        "bad-size": small,
    }


UNUSABLE = _unusable()


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_key_that_cannot_be_used_is_left_out_and_spoils_no_other(case: str) -> None:
    good = public_jwk(private_key("EdDSA"), kid="good")
    found = key_set(json.dumps({"keys": [UNUSABLE[case], good]}).encode())
    assert list(found.named) == ["good"]
    assert found.nameless == []
    assert dict(found.unused) == {case.strip(): 1}


def test_keys_that_share_an_id_are_both_refused() -> None:
    keys = [public_jwk(private_key(kind), kid="same") for kind in ("EdDSA", "RS256")]
    good = public_jwk(private_key("ES256"), kid="other", key_ops=["verify"])
    encrypting = {**public_jwk(private_key("RS256")), "kid": "other", "use": "enc"}
    found = key_set(json.dumps({"keys": [*keys, good, encrypting]}).encode())
    assert list(found.named) == ["other"]
    assert dict(found.unused) == {"duplicate-kid": 2, "other-use": 1}


async def test_a_published_secret_signs_nothing(issuer: Issuer) -> None:
    secret = {"kty": "oct", "k": "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0", "kid": "shared", "alg": "HS256"}
    with JwksServer(lambda: {"keys": [*issuer.jwks()["keys"], secret]}) as server:
        async with trusting(issuer, server.url) as identity:
            forged = by_hand({"alg": "HS256", "kid": "shared"}, issuer.claims(), hs256(b"secret" * 5))
            assert await outcome(identity, f"Bearer {forged}") == "wrong-algorithm"
            assert await outcome(identity, issuer.bearer()) == "ok"


async def test_an_empty_jwks_withdraws_every_key(issuer: Issuer, server: JwksServer) -> None:
    watch = Watch()
    async with trusting(issuer, server.url, watch) as identity:
        sent = issuer.bearer()
        assert await outcome(identity, sent) == "ok"
        server.document = lambda: {"keys": []}
        watch.now += FRESH_SECONDS + 1
        assert await outcome(identity, made_up(issuer, 1)) == "unknown-key"
        assert await outcome(identity, sent) == "unknown-key"
