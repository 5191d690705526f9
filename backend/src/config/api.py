"""Settings of the HTTP API: which web pages may call it, and what it expects of clients."""

from __future__ import annotations

import re
from typing import Annotated, NoReturn

from pydantic import BaseModel, BeforeValidator, Field

from .validation_messages import refuse

ANY_ORIGIN = "*"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
_DEFAULT_PORTS = {"https": ":443", "http": ":80"}
_MAX_ORIGINS = 256


def _origins(value: object) -> tuple[str, ...]:
    members = value.split(",") if isinstance(value, str) else value
    if not isinstance(members, list | tuple) or not all(isinstance(member, str) for member in members):
        _refuse("Must be a comma-separated list of origins.")
    origins = tuple(dict.fromkeys(_origin(member) for member in members if member.strip()))
    if ANY_ORIGIN in origins and len(origins) > 1:
        _refuse("Must not list other origins beside *.")
    if len(origins) > _MAX_ORIGINS:
        _refuse(f"Must list at most {_MAX_ORIGINS} origins.")
    return origins


def _origin(text: str) -> str:
    """An origin as browsers send it: in lower case, without the scheme's default port."""
    origin = text.strip().lower().removesuffix("/")
    if origin == ANY_ORIGIN:
        return origin
    if not _ORIGIN.fullmatch(origin):
        _refuse("Must list origins: scheme, host and optionally port, without a path.")
    return origin.removesuffix(_DEFAULT_PORTS.get(origin.partition(":")[0], "\n"))


def _refuse(problem: str) -> NoReturn:
    refuse("CORS_ORIGINS", problem, "For example https://app.example.com,http://localhost:5173")


class ApiSettings(BaseModel):
    """API"""

    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_origins)] = Field(
        default=(),
        description=(
            "The web origins whose scripts may call the API: a comma-separated list, such as "
            "https://app.example.com, or * for all. Cookies are never used. Unset: none."
        ),
        json_schema_extra={"values": "origins"},
    )
    require_if_match: bool = Field(
        default=False,
        description=(
            "Whether update, replace and delete need an If-Match header with the last ETag (otherwise 428), so that "
            "no client overwrites a version it has not read."
        ),
    )
    idempotency_hours: int = Field(
        default=24,
        ge=1,
        le=720,
        description="How long the response to a request with an Idempotency-Key is stored.",
    )
