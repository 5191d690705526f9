"""The lock on a data directory: one owner at a time, named in the error that the next one gets."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from ..config.private_files import make_directory
from .errors import EmbeddedError
from .lifetime import alive


class DataDirectoryBusy(EmbeddedError):
    """Another process owns the data directory. `pid`, `command`, `since` are None where it left no note."""

    def __init__(self, directory: Path, pid: int | None, command: str | None, since: str | None) -> None:
        self.directory = directory
        self.pid = pid
        self.command = command
        self.since = since
        holder = f"process {pid}" if pid else "another process"
        if command:
            holder += f" ({command})"
        if since:
            holder += f", since {since}"
        stop = f"Stop it first (Ctrl-C there, or: kill {pid})" if pid else "Stop it first"
        super().__init__(
            f"The data directory {directory} is in use by {holder}. "
            f"{stop}, or give this one its own: DATA_DIRECTORY=<another directory>."
        )


def acquire(directory: Path) -> int:
    """Lock `directory` and return a descriptor; the lock ends with it or with the process.

    Raises DataDirectoryBusy, or EmbeddedError where the directory cannot be used.
    """
    path = directory / "lock"
    make_directory(directory)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise EmbeddedError(
            f"The data directory {directory} cannot be used: {error.strerror}. "
            f"Run as its owner, or choose another: DATA_DIRECTORY=<another directory>."
        ) from error
    if not _locked(descriptor, path):
        os.close(descriptor)
        note = read_note(path)
        pid, command, since = note.get("pid"), note.get("command"), note.get("since")
        raise DataDirectoryBusy(
            directory,
            pid if isinstance(pid, int) else None,
            command if isinstance(command, str) else None,
            since if isinstance(since, str) else None,
        )
    since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    note = {"pid": os.getpid(), "command": shlex.join(sys.orig_argv)[:200], "since": since}
    os.truncate(descriptor, 0)
    os.write(descriptor, json.dumps(note).encode())
    return descriptor


def _locked(descriptor: int, path: Path) -> bool:
    """Whether the lock was acquired.

    An owner that was killed while it started a child leaves the lock with that child until the child's exec: the
    attempt is repeated for up to two seconds while the process named in the note is dead.
    """
    deadline = time.monotonic() + 2.0
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pid = read_note(path).get("pid")
            if not isinstance(pid, int) or alive(pid) or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True


@contextlib.contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Inside, no other process starts a server on `directory` or deletes it."""
    descriptor = acquire(Path(directory).absolute())
    try:
        yield
    finally:
        os.close(descriptor)


def read_note(path: Path) -> dict[str, object]:
    """The object in a file of JSON; an empty one where there is none, or half of one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
