"""Looks for credentials in text that is going to be shared, and says where they are without repeating them.

`scan(path, text)` gives one line for each find. What stands for a password in an example is told from a password
by `is_placeholder`; when in doubt it is a password.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import unquote

# Words that examples and tests use where a password would stand. None of them has ever opened anything.
MADE_UP = frozenset(
    {
        "password",
        "passwd",
        "pass",
        "pw",
        "pwd",
        "secret",
        "zebra",
        "wrong",
        "right",
        "other",
        "canary",
        "changeme",
    }
)
_INTERPOLATED = re.compile(r"^[\w%.-]{0,8}(?:\$\{?\w|\{|<|\*{3}|\.{3}|…|%s|\\)")
_CAPITALS = re.compile(r"^[A-Z][A-Z_-]*$")

_ADDRESS = re.compile(r"(?i)\b[a-z][a-z0-9+.-]*://[^\s:/@'\"`<>]*:([^\s@'\"`]{1,200})@([\w\[{$<*.-]+)")
_SHAPES = {
    "a private key": re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"),
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA|AROA)[0-9A-Z]{16}\b"),
    "a JSON web token": re.compile(r"\beyJ[\w-]{6,}\.eyJ[\w-]{6,}\.[\w-]{8,}"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"),
    "a Neon password or key": re.compile(
        r"\b(?:npg_[A-Za-z0-9]{8,}|napi_[a-z0-9]{20,}|neon_[A-Za-z0-9]{30,})"
    ),
    "a Slack token": re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
    "a Google key": re.compile(r"\bAIza[\w-]{35}"),
    "a Stripe key": re.compile(r"\b[rs]k_live_[A-Za-z0-9]{16,}"),
    "a key of an API": re.compile(r"\bsk-[A-Za-z0-9_-]{24,}"),
    "a package index's token": re.compile(r"\b(?:pypi-Ag[\w-]{40,}|npm_[A-Za-z0-9]{36})"),
    "an Authorization header": re.compile(r"(?i)\b(?:bearer|basic)\s+[A-Za-z0-9+/_-]{24,}={0,2}"),
    "a password hash": re.compile(
        r"\$(?:2[aby]\$\d\d|argon2id?\$v=\d+|scrypt)\$[^\s'\"]{20,}|SCRAM-SHA-256\$\d+:\S{20,}"
    ),
}
_ASSIGNED = re.compile(
    r"""(?ix) (?:password|passwd|pwd|passphrase|secret|token|api_?key|access_?key|private_?key|credential)
        [\w-]* ["'`]? \s* (?::|=|:=|=>) \s* ["'`]? ([^\s"'`,;&(){}\[\]<>]{8,})"""
)
_KEY_FILE = re.compile(
    r"(?i)^(?:\.env(?:\.(?!example$).*)?|\.pgpass|pgpass\.conf|\.netrc|\.pypirc|\.npmrc|\.htpasswd|id_(?:rsa|dsa|ecdsa|ed25519)"
    r"|.*\.(?:pem|key|p12|pfx|jks|kdbx|ppk))$"
)


def scan(path: str, text: str) -> Iterator[str]:
    """One line for each credential found; the credential itself is not repeated."""
    if _KEY_FILE.match(PurePosixPath(path).name):
        yield f"{path}: a file of this name holds credentials"
    for number, line in enumerate(text.splitlines(), 1):
        for what in _found_in(line):
            yield f"{path}:{number}: {what}"


def _found_in(line: str) -> Iterator[str]:
    for match in _ADDRESS.finditer(line):
        # A single letter is nobody's host.
        if not is_placeholder(match[1]) and len(match[2]) > 1:
            yield "an address with a password"
    for what, shape in _SHAPES.items():
        if shape.search(line):
            yield what
    for match in _ASSIGNED.finditer(line):
        if looks_random(match[1]):
            yield "a random text assigned to a secret's name"


def is_placeholder(password: str) -> bool:
    """Whether it is obviously none: a few signs, a known word, CAPITALS, or filled in by a program."""
    plain = unquote(password)
    return (
        len(plain) <= 4
        or plain.lower() in MADE_UP
        or bool(_CAPITALS.match(plain))
        or bool(_INTERPOLATED.match(password))
    )


def looks_random(text: str) -> bool:
    """Whether nobody would have typed it: digits among letters, and many different signs for its length."""
    if not (re.search(r"\d", text) and re.search(r"[A-Za-z]", text)):
        return False
    if text.startswith("/") or re.fullmatch(r"[A-Za-z_][\w]*(?:\.[A-Za-z_]\w*)+", text) or "://" in text:
        return False  # A path, or a name in a program; addresses have a rule of their own.
    counts = Counter(text)
    entropy = -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())
    switches = len(re.findall(r"(?<=[A-Za-z])\d|(?<=\d)[A-Za-z]", text))
    return entropy >= 3.0 and switches >= 2 and (len(text) >= 16 or entropy >= 3.3)
