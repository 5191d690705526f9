"""Files and directories that only their owner may read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from ..errors import GroundworkError


class DataDirectoryError(GroundworkError):
    """The data directory cannot be created or used. Exit code 1."""

    exit_code: ClassVar[int] = 1


def make_directory(directory: Path) -> None:
    """The data directory, with what is missing above it. Raises `DataDirectoryError`."""
    try:
        for path in (*reversed(directory.parents), directory):
            if not path.exists():
                path.mkdir(exist_ok=True)  # Another process may make it at the same time.
                # The user who runs PostgreSQL may pass through, whatever the umask says.
                path.chmod(0o711)
                if os.geteuid() == 0:
                    # In a user's clone it is the user's, also when root was the first to need it.
                    owner = path.parent.stat()
                    os.chown(path, owner.st_uid, owner.st_gid)
    except OSError as error:
        raise DataDirectoryError(
            f"The data directory {directory} cannot be made: {error.strerror}. "
            f"Choose another: DATA_DIRECTORY=<another directory>."
        ) from error


def write_privately(path: Path, text: str) -> None:
    """Write all or nothing, readable by nobody else, also if the machine stops in the middle."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_directory(path: Path) -> None:
    """The names in it are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
