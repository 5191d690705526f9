"""What a token says, read strictly and before anything is believed: a JWS in compact form (RFC 7515, RFC 8725).

Whatever is wrong raises `Unauthenticated` with a slug for our own log. Nothing of the token is ever in it.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from ..errors import Unauthenticated

MOST_BYTES: Final = 8192
"""The longest token that is looked at; servers and proxies take few headers beyond that."""
LONGEST_TEXT: Final = 512
"""The longest `iss`, `sub`, `aud` and `kid`."""
LAST_EPOCH: Final = 2**31 - 1
"""What the column holds."""

_COMPACT = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)", re.ASCII)
# They would let a token choose its own key, or change what its other parts mean.
_LEADING = frozenset({"jwk", "jku", "x5u", "x5c", "crit", "b64", "zip", "enc"})
_ACCESS = frozenset({None, "jwt", "at+jwt", "application/at+jwt"})
# In the claims, where Keycloak, Cognito and others say what a token is for.
_PURPOSES = ("typ", "type", "token_type", "token_use")
_OTHER_PURPOSES = ("refresh", "offline", "logout")


@dataclass(frozen=True, slots=True)
class Token:
    """A token taken apart; nothing of it is verified."""

    algorithm: str
    kid: str | None
    kind: str | None
    """`typ` in lower case."""
    claims: Mapping[str, Any]
    signing_input: bytes
    signature: bytes


def bearer(authorization: str | None) -> str:
    """The token in an Authorization header. Looks at no more than its length and its scheme."""
    if not authorization:
        raise Unauthenticated("no-token")
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated("other-scheme")
    token = token.strip(" ")
    if not token:
        raise Unauthenticated("no-token")
    if len(token) > MOST_BYTES or not token.isascii():
        raise Unauthenticated("malformed")
    return token


def parse(token: str) -> Token:
    """Takes a token apart and refuses what no access token may say of itself."""
    parts = _COMPACT.fullmatch(token)
    if parts is None:
        _refuse("malformed")
    header, claims = _object(parts[1]), _object(parts[2])
    algorithm, kid, kind = header.get("alg"), header.get("kid"), header.get("typ")
    if not isinstance(algorithm, str) or not _LEADING.isdisjoint(header):
        _refuse("bad-header")
    if kid is not None and not is_name(kid):
        _refuse("bad-header")
    if kind is not None and not isinstance(kind, str):
        _refuse("bad-header")
    kind = kind.lower() if kind is not None else None
    if kind not in _ACCESS or "events" in claims or any(_is_other(claims.get(name)) for name in _PURPOSES):
        _refuse("not-for-access")
    signing_input = token[: parts.end(2)].encode("ascii")
    return Token(algorithm, kid, kind, claims, signing_input, _decoded(parts[3]))


def expiry(claims: Mapping[str, Any], *, now: float, leeway: float, longest: float) -> float:
    """`exp`, where the token is valid at `now` (Unix time) give or take `leeway` seconds."""
    expires_at = _instant(claims, "exp")
    if expires_at is None:
        _refuse("no-expiry")
    if expires_at + leeway <= now:
        _refuse("expired")
    if expires_at - now > longest + leeway:
        # More often milliseconds taken for seconds than anybody's wish.
        _refuse("expiry-too-far")
    for name in ("nbf", "iat"):
        instant = _instant(claims, name)
        if instant is not None and instant > now + leeway:
            _refuse("not-yet-valid")
    return expires_at


def audiences(claims: Mapping[str, Any]) -> frozenset[str]:
    """`aud`, one or several; an empty set where there is none."""
    value = claims.get("aud")
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_name(name) for name in found):
        _refuse("bad-claim")
    return frozenset(found)


def epoch(claims: Mapping[str, Any]) -> int:
    """`epoch`, which every token of our own has."""
    value = claims.get("epoch")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LAST_EPOCH:
        _refuse("bad-claim")
    return value


def is_name(value: object) -> bool:
    """A text that can be compared, hashed and stored: no control characters, no halves of surrogate pairs."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_TEXT and value.isprintable()


def _instant(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    # A bool is an int in Python. Bounded on both sides, because huge integers do not fit a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        _refuse("bad-claim")
    return float(value)


def _is_other(purpose: object) -> bool:
    return isinstance(purpose, str) and any(word in purpose.lower() for word in _OTHER_PURPOSES)


def _object(part: str) -> dict[str, Any]:
    try:
        # Given bytes, `loads` would also take UTF-16, UTF-32 and a byte order mark (RFC 7519, 3 has UTF-8 only).
        text = _decoded(part).decode("utf-8")
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        _refuse("malformed")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        # Two readers might each believe another one of the two.
        raise ValueError("a name stands twice")
    return found


def _no_constant(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


def _decoded(part: str) -> bytes:
    try:
        data = base64.b64decode(part.translate(_STANDARD) + "=" * (-len(part) % 4), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    # Bits left over in the last character would give one token many spellings.
    if base64.urlsafe_b64encode(data).rstrip(b"=") != part.encode("ascii"):
        _refuse("malformed")
    return data


_STANDARD = str.maketrans("-_", "+/")


def _refuse(reason: str) -> NoReturn:
    raise Unauthenticated(reason) from None
