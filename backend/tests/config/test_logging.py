"""One event is one line, whatever is in it and whichever library logged it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from src.config import logging as ours
from src.config.logging import configure, get_logger
from src.config.redaction import is_suspect, redact, redact_text
from src.config.version import VERSION

log = get_logger("tests.logging")

NASTY = (
    "a\nb\r\nc\x1b[31mred\x1b[0m\x00\x07\x08\x7f\x85\u2028\u2029\u202e\u200b\ud800"
    ' {"event": "forged"} level=error'
)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The standard library's and structlog's configuration are one for the process."""
    root = logging.getLogger()
    handlers, level, processors = list(root.handlers), root.level, list(ours._processors)
    yield
    logging.captureWarnings(False)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()
    ours._processors[:] = processors
    ours._Output.json_at_info = False
    for handler in list(root.handlers):
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)


def events(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def without_time(line: str) -> str:
    return re.sub(r"\d\d:\d\d:\d\d(\.\d{6}Z)?", "T", line)


def test_an_event_is_one_line_of_json_with_its_facts_and_the_request_id() -> None:
    stream = io.StringIO()
    configure("info", "json", stream)
    structlog.contextvars.bind_contextvars(request_id="r-1")
    log.info("pool.opened", size=4, ratio=0.5, ok=True, nothing=None, names=["a"])
    [event] = events(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", event.pop("timestamp"))
    assert event == {
        "level": "info", "severity": "INFO", "event": "pool.opened", "logger": "tests.logging", "pid": os.getpid(),
        "version": VERSION, "size": 4, "ratio": 0.5, "ok": True, "nothing": None, "names": ["a"], "request_id": "r-1",
    }  # fmt: skip


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error", "critical"])
def test_severity_is_the_level_in_the_words_of_googles_collectors(level: str) -> None:
    stream = io.StringIO()
    configure("debug", "json", stream)
    getattr(log, level)("pool.opened")
    logging.getLogger("library").log(getattr(logging, level.upper()), "opened")
    assert [(event["level"], event["severity"]) for event in events(stream)] == [(level, level.upper())] * 2


def test_a_worker_logs_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setenv("GROUNDWORK_WORKER", "3")
    configure("info", "json", stream)
    log.info("pool.opened")
    ours.RequestLog("tests.logging").write("r-1", "GET", "/v1/tasks", 200, 1.0)
    assert [event["worker"] for event in events(stream)] == [3, 3]


@pytest.mark.parametrize(
    ("client", "user_id"),
    [
        (None, None),
        ("2001:db8::1", None),
        ("192.0.2.1", "01a204f3-ab21-72c9-b90e-cf69b28b5f0d"),
        (NASTY, None),
    ],
)
@pytest.mark.parametrize("duration_ms", [0.0, 0.001, 12.345, 60000.0])
@pytest.mark.parametrize("request_id", ["r-1", "a:b/c=d+e._f", "password=hunter2", "9" * 128])
@pytest.mark.parametrize("format_", ["json", "console"])
def test_request_log_writes_the_line_that_the_logger_would_write(
    format_: Any, request_id: str, duration_ms: float, client: str | None, user_id: str | None
) -> None:
    stream = io.StringIO()
    configure("info", format_, stream)
    structlog.contextvars.bind_contextvars(request_id=request_id)
    facts: dict[str, Any] = {"method": "GET", "route": "/v1/tasks/{task_id}", "status": 200}
    more = {"client": client, "user_id": user_id}
    given = {name: value for name, value in more.items() if value is not None}
    get_logger("tests.logging").info("request", **facts, duration_ms=duration_ms, **given)
    ours.RequestLog("tests.logging").write(request_id, *facts.values(), duration_ms, **more)
    before, after = map(without_time, stream.getvalue().splitlines())
    assert before == after
    assert "hunter2" not in before


@pytest.mark.parametrize(
    ("status", "level"),
    [(200, "info"), (429, "info"), (500, "error"), (502, "error"), (503, "warning"), (504, "warning")],
)
def test_request_log_takes_the_level_from_the_status(status: int, level: str) -> None:
    stream = io.StringIO()
    configure("info", "json", stream)
    ours.RequestLog("tests.logging").write("r-1", "GET", "/v1/tasks", status, 1.0)
    assert [event["level"] for event in events(stream)] == [level]


def test_the_line_of_a_request_is_not_written_above_its_level() -> None:
    stream = io.StringIO()
    configure("warning", "json", stream)
    ours.RequestLog("tests.logging").write("r-1", "GET", "/v1/tasks", 200, 1.0)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("format_", ["json", "console"])
@pytest.mark.parametrize("where", ["value", "event", "key", "stdlib", "stdlib argument", "context"])
def test_nothing_in_a_value_breaks_the_line(format_: str, where: str) -> None:
    stream = io.StringIO()
    configure("info", format_, stream)  # type: ignore[arg-type]
    match where:
        case "value":
            log.info("event", path=NASTY, nested={"a": [NASTY]})
        case "event":
            log.info(NASTY)
        case "key":
            log.info("event", **{NASTY: 1})
        case "stdlib":
            logging.getLogger("uvicorn.error").warning(NASTY)
        case "stdlib argument":
            logging.getLogger("asyncio").error("%s", NASTY)
        case "context":
            structlog.contextvars.bind_contextvars(request_id=NASTY)
            log.info("event")
    line = stream.getvalue()
    assert line.endswith("\n")
    assert len(line.splitlines()) == 1
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e\u200b\ud800]", line)


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        object(),
        {1: {2}},
        b"bytes",
        {"a": float("inf")},
        ValueError("x"),
        10**400,
        "x" * 100_000,
    ],
)
@pytest.mark.parametrize("format_", ["json", "console"])
def test_no_value_is_too_odd_to_be_logged(value: object, format_: str) -> None:
    stream = io.StringIO()
    configure("info", format_, stream)  # type: ignore[arg-type]
    circular: list[Any] = []
    circular.append(circular)
    log.info("odd", value=value, circular=circular, plain=1)
    assert len(stream.getvalue().splitlines()) == 1
    if format_ == "json":
        assert events(stream)[0]["plain"] == 1


def test_a_value_whose_text_fails_does_not_stop_the_one_who_logs() -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no text")

        __repr__ = __str__

    stream = io.StringIO()
    configure("info", "json", stream)
    root = logging.getLogger()
    root.handlers[:] = [
        handler for handler in root.handlers if isinstance(handler, ours._StandardLibraryHandler)
    ]  # pytest's raise
    log.info("broken", value=Broken(), token=Broken())
    logging.getLogger("x").info("%s", Broken())
    logging.getLogger("x").info("%d", "not a number")
    assert [event["event"] for event in events(stream)] == ["broken", "%s", "%d"]


def test_a_broken_stream_does_not_stop_the_one_who_logs() -> None:
    stream = io.StringIO()
    configure("info", "json", stream)
    stream.close()
    log.info("lost")
    logging.getLogger("x").warning("lost too")
    assert stream.closed


def test_a_traceback_is_one_field_without_the_values_of_variables() -> None:
    stream = io.StringIO()
    configure("info", "json", stream)

    def fail(secret: str) -> None:
        raise ValueError("went wrong")

    try:
        fail("canary-" + "in-a-local")
    except ValueError:
        log.exception("failed", step=1)
        logging.getLogger("uvicorn.error").exception("failed there")
    first, second = events(stream)
    assert (first["event"], first["level"], first["step"]) == ("failed", "error", 1)
    for event in (first, second):
        assert event["exception"].startswith("Traceback (most recent call last):")
        assert event["exception"].endswith("ValueError: went wrong")
        assert "canary-in-a-local" not in event["exception"]


def test_on_a_terminal_a_traceback_is_indented_and_cannot_pass_for_an_event() -> None:
    stream = io.StringIO()
    configure("info", "console", stream)
    try:
        raise ValueError("x\n12:00:00 info    forged\x1b[2J")
    except ValueError:
        log.exception("failed")
    first, *rest = stream.getvalue().splitlines()
    assert "failed" in first
    assert rest
    assert all(line.startswith("    | ") for line in rest)
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    "name", ["uvicorn", "uvicorn.error", "alembic.runtime.migration", "asyncio", "any.library"]
)
def test_the_loggers_of_libraries_end_in_the_same_lines(name: str) -> None:
    stream = io.StringIO()
    own = io.StringIO()
    logging.getLogger(name.partition(".")[0]).addHandler(logging.StreamHandler(own))
    configure("info", "json", stream)
    structlog.contextvars.bind_contextvars(request_id="r-2")
    logging.getLogger(name).info("Running upgrade %s", "0001")
    [event] = events(stream)
    assert (event["logger"], event["event"], event["request_id"]) == (name, "Running upgrade 0001", "r-2")
    logging.getLogger(name.partition(".")[0]).handlers.clear()


def test_the_inventory_of_a_library_is_no_event() -> None:
    stream = io.StringIO()
    configure("info", "json", stream)
    logging.getLogger("alembic.runtime.plugins").info("setup plugin %s", "alembic.autogenerate.tables")
    logging.getLogger("alembic.runtime.plugins").warning("cannot set up %s", "it")
    assert [event["event"] for event in events(stream)] == ["cannot set up it"]


def test_python_warnings_and_lost_tasks_are_events_too() -> None:
    stream = io.StringIO()
    configure("info", "json", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("old habit", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(False)
    loop = asyncio.new_event_loop()
    loop.call_exception_handler({"message": "lost", "exception": ValueError("in a task")})
    loop.close()
    warned, lost = events(stream)
    assert warned["logger"] == "py.warnings"
    assert "old habit" in warned["event"]
    assert (lost["logger"], lost["level"]) == ("asyncio", "error")
    assert "in a task" in lost["exception"]


def test_the_servers_access_log_and_the_engines_statements_stay_silent() -> None:
    stream = io.StringIO()
    configure("debug", "json", stream)
    logging.getLogger("uvicorn.access").info("GET /?token=canary")
    logging.getLogger("sqlalchemy.engine.Engine").info("[generated] ('canary',)")
    assert stream.getvalue() == ""


def test_the_level_counts_and_a_second_configuration_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure("warning", "json", first)
    log.info("unheard")
    log.warning("heard")
    logging.getLogger("x").info("unheard")
    configure("debug", "console", second)
    log.debug("heard-later")
    logging.getLogger("x").debug("and-there")
    assert [event["event"] for event in events(first)] == ["heard"]
    assert [re.split(r" +", line)[3] for line in second.getvalue().splitlines()] == [
        "heard-later",
        "and-there",
    ]
    assert (
        sum(isinstance(handler, ours._StandardLibraryHandler) for handler in logging.getLogger().handlers)
        == 1
    )


def test_auto_is_json_unless_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    pipe, terminal, plain = io.StringIO(), Terminal(), Terminal()
    configure("info", "auto", pipe)
    log.info("event")
    monkeypatch.delenv("NO_COLOR", raising=False)
    configure("info", "auto", terminal)
    log.info("event")
    monkeypatch.setenv("NO_COLOR", "1")
    configure("info", "auto", plain)
    log.info("event")
    assert events(pipe)[0]["event"] == "event"
    assert "\x1b[32m" in terminal.getvalue()
    assert "\x1b" not in plain.getvalue()
    assert re.match(r"\d\d:\d\d:\d\d \[info +\] event", plain.getvalue())


MASKED = [
    ("postgresql://u:canary@h/db", "postgresql://u:***@h/db"),
    ("could not use postgres://u:ca@na/ry x@h:1/db now", "could not use postgres://u:***@h:1/db now"),
    ("postgresql+asyncpg://u:p%@:/ é@h", "postgresql+asyncpg://u:***@h"),
    ("see https://u:canary@proxy.example.com/x", "see https://u:***@proxy.example.com/x"),
    ("host=h password=canary user=u", "host=h password=*** user=u"),
    ("host=h password='can ary' user=u", "host=h password=*** user=u"),
    ("PGPASSWORD=canary psql", "PGPASSWORD=*** psql"),
    ('{"password": "canary"}', '{"password": ***}'),
    ("Authorization: Bearer canary.x", "Authorization: ***"),
    ("http://127.0.0.1:8000/docs and bob@example.com", "http://127.0.0.1:8000/docs and bob@example.com"),
    ("GET /v1/tasks?limit=5", "GET /v1/tasks?limit=5"),
]


@pytest.mark.parametrize(("text", "expected"), MASKED)
def test_what_looks_like_a_credential_is_masked(text: str, expected: str) -> None:
    assert redact_text(text) == expected
    assert is_suspect(text) or text == expected
    for format_ in ("json", "console"):
        stream = io.StringIO()
        configure("info", format_, stream)  # type: ignore[arg-type]
        log.info("event", fact=text, nested={"list": [text, (text,)]})
        logging.getLogger("library").error(text)
        try:
            raise ValueError(text)
        except ValueError:
            log.exception("failed", password=text, token=text, database_url=text, dsn=text)
        assert "canary" not in stream.getvalue()
        assert "can ary" not in stream.getvalue()


def test_redaction_leaves_numbers_and_flags_alone() -> None:
    facts = {
        "tokens": 3,
        "token": None,
        "secret": "x",
        "nested": {"password": "x", "n": 1},
        "list": [1, None, True],
    }
    expected = {"tokens": 3, "token": None, "secret": "***", "nested": {"password": "***", "n": 1}}
    assert redact(facts) == expected | {"list": [1, None, True]}
