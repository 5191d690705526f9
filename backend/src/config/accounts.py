"""Settings of local accounts: sign-up, sessions, password hashing and rate limits."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo

from .validation_messages import LowerCase, refuse

if TYPE_CHECKING:
    from limits import RateLimitItem

    from .settings import Settings

# OWASP's minimum for Argon2id with one lane.
MIN_MEMORY_KIB: Final = 19456
MIN_TIME_COST: Final = 2
# The most that verifying one password may cost: 256 MiB, and about two seconds.
MAX_MEMORY_KIB: Final = 256 << 10
MAX_TIME_COST: Final = 8

OFF: Final = "off"
_MAX_RULES = 4
_MAX_ATTEMPTS = 1_000_000
_MAX_PERIOD_SECONDS = 86_400
# Stricter than the library, which also parses `5/0minutes` and a colon between two rules.
_RULE = r"\s*[0-9]{1,9}\s*(?:/|per)\s*(?:[1-9][0-9]{0,5}\s*)?[a-z]{1,9}\s*"
_RULES = re.compile(f"{_RULE}(?:[;,|]{_RULE}){{0,{_MAX_RULES - 1}}}", re.ASCII)


def rules(text: str) -> tuple[RateLimitItem, ...]:
    """The rules of a limit such as `5/minute;30/hour`; none for `off`. Raises `ValueError` with a sentence."""
    # Imported here because it takes 30 ms.
    from limits import parse_many

    if text == OFF:
        return ()
    try:
        found = tuple(parse_many(text)) if _RULES.fullmatch(text) else ()
    except ValueError:
        found = ()
    if not found:
        raise ValueError("Must be a rate limit.")
    if not all(1 <= rule.amount <= _MAX_ATTEMPTS for rule in found):
        raise ValueError(f"Must allow 1 to {_MAX_ATTEMPTS} attempts.")
    if not all(rule.get_expiry() <= _MAX_PERIOD_SECONDS for rule in found):
        raise ValueError("Must not have a period longer than a day.")
    return found


def may_sign_up(settings: Settings) -> bool:
    """Whether sign-up is open. `auto` closes it where tokens of other issuers are accepted."""
    if settings.sign_up == "auto":
        return not settings.auth_issuers and settings.auth_shared_secret is None
    return settings.sign_up == "open"


def _limit(value: object, info: ValidationInfo) -> str:
    limit = value.strip().lower() if isinstance(value, str) else ""
    try:
        rules(limit)
    except ValueError as error:
        remedy = f"For example 5/minute;30/hour ({_MAX_RULES} rules at most), or off."
        refuse(str(info.field_name).upper(), str(error), remedy)
    return limit


_RateLimit = Annotated[str, BeforeValidator(_limit)]


class AccountSettings(BaseModel):
    """Local accounts"""

    sign_up: Annotated[Literal["auto", "open", "closed"], LowerCase] = Field(
        default="auto",
        description=(
            "Whether anyone may create an account with e-mail and password. auto: open, unless AUTH_ISSUERS or "
            "AUTH_SHARED_SECRET is set."
        ),
    )
    access_token_seconds: int = Field(
        default=300,
        ge=60,
        le=900,
        description="How long access tokens of this service are valid, also after their session has ended.",
    )
    session_idle_days: int = Field(
        default=30, ge=1, le=3650, description="A session ends after this time without a token refresh."
    )
    session_max_days: int = Field(
        default=365, ge=1, le=3650, description="A session ends this long after log-in, even if it is used."
    )
    password_hash_memory_kib: int = Field(
        default=MIN_MEMORY_KIB,
        ge=MIN_MEMORY_KIB,
        le=MAX_MEMORY_KIB,
        description=(
            "The memory cost of Argon2id, in KiB. After a change passwords are hashed again at the next log-in."
        ),
    )
    password_hash_time_cost: int = Field(
        default=MIN_TIME_COST,
        ge=MIN_TIME_COST,
        le=MAX_TIME_COST,
        description="The time cost of Argon2id: its passes over that memory.",
    )
    password_hash_threads: int = Field(
        default=1, ge=1, le=64, description="Passwords that a worker hashes at the same time."
    )
    password_hash_queue: int = Field(
        default=64,
        ge=1,
        le=10_000,
        description="Passwords that may wait for a hashing thread in a worker; beyond it log-ins get 429.",
    )
    login_rate_limit: _RateLimit = Field(
        default="5/minute;30/hour",
        description=(
            "Failed log-ins per client address and account. No limit applies to an account alone, so that an attacker "
            "cannot lock its owner out."
        ),
        json_schema_extra={"values": "such as 5/minute;30/hour, or off"},
    )
    login_address_rate_limit: _RateLimit = Field(
        default="60/minute;600/hour",
        description=(
            "Log-ins per client address, successful ones included. An IPv6 address counts by its /64 network. Behind "
            "a proxy set TRUSTED_PROXIES, otherwise all clients share the proxy's address."
        ),
        json_schema_extra={"values": "such as 5/minute;30/hour, or off"},
    )
    sign_up_rate_limit: _RateLimit = Field(
        default="30/hour;100/day",
        description="Sign-ups per client address, including those with an e-mail address that is already registered.",
        json_schema_extra={"values": "such as 5/minute;30/hour, or off"},
    )
    refresh_rate_limit: _RateLimit = Field(
        default="600/minute",
        description=(
            "Token refreshes per client address. All four limits count per worker and start anew after a restart."
        ),
        json_schema_extra={"values": "such as 5/minute;30/hour, or off"},
    )
