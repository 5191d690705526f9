"""Settings of authentication: which tokens are accepted, and which keys sign those of this service.

No message holds a value: even an issuer's URL may have a password pasted into it.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SecretStr

from ..errors import Fault
from .validation_messages import refuse

if TYPE_CHECKING:
    from .settings import Settings

SEED_BYTES: Final = 32
SEED_PREFIX: Final = "gwk_"
"""Prefix of every key from `python -m src keys new`, so that secret scanners recognise it."""
MIN_SECRET_BYTES: Final = 32
"""RFC 7518, 3.2: an HS256 key has at least as many bits as the hash."""
NEW_KEY: Final = "Generate one with: python -m src keys new"

_MAX_ISSUERS = 16
_MAX_NAME_LENGTH = 512
_MAX_URL_LENGTH = 2048
_EXAMPLE = (
    '[{"issuer": "https://id.example.com/", "jwks_url": "https://id.example.com/jwks.json", '
    '"audience": "tasks"}]'
)


@dataclass(frozen=True, slots=True)
class Issuer:
    """Another issuer whose tokens are accepted: its `iss`, the URL of its keys, and the `aud` of this service."""

    issuer: str
    jwks_url: str
    audiences: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """The entry in AUTH_ISSUERS."""
        return {"issuer": self.issuer, "jwks_url": self.jwks_url, "audience": list(self.audiences)}


def seeds(text: str) -> tuple[bytes, ...]:
    """The seeds in SIGNING_KEYS, 32 bytes each. Raises `ValueError` with a sentence."""
    found = tuple(_seed(part) for part in re.split(r"[\s,]+", text.strip()))
    if len(found) > 2:
        raise ValueError("Must hold at most two keys.")
    if len(set(found)) < len(found):
        raise ValueError("Must not hold the same key twice.")
    return found


def is_loopback(host: str) -> bool:
    """Whether a host is a loopback address or `localhost`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def weakness(secret: str) -> str | None:
    """Why an HS256 secret is easy to guess; None for one that looks random."""
    data = secret.encode("utf-8", "surrogatepass")
    if len(data) < MIN_SECRET_BYTES:
        return f"Must be at least {MIN_SECRET_BYTES} bytes long."
    letters = re.sub(r"[^a-z]", "", secret.lower())
    if any(word in letters for word in _KNOWN):
        return "Must not contain words of published examples."
    if len(set(data)) < 8 or _repeats(data) or _runs(data):
        return "Must be random, without repetitions or sequences."
    return None


def faults_of(settings: Settings) -> list[Fault]:
    """Contradictions between settings that are valid one by one."""
    return [*_secret_faults(settings), *_issuer_faults(settings)]


def weaknesses(settings: Settings) -> Iterator[Fault]:
    """Problems of the shared secret that development only warns about."""
    if settings.auth_shared_secret is None:
        return
    problem = weakness(settings.auth_shared_secret.get_secret_value())
    if problem is not None:
        remedy = "Use the output of `openssl rand -base64 32` on both sides."
        yield Fault("AUTH_SHARED_SECRET", problem, remedy)
    for name, claim in (("auth_shared_issuer", "iss"), ("auth_shared_audience", "aud")):
        if getattr(settings, name) is None:
            # Without it a token that the same secret signed for another purpose would be accepted.
            problem = "Must be set with AUTH_SHARED_SECRET outside development."
            yield Fault(name.upper(), problem, f"Set it to the `{claim}` of the application's tokens.")


def _secret_faults(settings: Settings) -> Iterator[Fault]:
    if settings.auth_shared_secret is None:
        for name in ("auth_shared_issuer", "auth_shared_audience"):
            if getattr(settings, name) is not None:
                remedy = "Set AUTH_SHARED_SECRET, or unset this."
                yield Fault(name.upper(), "Is set, but AUTH_SHARED_SECRET is not.", remedy)
    elif re.search(r'-----BEGIN|^\s*(?:ssh|ecdsa)-|"kty"', settings.auth_shared_secret.get_secret_value()):
        remedy = "Use 32 random bytes. The URL of public keys belongs in AUTH_ISSUERS, as jwks_url."
        yield Fault("AUTH_SHARED_SECRET", "Must not be an asymmetric key or a JWK: it may be public.", remedy)
    elif not settings.auth_shared_secret.get_secret_value().isprintable():
        remedy = "Remove line breaks and invisible characters."
        yield Fault("AUTH_SHARED_SECRET", "Must be one line of printable text.", remedy)
    elif settings.environment != "development":
        yield from weaknesses(settings)


def _issuer_faults(settings: Settings) -> Iterator[Fault]:
    names = [issuer.issuer for issuer in settings.auth_issuers]
    if len(set(names)) < len(names):
        yield Fault(
            "AUTH_ISSUERS", "Lists an issuer twice.", "Give each issuer one entry with all its audiences."
        )
    own, shared = settings.auth_own_issuer, settings.auth_shared_issuer
    if own in {*names, shared}:
        remedy = "Give each issuer a name of its own."
        yield Fault("AUTH_OWN_ISSUER", "Is also the name of another issuer.", remedy)
    if shared is not None and shared in names:
        remedy = "Use either the JWKS or the secret for an issuer."
        yield Fault("AUTH_SHARED_ISSUER", "Is also in AUTH_ISSUERS.", remedy)
    passthrough = settings.auth_passthrough_issuer
    if passthrough is not None and passthrough not in {*names, shared}:
        remedy = "Use an issuer of AUTH_ISSUERS or AUTH_SHARED_ISSUER."
        yield Fault("AUTH_PASSTHROUGH_ISSUER", "Is not a configured issuer.", remedy)


def _seed(part: str) -> bytes:
    text = part.removeprefix(SEED_PREFIX).rstrip("=")
    try:
        seed = base64.b64decode(text.translate(_STANDARD) + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        seed = b""
    if len(seed) != SEED_BYTES:
        raise ValueError(f"Must be {SEED_BYTES} random bytes in base64.")
    # 32 random bytes have about 30 different values; a text or a pattern has few, or is printable.
    if len(set(seed)) < 16 or _runs(seed) or _repeats(seed) or all(32 <= byte < 127 for byte in seed):
        raise ValueError("Must be random.")
    return seed


def _signing_keys(value: SecretStr | None) -> SecretStr | None:
    if value is None or not value.get_secret_value().strip():
        return None
    try:
        seeds(value.get_secret_value())
    except ValueError as error:
        refuse("SIGNING_KEYS", str(error), f"{NEW_KEY}. During a rotation: two keys, separated by a comma.")
    return value


def _issuers(value: object) -> tuple[Issuer, ...]:
    if isinstance(value, tuple) and all(isinstance(member, Issuer) for member in value):
        return value
    try:
        entries = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list | tuple) or len(entries) > _MAX_ISSUERS:
        refuse(
            "AUTH_ISSUERS",
            f"Must be a JSON array of at most {_MAX_ISSUERS} issuers.",
            f"For example {_EXAMPLE}",
        )
    return tuple(_issuer(entry, number) for number, entry in enumerate(entries, start=1))


def _issuer(entry: object, number: int) -> Issuer:
    def reject(problem: str) -> NoReturn:
        refuse("AUTH_ISSUERS", f"Entry {number} {problem}", f"For example {_EXAMPLE}")

    if not isinstance(entry, dict) or set(entry) != {"issuer", "jwks_url", "audience"}:
        reject("must have exactly the fields issuer, jwks_url and audience.")
    audience = entry["audience"]
    audiences = tuple(audience) if isinstance(audience, list) else (audience,)
    if not _is_name(entry["issuer"]):
        reject("must have an issuer: the `iss` of its tokens.")
    if not 1 <= len(audiences) <= _MAX_ISSUERS or not all(_is_name(name) for name in audiences):
        reject("must have an audience: the `aud` of tokens for this service, or an array of several.")
    problem = _url_problem(entry["jwks_url"])
    if problem is not None:
        reject(f"has a jwks_url that {problem}")
    return Issuer(entry["issuer"], entry["jwks_url"], audiences)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_NAME_LENGTH and value.isprintable()


def _name(value: str) -> str:
    if not _is_name(value):
        raise ValueError(f"Must be printable text of at most {_MAX_NAME_LENGTH} characters.")
    return value


def _url_problem(url: object) -> str | None:
    """Why a jwks_url is refused: only https (http on loopback), without credentials or fragment."""
    if not isinstance(url, str) or len(url) > _MAX_URL_LENGTH or not re.fullmatch(r"[!-~]+", url):
        return "is not a URL in ASCII."
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "is not a URL."
    if parts.scheme not in {"https", "http"} or not host or port == 0:
        return "is not a URL that begins with https://."
    if parts.scheme == "http" and not is_loopback(host):
        return "is not https. Plain http is accepted for loopback addresses only."
    if parts.username is not None or parts.password is not None:
        return "contains a user or a password."
    return "has a fragment (#)." if parts.fragment else None


_STANDARD = str.maketrans("-_", "+/")
# Defaults of frameworks, documentation and jwt.io, reduced to letters as `weakness` compares them.
_KNOWN = (
    "changeme", "changethis", "replaceme", "replacethis", "yoursecret", "yoursupersecret", "supersecret",
    "topsecret", "mysecret", "secretkey", "secrettoken", "secretsecret", "bitsecret", "stringsecret", "betterauth",
    "nextauth", "jwtsecret", "authsecret", "password", "placeholder", "example", "insecure", "development",
    "donotuse", "notasecret", "qwerty",
)  # fmt: skip


def _repeats(data: bytes) -> bool:
    return any(data == (data[:unit] * len(data))[: len(data)] for unit in range(1, len(data) // 2 + 1))


def _runs(data: bytes) -> bool:
    """Whether most bytes are one more, one less or the same as the byte before, as in 0123456789abcdef."""
    steps = [after - before for before, after in pairwise(data)]
    return max(map(steps.count, (-1, 0, 1))) * 2 > len(steps)


_Name = Annotated[str, AfterValidator(_name)]


class AuthSettings(BaseModel):
    """Tokens and keys"""

    auth_issuers: Annotated[tuple[Issuer, ...], BeforeValidator(_issuers)] = Field(
        default=(),
        description=(
            f"Other issuers whose tokens are accepted, such as {_EXAMPLE}: the `iss` of their tokens, the URL of their "
            "keys (https), and the `aud` of this service, or an array of several."
        ),
        json_schema_extra={"values": f"JSON, {_MAX_ISSUERS} at most"},
    )
    auth_shared_secret: SecretStr | None = Field(
        default=None,
        max_length=4096,
        description=(
            "A secret shared with an application that signs HS256 tokens itself; at least 32 random bytes. Outside "
            "development a weak one is refused."
        ),
        json_schema_extra={"values": "secret"},
    )
    auth_shared_issuer: _Name | None = Field(
        default=None,
        description="The `iss` that tokens signed with AUTH_SHARED_SECRET must have. May be unset in development only.",
    )
    auth_shared_audience: _Name | None = Field(
        default=None,
        description="The `aud` that tokens signed with AUTH_SHARED_SECRET must have. May be unset in development only.",
    )
    auth_passthrough_issuer: _Name | None = Field(
        default=None,
        description=(
            "The one issuer whose `sub` is a UUID and is used as the user's id. It can name any user of this service. "
            "For other issuers the id is derived from `iss` and `sub`."
        ),
    )
    auth_own_issuer: _Name = Field(
        default="groundwork", description="The `iss` of the tokens that this service signs."
    )
    auth_leeway_seconds: float = Field(
        default=30.0, ge=0, le=300, description="The clock difference tolerated when tokens are verified."
    )
    signing_keys: Annotated[SecretStr | None, AfterValidator(_signing_keys)] = Field(
        default=None,
        description=(
            "The keys that sign the tokens of this service, from `python -m src keys new`: one, or two separated by a "
            "comma during a rotation (the first signs, both verify). Required in production; otherwise generated and "
            "stored in DATA_DIRECTORY."
        ),
        json_schema_extra={"values": "secret"},
    )
