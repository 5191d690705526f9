"""Terminal output of the commands: data on standard output, messages on standard error.

A closed pipe is ignored: the exit code reports the command's own outcome, not whether its output was read.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

from ..config.redaction import redact_text
from ..errors import GroundworkError

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")

_MARKS = {"passed": ("✓", "ok", "green"), "failed": ("✗", "FAIL", "red"), "not run": ("–", "-", None)}
_WARNING = ("!", "!", "yellow")


class UsageError(GroundworkError):
    """Arguments that cannot be carried out."""

    exit_code = 2


def say(text: str = "") -> None:
    """Print a message on standard error, credentials masked."""
    _write(sys.stderr, redact_text(text) + "\n")


def say_safely(label: str, text: str) -> None:
    """Print a message whose text comes from outside: its control characters are escaped."""
    say(label + printable(text))


def emit(text: str) -> None:
    """Print data, one line or one document, on standard output."""
    _write(sys.stdout, (printable(text) if is_terminal(sys.stdout) else text) + "\n")


def emit_json(value: Any, *, indent: int | None = None) -> None:
    """Print JSON on standard output, in ASCII where the stream's encoding has no more."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    emit(text if can_encode(text, sys.stdout) else json.dumps(value, indent=indent))


def emit_bytes(data: bytes) -> None:
    """Print whole lines of UTF-8 on standard output, unchanged unless it is a terminal."""
    if is_terminal(sys.stdout):
        _write(sys.stdout, printable(data.decode("utf-8", "replace")))
    else:
        _write(sys.stdout, data)


def emit_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print a table of these columns on a terminal, else each row as one JSON object a line."""
    if not is_terminal(sys.stdout):
        for row in rows:
            emit_json(row)
        return
    lines = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        emit("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def progress(label: str, total: int) -> ProgressBar[int]:
    """A progress bar on standard error; hidden where that is no terminal."""
    return click.progressbar(
        length=total, label=label, show_pos=True, file=sys.stderr, hidden=not is_terminal(sys.stderr)
    )


def printable(text: str) -> str:
    r"""The text with its control and format characters, but for line ends, as `\uXXXX`, as JSON escapes them."""
    return "".join(
        character if character.isprintable() or character == "\n" else json.dumps(character)[1:-1]
        for character in text
    )


def can_encode(text: str, stream: TextIO | None) -> bool:
    """Whether the stream's encoding has all characters of the text."""
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


def mark(outcome: str) -> str:
    """The sign in front of a check's line, in ASCII where the terminal's encoding has no more."""
    sign, ascii_sign, colour = _MARKS.get(outcome, _WARNING)
    text = sign if can_encode("✓✗–", sys.stderr) else ascii_sign.ljust(4)
    return click.style(text, fg=colour, dim=colour is None or None)


def colour_default() -> bool | None:
    """click's `color` for a context: False where the environment forbids colours, else by the stream."""
    return False if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else None


def confirm(question: str, yes: bool) -> None:
    """Return when `yes` or when the user confirms; raise UsageError otherwise."""
    if yes:
        return
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        raise UsageError(f"{question} Pass --yes to run non-interactively.")
    if not click.confirm(question, err=True):
        raise UsageError("Nothing was done.")


def ask_password() -> str:
    """A new password: prompted for twice without echo, or the first line of piped input."""
    if not is_terminal(sys.stdin):
        # Some shells put a byte order mark in front of what they pipe.
        line = sys.stdin.readline() if sys.stdin is not None else ""
        return line.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")
    first = click.prompt("New password", hide_input=True, err=True)
    if first != click.prompt("The same again", hide_input=True, err=True):
        raise UsageError("The two are not the same.")
    return str(first)


def quiet_logs() -> None:
    """Log nothing but critical events, or everything with LOG_LEVEL=debug: a command prints its own result."""
    from ..config.logging import configure

    configure("debug" if os.environ.get("LOG_LEVEL", "").lower() == "debug" else "critical", "console")


def is_terminal(stream: TextIO | None) -> bool:
    """False also for a closed stream."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False  # It is closed.


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable("" if value is None else str(value)).replace("\n", "\\n")


def _write(stream: TextIO | None, data: str | bytes) -> None:
    if stream is None:  # The descriptor was closed at the start.
        return
    if isinstance(data, str) and not can_encode(data, stream):
        encoding = getattr(stream, "encoding", None) or "ascii"
        data = data.encode(encoding, "backslashreplace").decode(encoding)
    try:
        click.echo(data, file=stream, nl=False)
    except BrokenPipeError:
        # Later writes, Python's own at exit included, go nowhere.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
