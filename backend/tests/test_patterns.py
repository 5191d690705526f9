"""No regular expression takes more than linear time: none can be given a text that holds up the loop.

Every pattern in `src` is found, and tried as the code uses it, on long texts made to be nearly what it looks for. A
header is 32 KiB at most; the operator's own texts (config/) are tried at an eighth of that.
"""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

SRC: Final = Path(__file__).resolve().parents[1] / "src"
LONGEST: Final = 32 * 1024
# Of this process alone, so the machine's load does not matter. In linear time it takes a hundredth of this.
SECONDS: Final = 0.5
METHODS: Final = frozenset({"match", "fullmatch", "search", "sub", "split", "findall", "finditer"})
PIECES: Final = (
    *"aA0 \t\n-_.,;:/\\'\"=@[]()%&é",
    *(
        "a.",
        "a=",
        "ab ",
        '""',
        '"a" ,',
        'W/"a",',
        '; a="b"',
        "a, ",
        "postgres://a:",
        "postgresql://",
        "http://a:",
    ),
    *(
        "://",
        "x://x:",
        "password=",
        "password='",
        'token="',
        "authorization: bearer ",
        "-c ",
        " -----BEGIN",
        "[1",
        "%2",
    ),
)
AROUND: Final = (("", ""), ("", "!"), ('"', "\0"), ("a", "\n!"), ("password='", ""), ("postgres://", " "))


@dataclass(frozen=True)
class Pattern:
    place: str
    text: str | bytes
    flags: int
    methods: frozenset[str]

    @property
    def longest(self) -> int:
        return LONGEST // 8 if self.place.startswith("config/") and "redaction" not in self.place else LONGEST


def patterns(path: Path, name: str) -> Iterator[Pattern]:
    """Every pattern of a module, with the methods that the module calls on it; empty where it is put together."""
    tree = ast.parse(path.read_text())
    called: dict[str, set[str]] = {}
    named: dict[int, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in METHODS:
            called.setdefault(node.value.id, set()).add(node.attr)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            named[id(node.value)] = getattr(target, "id", "")
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        if getattr(node.func.value, "id", "") != "re" or node.func.attr not in {"compile", *METHODS}:
            continue
        if not isinstance(node.args[0], ast.Constant):
            yield Pattern(f"{name}:{node.lineno}", "", 0, frozenset())
            continue
        text = node.args[0].value
        flags = 0
        for given in (*node.args[1:], *(keyword.value for keyword in node.keywords)):
            for part in ast.walk(given):
                if isinstance(part, ast.Attribute) and getattr(part.value, "id", "") == "re":
                    flags |= int(getattr(re, part.attr))
        methods = (
            called.get(named.get(id(node), ""), set()) if node.func.attr == "compile" else {node.func.attr}
        )
        yield Pattern(f"{name}:{node.lineno}", text, flags, frozenset(methods or {"fullmatch"}))


def slowest(pattern: Pattern) -> tuple[float, str]:
    """The most CPU seconds that any of the texts took, and which text that was."""
    compiled: Any = re.compile(pattern.text, pattern.flags)
    worst = (0.0, "")
    for piece in PIECES:
        for before, after in AROUND:
            whole: str | bytes = before + piece * (pattern.longest // len(piece)) + after
            if isinstance(pattern.text, bytes):
                whole = whole.encode() if isinstance(whole, str) else whole
            for method in pattern.methods:
                began = time.process_time()
                if method == "sub":
                    compiled.sub(whole[:0], whole)
                elif method == "finditer":
                    list(compiled.finditer(whole))
                else:
                    getattr(compiled, method)(whole)
                worst = max(
                    worst, (time.process_time() - began, f"{method} of {before!r} {piece!r} … {after!r}")
                )
                if worst[0] > SECONDS:
                    return worst
    return worst


ALL: Final = [
    pattern
    for path in sorted(SRC.rglob("*.py"))
    for pattern in patterns(path, path.relative_to(SRC).as_posix())
]


def test_no_pattern_can_be_held_up() -> None:
    assert len(ALL) > 35
    assert {pattern.place.partition(":")[0] for pattern in ALL} >= {
        "api/bodies.py",
        "api/conditions.py",
        "config/redaction.py",
    }
    # Put together from a few literals: the operator's own rates, and how a password is kept.
    assert {pattern.place.partition(":")[0] for pattern in ALL if not pattern.text} == {
        "config/accounts.py",
        "services/passwords.py",
    }
    slow = {}
    for pattern in ALL:
        seconds, how = slowest(pattern)
        if seconds > SECONDS:
            slow[pattern.place] = f"{seconds:.2f} s: {how}"
    assert slow == {}


def test_a_pattern_that_can_be_held_up_is_found() -> None:
    quadratic = Pattern("api/x.py:1", r"[a-z]+=[a-z]*@", 0, frozenset({"search"}))
    assert slowest(quadratic)[0] > SECONDS
