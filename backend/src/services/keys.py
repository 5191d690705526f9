"""Keys that tokens are verified with. Each has one algorithm, fixed by what the key is, never by a token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt import PyJWK
from jwt.algorithms import Algorithm, get_default_algorithms
from jwt.exceptions import PyJWTError

PUBLIC: Final = frozenset({"RS256", "ES256", "EdDSA"})
SHARED: Final = frozenset({"HS256"})

# By the kind of a JWK and its curve: the algorithm, and the members that are the key itself (RFC 7638).
_KINDS: Final[Mapping[tuple[object, object], tuple[str, tuple[str, ...]]]] = {
    ("RSA", None): ("RS256", ("e", "kty", "n")),
    ("EC", "P-256"): ("ES256", ("crv", "kty", "x", "y")),
    ("OKP", "Ed25519"): ("EdDSA", ("crv", "kty", "x")),
}
_LEAST_RSA_BITS, _MOST_RSA_BITS = 2048, 8192
_LONGEST_KID = 256


class VerificationKey:
    """One key. `withdrawn` becomes true when its issuer publishes it no longer."""

    __slots__ = ("_key", "_method", "algorithm", "kid", "thumbprint", "withdrawn")

    def __init__(self, algorithm: str, key: Any, *, kid: str | None = None, thumbprint: str = "") -> None:
        self.algorithm = algorithm
        self.kid = kid
        self.thumbprint = thumbprint
        self.withdrawn = False
        self._method: Algorithm = get_default_algorithms()[algorithm]
        self._key = self._method.prepare_key(key)

    def verifies(self, signing_input: bytes, signature: bytes) -> bool:
        return bool(self._method.verify(signing_input, self._key, signature))


class KeySource(Protocol):
    """Where an issuer's keys come from."""

    algorithms: frozenset[str]
    """Every algorithm that a key of this source may have."""

    async def find(
        self, kid: str | None, *, instead_of: VerificationKey | None = None
    ) -> VerificationKey | None:
        """The key a token names; None when there is none. `instead_of` did not fit and is not wanted again.

        Raises `Unavailable` when it cannot be known just now.
        """
        ...


class SharedSecret:
    """The one key of an issuer that signs with a secret; whatever `kid` its tokens may carry."""

    algorithms = SHARED

    def __init__(self, secret: bytes) -> None:
        self._key = VerificationKey("HS256", secret)

    async def find(
        self, kid: str | None, *, instead_of: VerificationKey | None = None
    ) -> VerificationKey | None:
        return None if instead_of is self._key else self._key


def thumbprint_of(jwk: Mapping[str, Any], members: tuple[str, ...]) -> str:
    """RFC 7638: the same for the same key, whatever else is said about it."""
    text = json.dumps({name: jwk.get(name) for name in members}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def from_jwk(jwk: object) -> VerificationKey | str:
    """A public key that verifies signatures, or a slug of why this one cannot be used."""
    if not isinstance(jwk, dict):
        return "not-an-object"
    if jwk.get("kty") == "oct":
        # A published secret would let everybody sign.
        return "secret-published"
    found = _KINDS.get((_text(jwk.get("kty")), _text(jwk.get("crv"))))
    if found is None:
        return "other-kind"
    algorithm, members = found
    if "d" in jwk:
        return "private-key-published"
    if jwk.get("use", "sig") != "sig" or not _may_verify(jwk.get("key_ops")):
        return "other-use"
    if jwk.get("alg", algorithm) != algorithm:
        return "other-algorithm"
    kid = jwk.get("kid")
    if kid is not None and not (isinstance(kid, str) and 0 < len(kid) <= _LONGEST_KID):
        return "bad-kid"
    if any(not isinstance(jwk.get(name), str) for name in members):
        return "malformed"
    try:
        key = PyJWK.from_dict(jwk, algorithm).key
    except (PyJWTError, ValueError, TypeError, UnicodeError):
        return "malformed"
    if isinstance(key, RSAPublicKey) and not _LEAST_RSA_BITS <= key.key_size <= _MOST_RSA_BITS:
        return "bad-size"
    return VerificationKey(algorithm, key, kid=kid, thumbprint=thumbprint_of(jwk, members))


def from_ed25519(key: Ed25519PublicKey, kid: str) -> VerificationKey:
    """One of our own."""
    return VerificationKey("EdDSA", key, kid=kid)


def _text(value: object) -> object:
    """What can be looked up: a list as `kty` would not hash."""
    return value if isinstance(value, str) else None


def _may_verify(operations: object) -> bool:
    return operations is None or (isinstance(operations, list) and "verify" in operations)
