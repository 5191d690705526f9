"""Writes that may be sent again: an Idempotency-Key, and what was asked with it.

A key belongs to one user. It is kept in the same statement or transaction as the write it stands for, together
with the answer, so that a repeat within its time is given that answer and writes nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Self

from ..errors import InputFault, Invalid

KEY_MAX_LENGTH: Final = 255
HOURS: Final = 24


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """`request_hash` (32 bytes) tells one request from another; `hours` is how long the answer is kept."""

    key: str
    request_hash: bytes
    hours: float = HOURS

    @classmethod
    def of(cls, key: str, operation: str, body: bytes, *, hours: float = HOURS) -> Self:
        """The key that came with `body` for `operation`, such as `create_task`.

        1 to 255 visible ASCII characters; raises `Invalid` (pointer `Idempotency-Key`) otherwise.
        """
        if not 1 <= len(key) <= KEY_MAX_LENGTH or not all("!" <= character <= "~" for character in key):
            fault = f"Has to be 1 to {KEY_MAX_LENGTH} visible ASCII characters."
            raise Invalid(faults=[InputFault("Idempotency-Key", fault)])
        return cls(key, hashlib.sha256(operation.encode() + b"\0" + body).digest(), hours)
