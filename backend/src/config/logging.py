"""Structured logging: one event is one line, JSON on standard output or text for people on standard error.

structlog's processors render; a thread writes (`config.log_writer`), so no caller blocks on the sink. Records of the
standard library's loggers (uvicorn, alembic, asyncio, warnings) take the same way. `request_id_bound` puts a request's
id into each of its lines. Control characters, line separators and terminal escapes in values are escaped, and what
looks like a credential is masked (`config.redaction`). Importing this module changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal, Protocol, TextIO, cast
from weakref import WeakSet

from ..errors import ConfigurationError, GroundworkError
from .loading import without
from .log_writer import LogWriter
from .redaction import is_suspect, redact, redact_text
from .version import VERSION

# structlog's pretty tracebacks would import rich and pygments, a fifth of the supervisor's CPU, and show values.
with without("rich"):
    import structlog
    from structlog.dev import ConsoleRenderer, KeyValueColumnFormatter
    from structlog.processors import ExceptionRenderer, JSONRenderer, TimeStamper, add_log_level
    from structlog.stdlib import add_logger_name
    from structlog.typing import EventDict, ExcInfo, FilteringBoundLogger, Processor

Format = Literal["auto", "console", "json"]

WORKER_NUMBER = "GROUNDWORK_WORKER"
"""Environment variable: the number of a worker among those of its supervisor."""

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
# SQLAlchemy's INFO prints statements with their parameters, asyncio's DEBUG every selector, alembic's INFO its plugins.
_LIBRARY_LEVELS = {
    "uvicorn": logging.DEBUG,
    "uvicorn.error": logging.DEBUG,
    "uvicorn.asgi": logging.DEBUG,
    "asyncio": logging.INFO,
    "alembic": logging.INFO,
    "alembic.runtime.plugins": logging.WARNING,
    "sqlalchemy": logging.WARNING,
    "py.warnings": logging.DEBUG,
}
_MAX_TRACEBACK = 20_000
_MAX_VALUE = 20_000
_MAX_LINE = 64_000

_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_PLAIN_ADDRESS = re.compile(r"[0-9A-Fa-f.:]{2,45}")

request_id_bound: ContextVar[str] = ContextVar("structlog_request_id")
"""The id of the current request, part of every line. structlog merges variables with this prefix; its own function for
binding one costs five times as much."""

# Loggers live in modules and outlast a configuration; they all share these two, which `configure` changes in place.
_processors: list[Processor] = []
_loggers: WeakSet[Any] = WeakSet()


class LogSettings(Protocol):
    """The settings that `configure_service` uses."""

    @property
    def log_level(self) -> str: ...
    @property
    def log_format(self) -> Format: ...
    @property
    def environment(self) -> str: ...


def get_logger(name: str) -> FilteringBoundLogger:
    """A module's logger: `log.info("pool.opened", size=4)`. It may be made before `configure` is called."""
    logger = structlog.get_logger(name)
    _loggers.add(logger)
    return cast(FilteringBoundLogger, logger)


def configure(level: str = "info", format: Format = "auto", stream: TextIO | None = None) -> None:  # noqa: A002
    """Start logging, or change level, format and stream.

    Without `stream`, JSON goes to standard output and text for people to standard error; `auto` is text where standard
    error is a terminal, else JSON.
    """
    terminal = _is_terminal(stream or sys.stderr)
    console = format == "console" or (format == "auto" and terminal)
    if stream is None:
        stream = sys.stderr if console else sys.stdout
    threshold = _LEVELS[level.lower()]
    _Output.open(stream)
    _Output.console = console
    _Output.json_at_info = not console and threshold <= _LEVELS["info"]
    _processors[:] = _console_processors(terminal) if console else _json_processors()
    structlog.configure(
        processors=_processors,
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        context_class=dict,
        logger_factory=_Output,
        cache_logger_on_first_use=True,
    )
    for logger in _loggers:
        logger.__dict__.pop("bind", None)  # What structlog cached was made for the former level.
    _adopt_standard_library(threshold)


def configure_service(settings: LogSettings) -> None:
    """`configure` for a process of the service: JSON in production, and uncaught exceptions are events too."""
    production = settings.log_format == "auto" and settings.environment == "production"
    configure(settings.log_level, "json" if production else settings.log_format)
    log = get_logger("groundwork.process")

    def thread_crashed(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_type is not SystemExit:
            log.error("thread.crashed", exc_info=failed.exc_value)

    sys.excepthook = lambda *error: log.critical("process.crashed", exc_info=error)
    threading.excepthook = thread_crashed
    sys.unraisablehook = lambda failed: log.error("exception.ignored", exc_info=failed.exc_value)


def is_for_people() -> bool:
    """Whether the configured log is text for people."""
    return _Output.console


def write_text(text: str) -> None:
    """Write lines for people between those of the log, and like them without blocking on the sink."""
    _Output.write(redact_text(text))


def log_refusal(error: GroundworkError) -> int:
    """Log why the service does not start: one event, or the message for people. Returns the exit code."""
    if _Output.console and isinstance(error, ConfigurationError):
        write_text(str(error))
    else:
        faults = error.faults if isinstance(error, ConfigurationError) else []
        get_logger("groundwork.process").error(
            "startup.refused",
            reason=getattr(error, "reason", type(error).__name__),
            detail=str(error),
            **({"faults": [asdict(fault) for fault in faults]} if faults else {}),
        )
    return int(getattr(error, "exit_code", 1))


class _Output:
    """structlog's logger: hands finished lines to the writer. A stream that cannot be written to loses the line."""

    console = False
    json_at_info = False
    # Fields of every JSON line: pid, number of the worker, version.
    process: ClassVar[dict[str, Any]] = {}
    _writer: LogWriter | None = None
    _stream: TextIO | None = None

    def __init__(self, name: str) -> None:
        self.name = name

    def msg(self, line: str) -> None:
        self.write(line)

    debug = info = warning = warn = error = err = critical = fatal = exception = failure = log = msg

    @classmethod
    def open(cls, stream: TextIO | None) -> None:
        if cls._writer is not None:
            cls._writer.close()
        cls._writer, cls._stream = None, stream
        # Streams without a descriptor (in memory, or closed) cannot block: they are written to directly.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            if stream is not None:
                cls._writer = LogWriter(stream.fileno(), stream.encoding, _dropped_line)

    @classmethod
    def write(cls, line: str, *, batched: bool = False) -> None:
        if cls._writer is not None:
            cls._writer.write(line, batched=batched)
        elif cls._stream is not None:
            with contextlib.suppress(OSError, ValueError):
                cls._stream.write(line + "\n")


def flush() -> None:
    """Wait until the lines logged so far are written, `log_writer.CLOSE_SECONDS` at most."""
    if _Output._writer is not None:
        _Output._writer.flush()


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (AttributeError, ValueError):
        return False


def _dropped_line(count: int) -> str:
    """The event that reports lost lines."""
    return _render(_Output(__name__), "warning", {"event": "log.dropped", "count": count})


def _render(output: _Output, method: str, event: EventDict) -> str:
    line: Any = event
    for processor in _processors:
        line = processor(output, method, line)
    return cast(str, line)


class RequestLog:
    """The `request` event of one logger for ordinary requests, at a fifth of the cost.

    `write` produces the same bytes as the logger, as long as `request_id` is the only bound variable; what it cannot
    (text for people, a suspicious value, an error) it leaves to the logger. Methods and routes come from small sets:
    each pair is encoded once.
    """

    def __init__(self, name: str) -> None:
        self._log = get_logger(name)
        self._name = name
        self._encoded: dict[tuple[str, str], str] = {}
        self._process = _Output.process
        self._second, self._clock = 0, ""

    def write(
        self,
        request_id: str,
        method: str,
        route: str,
        status: int,
        duration_ms: float,
        *,
        client: str | None = None,
        user_id: str | None = None,
        suspect_id: bool = True,
    ) -> None:
        """`request_id` holds only characters that JSON does not escape; `suspect_id` unless it was made here."""
        if (
            not _Output.json_at_info
            or status >= 500
            or (suspect_id and is_suspect(request_id))
            or (client is not None and not _PLAIN_ADDRESS.fullmatch(client))
        ):
            facts = request_facts(method, route, status, duration_ms, client, user_id)
            getattr(self._log, level_of_status(status))("request", **facts)
            return
        now = time.time()
        second = int(now)
        if second != self._second:
            self._clock = datetime.fromtimestamp(second, UTC).isoformat()[:19]
            self._second = second
        if self._process is not _Output.process:
            self._process = _Output.process
            self._encoded.clear()
        encoded = self._encoded.get((method, route))
        if encoded is None:
            facts = {
                "event": "request",
                "logger": self._name,
                **self._process,
                "method": method,
                "route": route,
            }
            encoded = _encode({"level": "info", "severity": "INFO", **facts})[1:-1]
            self._encoded[method, route] = encoded
        optional = "" if client is None else f',"client":"{client}"'
        if user_id is not None:
            optional += f',"user_id":"{user_id}"'
        _Output.write(
            f'{{"timestamp":"{self._clock}.{int((now - second) * 1000000):06d}Z",{encoded},"status":{status},'
            f'"duration_ms":{duration_ms}{optional},"request_id":"{request_id}"}}',
            batched=True,
        )


def request_facts(
    method: str, route: str, status: int, duration_ms: float, client: str | None, user_id: str | None
) -> dict[str, Any]:
    """The fields of a `request` event, in their order."""
    facts: dict[str, Any] = {"method": method, "route": route, "status": status, "duration_ms": duration_ms}
    if client is not None:
        facts["client"] = client
    if user_id is not None:
        facts["user_id"] = user_id
    return facts


def level_of_status(status: int) -> str:
    """The level of a request's line: 503 and 504 tell of a dependency or of load, other 5xx of a defect."""
    if status < 500:
        return "info"
    return "warning" if status in (503, 504) else "error"


# --- processors ----------------------------------------------------------------------------------------------


def _json_processors() -> list[Processor]:
    number = os.environ.get(WORKER_NUMBER, "")
    worker = {"worker": int(number)} if number.isdecimal() else {}
    _Output.process = {"pid": os.getpid(), **worker, "version": VERSION}
    return [
        structlog.contextvars.merge_contextvars,
        TimeStamper(fmt="%Y-%m-%dT%H:%M:%S.%fZ", utc=True),
        add_log_level,
        add_logger_name,
        ExceptionRenderer(_format_exception),
        _arrange,
        _Redacting(JSONRenderer(serializer=_to_json)),
    ]


def _console_processors(terminal: bool) -> list[Processor]:
    renderer = ConsoleRenderer(
        colors=terminal and not os.environ.get("NO_COLOR"), sort_keys=False, pad_event_to=0
    )
    for column in renderer.columns:
        if isinstance(column.formatter, KeyValueColumnFormatter):
            column.formatter.value_repr = _escape if column.key else _quote
    return [
        structlog.contextvars.merge_contextvars,
        TimeStamper(fmt="%H:%M:%S", utc=True),
        add_log_level,
        add_logger_name,
        ExceptionRenderer(_format_exception),
        _Redacting(lambda logger, method, event: renderer(logger, method, _printable(event))),
    ]


def _arrange(_logger: object, _method: str, event: EventDict) -> EventDict:
    """The fields of every line in their order, with Google's name for the level (`severity`) and the process."""
    level = event.pop("level")
    return {
        "timestamp": event.pop("timestamp"),
        "level": level,
        "severity": level.upper(),
        "event": event.pop("event", ""),
        "logger": event.pop("logger"),
        **_Output.process,
        **event,
    }


def _format_exception(exc_info: ExcInfo) -> str:
    """The traceback with source lines and without the values of variables."""
    text = "".join(traceback.format_exception(exc_info[1])).rstrip()
    if len(text) > _MAX_TRACEBACK:
        half = _MAX_TRACEBACK // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
    return text


class _Redacting:
    """The last processor: renders. Credentials are looked for in the finished line, because hardly any has one."""

    def __init__(self, render: Callable[[Any, str, EventDict], str | bytes]) -> None:
        self._render = render

    def __call__(self, logger: Any, method: str, event: EventDict) -> str:
        line = cast(str, self._render(logger, method, dict(event)))
        return cast(str, self._render(logger, method, redact(event))) if is_suspect(line) else line


def _to_json(event: MutableMapping[str, Any], **_: Any) -> str:
    try:
        line = _encode(event)
    except (TypeError, ValueError, RecursionError):
        # NaN, a circular value or an odd key: the fields as text are better than no line.
        line = _as_texts(event)
    if len(line) > _MAX_LINE:
        line = _as_texts(event)
    return line.replace("\x7f", "\\u007f")


def _as_texts(event: MutableMapping[str, Any]) -> str:
    return _encode(
        {_text(key): value if isinstance(value, int | None) else _text(value) for key, value in event.items()}
    )


def _text(value: object) -> str:
    try:
        text = value if isinstance(value, str) else str(value)
    except Exception:  # a value's own __str__ may do anything
        text = f"<{type(value).__name__} without text>"
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}... ({len(text)} characters)"


# ASCII only: no character that a reader may take for a new line, in any encoding of the stream.
_encode = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=_text).encode


def _printable(event: MutableMapping[str, Any]) -> EventDict:
    """The event with keys that cannot break a line; the lines of a traceback are marked, so that none looks like an
    event. Values are escaped by the renderer's columns."""
    shown: dict[str, Any] = {_escape(key): value for key, value in event.items()}
    for key in ("exception", "stack"):
        if key in shown:
            lines = re.split(r"\r?\n", _text(shown[key]))
            shown[key] = "\n".join(f"    | {_escape(line)}" for line in lines)
    return shown


def _escape(value: object) -> str:
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), _text(value))


def _quote(value: object) -> str:
    shown = _escape(value)
    if shown and not re.search(r"[\s\"=]", shown):
        return shown
    return '"' + shown.replace('"', '\\"') + '"'


# --- the standard library's loggers --------------------------------------------------------------------------


class _StandardLibraryHandler(logging.Handler):
    """Renders a library's records as events. Unlike structlog's formatter it keeps a record with unfit arguments."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except Exception:  # arguments that do not fit the message
            text = _text(record.msg)
        level = next((name for name, number in _LEVELS.items() if number >= record.levelno), "critical")
        output = _Output(record.name)
        with contextlib.suppress(Exception):
            output.msg(_render(output, level, {"event": text, "exc_info": record.exc_info}))
        if text.startswith("Finished server process"):
            # uvicorn's last record: it then raises the signal that stopped it, and no exit handler runs.
            flush()


def _is_no_greeting(record: logging.LogRecord) -> bool:
    """Alembic opens every run with its dialect and its mode, whether there is anything to migrate or not."""
    return not str(record.msg).startswith(("Context impl ", "Will assume "))


def _adopt_standard_library(threshold: int) -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _StandardLibraryHandler) or type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
    root.addHandler(_StandardLibraryHandler())
    root.setLevel(threshold)
    for name, least in _LIBRARY_LEVELS.items():
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(max(threshold, least))
    logging.getLogger("alembic.runtime.migration").addFilter(_is_no_greeting)
    # uvicorn's access log prints query strings, and tokens in them; the middleware logs requests.
    access = logging.getLogger("uvicorn.access")
    access.handlers.clear()
    access.propagate = False
    access.setLevel(logging.CRITICAL + 1)
    logging.captureWarnings(True)
