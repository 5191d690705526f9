"""From a token to a principal: what is believed, and everything that is not."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4, uuid5

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples import examples
from issuers import ALGORITHMS, Issuer, JwksServer, by_hand, encoded, hs256, private_key, public_jwk
from src.config.settings import load_settings
from src.errors import Unauthenticated
from src.services import tokens
from src.services.identity import NAMESPACE, Identity, Principal, Trust
from src.services.keys import SharedSecret, VerificationKey
from src.services.signing import LONGEST_SECONDS, SigningKeys

SECRET = secrets.token_urlsafe(32)
ANA = UUID("018f4e6a-7c11-7bbd-9d0e-3a52cf7d9e10")


@dataclass
class World:
    """An identity that trusts one issuer with a key of each kind, and our own tokens."""

    issuer: Issuer
    server: JwksServer
    identity: Identity

    async def reason(self, token: str) -> str:
        """Why the token is refused."""
        with pytest.raises(Unauthenticated) as caught:
            await self.identity.principal(f"Bearer {token}")
        return caught.value.reason


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer(rsa="RS256", curve="ES256", edwards="EdDSA")


@pytest.fixture(scope="module")
def server(issuer: Issuer) -> Iterator[JwksServer]:
    with JwksServer(issuer.jwks) as running:
        yield running


@pytest.fixture
async def world(issuer: Issuer, server: JwksServer) -> AsyncIterator[World]:
    configured = load_settings(auth_issuers=json.dumps([server.entry(issuer)]))
    async with Identity.from_settings(configured) as identity:
        await identity.principal(issuer.bearer())
        yield World(issuer, server, identity)


@pytest.fixture
async def recipes(issuer: Issuer, server: JwksServer) -> AsyncIterator[World]:
    """As `world`, with the audiences that the recipes of docs/identity.md name."""
    entry = {**server.entry(issuer), "audience": ["https://tasks.example.com", "authenticated"]}
    async with Identity.from_settings(load_settings(auth_issuers=json.dumps([entry]))) as identity:
        yield World(issuer, server, identity)


def own(identity: Identity, user_id: UUID = ANA, seconds: int = 60) -> str:
    return identity.signing.mint(user_id, "Ana@Example.com", seconds)


def alone(**more: Any) -> Identity:
    """Own tokens only."""
    return Identity(SigningKeys([os.urandom(32)]), {}, **more)


# What is believed


async def test_a_token_of_our_own_speaks_for_its_user_without_any_setting() -> None:
    async with Identity.from_settings(load_settings()) as identity:
        found = await identity.principal(f"Bearer {own(identity)}")
    assert found == Principal(ANA, "groundwork", str(ANA), "ana@example.com", True, found.expires_at, epoch=0)
    assert 0 < found.expires_at - time.time() <= 60


@pytest.mark.parametrize("kid", ["rsa", "curve", "edwards"])
async def test_a_token_of_each_kind_of_key_is_believed(world: World, kid: str) -> None:
    found = await world.identity.principal(world.issuer.bearer(kid, sub="auth0|42", email="Ana@Example.com"))
    assert found.user_id == uuid5(uuid5(NAMESPACE, "https://id.example.com/"), "auth0|42")
    assert (found.issuer, found.subject) == ("https://id.example.com/", "auth0|42")
    assert (found.email, found.own) == ("ana@example.com", False)


async def test_ids_made_from_issuer_and_subject_never_change() -> None:
    # A changed rule or constant would part every user from their rows.
    identity = Identity.from_settings(load_settings(auth_shared_secret=SECRET))
    found = await identity.principal(shared(iss="https://id.example.com/", sub="ana"))
    assert str(found.user_id) == "a8844bde-67c3-5479-b14f-d6975f9cf8c0"


async def test_one_subject_of_two_issuers_is_two_users() -> None:
    with JwksServer(dict) as server:
        one, two = Issuer("https://one.example.com"), Issuer("https://two.example.com")
        server.document = lambda: {"keys": one.jwks()["keys"]}
        with JwksServer(two.jwks) as other:
            configured = load_settings(auth_issuers=json.dumps([server.entry(one), other.entry(two)]))
            async with Identity.from_settings(configured) as identity:
                ids = [(await identity.principal(each.bearer())).user_id for each in (one, two)]
                # Each is believed for its own name only.
                for thief, victim in ((one, two), (two, one)):
                    with pytest.raises(Unauthenticated):
                        await identity.principal(thief.bearer(iss=victim.name))
                    with pytest.raises(Unauthenticated):
                        await identity.principal(
                            thief.bearer(iss="groundwork", aud="groundwork", sub=str(ANA))
                        )
    assert len(set(ids)) == 2


@pytest.mark.parametrize(
    "header",
    ["Bearer {}", "bearer {}", "BEARER {}", "Bearer   {}", "Bearer {} "],
    ids=repr,
)
async def test_the_scheme_is_read_as_http_writes_it(header: str) -> None:
    identity = alone()
    assert (await identity.principal(header.format(own(identity)))).user_id == ANA


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, "no-token"), ("", "no-token"), ("Bearer", "no-token"), ("Bearer ", "no-token"),
        ("Basic YW5hOmFuYQ==", "other-scheme"), ("{}", "other-scheme"), ("Token {}", "other-scheme"),
        ("Bearer\t{}", "other-scheme"), ("Bearer {} {}", "malformed"), ("Bearer {},", "malformed"),
        ("Bearer {}\u00e9", "malformed"), ("Bearer \x00{}", "malformed"), ("Bearer {}.", "malformed"),
    ],
)  # fmt: skip
async def test_no_other_authorization_is_read_as_a_token(header: str | None, reason: str) -> None:
    identity = alone()
    token = own(identity)
    with pytest.raises(Unauthenticated) as caught:
        await identity.principal(None if header is None else header.format(token, token))
    assert caught.value.reason == reason


@pytest.mark.parametrize("kind", [None, "JWT", "jwt", "at+jwt", "application/at+jwt"])
async def test_an_access_token_may_call_itself_one_in_each_usual_way(world: World, kind: str | None) -> None:
    assert await world.identity.principal(f"Bearer {world.issuer.token(headers={'typ': kind})}")


@pytest.mark.parametrize("audience", ["tasks", ["other", "tasks"]])
async def test_one_of_several_audiences_suffices(world: World, audience: Any) -> None:
    assert await world.identity.principal(world.issuer.bearer(aud=audience))


# What is not: the signature and the key


async def test_none_is_no_algorithm(world: World) -> None:
    for claims in (
        world.issuer.claims(),
        {**world.issuer.claims(), "iss": "groundwork", "aud": "groundwork"},
    ):
        for name in ("none", "None", "NONE", "nOnE", "", None, 0, ["RS256"], {"RS256": 1}):
            header = {"alg": name, "typ": "at+jwt"}
            assert await world.reason(by_hand(header, claims)) in {"wrong-algorithm", "bad-header"}
            unsigned = by_hand(header, claims, lambda _: b"")
            assert await world.reason(unsigned) == "malformed"
    assert await world.reason(by_hand({"typ": "JWT"}, world.issuer.claims())) == "bad-header"


async def test_a_public_key_is_no_secret(world: World) -> None:
    """RS/HS confusion: everybody has the public key, in each of its spellings."""
    key = world.issuer.keys["rsa"][1].public_key()
    spellings = [
        key.public_bytes(encoding, form)
        for encoding in (Encoding.PEM, Encoding.DER)
        for form in (PublicFormat.SubjectPublicKeyInfo, PublicFormat.PKCS1)
    ]
    spellings += [spellings[0].strip(), json.dumps(world.issuer.jwks()["keys"][0]).encode(), b""]
    for secret in spellings:
        for algorithm in ("HS256", "RS256"):
            forged = by_hand({"alg": algorithm, "kid": "rsa"}, world.issuer.claims(), hs256(secret))
            assert await world.reason(forged) in {"wrong-algorithm", "bad-signature"}


@pytest.mark.parametrize("kid", ["rsa", "curve", "edwards"])
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "RS384", "RS512", "PS256", "ES384", "ES256K", "HS256"])
async def test_a_key_verifies_by_its_own_algorithm_only(world: World, kid: str, algorithm: str) -> None:
    fixed, key = world.issuer.keys[kid]
    if algorithm == fixed:
        algorithm = "EdDSA" if fixed != "EdDSA" else "RS256"
    token = by_hand({"alg": algorithm, "kid": kid}, world.issuer.claims())
    assert await world.reason(token) in {"wrong-algorithm", "bad-signature"}
    if kid == "edwards":
        # The signature is right; only the header lies about how it was made.
        signed = by_hand({"alg": algorithm, "kid": kid}, world.issuer.claims(), key.sign)
        assert await world.reason(signed) in {"wrong-algorithm", "bad-signature"}
    if algorithm in {"RS384", "RS512", "PS256"} and kid == "rsa":
        valid = jwt.encode(world.issuer.claims(), key, algorithm, headers={"kid": kid})
        assert await world.reason(valid) == "wrong-algorithm"


@pytest.mark.parametrize("name", ["jwk", "jku", "x5u", "x5c", "crit", "b64", "zip", "enc"])
async def test_a_token_does_not_choose_its_key_or_its_meaning(world: World, name: str) -> None:
    thief = private_key("EdDSA")
    values: dict[str, Any] = {
        "jwk": public_jwk(thief), "jku": world.server.url, "x5u": world.server.url, "x5c": ["MII"], "crit": ["exp"],
        "b64": True, "zip": "DEF", "enc": "A256GCM",
    }  # fmt: skip
    asked = len(world.server.asked)
    for key, kid in ((thief, "edwards"), (thief, "mine"), (world.issuer.keys["edwards"][1], "edwards")):
        header = {"alg": "EdDSA", "kid": kid, name: values[name]}
        assert await world.reason(by_hand(header, world.issuer.claims(), key.sign)) == "bad-header"
    assert len(world.server.asked) == asked


@pytest.mark.parametrize(
    "kid",
    [
        1, True, ["edwards"], {"kid": "edwards"}, "", "e" * 513, "edwards\x00", "\ud800", "../../../../dev/null",
        "edwards' OR 1=1 --", "/proc/self/environ", "https://evil.example.com/key", "EDWARDS", " edwards",
    ],
)  # fmt: skip
async def test_a_key_id_is_looked_up_and_never_followed(world: World, kid: Any) -> None:
    for signer in (world.issuer.keys["edwards"][1].sign, hs256(b""), hs256(b"\x00")):
        for algorithm in ("EdDSA", "HS256"):
            token = by_hand({"alg": algorithm, "kid": kid}, world.issuer.claims(), signer)
            assert await world.reason(token) in {"bad-header", "unknown-key", "wrong-algorithm"}


async def test_a_token_without_a_key_id_does_not_find_one_of_several(world: World) -> None:
    key = world.issuer.keys["edwards"][1]
    assert await world.reason(by_hand({"alg": "EdDSA"}, world.issuer.claims(), key.sign)) == "unknown-key"
    mine = {
        "iss": "groundwork",
        "aud": "groundwork",
        "sub": str(ANA),
        "exp": int(time.time()) + 60,
        "epoch": 0,
    }
    seed = os.urandom(32)
    assert await world.reason(by_hand({"alg": "EdDSA", "typ": "at+jwt"}, mine, hs256(seed))) == "unknown-key"


async def test_every_change_of_a_token_breaks_it(world: World) -> None:
    for kid in world.issuer.keys:
        token = world.issuer.token(kid)
        for place in range(0, len(token), 7):
            changed = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
            assert await world.reason(changed)
    # The last character's unused bits: the same bytes, but another spelling.
    token = world.issuer.token("edwards")
    spelling = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    other = spelling[spelling.index(token[-1]) ^ 1]
    assert await world.reason(token[:-1] + other) == "malformed"
    assert await world.reason(token + "=") == "malformed"
    assert await world.reason(token + ".x") == "malformed"
    assert await world.reason(token.replace(".", "..", 1)) == "malformed"
    head, claims, signature = token.split(".")
    assert await world.reason(f"{head}.{claims}.{signature[:-2]}")
    assert await world.reason(f"{claims}.{head}.{signature}")


async def test_a_name_stands_once(world: World) -> None:
    key = world.issuer.keys["edwards"][1]
    header, claims = b'{"alg":"EdDSA","kid":"edwards"}', json.dumps(world.issuer.claims()).encode()
    good = by_hand(header, claims, key.sign)
    assert await world.identity.principal(f"Bearer {good}")
    for twice in (
        by_hand(header.replace(b"{", b'{"alg":"none",', 1), claims, key.sign),
        by_hand(header, claims.replace(b"{", b'{"sub":"bob",', 1), key.sign),
        by_hand(header, claims.replace(b"{", b'{"x":{"y":1,"y":2},', 1), key.sign),
    ):
        assert await world.reason(twice) == "malformed"


@pytest.mark.parametrize(
    "text",
    [
        b"", b"null", b"[]", b"1", b'"x"', b"{", b"{}x", b"\xff\xfe", b"[" * 4000, b'{"a":' * 1500, b'{"exp":NaN}',
        b'{"exp":Infinity}', b'{"exp":' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
async def test_what_is_no_object_is_no_header_and_no_claims(world: World, text: bytes) -> None:
    key = world.issuer.keys["edwards"][1]
    good = {"alg": "EdDSA", "kid": "edwards"}
    assert await world.reason(by_hand(text, world.issuer.claims(), key.sign)) == "malformed"
    assert await world.reason(by_hand(good, text, key.sign)) == "malformed"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
async def test_a_token_is_utf_8_and_nothing_else(world: World, encoding: str) -> None:
    key = world.issuer.keys["edwards"][1]
    header, claims = {"alg": "EdDSA", "kid": "edwards"}, world.issuer.claims()
    assert await world.identity.principal(f"Bearer {by_hand(header, claims, key.sign)}")
    for parts in (
        (json.dumps(header).encode(encoding), claims),
        (header, json.dumps(claims).encode(encoding)),
    ):
        assert await world.reason(by_hand(*parts, key.sign)) == "malformed"  # type: ignore[call-arg]


async def test_a_token_over_the_bound_is_not_even_taken_apart(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = world.issuer.token("edwards", padding="x" * 5500)
    assert 7500 < len(largest) <= tokens.MOST_BYTES
    assert await world.identity.principal(f"Bearer {largest}")

    def never(_: str) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(tokens, "parse", never)
    assert await world.reason(world.issuer.token("edwards", padding="x" * 6200)) == "malformed"
    assert await world.reason("a" * 1_000_000) == "malformed"
    with pytest.raises(AssertionError, match="parsed"):
        await world.identity.principal("Bearer a.b.c")


@settings(
    max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    header=st.dictionaries(
        st.sampled_from(["alg", "kid", "typ", "jku", "x"]),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.just("EdDSA")),
    ),
    claims=st.dictionaries(
        st.sampled_from(["iss", "sub", "aud", "exp", "nbf", "iat", "typ", "email", "events"]),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9),
                      st.sampled_from(["groundwork", "https://id.example.com/", "tasks"])),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=4,
        ),
    ),
    noise=st.text(max_size=40),
)  # fmt: skip
async def test_whatever_is_sent_is_refused_and_nothing_else(
    world: World, header: dict[str, Any], claims: dict[str, Any], noise: str
) -> None:
    for sent in (f"Bearer {by_hand(header, claims)}", f"Bearer {noise}", noise):
        with pytest.raises(Unauthenticated):
            await world.identity.principal(sent)


# What is not: the claims

NEVER = LONGEST_SECONDS + 31


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"exp": ...}, "no-expiry"), ({"exp": None}, "no-expiry"), ({"exp": "9999999999"}, "bad-claim"),
        ({"exp": True}, "bad-claim"), ({"exp": [1]}, "bad-claim"), ({"exp": -1}, "bad-claim"),
        ({"exp": 10**400}, "bad-claim"), ({"exp": 1e300}, "bad-claim"), ({"exp": 0}, "expired"),
        ({"iss": ...}, "unknown-issuer"), ({"iss": "https://id.example.com"}, "unknown-issuer"),
        ({"iss": "https://ID.example.com/"}, "unknown-issuer"), ({"iss": None}, "bad-claim"),
        ({"iss": ["https://id.example.com/"]}, "bad-claim"), ({"iss": {}}, "bad-claim"), ({"iss": 1}, "bad-claim"),
        ({"aud": ...}, "wrong-audience"), ({"aud": "other"}, "wrong-audience"), ({"aud": []}, "wrong-audience"),
        ({"aud": "task"}, "wrong-audience"), ({"aud": "tasks "}, "wrong-audience"), ({"aud": 1}, "bad-claim"),
        ({"aud": {"tasks": 1}}, "bad-claim"), ({"aud": [["tasks"]]}, "bad-claim"), ({"aud": ["tasks", 1]}, "bad-claim"),
        ({"sub": ...}, "bad-claim"), ({"sub": ""}, "bad-claim"), ({"sub": None}, "bad-claim"),
        ({"sub": 7}, "bad-claim"),
        ({"sub": ["ana"]}, "bad-claim"), ({"sub": "a" * 513}, "bad-claim"), ({"sub": "a\x00"}, "bad-claim"),
        ({"sub": "a\nb"}, "bad-claim"), ({"sub": "\ud800"}, "bad-claim"),
        ({"nbf": "soon"}, "bad-claim"), ({"iat": False}, "bad-claim"),
        ({"typ": "Refresh"}, "not-for-access"), ({"typ": "Offline"}, "not-for-access"),
        ({"type": "refresh"}, "not-for-access"), ({"token_use": "refresh"}, "not-for-access"),
        ({"token_type": "refresh_token"}, "not-for-access"), ({"typ": "Logout"}, "not-for-access"),
        ({"events": {"http://schemas.openid.net/event/backchannel-logout": {}}}, "not-for-access"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
async def test_a_claim_that_is_missing_or_wrong_is_refused_before_any_key_is_asked_for(
    world: World, changes: dict[str, Any], reason: str
) -> None:
    await world.identity.principal(world.issuer.bearer())
    asked = len(world.server.asked)
    assert (
        await world.reason(by_hand({"alg": "EdDSA", "kid": "new"}, world.issuer.claims(**changes))) == reason
    )
    key = world.issuer.keys["edwards"][1]
    signed = by_hand({"alg": "EdDSA", "kid": "edwards"}, world.issuer.claims(**changes), key.sign)
    assert await world.reason(signed) == reason
    assert len(world.server.asked) == asked


@pytest.mark.parametrize(
    "kind", ["refresh+jwt", "logout+jwt", "dpop+jwt", "secevent+jwt", "id_token", "", 1, ["JWT"]]
)
async def test_a_token_made_for_something_else_is_refused(world: World, kind: Any) -> None:
    key = world.issuer.keys["edwards"][1]
    token = by_hand({"alg": "EdDSA", "kid": "edwards", "typ": kind}, world.issuer.claims(), key.sign)
    assert await world.reason(token) in {"not-for-access", "bad-header"}


async def test_a_token_of_ours_has_to_say_that_it_is_for_access() -> None:
    seed = os.urandom(32)
    identity = Identity(SigningKeys([seed]), {})
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.from_private_bytes(seed)
    kid = jwt.get_unverified_header(own(identity))["kid"]
    claims = {"iss": "groundwork", "aud": "groundwork", "sub": str(ANA), "exp": int(time.time()) + 60}
    for kind in (None, "JWT", "refresh+jwt"):
        token = jwt.encode(claims, private, "EdDSA", headers={"kid": kid, "typ": kind})
        with pytest.raises(Unauthenticated) as caught:
            await identity.principal(f"Bearer {token}")
        assert caught.value.reason == "not-for-access"
    for subject in ("ana", f"{{{ANA}}}", f"urn:uuid:{ANA}", ANA.hex):
        token = jwt.encode(
            {**claims, "sub": subject}, private, "EdDSA", headers={"kid": kid, "typ": "at+jwt"}
        )
        with pytest.raises(Unauthenticated):
            await identity.principal(f"Bearer {token}")


async def test_clocks_may_differ_by_the_leeway_and_no_more(issuer: Issuer, server: JwksServer) -> None:
    configured = load_settings(auth_issuers=json.dumps([server.entry(issuer)]), auth_leeway_seconds=30)
    async with Identity.from_settings(configured) as identity:
        now = int(time.time())
        inside = ({"exp": now - 20}, {"nbf": now + 20}, {"iat": now + 20}, {"exp": now + LONGEST_SECONDS - 5})
        outside = (
            ({"exp": now - 40}, "expired"), ({"nbf": now + 50}, "not-yet-valid"), ({"iat": now + 50}, "not-yet-valid"),
            ({"exp": now + NEVER + 20}, "expiry-too-far"), ({"exp": (now + 600) * 1000}, "bad-claim"),
            ({"exp": 9_999_999_999}, "expiry-too-far"),
        )  # fmt: skip
        for changes in inside:
            assert await identity.principal(issuer.bearer(**changes))
        for wrong, reason in outside:
            with pytest.raises(Unauthenticated) as caught:
                await identity.principal(issuer.bearer(**wrong))
            assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({"email": "Ana@Example.COM"}, "ana@example.com"),
        ({"email": "ana@example.com", "email_verified": True}, "ana@example.com"),
        ({"email": "ana@example.com", "email_verified": False}, None),
        ({"email": "ana@example.com", "email_verified": "false"}, None),
        # As Better Auth spells it.
        ({"email": "ana@example.com", "emailVerified": True}, "ana@example.com"),
        ({"email": "ana@example.com", "emailVerified": False}, None),
        ({"email": "ana@example.com", "email_verified": True, "emailVerified": False}, None),
        ({}, None), ({"email": None}, None), ({"email": ""}, None), ({"email": "nobody"}, None), ({"email": 5}, None),
        ({"email": ["ana@example.com"]}, None), ({"email": "a@" + "b" * 300 + ".com"}, None),
        ({"email": "ana\x00@example.com"}, None), ({"email": "\ud800@example.com"}, None),
    ],
)  # fmt: skip
async def test_an_address_we_cannot_store_or_nobody_vouches_for_is_none(
    world: World, claims: dict[str, Any], expected: str | None
) -> None:
    key = world.issuer.keys["edwards"][1]
    token = by_hand({"alg": "EdDSA", "kid": "edwards"}, world.issuer.claims(**claims), key.sign)
    assert (await world.identity.principal(f"Bearer {token}")).email == expected


# The shared secret, and the issuer whose ids are taken as they are


def shared(**claims: Any) -> str:
    now = int(time.time())
    return "Bearer " + by_hand(
        {"alg": "HS256", "typ": "JWT"}, {"sub": "ana", "exp": now + 60, **claims}, hs256(SECRET.encode())
    )


async def test_a_shared_secret_is_enough_for_who_signs_with_it() -> None:
    identity = Identity.from_settings(load_settings(auth_shared_secret=SECRET))
    found = await identity.principal(shared(email="ana@example.com"))
    assert (found.issuer, found.own) == ("", False)
    assert found.user_id == uuid5(uuid5(NAMESPACE, ""), "ana")
    named = await identity.principal(shared(iss="https://app.example.com", aud="anything"))
    assert named.user_id == uuid5(uuid5(NAMESPACE, "https://app.example.com"), "ana")
    for kid in ("../../dev/null", "x", "groundwork"):
        claims = {"sub": "ana", "exp": int(time.time()) + 60}
        token = by_hand({"alg": "HS256", "kid": kid}, claims, hs256(SECRET.encode()))
        assert (await identity.principal(f"Bearer {token}")).user_id == found.user_id
        forged = by_hand({"alg": "HS256", "kid": kid}, claims, hs256(b""))
        with pytest.raises(Unauthenticated):
            await identity.principal(f"Bearer {forged}")


async def test_who_has_the_shared_secret_speaks_for_nobody_elses_issuer(
    issuer: Issuer, server: JwksServer
) -> None:
    configured = load_settings(auth_shared_secret=SECRET, auth_issuers=json.dumps([server.entry(issuer)]))
    async with Identity.from_settings(configured) as identity:
        assert await identity.principal(shared())
        for theirs in ({"iss": issuer.name, "aud": issuer.audience},
                       {"iss": "groundwork", "aud": "groundwork", "sub": str(ANA)}):  # fmt: skip
            with pytest.raises(Unauthenticated) as caught:
                await identity.principal(shared(**theirs))
            assert caught.value.reason == "wrong-algorithm"


async def test_a_shared_secret_is_held_to_issuer_and_audience_where_they_are_set() -> None:
    identity = Identity.from_settings(
        load_settings(auth_shared_secret=SECRET, auth_shared_issuer="app", auth_shared_audience="tasks")
    )
    assert await identity.principal(shared(iss="app", aud=["tasks"]))
    for wrong in (
        {},
        {"iss": "app"},
        {"aud": "tasks"},
        {"iss": "other", "aud": "tasks"},
        {"iss": "app", "aud": "x"},
    ):
        with pytest.raises(Unauthenticated):
            await identity.principal(shared(**wrong))


async def test_ids_of_one_named_issuer_are_taken_as_they_are() -> None:
    identity = Identity.from_settings(
        load_settings(auth_shared_secret=SECRET, auth_shared_issuer="app", auth_passthrough_issuer="app")
    )
    assert (await identity.principal(shared(iss="app", sub=str(ANA)))).user_id == ANA
    assert (await identity.principal(shared(iss="app", sub=str(ANA).upper()))).user_id == ANA
    for subject in ("ana", ANA.hex, f"{{{ANA}}}", f"urn:uuid:{ANA}", f"{ANA} ", str(ANA) + "0"):
        with pytest.raises(Unauthenticated):
            await identity.principal(shared(iss="app", sub=subject))


# What is remembered


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one for every signature that is verified."""
    done: list[str] = []
    real = VerificationKey.verifies

    def counting(key: VerificationKey, signing_input: bytes, signature: bytes) -> bool:
        done.append(key.algorithm)
        return real(key, signing_input, signature)

    monkeypatch.setattr(VerificationKey, "verifies", counting)
    return done


def stepping() -> tuple[Callable[[], float], Callable[[float], None]]:
    now = [time.time()]

    def step(seconds: float) -> None:
        now[0] += seconds

    return lambda: now[0], step


async def test_a_token_is_verified_once_and_never_believed_past_its_end(verified: list[str]) -> None:
    clock, step = stepping()
    identity = alone(leeway_seconds=0, clock=clock)
    sent = f"Bearer {own(identity, seconds=60)}"
    first = await identity.principal(sent)
    assert all([await identity.principal(sent) is first for _ in range(5)])
    assert len(verified) == 1
    step(61)
    with pytest.raises(Unauthenticated) as caught:
        await identity.principal(sent)
    assert caught.value.reason == "expired"
    assert len(verified) == 1


async def test_within_the_leeway_a_token_is_believed_but_not_remembered(verified: list[str]) -> None:
    clock, step = stepping()
    identity = alone(leeway_seconds=30, clock=clock)
    sent = f"Bearer {own(identity, seconds=60)}"
    step(70)
    for _ in range(3):
        assert await identity.principal(sent)
    assert len(verified) == 3
    assert len(identity._cache) == 0


async def test_a_token_is_verified_anew_now_and_then(verified: list[str]) -> None:
    clock, step = stepping()
    identity = alone(clock=clock)
    sent = f"Bearer {own(identity, seconds=3600)}"
    for _ in range(4):
        assert await identity.principal(sent)
        step(301)
    assert len(verified) == 4


async def test_memory_is_bounded_and_holds_the_tokens_used_last(verified: list[str]) -> None:
    identity = alone(most_cached=3)
    sent = [f"Bearer {own(identity, uuid4())}" for _ in range(4)]
    for each in (*sent[:3], sent[0], sent[3]):
        await identity.principal(each)
    assert len(identity._cache) == 3
    assert len(verified) == 4
    await identity.principal(sent[0])
    assert len(verified) == 4
    await identity.principal(sent[1])
    assert len(verified) == 5


async def test_refused_tokens_leave_nothing_behind_and_push_nobody_out() -> None:
    identity = alone(most_cached=2)
    sent = f"Bearer {own(identity)}"
    await identity.principal(sent)
    for _ in range(50):
        with pytest.raises(Unauthenticated):
            await identity.principal(f"Bearer {own(alone())}")
    assert len(identity._cache) == 1
    assert sent.removeprefix("Bearer ") not in repr(identity._cache)


# Our own keys


async def test_of_two_keys_the_first_signs_and_both_are_believed() -> None:
    old, new = os.urandom(32), os.urandom(32)
    before, during, after = (Identity(SigningKeys(each), {}) for each in ([old], [new, old], [new]))
    old_token, new_token = own(before), own(during)
    assert await during.principal(f"Bearer {old_token}")
    assert await after.principal(f"Bearer {new_token}")
    with pytest.raises(Unauthenticated) as caught:
        await after.principal(f"Bearer {old_token}")
    assert caught.value.reason == "unknown-key"
    assert during.signing.derive_all(b"x") == (after.signing.derive(b"x"), before.signing.derive(b"x"))


def test_what_is_derived_for_one_purpose_says_nothing_of_another() -> None:
    seed = os.urandom(32)
    keys = SigningKeys([seed])
    derived = [keys.derive(purpose) for purpose in (b"cursors", b"cursors2", b"")]
    assert len({*derived, seed}) == 4
    assert {len(each) for each in derived} == {32}
    assert keys.derive(b"cursors") == SigningKeys([seed]).derive(b"cursors")


def test_no_token_is_minted_that_would_be_refused() -> None:
    keys = SigningKeys([os.urandom(32)])
    for seconds in (0, -1, LONGEST_SECONDS + 1):
        with pytest.raises(ValueError, match="366 days"):
            keys.mint(ANA, None, seconds)
    assert "email" not in jwt.decode(keys.mint(ANA, None, 60), options={"verify_signature": False})


async def test_another_name_for_our_own_tokens_is_held_to() -> None:
    one = Identity.from_settings(load_settings())
    other = Identity.from_settings(load_settings(auth_own_issuer="tasks.example.com"))
    assert await other.principal(f"Bearer {own(other)}")
    with pytest.raises(Unauthenticated) as caught:
        await one.principal(f"Bearer {own(other)}")
    assert caught.value.reason == "unknown-issuer"


async def test_an_issuer_can_be_trusted_in_code() -> None:
    trusted = {"app": Trust(SharedSecret(SECRET.encode()), frozenset({"tasks"}))}
    identity = Identity(SigningKeys([os.urandom(32)]), trusted)
    assert (await identity.principal(shared(iss="app", aud="tasks"))).issuer == "app"


# What providers sign, by their own documentation

API, CLIENT = "https://tasks.example.com", "client-1"
AUTH0 = {
    "sub": "auth0|123456",
    "aud": [API, "https://tenant.eu.auth0.com/userinfo"],
    "azp": CLIENT,
    "scope": "openid profile email",
}
CLERK = {
    "azp": "https://app.example.com",
    "sub": "user_1",
    "nbf": 1,
    "fva": [7, -1],
    "sid": "sess_1",
    "sts": "active",
    "v": 2,
}
KEYCLOAK = {
    "jti": "onrtac:1", "sub": "9c3c9a24-6f14-4b43-8f04-1d0b1b1c61c2", "typ": "Bearer", "azp": CLIENT, "sid": "1",
    "acr": "1", "scope": "email profile", "email_verified": True, "email": "ana@example.com",
}  # fmt: skip
SUPABASE = {
    "aal": "aal1", "amr": [{"method": "password", "timestamp": 1}], "aud": "authenticated", "role": "authenticated",
    "email": "ana@example.com", "phone": "", "session_id": "1", "sub": str(ANA), "is_anonymous": False,
    "app_metadata": {"provider": "email"}, "user_metadata": {"email_verified": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kid", "headers", "claims", "expected"),
    [
        ("rsa", {}, AUTH0, None),
        ("rsa", {"typ": "at+jwt"}, {**AUTH0, "azp": ..., "client_id": CLIENT, "jti": "1"}, None),
        ("rsa", {"cat": "cl_1"}, {**CLERK, "aud": API, "email": "ana@example.com"}, "ana@example.com"),
        ("rsa", {}, {**KEYCLOAK, "aud": [API, "account"]}, "ana@example.com"),
        ("rsa", {}, {**KEYCLOAK, "aud": API, "email_verified": False}, None),
        ("curve", {}, SUPABASE, "ana@example.com"),
        ("curve", {}, {**SUPABASE, "is_anonymous": True, "email": ""}, None),
    ],
    ids=[
        "auth0",
        "auth0-rfc9068",
        "clerk-template",
        "keycloak",
        "keycloak-unverified",
        "supabase",
        "supabase-anonymous",
    ],
)
async def test_access_tokens_as_the_recipes_have_them_are_believed(
    recipes: World, kid: str, headers: dict[str, str], claims: dict[str, Any], expected: str | None
) -> None:
    token = recipes.issuer.token(kid, headers=headers, **claims)
    found = await recipes.identity.principal(f"Bearer {token}")
    assert (found.subject, found.email) == (claims["sub"], expected)


@pytest.mark.parametrize(
    ("kid", "claims", "reason"),
    [
        # An ID token is for the application that asked for it.
        ("rsa", {**AUTH0, "aud": CLIENT, "azp": ..., "email": "ana@example.com"}, "wrong-audience"),
        ("rsa", {**CLERK, "aud": ...}, "wrong-audience"),
        ("rsa", {**KEYCLOAK, "aud": "account"}, "wrong-audience"),
        ("rsa", {**KEYCLOAK, "aud": ...}, "wrong-audience"),
        ("rsa", {**KEYCLOAK, "typ": "ID", "aud": CLIENT}, "wrong-audience"),
        ("rsa", {**KEYCLOAK, "typ": "Refresh", "aud": API}, "not-for-access"),
        ("rsa", {**KEYCLOAK, "typ": "Offline", "aud": API}, "not-for-access"),
        # Amazon Cognito's access tokens.
        ("rsa", {"aud": ..., "client_id": CLIENT, "token_use": "access", "sub": str(ANA)}, "wrong-audience"),
        ("curve", {"aud": ..., "sub": ..., "role": "anon", "ref": "project"}, "bad-claim"),
        ("curve", {**SUPABASE, "aud": "anon"}, "wrong-audience"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_other_tokens_of_the_same_providers_are_refused(
    recipes: World, kid: str, claims: dict[str, Any], reason: str
) -> None:
    assert await recipes.reason(recipes.issuer.token(kid, **claims)) == reason


async def test_an_opaque_or_encrypted_token_is_refused(recipes: World) -> None:
    # What Auth0 gives where no audience is asked for: nothing, or a JWE of five parts.
    for token in (secrets.token_urlsafe(24), f"{encoded({'alg': 'dir', 'enc': 'A256GCM'})}..a.b.c"):
        assert await recipes.reason(token) == "malformed"
