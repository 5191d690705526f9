"""Talking to people (standard error) and to programs (standard output), whatever stands at the other end.

A reader that goes away early does not change what the command did, so a closed pipe is passed over in silence and the
exit code stays that of the work.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TextIO

import typer

from ..config.redaction import redact_text
from ..errors import GroundworkError

PLAIN: Any = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "pretty_exceptions_show_locals": False,
    "add_completion": False,
    "no_args_is_help": True,
}
"""How every part of the command line is made: plain help is quick, and tracebacks with local variables show secrets."""

Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]

_COLOURS = {"green": "32", "red": "31", "yellow": "33", "dim": "2", "bold": "1"}
_MARKS = {"passed": ("✓", "ok", "green"), "failed": ("✗", "FAIL", "red"), "not run": ("–", "-", "dim")}
_WARNING = ("!", "!", "yellow")


class UsageError(GroundworkError):
    """The command was asked for something it cannot mean."""

    exit_code = 2


def say(text: str = "") -> None:
    """One or more lines for people, on standard error."""
    _write(sys.stderr, redact_text(text) + "\n")


def say_safely(label: str, text: str) -> None:
    """A line for people whose text came from elsewhere: no control character in it reaches the terminal."""
    say(label + printable(text))


def emit(text: str) -> None:
    """Data for programs: one line, or one document, on standard output."""
    stream = sys.stdout
    _write(stream, (printable(text) if _is_terminal(stream) else text) + "\n")


def emit_json(value: Any, *, indent: int | None = None) -> None:
    """JSON on standard output, in ASCII where the stream can hold no more."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    emit(text if can_show(text, sys.stdout) else json.dumps(value, indent=indent))


def emit_bytes(data: bytes) -> None:
    """Data that is UTF-8 text already, as it is; whole lines, so that a terminal can be spared what steers it."""
    stream = sys.stdout
    raw = getattr(stream, "buffer", None)
    if raw is None or _is_terminal(stream):
        text = data.decode("utf-8", "replace")
        _write(stream, printable(text) if _is_terminal(stream) else text)
        return
    try:
        raw.write(data)
        raw.flush()
    except BrokenPipeError:
        _forget(stream)


class Progress:
    """A bar on standard error that grows with `to`, where a person is looking; elsewhere nothing at all."""

    _WIDTH = 30

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._shown = _is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"
        self._last = 0.0

    def to(self, count: int) -> None:
        """Ten times a second at most, and always at the end."""
        now = time.monotonic()
        if not self._shown or (count < self._total and now - self._last < 0.1):
            return
        self._last = now
        share = min(1.0, count / self._total) if self._total else 1.0
        bar = ("#" * round(share * self._WIDTH)).ljust(self._WIDTH, ".")
        _write(sys.stderr, f"\r{self._what} [{bar}] {count:,} of {self._total:,} tasks")

    def end(self) -> None:
        """The next line begins at its beginning, also after a failure."""
        if self._shown and self._last:
            _write(sys.stderr, "\n")


def printable(text: str) -> str:
    r"""Control and format characters, but for line ends, as `\uXXXX`: a title cannot steer a terminal."""
    return "".join(
        character if character.isprintable() or character == "\n" else _escape(character)
        for character in text
    )


def _escape(character: str) -> str:
    number = ord(character)
    if number < 0x10000:
        return f"\\u{number:04x}"
    # JSON's way: the two halves of a surrogate pair.
    number -= 0x10000
    return f"\\u{0xD800 + (number >> 10):04x}\\u{0xDC00 + (number & 0x3FF):04x}"


def can_show(text: str, stream: TextIO | None) -> bool:
    encoding = getattr(stream, "encoding", None) or "ascii"
    try:
        text.encode(encoding)
    except (UnicodeError, LookupError):
        return False
    return True


def mark(outcome: str) -> str:
    """The sign in front of a check's line, coloured where that is welcome, in ASCII where it has to be."""
    fancy, plain, colour = _MARKS.get(outcome, _WARNING)
    if can_show("✓✗–", sys.stderr):
        return paint(fancy, colour)
    return paint(plain.ljust(4), colour)


def paint(text: str, colour: str) -> str:
    if not _is_terminal(sys.stderr) or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def rows(found: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Rows on standard output: a table for a terminal, else one JSON object a line, complete."""
    if not _is_terminal(sys.stdout):
        for row in found:
            emit_json(row)
        return
    cells = [[_cell(row.get(column)) for column in columns] for row in found]
    widths = [
        max([len(column), *(len(line[index]) for line in cells)]) for index, column in enumerate(columns)
    ]
    for line in [list(columns), *cells]:
        emit("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable("" if value is None else str(value)).replace("\n", "\\n")


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "ascii"
    if not can_show(text, stream):
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        _forget(stream)


def _forget(stream: TextIO) -> None:
    """Let further writing, also Python's own at exit, go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def confirm(question: str, yes: bool) -> None:
    """Go on when `yes`, or when a person says so; raises UsageError where nobody can be asked."""
    if yes:
        return
    if not (_is_terminal(sys.stdin) and _is_terminal(sys.stderr)):
        raise UsageError(f"{question} Say so with --yes.")
    _write(sys.stderr, f"{question} [y/N] ")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("Nothing was done.")


def ask_password() -> str:
    """A new password: asked for twice without showing it, or the first line of what is piped in."""
    if not _is_terminal(sys.stdin):
        line = sys.stdin.readline() if sys.stdin is not None else ""
        # Some shells lead what they pipe with a byte order mark.
        return line.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")
    import getpass

    first = getpass.getpass("New password: ")
    if first != getpass.getpass("The same again: "):
        raise UsageError("The two are not the same.")
    return first


def quiet_logs() -> None:
    """One command, one clear line at its end: what happens on the way is for those who ask by LOG_LEVEL=debug."""
    from ..config.logging import configure

    configure("debug" if os.environ.get("LOG_LEVEL", "").lower() == "debug" else "critical", "console")
