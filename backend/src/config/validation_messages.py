"""Messages about invalid settings. They never hold a value."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from ..errors import Fault


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


LowerCase = BeforeValidator(_lower)


def refuse(variable: str, problem: str, remedy: str) -> NoReturn:
    """Raise the error that carries a fault through Pydantic, whose own errors would hold the value."""
    raise_faults([Fault(variable, problem, remedy)])


def raise_faults(faults: list[Fault]) -> NoReturn:
    """Raise the error that carries several faults through Pydantic."""
    raise PydanticCustomError("faults", "is not usable", {"faults": faults}) from None


def explain(detail: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> list[Fault]:
    """A Pydantic error as faults. The value is not repeated: it may be a secret in the wrong place."""
    name = str(detail["loc"][0]) if detail["loc"] else "settings"
    kind, context = str(detail["type"]), detail.get("ctx") or {}
    if kind == "faults":
        return list(context["faults"])
    field = fields.get(name)
    default = as_text(field.default) if field and field.default is not None else ""
    remedy = f"Unset it for the default, {default}." if default else "Unset it."
    match kind:
        case "literal_error":
            problem = f"Must be {context['expected'].replace(chr(39), '')}."
        case "int_parsing" | "int_type" | "int_parsing_size" | "int_from_float":
            problem = "Must be an integer."
        case "float_parsing" | "float_type" | "finite_number":
            problem = "Must be a number."
        case "bool_parsing" | "bool_type":
            problem = "Must be true or false."
        case "greater_than_equal":
            problem = f"Must be at least {context['ge']:g}."
        case "greater_than":
            problem = f"Must be greater than {context['gt']:g}."
        case "less_than_equal":
            problem = f"Must be at most {context['le']:g}."
        case "string_too_long" | "too_long":
            problem = f"Must be at most {context['max_length']} characters long."
        case "value_error":
            problem = str(context["error"])
        case _:
            problem = "Must be a valid value."
    return [Fault(name.upper(), problem, remedy)]


OTHER_NAMES = (
    "POSTGRES_URL", "POSTGRESQL_URL", "POSTGRES_PRISMA_URL", "POSTGRES_URL_NON_POOLING", "POSTGRES_DSN",
    "DATABASE_URI", "DATABASE_PRIVATE_URL", "DB_URL", "PG_URL", "NEON_DATABASE_URL", "NETLIFY_DATABASE_URL",
    "POSTGRESQL_ADDON_URI", "SQLALCHEMY_DATABASE_URL", "SQLALCHEMY_DATABASE_URI",
)  # fmt: skip


def missing_database(names: Iterable[str], env_file: Path) -> Fault:
    """The fault of a missing DATABASE_URL, with a hint at a similar name among `names`."""
    remedy = (
        f"Set DATABASE_URL in the environment or in {env_file} (see .env.example), or start a private PostgreSQL with "
        "`make run`."
    )
    found = sorted(name.upper() for name in names if name.isascii() and name.isprintable())
    close = [name for name in OTHER_NAMES if name in found]
    close = close or get_close_matches("DATABASE_URL", found, n=1, cutoff=0.8)
    hint = f" {close[0]} is set: did you mean DATABASE_URL?" if close else ""
    return Fault("DATABASE_URL", f"Is not set.{hint}", remedy)


def as_text(value: object) -> str:
    """A value as the text of an environment variable."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        if all(isinstance(member, str) for member in value):
            return ",".join(value)
        return json.dumps([member.document() for member in value])
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
