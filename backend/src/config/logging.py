"""One line an event: for people on a terminal, JSON for machines. Importing this changes nothing.

Our own events are rendered and written directly; what libraries log through the standard library (uvicorn,
alembic, asyncio, warnings) goes through the same steps. A request's id is bound by `request_id_bound` and so stands
in every line. Values cannot break a line: control characters, line separators and terminal escapes are shown as
escapes. The last belt: what looks like a credential is masked (`config.redaction`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal, TextIO, cast
from weakref import WeakSet

from .loading import without
from .redaction import is_suspect, redact

# Its pretty tracebacks would bring rich and pygments, a fifth of the supervisor's CPU: ours show no values.
with without("rich"):
    import structlog
    from structlog.typing import EventDict, FilteringBoundLogger, Processor

Format = Literal["auto", "console", "json"]
Render = Callable[[MutableMapping[str, Any]], str]

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
# SQLAlchemy's INFO prints statements with their parameters; asyncio's DEBUG speaks of every selector; alembic tells of
# each of its plugins when it is imported.
_AT_LEAST = {
    "asyncio": logging.INFO,
    "alembic": logging.INFO,
    "alembic.runtime.plugins": logging.WARNING,
    "sqlalchemy": logging.WARNING,
}
_MAXIMUM_TRACEBACK = 20_000
_MAXIMUM_VALUE = 20_000
GATHER_SECONDS = 0.1
# What a pipe takes in one piece (POSIX's PIPE_BUF on Linux): several workers write to one, and no line may end up in
# another's.
_WRITTEN_AS_ONE = 4096

_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_COLOURS = {
    "debug": "\x1b[2m",
    "info": "\x1b[32m",
    "warning": "\x1b[33m",
    "error": "\x1b[31m",
    "critical": "\x1b[1;31m",
}
_PLAIN = "\x1b[0m"

request_id_bound: ContextVar[str] = ContextVar("structlog_request_id")
"""The id of the request that is worked on, for every line. structlog merges what is called so; its own way of binding
one costs five times as much."""

# Loggers live in modules and outlast a configuration; they all share these two, which `configure` changes in place.
_steps: list[Processor] = []
_loggers: WeakSet[Any] = WeakSet()


def get_logger(name: str) -> FilteringBoundLogger:
    """A module's logger: `log.info("pool-opened", size=4)`. It may be made before `configure` is called."""
    logger = structlog.get_logger(name)
    _loggers.add(logger)
    return cast(FilteringBoundLogger, logger)


def configure(level: str = "info", format: Format = "auto", stream: TextIO | None = None) -> None:  # noqa: A002
    """Send every event to `stream` (standard error), one line each. It may be called again; the last call counts."""
    target = sys.stderr if stream is None else stream
    terminal = _is_terminal(target)
    threshold = _LEVELS[level.lower()]
    _Writer.stream = target
    render: Render = _json_line
    if format == "console" or (format == "auto" and terminal):
        render = _Console(colours=terminal and not os.environ.get("NO_COLOR"))
    _steps[:] = [
        structlog.contextvars.merge_contextvars,
        _stamp,
        _exception,
        _Rendered(render),
    ]
    structlog.configure(
        processors=_steps,
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        context_class=dict,
        logger_factory=_Writer,
        cache_logger_on_first_use=True,
    )
    for logger in _loggers:
        logger.__dict__.pop("bind", None)  # what structlog cached was assembled for the former level
    _Writer.json_at_info = render is _json_line and threshold <= _LEVELS["info"]
    _adopt_standard_library(threshold)


class _Writer:
    """Where lines go. A closed or broken stream loses the line, never the request that logged it."""

    stream: TextIO = sys.stderr
    json_at_info = False
    _lock = threading.RLock()
    # Lines that are to go out together, and their characters, which are all ASCII.
    gathers = False
    _gathered: ClassVar[list[str]] = []
    _size = 0
    _due = False

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    def msg(self, line: str) -> None:
        with self._lock:
            self.flush()
            self._write(line + "\n")

    debug = info = warning = warn = error = err = critical = fatal = exception = failure = log = msg

    @classmethod
    def gather(cls, line: str) -> None:
        """Writes the line soon, with others; on the event loop."""
        with cls._lock:
            if cls._size + len(line) >= _WRITTEN_AS_ONE:
                cls.flush()
            cls._gathered.append(line)
            cls._size += len(line) + 1
            if not cls._due:
                cls._due = True
                asyncio.get_running_loop().call_later(GATHER_SECONDS, cls.flush, True)

    @classmethod
    def flush(cls, due: bool = False) -> None:
        """Also from other threads, which is why the loop's timer is left alone: it may find nothing."""
        with cls._lock:
            cls._due = cls._due and not due
            if cls._gathered:
                text = "\n".join([*cls._gathered, ""])
                cls._gathered.clear()
                cls._size = 0
                cls._write(text)

    @classmethod
    def _write(cls, text: str) -> None:
        stream = cls.stream
        with contextlib.suppress(OSError, ValueError):
            stream.write(text)
            if not getattr(stream, "line_buffering", False):
                stream.flush()


@contextlib.contextmanager
def gathering() -> Iterator[None]:
    """Around an event loop: the lines of ordinary requests go out together, a tenth of a second late at most.

    A write for each costs a request a tenth of its CPU. Whatever else is logged is written at once, and they before
    it; a process that is killed takes the last of them along.
    """
    _Writer.gathers = True
    try:
        yield
    finally:
        _Writer.gathers = False
        _Writer.flush(due=True)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


class RequestLines:
    """`log.info("request", ...)` of one logger for what nearly every request says, at a fifth of the cost.

    Every answer writes this line, so it is put together here, where it is JSON. `say` writes the same bytes as the
    logger would, with `request_id` the only fact that is bound, or leaves it to the logger. Methods and routes come
    from small sets: each pair is encoded once.
    """

    def __init__(self, name: str) -> None:
        self._log = get_logger(name)
        self._name = name
        self._writer = _Writer(name)
        self._facts: dict[tuple[str, str], str] = {}
        self._second, self._clock = 0, ""

    def say(
        self, request_id: str, method: str, route: str, status: int, duration_ms: float, *, given: bool = True
    ) -> None:
        """`request_id` is of characters that JSON holds as they are; a `given` one is not of our making."""
        if not _Writer.json_at_info or (given and is_suspect(request_id)):
            self._log.info("request", method=method, route=route, status=status, duration_ms=duration_ms)
            return
        now = time.time()
        second = int(now)
        if second != self._second:
            self._clock = datetime.fromtimestamp(second, UTC).isoformat()[:19]
            self._second = second
        facts = self._facts.get((method, route))
        if facts is None:
            facts = self._facts[method, route] = f'"method":{_encode(method)},"route":{_encode(route)}'
        line = (
            f'{{"timestamp":"{self._clock}.{int((now - second) * 1000):03d}Z","level":"info","event":"request",'
            f'"logger":"{self._name}",{facts},"status":{status},"duration_ms":{duration_ms},"request_id":"{request_id}"}}'
        )
        if _Writer.gathers:
            _Writer.gather(line)
        else:
            self._writer.msg(line)


# --- the steps of an event -----------------------------------------------------------------------------------


def _stamp(logger: Any, method: str, event: EventDict) -> EventDict:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
    stamped: dict[str, Any] = {"timestamp": now, "level": "error" if method == "exception" else method}
    stamped["event"] = event.pop("event", "")
    if logger.name is not None:
        stamped["logger"] = logger.name
    stamped.update(event)
    return stamped


def _exception(_logger: object, _method: str, event: EventDict) -> EventDict:
    """`exc_info` becomes one text: the traceback with source lines and without the values of variables."""
    given = event.pop("exc_info", None)
    if given is None or given is False:
        return event
    if isinstance(given, tuple):
        given = given[1]
    error = given if isinstance(given, BaseException) else sys.exc_info()[1]
    if error is not None:
        text = "".join(traceback.format_exception(error)).rstrip()
        if len(text) > _MAXIMUM_TRACEBACK:
            half = _MAXIMUM_TRACEBACK // 2
            text = f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
        event["exception"] = text
    return event


class _Rendered:
    """The last step: text. Credentials are looked for in the finished line, because nearly every line has none."""

    def __init__(self, render: Render) -> None:
        self._render = render

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
        line = self._render(event)
        return self._render(redact(event)) if is_suspect(line) else line


def _json_line(event: MutableMapping[str, Any]) -> str:
    try:
        line = _encode(event)
    except (TypeError, ValueError, RecursionError):
        # NaN, a circular value or an odd key: the facts as text are better than no line.
        line = _encode(
            {
                _shown(key): value if isinstance(value, int | None) else _shown(value)
                for key, value in event.items()
            }
        )
    return line.replace("\x7f", "\\u007f")


def _shown(value: object) -> str:
    try:
        text = value if isinstance(value, str) else str(value)
    except Exception:  # a value's own __str__ may do anything
        text = f"<{type(value).__name__} without text>"
    return text if len(text) <= _MAXIMUM_VALUE else f"{text[:_MAXIMUM_VALUE]}... ({len(text)} characters)"


# ASCII only: whatever encoding the stream has, and no separator that a reader may take for a new line.
_encode = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=_shown).encode


class _Console:
    """`20:15:42 warning  pool-exhausted  waiting=3 request_id=...`, and a traceback indented beneath."""

    def __init__(self, *, colours: bool) -> None:
        self._colours = colours

    def __call__(self, event: MutableMapping[str, Any]) -> str:
        facts = dict(event)
        time = str(facts.pop("timestamp", ""))[11:19]
        level = str(facts.pop("level", ""))
        exception = facts.pop("exception", None)
        name = _escaped(_shown(facts.pop("event", "")))
        logger = facts.pop("logger", None)
        label = f"{level:<8}"
        if self._colours:
            label = f"{_COLOURS.get(level, '')}{label}{_PLAIN}"
        words = [f"{_escaped(_shown(key))}={_quoted(_shown(value))}" for key, value in facts.items()]
        if logger is not None:
            words.append(f"[{_escaped(_shown(logger))}]")
        line = "  ".join(part for part in (f"{time} {label}{name}", " ".join(words)) if part)
        if exception is not None:
            # The bar keeps a line forged inside an exception's message from passing for an event.
            line += "".join(f"\n    | {_escaped(part)}" for part in re.split(r"\r?\n", _shown(exception)))
        return line


def _escaped(text: str) -> str:
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def _quoted(text: str) -> str:
    shown = _escaped(text)
    if shown and not re.search(r"[\s\"=]", shown):
        return shown
    return '"' + shown.replace('"', '\\"') + '"'


# --- the standard library's loggers ------------------------------------------------------------------------------


class _Adopted(logging.Handler):
    """A record of a library takes the same steps as an event of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except Exception:  # arguments that do not fit the message
            text = _shown(record.msg)
        writer = _Writer(record.name)
        level = next((name for name, number in _LEVELS.items() if number >= record.levelno), "critical")
        line: Any = {"event": text, "exc_info": record.exc_info}
        with contextlib.suppress(Exception):
            for step in _steps:
                line = step(writer, level, line)
            writer.msg(line)


def _says_something(record: logging.LogRecord) -> bool:
    """Alembic opens every run with its dialect and its mode, whether there is anything to migrate or not."""
    return not str(record.msg).startswith(("Context impl ", "Will assume "))


def _adopt_standard_library(threshold: int) -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _Adopted) or type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
    root.addHandler(_Adopted())
    root.setLevel(threshold)
    for name in (
        "uvicorn",
        "uvicorn.error",
        "uvicorn.asgi",
        "alembic",
        "alembic.runtime.plugins",
        "sqlalchemy",
        "asyncio",
        "py.warnings",
    ):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(max(threshold, _AT_LEAST.get(name, 0)))
    logging.getLogger("alembic.runtime.migration").addFilter(_says_something)
    # uvicorn's access log prints query strings, and tokens in them; a request has its own line from our middleware.
    access = logging.getLogger("uvicorn.access")
    access.handlers.clear()
    access.propagate = False
    access.setLevel(logging.CRITICAL + 1)
    logging.captureWarnings(True)
