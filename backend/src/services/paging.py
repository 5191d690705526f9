"""How much of a list one answer may hold."""

from __future__ import annotations

from typing import Final

from ..errors import InputFault, Invalid

PAGE_LIMIT: Final = 200

PAGE_BYTES: Final = 1 << 20
"""The JSON of a page's rows is not larger: the page ends before the row that would exceed it."""


def bounded(limit: int) -> int:
    """`limit` if it is 1 to 200; raises `Invalid` otherwise."""
    if not 1 <= limit <= PAGE_LIMIT:
        raise Invalid(faults=[InputFault("limit", f"must be 1 to {PAGE_LIMIT}")])
    return limit
