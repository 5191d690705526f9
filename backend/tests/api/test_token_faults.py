"""Rows A1 and A2 of docs/reliability.md over HTTP: tokens that look like one, on every operation that wants one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from uuid import UUID

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from asking import TASKS, Caller, hold, people
from issuers import by_hand, hs256
from src.services.signing import new_key, seeds

if TYPE_CHECKING:
    from tests.api.conftest import MakeApp, Serve


class Forger:
    """Knows everything but the key, or, with `key`, even that: then only what it says can be wrong."""

    def __init__(self, key: Ed25519PrivateKey, user_id: UUID, header: dict[str, Any]) -> None:
        self.key = key
        self.header = header
        now = int(time.time())
        self.claims = {
            "iss": "groundwork",
            "aud": "groundwork",
            "sub": str(user_id),
            "iat": now,
            "exp": now + 600,
            "epoch": 0,
        }

    def signed(self, header: dict[str, Any] | None = None, **claims: Any) -> str:
        """By the right key; a claim or a header that is `...` is left out."""
        said = {name: value for name, value in {**self.claims, **claims}.items() if value is not ...}
        heads = {name: value for name, value in {**self.header, **(header or {})}.items() if value is not ...}
        return by_hand(heads, said, self.key.sign)

    def mixed_up(self) -> dict[str, str]:
        """A1: what tells the verifier how to verify."""
        public = self.key.public_key()
        raw = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        own = Ed25519PrivateKey.generate()
        jwk = jwt.algorithms.OKPAlgorithm.to_jwk(own.public_key(), as_dict=True)
        kid = self.header["kid"]
        return {
            "none": by_hand({**self.header, "alg": "none"}, self.claims, lambda _: b""),
            "None": by_hand({**self.header, "alg": "None"}, self.claims, lambda _: b""),
            "the public key as a secret": by_hand({**self.header, "alg": "HS256"}, self.claims, hs256(raw)),
            "its PEM as a secret": by_hand({**self.header, "alg": "HS256"}, self.claims, hs256(pem)),
            "an empty secret": by_hand({**self.header, "alg": "HS256"}, self.claims, hs256(b"")),
            "a key of one's own": by_hand(self.header, self.claims, own.sign),
            "jwk": by_hand({**self.header, "jwk": jwk}, self.claims, own.sign),
            "jku": by_hand({**self.header, "jku": "http://127.0.0.1:1/keys"}, self.claims, own.sign),
            "x5u": by_hand({**self.header, "x5u": "http://127.0.0.1:1/keys"}, self.claims, own.sign),
            "a path for a kid": by_hand({**self.header, "kid": "../../../dev/null"}, self.claims, hs256(b"")),
            "SQL for a kid": by_hand({**self.header, "kid": f"{kid}' OR '1'='1"}, self.claims, own.sign),
            "a kid that is no text": by_hand({**self.header, "kid": [kid]}, self.claims, own.sign),
            "crit": self.signed({"crit": ["exp"]}),
            "unknown crit": self.signed({"crit": ["x"], "x": 1}),
            "RS256": by_hand({**self.header, "alg": "RS256"}, self.claims, self.key.sign),
            "no signature": self.signed().rpartition(".")[0] + ".",
            "no algorithm": self.signed({"alg": ...}),
        }

    def untrue(self) -> dict[str, str]:
        """A2: by the right key, and yet no token for this."""
        now = time.time()
        return {
            **{
                f"exp {value!r}": self.signed(exp=value)
                for value in (..., None, "x", True, -1, 0, now - 3600, [now])
            },
            **{f"exp {value!r}": self.signed(exp=value) for value in (now + 10 * 366 * 86400, 1e300, 2**70)},
            **{
                f"aud {value!r}": self.signed(aud=value)
                for value in (..., None, "", "other", [], ["other"], {}, 1)
            },
            **{
                f"iss {value!r}": self.signed(iss=value)
                for value in (..., None, "", "other", ["groundwork"], 1)
            },
            **{
                f"sub {value!r}": self.signed(sub=value)
                for value in (..., None, "", "ana", 1, "\0", "x" * 5000)
            },
            **{
                f"typ {value!r}": self.signed({"typ": value})
                for value in (..., "JWT", "refresh+jwt", "rt+jwt", "", 1)
            },
        }


async def test_a1_a2_a_token_that_is_none_is_401_on_every_operation(
    make_app: MakeApp, serve: Serve, app_database_url: str, database_url: str
) -> None:
    text = new_key()
    key = Ed25519PrivateKey.from_private_bytes(seeds(text)[0])
    assert key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()) == seeds(text)[0]
    app = make_app(database_url=app_database_url, database_migration_url=database_url, signing_keys=text)
    async with people(serve, app) as (ana, _):
        task = await ana.create("private")
        header = jwt.get_unverified_header(ana.headers["authorization"].removeprefix("Bearer "))
        forger = Forger(key, ana.id, header)
        await with_token(ana, forger.signed(), 200)  # The forger's tools are good for more than nothing.
        bad = {**forger.mixed_up(), **forger.untrue()}
        assert len(bad) > 45
        for name, token in bad.items():
            for method, path in (
                ("GET", TASKS),
                ("GET", f"{TASKS}/{task['id']}"),
                ("DELETE", f"{TASKS}/{task['id']}"),
                ("GET", f"{TASKS}/export"),
                ("POST", f"{TASKS}/batch"),
            ):
                answer = hold(
                    await ana.client.request(method, path, headers={"authorization": f"Bearer {token}"})
                )
                assert answer.status_code == 401, (name, method, path)
                assert 'error="invalid_token"' in answer.headers["www-authenticate"], name
        assert await ana.all() == [task]


async def with_token(ana: Caller, token: str, status: int) -> None:
    answer = await ana.client.get(TASKS, headers={"authorization": f"Bearer {token}"})
    assert answer.status_code == status, answer.text
