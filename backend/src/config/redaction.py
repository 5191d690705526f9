"""The last belt: credentials that got into a text by mistake are masked before anybody reads it.

Nothing relies on it. Passwords are `SecretStr`, errors are written without values; this catches the library that
prints an address all the same. When in doubt it masks too much.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from typing import Any

MASK = "***"
_DEPTH = 6

# A raw password may hold blanks, slashes and at-signs, so in a PostgreSQL address everything up to the last @ goes.
_POSTGRES = re.compile(r"(?i)(postgres(?:ql)?(?:\+\w+)?://[^\s:/@]*):.*@")
# A word is tried once, from its beginning: else a long one costs the square of its length.
_ADDRESS = re.compile(r"(?i)(?<![a-z0-9+.-])([a-z0-9+.-]++://[^\s:/@]*+):[^\s/]*@")
_NAMED = re.compile(
    r"(?i)\b((?:pg|ssl|db|database|api)?[_-]?(?:password|passwd|pwd|secret|token)|authorization)"
    r"(\"?'?\s*[=:]\s*)(?:\"[^\"]*\"|'(?:[^'\\]|\\.)*'|(?:bearer\s+|basic\s+)?[^\s&,;\"')\]}]+)"
)
_SECRET_KEY = re.compile(
    r"(?i)(?:^|[_-])(?:password|passwd|pwd|secret|token|authorization|cookie|dsn)$|^database(?:_migration)?_url$"
)
_HINTS = ("://", "assword", "asswd", "pwd", "ecret", "oken", "uthorization", "ookie", "dsn", "atabase_")


def is_suspect(text: str) -> bool:
    """A quick look that says no for nearly every line: False promises that `redact` would change nothing."""
    lowered = text.lower()
    return any(hint in lowered for hint in _HINTS)


def redact_text(text: str) -> str:
    """The text with passwords in addresses, and values after `password=` and its like, replaced by `***`."""
    text = _POSTGRES.sub(rf"\1:{MASK}@", text)
    text = _ADDRESS.sub(rf"\1:{MASK}@", text)
    return _NAMED.sub(rf"\1\2{MASK}", text)


def redact(event: Mapping[str, Any]) -> MutableMapping[str, Any]:
    """A copy of an event with every text in it redacted, and what stands under a secret's name masked whole."""
    return {key: MASK if _is_secret(key, value) else _redacted(value, _DEPTH) for key, value in event.items()}


def _is_secret(key: object, value: object) -> bool:
    return isinstance(key, str) and value not in (None, "", False, True) and bool(_SECRET_KEY.search(key))


def _redacted(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return redact_text(value)
    if depth == 0:
        return MASK
    if isinstance(value, Mapping):
        return {
            key: MASK if _is_secret(key, item) else _redacted(item, depth - 1) for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted(item, depth - 1) for item in value]
    try:
        return redact_text(str(value))
    except Exception:  # a value's own __str__ may do anything
        return MASK
