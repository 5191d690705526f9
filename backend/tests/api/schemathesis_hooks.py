"""What schemathesis cannot know by itself; it imports this file (`hooks` in its configuration)."""

from __future__ import annotations

import os
from typing import Any
from uuid import uuid4

import schemathesis

USABLE_KEY = frozenset(map(chr, range(0x21, 0x7F)))


@schemathesis.serializer("application/x-ndjson")
def lines(context: Any, value: Any) -> Any:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


@schemathesis.auth()
class Token:
    """The caller's token on every request but those that are to go without; `--header` would add it there too."""

    def get(self, case: Any, context: Any) -> str:
        return os.environ["GROUNDWORK_TOKEN"]

    def set(self, case: Any, data: str, context: Any) -> None:
        case.headers["Authorization"] = f"Bearer {data}"


def refusable(case: Any) -> bool:
    """Whether the request is meant to break the description, so that nothing in it may be mended."""
    return bool(case.meta is None or case.meta.generation.mode.is_negative)


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Takes away what is as described and yet rightly refused: a key used before, a cursor that nobody gave."""
    if case.query and isinstance(case.query.get("cursor"), str) and not refusable(case):
        del case.query["cursor"]
    key = (case.headers or {}).get("Idempotency-Key")
    if isinstance(key, str) and 1 <= len(key) <= 200 and set(key) <= USABLE_KEY:
        case.headers["Idempotency-Key"] = f"{key}-{uuid4()}"
