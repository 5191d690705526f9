"""Who asks: from a bearer token to a `Principal`, without the database.

A token is believed for its signature by a key of the issuer that it names. Which keys those are, and by which
algorithm each verifies, is decided by the settings and the issuer, never by the token. docs/identity.md has the rules.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid5

from pydantic import TypeAdapter, ValidationError

from ..errors import Unauthenticated
from ..models.base import QuickUUID
from ..models.user import Email
from . import tokens
from .fetching import Fetcher
from .jwks import FRESH_SECONDS, PublishedKeys
from .keys import KeySource, SharedSecret, VerificationKey
from .signing import AUDIENCE, LONGEST_SECONDS, TOKEN_TYPE, SigningKeys

if TYPE_CHECKING:
    from ..config.settings import Settings

NAMESPACE: Final = UUID("7a1d9b34-52c6-5e0f-9c8e-3f6b0d24e815")
"""Of the ids of users whom other issuers vouch for: `uuid5(uuid5(NAMESPACE, iss), sub)`. It never changes."""
MOST_CACHED: Final = 10_000
"""Verified tokens a process remembers: some 6 MB when full."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody a valid token speaks for. `expires_at` is Unix time; `own`: our token, and not another issuer's.

    `email` is None where the issuer gives none, gives none we can store, or says that it is not verified. `epoch`
    is what our own token holds: a write looks whether it is still that of the user (`services.ownership`).
    """

    user_id: UUID
    issuer: str
    subject: str
    email: str | None
    own: bool
    expires_at: float
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class Trust:
    """One issuer that is believed: by which keys, for which audience, and how its users' ids come about."""

    keys: KeySource
    audiences: frozenset[str] = frozenset()
    """One of these has to be in `aud`; an empty set: it is not looked at."""
    own: bool = False
    passthrough: bool = False
    """`sub` is a UUID and the user's id as it is."""


@dataclass(frozen=True, slots=True)
class _Remembered:
    principal: Principal
    key: VerificationKey
    until: float


class Identity:
    """Opened and closed with the service. Holds no token, only digests of those it has verified."""

    def __init__(
        self,
        signing: SigningKeys,
        trusted: Mapping[str, Trust],
        *,
        anybody: Trust | None = None,
        published: Sequence[PublishedKeys] = (),
        leeway_seconds: float = 30.0,
        most_cached: int = MOST_CACHED,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`trusted` goes by `iss`; `anybody` is for every other `iss`, and for none."""
        self.signing = signing
        self._trusted = {signing.issuer: Trust(signing, frozenset({AUDIENCE}), own=True), **trusted}
        self._anybody = anybody
        self._published = tuple(published)
        self._leeway = leeway_seconds
        self._most_cached = most_cached
        self._clock = clock
        self._cache: OrderedDict[bytes, _Remembered] = OrderedDict()

    @classmethod
    def from_settings(cls, settings: Settings) -> Identity:
        """Raises `ConfigurationError` as `SigningKeys.from_settings` does."""
        signing = SigningKeys.from_settings(settings)
        fetcher = Fetcher()
        published = [
            PublishedKeys(each.issuer, each.jwks_url, fetcher.fetch) for each in settings.auth_issuers
        ]
        trusted = {
            each.issuer: Trust(
                keys,
                frozenset(each.audiences),
                passthrough=each.issuer == settings.auth_passthrough_issuer,
            )
            for each, keys in zip(settings.auth_issuers, published, strict=True)
        }
        anybody = None
        if settings.auth_shared_secret is not None:
            name, audience = settings.auth_shared_issuer, settings.auth_shared_audience
            shared = Trust(
                SharedSecret(settings.auth_shared_secret.get_secret_value().encode()),
                frozenset({audience} if audience is not None else ()),
                passthrough=name is not None and name == settings.auth_passthrough_issuer,
            )
            if name is None:
                anybody = shared
            else:
                trusted[name] = shared
        return cls(
            signing,
            trusted,
            anybody=anybody,
            published=published,
            leeway_seconds=settings.auth_leeway_seconds,
        )

    async def __aenter__(self) -> Identity:
        for keys in self._published:
            keys.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        for keys in self._published:
            await keys.close()

    async def principal(self, authorization: str | None) -> Principal:
        """Whom the Authorization header speaks for.

        Raises `Unauthenticated`, and `Unavailable` where an issuer's keys cannot be had. Takes no connection.
        """
        token = tokens.bearer(authorization)
        digest = hashlib.sha256(token.encode("ascii")).digest()
        remembered = self._cache.get(digest)
        if remembered is not None:
            if self._clock() < remembered.until and not remembered.key.withdrawn:
                self._cache.move_to_end(digest)
                return remembered.principal
            del self._cache[digest]
        principal, key = await self._verify(tokens.parse(token))
        now = self._clock()
        # Verifying anew now and then is what makes an issuer's withdrawn keys noticed.
        until = min(principal.expires_at, now + FRESH_SECONDS)
        if until > now:
            self._cache[digest] = _Remembered(principal, key, until)
            self._cache.move_to_end(digest)
            if len(self._cache) > self._most_cached:
                self._cache.popitem(last=False)
        return principal

    async def _verify(self, token: tokens.Token) -> tuple[Principal, VerificationKey]:
        # Everything that needs no key comes first: what cannot be valid makes nobody fetch anything.
        claims = token.claims
        issuer, subject = claims.get("iss", ""), claims.get("sub")
        if (issuer != "" and not tokens.is_name(issuer)) or not tokens.is_name(subject):
            raise Unauthenticated("bad-claim")
        trust = self._trusted.get(issuer, self._anybody)
        if trust is None:
            raise Unauthenticated("unknown-issuer")
        if token.algorithm not in trust.keys.algorithms:
            raise Unauthenticated("wrong-algorithm")
        if trust.own and token.kind != TOKEN_TYPE:
            raise Unauthenticated("not-for-access")
        expires_at = tokens.expiry(
            claims, now=self._clock(), leeway=self._leeway, longest=float(LONGEST_SECONDS)
        )
        if trust.audiences and trust.audiences.isdisjoint(tokens.audiences(claims)):
            raise Unauthenticated("wrong-audience")
        principal = Principal(
            user_id=_user_id(trust, issuer, str(subject)),
            issuer=issuer,
            subject=str(subject),
            email=_email(claims, own=trust.own),
            own=trust.own,
            expires_at=expires_at,
            epoch=tokens.epoch(claims) if trust.own else None,
        )
        return principal, await _proven(token, trust.keys)


async def _proven(token: tokens.Token, keys: KeySource) -> VerificationKey:
    """The key that the token's signature is by."""
    # On the loop: a signature takes 50 (RS256) to 130 us (ES256, EdDSA), once for a token in five minutes, while
    # the way to a thread and back alone takes 35.
    key = await keys.find(token.kid)
    if key is not None and token.kid is None and not _fits(key, token):
        # An issuer that does not name its keys may have changed the only one.
        key = await keys.find(None, instead_of=key)
    if key is None:
        raise Unauthenticated("unknown-key")
    if not _fits(key, token):
        raise Unauthenticated("bad-signature")
    return key


def _fits(key: VerificationKey, token: tokens.Token) -> bool:
    return key.algorithm == token.algorithm and key.verifies(token.signing_input, token.signature)


def _user_id(trust: Trust, issuer: str, subject: str) -> UUID:
    if not (trust.own or trust.passthrough):
        return QuickUUID(str(uuid5(uuid5(NAMESPACE, issuer), subject)))
    try:
        user_id = QuickUUID(subject)
    except ValueError:
        user_id = None
    # `UUID` also reads braces and URNs: one user, one spelling.
    if user_id is None or str(user_id) != subject.lower():
        raise Unauthenticated("bad-claim")
    return user_id


_address: TypeAdapter[str] = TypeAdapter(Email)


def _email(claims: Mapping[str, Any], *, own: bool) -> str | None:
    # Whoever types somebody else's address into a sign-up form elsewhere must not take its place here. Better Auth's
    # tokens, as they come, spell the claim as its tables do. With a token of our own the place is taken already.
    unverified = (False, "false")
    if not own and any(claims.get(name) in unverified for name in ("email_verified", "emailVerified")):
        return None
    try:
        return _address.validate_python(claims.get("email"))
    except ValidationError:
        return None
