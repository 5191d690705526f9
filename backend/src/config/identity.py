"""What the operator says about tokens: whose are accepted, and which keys sign our own. Opens nothing.

A finding never holds a value: even an issuer's address may have a password pasted into it.
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

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

from ..errors import Fault

if TYPE_CHECKING:
    from .settings import Settings

SEED_BYTES: Final = 32
SEED_PREFIX: Final = "gwk_"
"""Leads every key that `python -m src keys new` prints, so that scanners for secrets can know it."""
LEAST_SECRET_BYTES: Final = 32
"""RFC 7518, 3.2: an HS256 key has at least as many bits as the hash."""
NEW_KEY: Final = "Make one with: python -m src keys new"

_MOST_ISSUERS = 16
_LONGEST_NAME = 512
_LONGEST_URL = 2048
_EXAMPLE = (
    '[{"issuer": "https://id.example.com/", "jwks_url": "https://id.example.com/jwks.json", '
    '"audience": "tasks"}]'
)


@dataclass(frozen=True, slots=True)
class Issuer:
    """Somebody else whose tokens are accepted: its `iss`, where its public keys are, and the `aud` that means us."""

    issuer: str
    jwks_url: str
    audiences: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """As it stands in AUTH_ISSUERS."""
        return {"issuer": self.issuer, "jwks_url": self.jwks_url, "audience": list(self.audiences)}


def seeds(text: str) -> tuple[bytes, ...]:
    """The secret seeds in SIGNING_KEYS, 32 bytes each. Raises `ValueError` with a sentence about what is wrong."""
    found = tuple(_seed(part) for part in re.split(r"[\s,]+", text.strip()))
    if len(found) > 2:
        raise ValueError("holds more than two keys.")
    if len(set(found)) < len(found):
        raise ValueError("holds the same key twice.")
    return found


def is_loopback(host: str) -> bool:
    """Whether an address can only be this machine; a name other than `localhost` may be anything."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def weakness(secret: str) -> str | None:
    """Why an HS256 secret is too easy to guess; None for one that looks made by chance."""
    data = secret.encode("utf-8", "surrogatepass")
    if len(data) < LEAST_SECRET_BYTES:
        return f"is shorter than {LEAST_SECRET_BYTES} bytes."
    letters = re.sub(r"[^a-z]", "", secret.lower())
    if any(word in letters for word in _KNOWN):
        return "holds words that stand in published examples."
    if len(set(data)) < 8 or _repeats(data) or _runs(data):
        return "repeats itself or counts."
    return None


def faults_of(settings: Settings) -> list[Fault]:
    """What is wrong between the settings, each of which may be right by itself."""
    return [*_secret_faults(settings), *_issuer_faults(settings)]


def weaknesses(settings: Settings) -> list[tuple[str, str]]:
    """What development lets pass, to be warned about: the variable and a sentence."""
    secret = settings.auth_shared_secret
    problem = weakness(secret.get_secret_value()) if secret is not None else None
    return [] if problem is None else [("AUTH_SHARED_SECRET", f"AUTH_SHARED_SECRET {problem}")]


def _secret_faults(settings: Settings) -> Iterator[Fault]:
    if settings.auth_shared_secret is None:
        for name in ("auth_shared_issuer", "auth_shared_audience"):
            if getattr(settings, name) is not None:
                remedy = "Set AUTH_SHARED_SECRET, or unset this."
                yield Fault(name.upper(), "is set, but AUTH_SHARED_SECRET is not.", remedy)
    elif re.search(r'-----BEGIN|^\s*(?:ssh|ecdsa)-|"kty"', settings.auth_shared_secret.get_secret_value()):
        remedy = "Take 32 random bytes; keys in pairs belong into AUTH_ISSUERS, by their jwks_url."
        yield Fault("AUTH_SHARED_SECRET", "is a key of another kind, which may be public.", remedy)
    elif settings.environment != "development":
        for variable, problem in weaknesses(settings):
            yield Fault(
                variable,
                problem.removeprefix(f"{variable} "),
                "Take 32 random bytes on both sides, as `openssl rand -base64 32` prints them.",
            )


def _issuer_faults(settings: Settings) -> Iterator[Fault]:
    names = [issuer.issuer for issuer in settings.auth_issuers]
    if len(set(names)) < len(names):
        yield Fault("AUTH_ISSUERS", "names an issuer twice.", "Give each one entry with all its audiences.")
    own, shared = settings.auth_own_issuer, settings.auth_shared_issuer
    if own in {*names, shared}:
        remedy = "Every issuer needs a name of its own, or one could speak for the other."
        yield Fault("AUTH_OWN_ISSUER", "is also the name of another issuer.", remedy)
    if shared is not None and shared in names:
        remedy = "An issuer proves itself either by its JWKS or by the secret."
        yield Fault("AUTH_SHARED_ISSUER", "is also in AUTH_ISSUERS.", remedy)
    passthrough = settings.auth_passthrough_issuer
    if passthrough is not None and passthrough not in {*names, shared}:
        remedy = "Name an issuer that stands in AUTH_ISSUERS or AUTH_SHARED_ISSUER."
        yield Fault("AUTH_PASSTHROUGH_ISSUER", "is none of the issuers.", remedy)


# One setting at a time


def _refuse(variable: str, problem: str, remedy: str) -> NoReturn:
    # The kind that carries whole faults; Pydantic's own error would hold the value.
    raise PydanticCustomError(
        "address", "is not usable", {"faults": [Fault(variable, problem, remedy)]}
    ) from None


def _seed(part: str) -> bytes:
    text = part.removeprefix(SEED_PREFIX).rstrip("=")
    try:
        seed = base64.b64decode(text.translate(_STANDARD) + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        seed = b""
    if len(seed) != SEED_BYTES:
        raise ValueError(f"holds something that is not {SEED_BYTES} bytes in base64.")
    # 32 random bytes have about 30 different values; a text, or a pattern, has few or is printable.
    if len(set(seed)) < 16 or _runs(seed) or _repeats(seed) or all(32 <= byte < 127 for byte in seed):
        raise ValueError("holds a key that was not made by chance.")
    return seed


def _signing_keys(value: SecretStr | None) -> SecretStr | None:
    if value is None or not value.get_secret_value().strip():
        return None
    try:
        seeds(value.get_secret_value())
    except ValueError as error:
        _refuse("SIGNING_KEYS", str(error), f"{NEW_KEY}. Two, with a comma between them, while you rotate.")
    return value


def _issuers(value: object) -> tuple[Issuer, ...]:
    if isinstance(value, tuple) and all(isinstance(member, Issuer) for member in value):
        return value
    try:
        entries = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list | tuple) or len(entries) > _MOST_ISSUERS:
        _refuse(
            "AUTH_ISSUERS", f"has to be a JSON array of {_MOST_ISSUERS} issuers at most.", f"As in {_EXAMPLE}"
        )
    return tuple(_issuer(entry, number) for number, entry in enumerate(entries, start=1))


def _issuer(entry: object, number: int) -> Issuer:
    def refuse(problem: str) -> NoReturn:
        _refuse("AUTH_ISSUERS", f"entry {number} {problem}", f"As in {_EXAMPLE}")

    if not isinstance(entry, dict) or set(entry) != {"issuer", "jwks_url", "audience"}:
        refuse("has to have exactly issuer, jwks_url and audience.")
    audience = entry["audience"]
    audiences = tuple(audience) if isinstance(audience, list) else (audience,)
    if not _is_name(entry["issuer"]):
        refuse("needs an issuer: the text that stands as `iss` in its tokens.")
    if not 1 <= len(audiences) <= _MOST_ISSUERS or not all(_is_name(name) for name in audiences):
        refuse(
            "needs an audience: the text, or texts, of which one stands as `aud` in tokens for this service."
        )
    problem = _url_problem(entry["jwks_url"])
    if problem is not None:
        refuse(f"has a jwks_url that {problem}")
    return Issuer(entry["issuer"], entry["jwks_url"], audiences)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME and value.isprintable()


def _name(value: str | None) -> str | None:
    if value is not None and not _is_name(value):
        raise PydanticCustomError("name", "is not a printable text")
    return value


def _url_problem(url: object) -> str | None:
    """Why keys cannot be fetched from there: only https, or this machine, and nothing that hides where it goes."""
    if not isinstance(url, str) or len(url) > _LONGEST_URL or not re.fullmatch(r"[!-~]+", url):
        return "is not a URL in ASCII."
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "is not a URL."
    if parts.scheme not in {"https", "http"} or not host or port == 0:
        return "is not a URL that begins with https://."
    if parts.scheme == "http" and not is_loopback(host):
        return "is not https; plain http is for this machine only."
    if parts.username is not None or parts.password is not None:
        return "holds a user or a password."
    return "has a fragment (#)." if parts.fragment else None


_STANDARD = str.maketrans("-_", "+/")
# Letters only, as `weakness` compares them: defaults of frameworks, documentation and jwt.io.
_KNOWN = (
    "changeme", "changethis", "replaceme", "replacethis", "yoursecret", "yoursupersecret", "supersecret",
    "topsecret", "mysecret", "secretkey", "secrettoken", "secretsecret", "bitsecret", "stringsecret", "betterauth",
    "nextauth", "jwtsecret", "authsecret", "password", "placeholder", "example", "insecure", "development",
    "donotuse", "notasecret", "qwerty",
)  # fmt: skip


def _repeats(data: bytes) -> bool:
    return any(data == (data[:unit] * len(data))[: len(data)] for unit in range(1, len(data) // 2 + 1))


def _runs(data: bytes) -> bool:
    """Whether most bytes follow their neighbour, as in 0123456789abcdef."""
    steps = [after - before for before, after in pairwise(data)]
    return max(map(steps.count, (-1, 0, 1))) * 2 > len(steps)


# The types of the settings: how they are read, and the sentence about each.

AuthIssuers = Annotated[
    tuple[Issuer, ...],
    NoDecode,
    BeforeValidator(_issuers),
    Field(
        description=(
            f"Whose tokens are accepted besides our own, such as {_EXAMPLE}: their `iss`, where they publish their "
            "keys (https), and the `aud`, or an array of several, that means this service."
        ),
        json_schema_extra={"values": f"JSON, {_MOST_ISSUERS} at most"},
    ),
]
AuthSharedSecretStr = Annotated[
    SecretStr | None,
    Field(
        description=(
            "A secret shared with an application that signs HS256 tokens itself; at least 32 bytes, made by chance. "
            "Outside development a weak one is refused."
        ),
        json_schema_extra={"values": "secret"},
    ),
]
AuthSharedIssuer = Annotated[
    str | None,
    AfterValidator(_name),
    Field(description="The `iss` that tokens signed with AUTH_SHARED_SECRET must have. Unset: any, or none."),
]
AuthSharedAudience = Annotated[
    str | None,
    AfterValidator(_name),
    Field(description="The `aud` that tokens signed with AUTH_SHARED_SECRET must have. Unset: any, or none."),
]
AuthPassthroughIssuer = Annotated[
    str | None,
    AfterValidator(_name),
    Field(
        description=(
            "The one issuer whose `sub` is a UUID and becomes the user's id as it is. It can name any user of this "
            "service. Everybody else's ids are made from `iss` and `sub`."
        )
    ),
]
AuthOwnIssuer = Annotated[
    str, AfterValidator(_name), Field(min_length=1, description="The `iss` of the tokens this service signs.")
]
AuthLeeway = Annotated[
    float,
    Field(ge=0, le=300, description="How far the clocks of issuers may differ from ours."),
]
SigningKeysSecretStr = Annotated[
    SecretStr | None,
    AfterValidator(_signing_keys),
    Field(
        description=(
            "The keys of our own tokens, from `python -m src keys new`: one, or two with a comma between them while "
            "you rotate (the first signs, both are accepted). Required in production; else made and kept in "
            "DATA_DIRECTORY."
        ),
        json_schema_extra={"values": "secret"},
    ),
]
