"""The roles of the embedded PostgreSQL, their passwords, and their addresses."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Final

from ..models.isolation import CREATE_ROLE, ROLE
from . import lock as owner

NAME: Final = "groundwork"
"""Both the superuser and the database that is made with the cluster."""

APPLICATION: Final = "app"
"""The role that the service connects as: bound by row-level security, owner of nothing."""

PASSWORD_FILES: Final = {NAME: "password", APPLICATION: "app-password"}

_PASSWORD: Final = re.compile(r"[A-Za-z0-9._~-]+")
"""Characters that need no escape in a URL; generated passwords are hexadecimal."""


PORT: Final = 5432
"""Part of the socket's name; no TCP port is open."""


def url_of(role: str, password: str, database: str, host: Path | str, port: int = PORT) -> str:
    """The address of `database` for `role`, password included: never print it. `host` may be a socket's directory."""
    if isinstance(host, str):
        return f"postgresql://{role}:{password}@{host}:{port}/{database}"
    suffix = f"&port={port}" if port != PORT else ""
    return f"postgresql://{role}:{password}@/{database}?host={host}{suffix}"


def noted_password(path: Path) -> str | None:
    """The password in the file; None where there is none, or something that this module does not write."""
    try:
        password = path.read_text(encoding="ascii").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return password if _PASSWORD.fullmatch(password) else None


def with_password(role: str, password: str) -> list[str]:
    """The statements, one a line, that set the password of `role`. The application's role and its group are created
    if they are missing, so that a later migration finds both and only grants."""
    if role != APPLICATION:
        return [f"ALTER ROLE \"{role}\" PASSWORD '{password}'"]
    made = "DO $$BEGIN {}; EXCEPTION WHEN duplicate_object THEN NULL; END$$"
    return [
        made.format(CREATE_ROLE),
        made.format(f"CREATE ROLE {role}"),
        f"ALTER ROLE {role} LOGIN NOSUPERUSER NOBYPASSRLS NOCREATEROLE NOCREATEDB PASSWORD '{password}'",
        f"GRANT {ROLE} TO {role}",
    ]


def running_url(directory: Path, *, role: str = NAME) -> str | None:
    """The URL of the embedded server that is running on `directory`, or None. Contains the password."""
    note = owner.read_note(Path(directory).absolute() / "server.json")
    sockets, port, home = note.get("socket"), note.get("port"), note.get("home")
    if not (isinstance(sockets, str) and isinstance(port, int) and isinstance(home, str)):
        return None
    try:
        # Only the server's own user can listen in that directory.
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(f"{sockets}/.s.PGSQL.{port}")
        password = noted_password(Path(home) / PASSWORD_FILES[role])
    except OSError:
        return None
    return None if password is None else url_of(role, password, NAME, Path(sockets), port)
