"""The keys of our own: they sign access tokens, and other secrets are derived from them.

In production they come from SIGNING_KEYS. Elsewhere one is made at the first start and kept beside the data.
"""

from __future__ import annotations

import base64
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ..config.auth import NEW_KEY, SEED_BYTES, SEED_PREFIX, seeds
from ..config.private_files import make_directory
from ..errors import ConfigurationError, Fault, GroundworkError
from .keys import VerificationKey, from_ed25519, thumbprint_of

if TYPE_CHECKING:
    from ..config.settings import Settings

AUDIENCE: Final = "groundwork"
TOKEN_TYPE: Final = "at+jwt"  # noqa: S105 - RFC 9068's name of the kind
FILE_NAME: Final = "signing-key"
LONGEST_SECONDS: Final = 366 * 86400
"""No token is valid for longer than this, ours or another's."""


def new_key() -> str:
    """A key for SIGNING_KEYS."""
    return SEED_PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(SEED_BYTES)).decode().rstrip("=")


class SigningKeys:
    """One or two keys: the first signs, all verify. Never printed, never logged."""

    algorithms = frozenset({"EdDSA"})

    def __init__(self, seeds: Sequence[bytes], issuer: str = "groundwork") -> None:
        self.issuer = issuer
        self._seeds = tuple(seeds)
        self._private = Ed25519PrivateKey.from_private_bytes(self._seeds[0])
        keys = [_public(seed) for seed in self._seeds]
        self._kid = str(keys[0].kid)
        self._keys = {key.kid: key for key in keys}

    @classmethod
    def from_settings(cls, settings: Settings) -> SigningKeys:
        """Raises `ConfigurationError` where there is no key and none may be made, or its file cannot be used."""
        if settings.signing_keys is not None:
            return cls(seeds(settings.signing_keys.get_secret_value()), settings.auth_own_issuer)
        if settings.environment == "production":
            problem = "Must be set in production."
            raise ConfigurationError([Fault("SIGNING_KEYS", problem, f"{NEW_KEY}.")])
        return cls(_kept(settings.data_directory), settings.auth_own_issuer)

    async def find(
        self, kid: str | None, *, instead_of: VerificationKey | None = None
    ) -> VerificationKey | None:
        key = self._keys.get(kid)
        return None if key is instead_of else key

    def mint(self, user_id: UUID, email: str | None, lifetime_seconds: int, *, epoch: int = 0) -> str:
        """An access token of this user, good for writing as long as `epoch` is theirs (a new user's is 0).

        Raises `ValueError` for a lifetime that `Identity` would refuse.
        """
        if not 0 < lifetime_seconds <= LONGEST_SECONDS:
            raise ValueError("a token is valid for more than no time, and for 366 days at most")
        now = int(time.time())
        claims: dict[str, Any] = {
            "iss": self.issuer,
            "aud": AUDIENCE,
            "sub": str(user_id),
            "iat": now,
            "exp": now + int(lifetime_seconds),
            "epoch": epoch,
        }
        if email is not None:
            # No mail is ever sent, so whoever trusts us elsewhere must not take it for theirs.
            claims |= {"email": email, "email_verified": False}
        headers = {"kid": self._kid, "typ": TOKEN_TYPE}
        return jwt.encode(claims, self._private, algorithm="EdDSA", headers=headers)

    def document(self) -> dict[str, Any]:
        """The public keys as a JWK set (RFC 7517), for whoever verifies our tokens elsewhere."""
        return {"keys": [_jwk(seed) for seed in self._seeds]}

    def derive(self, purpose: bytes) -> bytes:
        """32 secret bytes for one purpose, the same as long as the first key is; unrelated to those of any other."""
        return self.derive_all(purpose)[0]

    def derive_all(self, purpose: bytes) -> tuple[bytes, ...]:
        """As `derive`, of every key: what was made before a rotation can then still be recognised."""
        return tuple(
            HKDF(algorithm=SHA256(), length=32, salt=None, info=b"groundwork/" + purpose).derive(seed)
            for seed in self._seeds
        )


def _public(seed: bytes) -> VerificationKey:
    return from_ed25519(Ed25519PrivateKey.from_private_bytes(seed).public_key(), _jwk(seed)["kid"])


def _jwk(seed: bytes) -> dict[str, str]:
    raw = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    key = {"crv": "Ed25519", "kty": "OKP", "x": base64.urlsafe_b64encode(raw).decode().rstrip("=")}
    # Long enough that two keys never share it, short enough for a header sent with every request.
    return {**key, "kid": thumbprint_of(key, ("crv", "kty", "x"))[:16], "use": "sig", "alg": "EdDSA"}


def _kept(directory: Path) -> tuple[bytes, ...]:
    """The key in the data directory; made if there is none. Processes that start at once get the same one."""
    path = directory / FILE_NAME
    try:
        if not path.exists():
            make_directory(directory)
            _make(path)
        mode, text = path.stat().st_mode, path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError, GroundworkError) as error:
        reason = getattr(error, "strerror", None) or "the directory cannot be made"
        problem = f"Is not set, and {path} cannot be used instead ({reason})."
        raise ConfigurationError([Fault("SIGNING_KEYS", problem, f"{NEW_KEY}.")]) from None
    if mode & 0o077:
        problem = f"Is not set, and {path} can be read by others."
        raise ConfigurationError([Fault("SIGNING_KEYS", problem, f"Delete {path}: a new one is made.")])
    try:
        return seeds(text)
    except ValueError as error:
        problem = f"Is not set, and {path} is not valid. {error}"
    raise ConfigurationError([Fault("SIGNING_KEYS", problem, f"Delete {path}: a new one is made.")])


def _make(path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(new_key() + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            # Unlike a rename, a link never takes the place of what another process has just made.
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        temporary.unlink()
