"""What the operator says about requests: how much is read of them, and who may send them from a browser."""

from __future__ import annotations

import re
from typing import Annotated, NoReturn

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

from ..errors import Fault

ANY_ORIGIN = "*"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
_DEFAULT_PORTS = {"https": ":443", "http": ":80"}


def _origins(value: object) -> object:
    members = value.split(",") if isinstance(value, str) else value
    if not isinstance(members, list | tuple) or not all(isinstance(member, str) for member in members):
        _refuse("is not a list of origins.")
    origins = tuple(dict.fromkeys(_origin(member) for member in members if member.strip()))
    if ANY_ORIGIN in origins and len(origins) > 1:
        _refuse("names origins beside *, which means all of them.")
    return origins


def _origin(text: str) -> str:
    """As browsers write it: in small letters, without the scheme's own port."""
    origin = text.strip().lower().removesuffix("/")
    if origin == ANY_ORIGIN:
        return origin
    if not _ORIGIN.fullmatch(origin):
        _refuse("holds something that is not an origin: a scheme, a host and perhaps a port.")
    return origin.removesuffix(_DEFAULT_PORTS.get(origin.partition(":")[0], "\n"))


def _refuse(problem: str) -> NoReturn:
    remedy = "As in https://app.example.com,http://localhost:5173"
    # The kind that carries whole faults, and no value.
    raise PydanticCustomError(
        "address", "is not usable", {"faults": [Fault("CORS_ORIGINS", problem, remedy)]}
    ) from None


# The types of the settings: how they are read, and the sentence about each.

BodyBytes = Annotated[
    int,
    Field(ge=1024, le=1 << 30, description="The largest request body that is read, in bytes; more is a 413."),
]
BatchBytes = Annotated[
    int, Field(ge=1024, le=1 << 30, description="The same for a batch of operations, which is read at once.")
]
ImportBytes = Annotated[
    int,
    Field(
        ge=1024, le=1 << 40, description="The same for an import, which is kept on disk while it is checked."
    ),
]
CorsOrigins = Annotated[
    tuple[str, ...],
    NoDecode,
    BeforeValidator(_origins),
    Field(
        description=(
            "The web pages whose scripts may call this service: a comma-separated list of origins, such as "
            "https://app.example.com; * for every page there is. Cookies are never asked for. Unset: none."
        ),
        json_schema_extra={"values": "origins"},
    ),
]
RequireIfMatch = Annotated[
    bool,
    Field(
        description=(
            "Whether changing, replacing and deleting a task needs If-Match with the ETag last read (else 428), so "
            "that nobody overwrites what they have not seen."
        )
    ),
]
IdempotencyHours = Annotated[
    int,
    Field(ge=1, le=720, description="How long the answer to an Idempotency-Key is kept and given again."),
]
