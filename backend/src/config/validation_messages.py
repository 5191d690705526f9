"""What is wrong with a setting, in words that never hold its value."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

from ..errors import Fault

PROXIES = "a comma-separated list of addresses or networks, such as 10.0.0.0/8,192.168.1.7"


def explain(detail: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> list[Fault]:
    """Pydantic's finding as a fault. Nothing of the value is repeated: it may be a secret in the wrong place."""
    name = str(detail["loc"][0]) if detail["loc"] else "settings"
    kind, context = str(detail["type"]), detail.get("ctx") or {}
    if kind == "address":
        return list(context["faults"])
    field = fields.get(name)
    remedy = (
        f"Leave it out for {as_text(field.default) or 'none'}."
        if field and field.default is not None
        else "Unset it."
    )
    match kind:
        case "literal_error":
            problem = f"has to be {context['expected'].replace(chr(39), '')}."
        case "int_parsing" | "int_type" | "int_parsing_size" | "int_from_float":
            problem = "has to be a whole number."
        case "float_parsing" | "float_type" | "finite_number":
            problem = "has to be a number."
        case "bool_parsing" | "bool_type":
            problem = "has to be true or false."
        case "greater_than_equal":
            problem = f"has to be at least {context['ge']:g}."
        case "greater_than":
            problem = f"has to be more than {context['gt']:g}."
        case "less_than_equal":
            problem = f"has to be at most {context['le']:g}."
        case "proxies":
            problem, remedy = f"has to be {PROXIES}.", "Leave it out to trust nobody."
        case "name":
            problem = "has to be a printable text of 512 characters at most."
        case _:
            problem = "is not a usable value."
    return [Fault(name.upper(), problem, remedy)]


_OTHER_NAMES = (
    "POSTGRES_URL", "POSTGRESQL_URL", "POSTGRES_PRISMA_URL", "DATABASE_URI", "DB_URL", "PG_URL", "NEON_DATABASE_URL",
    "SQLALCHEMY_DATABASE_URL", "SQLALCHEMY_DATABASE_URI",
)  # fmt: skip


def missing_database(names: Iterable[str], env_file: Path) -> Fault:
    """That there is no DATABASE_URL, with a hint at the one of `names` that was meant to be it."""
    remedy = (
        f"Put DATABASE_URL into the environment or {env_file} (see .env.example), or start a private PostgreSQL by "
        "`make run`."
    )
    set_names = sorted(name for name in names if name.isascii() and name.isprintable())
    close = get_close_matches("DATABASE_URL", [name.upper() for name in set_names], n=1, cutoff=0.8)
    close = close or [name for name in _OTHER_NAMES if name in set_names]
    hint = f" {close[0]} is set: did you mean DATABASE_URL?" if close else ""
    return Fault("DATABASE_URL", f"is not set.{hint}", remedy)


def _networks(value: object) -> object:
    members = value.split(",") if isinstance(value, str) else value
    if not isinstance(members, list | tuple) or not all(isinstance(member, str) for member in members):
        raise PydanticCustomError("proxies", "is not a list of networks")
    networks = [_network(member.strip()) for member in members if member.strip()]
    if None in networks:
        raise PydanticCustomError("proxies", "holds something that is neither an IP address nor a network")
    return tuple(networks)


TrustedProxies = Annotated[
    tuple[str, ...],
    NoDecode,
    BeforeValidator(_networks),
    Field(description=f"Whose X-Forwarded-* headers are believed: {PROXIES}. Unset: nobody's."),
]


def _network(text: str) -> str | None:
    try:
        return str(ip_network(text, strict=False))
    except ValueError:
        return None


def file_problem(path: Path) -> str | None:
    try:
        path.read_text(encoding="utf-8")
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        return "is not UTF-8 text"
    return None


def as_text(value: object) -> str:
    """A value as it is written in an environment variable."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        if all(isinstance(member, str) for member in value):
            return ",".join(value)
        return json.dumps([member.document() for member in value])
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
