"""Where settings are read from: the environment, `.env` and secret files, and names that other tools use.

A value is taken literally, without the blanks, line ends and invisible characters around it. Empty means unset.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Final, get_args

from dotenv import dotenv_values
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from ..errors import Fault
from . import BACKEND

RENAMED: Final = {
    "request_head_seconds": "header_timeout_seconds",
    "request_body_seconds": "body_timeout_seconds",
    "response_stall_seconds": "send_timeout_seconds",
    "max_requests_under_way": "max_concurrent_requests",
    "database_pool_wait_seconds": "database_pool_timeout_seconds",
    "password_hash_passes": "password_hash_time_cost",
}
# Set by platforms for other servers, with the same meaning: Heroku, and Neon's integrations with Vercel and others.
ACCEPTED: Final = {"web_concurrency": "workers", "database_url_unpooled": "database_migration_url"}
# Set for other servers. FORWARDED_ALLOW_IPS is `*` on Heroku, which would trust every client.
HINTED: Final = {
    "forwarded_allow_ips": "trusted_proxies",
    "uvicorn_host": "host",
    "uvicorn_port": "port",
    "uvicorn_workers": "workers",
}


@dataclass(slots=True)
class Sources:
    """The values of settings with their origins, and the faults and warnings about the places they come from."""

    values: dict[str, Any] = field(default_factory=dict, repr=False)
    origins: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)

    def add(self, origin: str, values: Mapping[str, Any]) -> None:
        """Add a source. Sources added before it take precedence."""
        for name, value in values.items():
            cleaned = clean(value)
            if cleaned is not None and name.lower() not in self.values:
                self.values[name.lower()] = cleaned
                self.origins[name.lower()] = origin

    def variable(self, name: str) -> str:
        """The variable that a setting was read from: its own name, or another one that is accepted for it."""
        origin = self.origins.get(name.lower(), "")
        return origin if origin.lower() in ACCEPTED else name


def clean(value: Any) -> Any:
    """A text without white space, line ends and invisible characters around it; None if nothing is left."""
    if isinstance(value, SecretStr):
        text = clean(value.get_secret_value())
        return None if text is None else SecretStr(text)
    if not isinstance(value, str):
        return value
    start, end = 0, len(value)
    while start < end and _is_invisible(value[start]):
        start += 1
    while start < end and _is_invisible(value[end - 1]):
        end -= 1
    return value[start:end] or None


def _is_invisible(character: str) -> bool:
    """Whether a character is white space or a format character, such as U+200B or U+FEFF."""
    return character.isspace() or unicodedata.category(character) == "Cf"


def read_sources(given: Mapping[str, Any], env_file: Path, fields: Mapping[str, FieldInfo]) -> Sources:
    """Read all sources of the settings in `fields`; `given` takes precedence."""
    sources = Sources()
    sources.add("command", given)
    sources.add("environment", os.environ)
    if env_file.exists():
        _add_env_file(sources, env_file, fields)
    if "secrets_dir" in sources.values:
        _add_secret_files(sources, BACKEND / Path(sources.values["secrets_dir"]).expanduser(), fields)
    _translate_names(sources)
    return sources


def _add_env_file(sources: Sources, path: Path, fields: Mapping[str, FieldInfo]) -> None:
    text = _read_text(sources, path, ".env", str(path))
    # Without interpolation: `${...}` in a password is part of the password.
    values = dotenv_values(stream=StringIO(text), interpolate=False)
    sources.add(".env", values)
    if _is_world_readable(path) and any(_is_secret(fields, name) and values[name] for name in values):
        problem = (
            f"{path} contains secrets, and every user of this machine can read it. Run: chmod 600 {path}"
        )
        sources.warnings.append((".env", problem))


def _add_secret_files(sources: Sources, directory: Path, fields: Mapping[str, FieldInfo]) -> None:
    if not (os.path.isdir(directory) and os.access(directory, os.R_OK | os.X_OK)):
        remedy = "Set it to the path of a directory with one file per setting."
        sources.faults.append(Fault("SECRETS_DIR", "Must be a readable directory.", remedy))
        return
    known = {*fields, *RENAMED, *ACCEPTED, *HINTED}
    files = [file for file in sorted(directory.iterdir()) if file.name.lower() in known]
    sources.add(
        "secrets",
        {
            file.name: _read_text(sources, file, file.name.upper(), "Its file in SECRETS_DIR")
            for file in files
        },
    )
    exposed = [file.name for file in files if _is_secret(fields, file.name) and _is_world_readable(file)]
    if exposed:
        problem = f"Every user of this machine can read {', '.join(exposed)} in SECRETS_DIR. Set mode 0400."
        sources.warnings.append(("SECRETS_DIR", problem))


def _read_text(sources: Sources, path: Path, variable: str, subject: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        problem = f"{subject} cannot be read ({error.strerror})."
    except UnicodeDecodeError:
        problem = f"{subject} is not UTF-8 text."
    remedy = "Make it a UTF-8 text file that the service's user can read."
    sources.faults.append(Fault(variable, problem, remedy))
    return ""


def _translate_names(sources: Sources) -> None:
    for old, new in RENAMED.items():
        if old in sources.values:
            fault = Fault(old.upper(), f"Renamed to {new.upper()}.", f"Set {new.upper()} instead.")
            sources.faults.append(fault)
    for foreign, name in ACCEPTED.items():
        if foreign not in sources.values or name in sources.values:
            continue
        # A DATABASE_URL of another source may be another database, which these migrations must not reach.
        if (
            name != "database_migration_url"
            or sources.origins.get("database_url") == sources.origins[foreign]
        ):
            sources.values[name], sources.origins[name] = sources.values[foreign], foreign.upper()
    for foreign, name in HINTED.items():
        if foreign in sources.values and name not in sources.values:
            sources.warnings.append((foreign.upper(), f"{foreign.upper()} is not used. Set {name.upper()}."))


def _is_secret(fields: Mapping[str, FieldInfo], name: str) -> bool:
    field = fields.get(name.lower())
    return field is not None and SecretStr in get_args(field.annotation)


def _is_world_readable(path: Path) -> bool:
    return os.name == "posix" and bool(path.stat().st_mode & stat.S_IROTH)
