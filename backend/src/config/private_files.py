"""Files and directories that only their owner can read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from ..errors import GroundworkError


class DataDirectoryError(GroundworkError):
    """The data directory cannot be created or used. Exit code 1."""

    exit_code: ClassVar[int] = 1


def make_directory(directory: Path) -> None:
    """Create the data directory and its parents. Raises `DataDirectoryError`."""
    try:
        for path in (*reversed(directory.parents), directory):
            if not path.exists():
                path.mkdir(exist_ok=True)  # Another process may create it at the same time.
                # The user of the PostgreSQL server must be able to pass, whatever the umask is.
                path.chmod(0o711)
                if os.geteuid() == 0:
                    # In a user's clone it is the user's, also when root was the first to need it.
                    owner = path.parent.stat()
                    os.chown(path, owner.st_uid, owner.st_gid)
    except OSError as error:
        raise DataDirectoryError(
            f"The data directory {directory} cannot be created: {error.strerror}. "
            f"Set DATA_DIRECTORY to another directory."
        ) from error


def write_privately(path: Path, text: str) -> None:
    """Write a file atomically, with mode 0600, also if the machine stops during the write."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_directory(path: Path) -> None:
    """Write the directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
