"""A secret that is easy to recognise, and the search for it in whatever was said.

The canary has a letter that no output of ours has a use for, so even a small piece of it, or a wrong decoding of
it, is found.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator
from urllib.parse import quote, quote_plus

CANARY = "p%@:/ é"


def forms(secret: str) -> dict[str, bytes]:
    """How a secret may show itself, by name."""
    raw = secret.encode()
    found = {
        "raw": secret,
        "percent-encoded": quote(secret, safe=""),
        "percent-encoded in lower case": quote(secret, safe="")
        .replace("%C3%A9", "%c3%a9")
        .replace("%2F", "%2f"),
        "percent-encoded but for slashes": quote(secret),
        "percent-encoded twice": quote(quote(secret, safe=""), safe=""),
        "as in a form": quote_plus(secret),
        "in JSON": json.dumps(secret)[1:-1],
        "in JSON of JSON": json.dumps(json.dumps(secret))[3:-3],
        "as a Python text": ascii(secret)[1:-1],
        "as Python bytes": repr(raw)[2:-1],
        "in HTML": html.escape(secret).replace("é", "&#233;"),
        "in hexadecimal": raw.hex(),
        "decoded wrongly": raw.decode("latin-1"),
        "written backwards": secret[::-1],
    }
    shapes = {name: text.encode() for name, text in found.items()}
    shapes["in Latin-1"] = secret.encode("latin-1")
    for offset in range(3):
        # Where it lies in the encoded text decides its letters; those at its ends are its neighbours' too.
        encoded = base64.b64encode(b"x" * offset + raw)
        shapes[f"in base64 at offset {offset}"] = encoded[(0, 2, 3)[offset] : len(encoded) - 4]
    return shapes


_PIECES = {
    "its head": b"p%@",
    "its middle": b"%@:/",
    "its tail": ":/ é".encode(),
    "its encoded head": b"%25%40",
    "its letter": "é".encode(),
    "its letter in Latin-1": b"\xe9",
    "its letter percent-encoded": b"%C3%A9",
    "its letter escaped": b"\\u00e9",
    "its letter as Python bytes": b"\\xc3\\xa9",
    "its letter as a Python text": b"\\xe9",
}


def found(said: bytes) -> list[str]:
    """The forms and pieces of the canary in what was said, each with where it begins."""
    return list(_search(said, {**forms(CANARY), **_PIECES}))


def found_of(secret: str, said: bytes) -> list[str]:
    """The same for another secret, whose pieces are nothing special."""
    return list(_search(said, forms(secret)))


def _search(said: bytes, shapes: dict[str, bytes]) -> Iterator[str]:
    for name, shape in shapes.items():
        at = said.find(shape)
        # In UTF-8 the byte of the Latin-1 letter is a part of other characters; alone it is not.
        if name == "its letter in Latin-1" and _is_utf8(said):
            continue
        if at >= 0:
            line = said.count(b"\n", 0, at) + 1
            yield f"{name}, in line {line}"


def _is_utf8(said: bytes) -> bool:
    try:
        said.decode()
    except UnicodeDecodeError:
        return False
    return True
