"""What the operator says about accounts of our own: who may sign up, what a password costs, how often one may try."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Final, Literal, NoReturn

from pydantic import BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from ..errors import Fault

if TYPE_CHECKING:
    from limits import RateLimitItem

    from .settings import Settings

# OWASP's least for Argon2id with one lane; nothing weaker can be set.
LEAST_MEMORY_KIB: Final = 19456
LEAST_PASSES: Final = 2
# What one password may cost at most, whoever asks for it: 256 MiB, and some two seconds.
MOST_MEMORY_KIB: Final = 256 << 10
MOST_PASSES: Final = 8

OFF: Final = "off"
_MOST_RULES = 4
_MOST_ATTEMPTS = 1_000_000
_LONGEST_SECONDS = 86_400
# The library takes a little more than it writes down: `5/0minutes`, or a colon between two rules.
_RULE = r"\s*[0-9]{1,9}\s*(?:/|per)\s*(?:[1-9][0-9]{0,5}\s*)?[a-z]{1,9}\s*"
_RULES = re.compile(f"{_RULE}(?:[;,|]{_RULE}){{0,{_MOST_RULES - 1}}}", re.ASCII)


def rules(text: str) -> tuple[RateLimitItem, ...]:
    """A limit such as `5/minute;30/hour` as its rules; none for `off`. Raises `ValueError` with a sentence."""
    # Only who sets or uses a limit pays the 30 ms that this import takes.
    from limits import parse_many

    if text == OFF:
        return ()
    try:
        found = tuple(parse_many(text)) if _RULES.fullmatch(text) else ()
    except ValueError:
        found = ()
    if not found:
        raise ValueError("is not a limit.")
    if not all(1 <= rule.amount <= _MOST_ATTEMPTS for rule in found):
        raise ValueError("allows nothing, or over a million attempts.")
    if not all(rule.get_expiry() <= _LONGEST_SECONDS for rule in found):
        raise ValueError("counts over more than a day.")
    return found


def may_sign_up(settings: Settings) -> bool:
    """Whether strangers may make accounts: where other issuers are trusted, only when SIGN_UP says so."""
    if settings.sign_up == "auto":
        return not settings.auth_issuers and settings.auth_shared_secret is None
    return settings.sign_up == "open"


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _limit(value: object, info: ValidationInfo) -> object:
    def refuse(problem: str) -> NoReturn:
        remedy = f"As in 5/minute;30/hour ({_MOST_RULES} rules at most), or off."
        # The kind that carries whole faults, and no value.
        raise PydanticCustomError(
            "address", "is not usable", {"faults": [Fault(str(info.field_name).upper(), problem, remedy)]}
        ) from None

    if not isinstance(value, str):
        refuse("is not a text.")
    limit = value.strip().lower()
    try:
        rules(limit)
    except ValueError as error:
        refuse(str(error))
    return limit


# The types of the settings: how they are read, and the sentence about each.

SignUp = Annotated[
    Literal["auto", "open", "closed"],
    BeforeValidator(_lower),
    Field(
        description=(
            "Whether strangers may make an account with e-mail and password; auto: yes, unless AUTH_ISSUERS or "
            "AUTH_SHARED_SECRET names somebody else who knows the users."
        )
    ),
]
AccessTokenSeconds = Annotated[
    int,
    Field(
        ge=60,
        le=900,
        description=(
            "How long our own access tokens are valid; so long may somebody read whose session was ended."
        ),
    ),
]
SessionIdleDays = Annotated[
    int,
    Field(ge=1, le=3650, description="After how long without use a session ends; every refresh is a use."),
]
SessionMaxDays = Annotated[
    int,
    Field(ge=1, le=3650, description="How long after the log-in a session ends, however much it is used."),
]
PasswordHashMemoryKib = Annotated[
    int,
    Field(
        ge=LEAST_MEMORY_KIB,
        le=MOST_MEMORY_KIB,
        description=(
            "The memory that Argon2id takes for one password, in KiB. Who logs in after a change is hashed anew."
        ),
    ),
]
PasswordHashTimeCost = Annotated[
    int,
    Field(ge=LEAST_PASSES, le=MOST_PASSES, description="How often Argon2id passes over that memory."),
]
PasswordHashThreads = Annotated[
    int, Field(ge=1, le=64, description="How many passwords a worker hashes at a time, beside its requests.")
]
PasswordHashQueue = Annotated[
    int,
    Field(
        ge=1,
        le=10_000,
        description="How many passwords may wait for that in a worker; beyond them log-ins get 429.",
    ),
]


_NOTATION = {"values": "such as 5/minute;30/hour, or off"}
LoginRateLimit = Annotated[
    str,
    BeforeValidator(_limit),
    Field(
        description=(
            "How often one address may try one account's password until it is right. No limit counts an account "
            "alone, so no stranger can lock its owner out."
        ),
        json_schema_extra=_NOTATION,
    ),
]
LoginAddressRateLimit = Annotated[
    str,
    BeforeValidator(_limit),
    Field(
        description=(
            "How often one address may try passwords, whatever the accounts, right ones included. An IPv6 address "
            "counts by its first 64 bits. Behind a proxy set TRUSTED_PROXIES, or everybody has its address."
        ),
        json_schema_extra=_NOTATION,
    ),
]
SignUpRateLimit = Annotated[
    str,
    BeforeValidator(_limit),
    Field(
        description="How often one address may sign up, or learn that an e-mail address has signed up before.",
        json_schema_extra=_NOTATION,
    ),
]
RefreshRateLimit = Annotated[
    str,
    BeforeValidator(_limit),
    Field(
        description=(
            "How often one address may refresh tokens. All four limits count in each worker by itself, so workers "
            "multiply them, and a restart begins anew."
        ),
        json_schema_extra=_NOTATION,
    ),
]
