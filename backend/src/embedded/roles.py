"""Who connects to the embedded PostgreSQL, and with which password: its superuser, and the application's role."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ..models.isolation import CREATE_ROLE, ROLE
from . import lock as owner
from . import processes

NAME: Final = "groundwork"
"""Both the superuser and the database that is made with the cluster."""

APPLICATION: Final = "app"
"""The role that the service connects as: bound by row-level security, owner of nothing."""

PASSWORD_FILES: Final = {NAME: "password", APPLICATION: "app-password"}

_PASSWORD: Final = re.compile(r"[A-Za-z0-9._~-]+")
"""What stands in a URL as it is; ours are hexadecimal."""


def url_of(role: str, password: str, port: int, database: str) -> str:
    """Where `role` reaches `database`, password included: never print it."""
    return f"postgresql://{role}:{password}@127.0.0.1:{port}/{database}"


def noted_password(path: Path) -> str | None:
    """The password in the file; None where there is none, or something that we would not have written."""
    try:
        password = path.read_text(encoding="ascii").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return password if _PASSWORD.fullmatch(password) else None


def with_password(role: str, password: str) -> list[str]:
    """What makes `password` that of `role`, one command a line. The application's role is made if need be, and the
    group too, so that whichever migration comes later finds both and has only rights to give."""
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
    state = owner.read_note(Path(directory).absolute() / "server.json")
    port, pid, home = state.get("port"), state.get("pid"), state.get("home")
    if not (isinstance(port, int) and isinstance(pid, int) and isinstance(home, str)):
        return None
    if not processes.alive(pid) or not processes.answers(port):
        return None
    try:
        password = noted_password(Path(home) / PASSWORD_FILES[role])
    except OSError:
        return None
    return None if password is None else url_of(role, password, port, NAME)
