"""Others' collections of what programs stumble over, from `data/`, beside what `naughty` makes itself."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Final

import naughty

DATA: Final = Path(__file__).with_name("data")


@cache
def strings() -> tuple[str, ...]:
    """The Big List of Naughty Strings, and ours, each text once."""
    listed: list[str] = json.loads((DATA / "naughty-strings.json").read_text("ascii"))
    return tuple(dict.fromkeys([*listed, *naughty.strings()]))


@cache
def documents(kind: str) -> tuple[bytes, ...]:
    """JSONTestSuite's: `y` is JSON, `n` is none, `i` may be taken or refused."""
    packed: dict[str, str | tuple[str, int, str]] = json.loads(
        (DATA / "json-documents.json").read_text("ascii")
    )
    return tuple(_unpacked(text) for name, text in packed.items() if name.startswith(f"{kind}_"))


@cache
def broken() -> tuple[bytes, ...]:
    """What is no JSON: the suite's, ours, and the suite's with bytes that are no UTF-8."""
    not_utf_8 = [
        document.replace("\ufffd".encode(), b"\xff")
        for kind in "ni"
        for document in documents(kind)
        if "\ufffd".encode() in document
    ]
    return tuple(dict.fromkeys([*documents("n"), *naughty.broken_documents(), *not_utf_8]))


def _unpacked(text: str | tuple[str, int, str]) -> bytes:
    if not isinstance(text, str):
        piece, times, rest = text
        text = piece * times + rest
    return text.encode("utf-8", "surrogatepass")
