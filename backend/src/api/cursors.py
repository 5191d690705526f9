"""Cursors: where a page ended, given to the client as text that only we can make.

A cursor holds the position and a code over the position and the list that it belongs to: its owner, order and
filters. Whoever changes it, or carries it to another list, gets 422.
"""

from __future__ import annotations

import base64
import hashlib
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
        code = _code(self._keys[0], payload, owner, query)
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
        if not any(hmac.compare_digest(code, _code(key, payload, owner, query)) for key in self._keys):
            raise _refused()
        return Position(payload[_ID_BYTES:].decode("ascii"), UUID(bytes=payload[:_ID_BYTES]))


def _code(key: bytes, payload: bytes, owner: UUID, query: PageQuery) -> bytes:
    # BLAKE2 takes a key by itself (RFC 7693), at a third of what HMAC costs.
    said = b"%b%b%b%b" % (owner.bytes, len(payload).to_bytes(4, "big"), payload, query.list_of)
    return hashlib.blake2b(said, digest_size=_CODE_BYTES, key=key).digest()


def _refused() -> Invalid:
    return Invalid(faults=[InputFault("cursor", "In the query: Is not a cursor of this list.")])
