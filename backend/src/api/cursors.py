"""Cursors: where a page ended, given to the client as text that only we can make.

A cursor holds the position and a code over the position and the list that it belongs to: its owner, order and
filters. Whoever changes it, or carries it to another list, gets 422.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Sequence
from typing import Final
from uuid import UUID

from ..errors import InputFault, Invalid
from ..services.task_pages import PageQuery, Position

MAX_LENGTH: Final = 200
_CODE_BYTES: Final = 16
_ID_BYTES: Final = 16


class Cursors:
    """The first key makes cursors, every key recognises them; each has 32 secret bytes."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = tuple(keys)

    def seal(self, position: Position, owner: UUID, query: PageQuery) -> str:
        """The cursor that leads on from `position` in this owner's list, 70 to 100 characters of a URL."""
        payload = position.id.bytes + position.timestamp.encode("ascii")
        code = _code(self._keys[0], payload, _scope(owner, query))
        return base64.urlsafe_b64encode(code + payload).decode("ascii").rstrip("=")

    def open(self, cursor: str, owner: UUID, query: PageQuery) -> Position:
        """Raises `Invalid` (pointer `cursor`) for anything that `seal` did not make for this list."""
        try:
            sealed = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        except (ValueError, UnicodeEncodeError):
            raise _refused() from None
        # The decoder passes over characters that are none of its own.
        if base64.urlsafe_b64encode(sealed).decode("ascii").rstrip("=") != cursor:
            raise _refused()
        code, payload = sealed[:_CODE_BYTES], sealed[_CODE_BYTES:]
        scope = _scope(owner, query)
        if not any(hmac.compare_digest(code, _code(key, payload, scope)) for key in self._keys):
            raise _refused()
        return Position(payload[_ID_BYTES:].decode("ascii"), UUID(bytes=payload[:_ID_BYTES]))


def _scope(owner: UUID, query: PageQuery) -> bytes:
    """What makes a list this one. The size of a page and the way of counting may change between two pages."""
    return repr(
        (
            "tasks",
            owner.hex,
            query.sort,
            query.descending,
            query.is_completed,
            query.created_after,
            query.created_before,
            query.updated_after,
            query.updated_before,
            query.q,
        )
    ).encode("utf-8")


def _code(key: bytes, payload: bytes, scope: bytes) -> bytes:
    return hmac.digest(key, len(payload).to_bytes(4, "big") + payload + scope, "sha256")[:_CODE_BYTES]


def _refused() -> Invalid:
    return Invalid(faults=[InputFault("cursor", "In the query: Is not a cursor of this list.")])
