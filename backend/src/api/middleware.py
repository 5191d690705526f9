"""What happens around every request: one raw ASGI middleware, because each layer costs every request.

It gives the request an id, bounds its body, tells browsers which pages
may read the answer, turns an unexpected exception into a 500 problem, counts and times the answer under its route
template, and writes one log line.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import time
import traceback
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..config.logging import RequestLog, get_logger, level_of_status, request_facts, request_id_bound
from ..config.redaction import redact_text
from ..errors import GroundworkError, InternalFault, OutcomeUnknown, RequestError, Unavailable
from ..services.metrics import Metrics
from . import problems
from .cors import Cors
from .fast_path import FastPath

# Long enough for every tracing system's ids, and nothing that a log or a header could be broken with.
SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:=+/-]{1,128}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
PROBES = frozenset({"/livez", "/readyz", "/health", "/metrics"})
_UNMATCHED = "unmatched"
USER_ID = "user_id"
"""In the request's state once its user is known, as text, for the log."""
WHOLE = "groundwork.whole"
"""An extension of ASGI (`scope["extensions"]`) and its message: `status`, `headers` and `body` of an answer at once."""
# No answer is for guessing at, and no address of ours (it may name a task) is for the next site to know.
ON_EVERY_ANSWER = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
# These libraries quote values (parameters, keys of rows, inputs) in their messages.
_QUOTING = ("asyncpg", "sqlalchemy", "pydantic", "pydantic_core", "fastapi")

log = get_logger("groundwork.http")
request_log = RequestLog("groundwork.http")


_plain = Response.__call__


class _Incoming:
    """`receive`, for as many bytes as a body may have."""

    __slots__ = ("_left", "_receive")

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self._left = most

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise HTTPException(problems.TooLarge.status)
        return message


class _Outgoing:
    """`send`, with the headers that every answer has `added`. `status` is 0 until an answer has begun."""

    __slots__ = ("_bodiless", "_send", "added", "status")

    def __init__(self, send: Send, added: list[tuple[bytes, bytes]], bodiless: bool) -> None:
        self._send = send
        self.added = added
        self._bodiless = bodiless
        self.status = 0

    async def __call__(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self.added]}
        elif self._bodiless and kind == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)

    async def whole(self, response: Response) -> None:
        """Sends an answer of one piece, to a server that takes it as one."""
        self.status = response.status_code
        headers = [*response.raw_headers, *self.added]
        await self._send({"type": WHOLE, "status": self.status, "headers": headers, "body": response.body})
        if response.background is not None:
            await response.background()


class RequestMiddleware:
    """`Metrics` counts what passes; `max_body_bytes` bounds what comes in, `larger` does so for the paths in it.

    `fast_path` answers what it can before the application inside is asked. `log_client_address` puts the address of
    the client into the lines of its requests.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        max_body_bytes: int,
        larger: Mapping[str, int] | None = None,
        cors: Cors | None = None,
        fast_path: FastPath | None = None,
        log_client_address: bool = True,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.max_body_bytes = max_body_bytes
        self.larger = larger or {}
        self.cors = cors
        self.fast_path = fast_path
        self.log_client_address = log_client_address
        # A random start and a counter: unique without asking the kernel for random bytes at every request.
        self._prefix = os.urandom(8).hex().encode()
        self._count = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, _without_traceback(scope, send))
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started_at = time.perf_counter()
        request_id = b""
        announced = 0
        for name, value in scope["headers"]:
            if name == b"x-request-id" and SANE_REQUEST_ID.fullmatch(value):
                request_id = value
            elif name == b"content-length" and value.isdigit():
                # Nineteen digits are more than any limit, and `int` refuses thousands of them.
                announced = int(value[:19])
        given = bool(request_id)
        if not given:
            request_id = b"%b-%x" % (self._prefix, next(self._count))
        text_id = request_id.decode("ascii")

        method: str = scope["method"]
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = text_id
        inner = scope
        if method == "HEAD":
            # HEAD is GET without the body (RFC 9110, 9.3.2), for every route at once. The copy keeps the
            # server's own scope as it was, because the server looks at the method too.
            inner = {**scope, "method": "GET"}

        bound = self.max_body_bytes
        if self.larger:
            # Looked up once, by the path alone: what is read is bounded before a route is chosen.
            bound = self.larger.get(scope["path"].removeprefix(scope.get("root_path", "")), bound)
        incoming = _Incoming(receive, bound)
        outgoing = _Outgoing(send, [(b"x-request-id", request_id), *ON_EVERY_ANSWER], method == "HEAD")
        if self.cors is not None:
            outgoing.added += self.cors.headers(scope)

        async def say(error: RequestError) -> None:
            state["problem"] = error
            await problems.answer(error, text_id)(inner, receive, outgoing)

        unexpected: BaseException | None = None
        bound_before = request_id_bound.set(text_id)
        try:
            if announced > bound:
                await say(problems.TooLarge())
            elif self.cors is not None and (permission := self.cors.preflight(scope)) is not None:
                await permission(inner, receive, outgoing)
            elif self.fast_path is not None and (found := self.fast_path.find(inner)) is not None:
                response = await self.fast_path.answer(found, inner, incoming)
                if type(response).__call__ is _plain and WHOLE in scope.get("extensions", ()):
                    await outgoing.whole(response)
                else:
                    await response(inner, incoming, outgoing)
            else:
                await self.app(inner, incoming, outgoing)
        except asyncio.CancelledError as error:
            # The server gives up on requests that outlive its shutdown. A write may have been stored.
            unexpected = error
            if not outgoing.status:
                cut: RequestError = Unavailable("cancelled", "The service is stopping.")
                if method not in _SAFE_METHODS:
                    # With an Idempotency-Key it may be sent again; elsewhere the services say so themselves.
                    cut = OutcomeUnknown(
                        "cancelled", retry_after_seconds=1 if state.get("repeatable") else None
                    )
                await say(cut)
            raise
        except Exception as error:
            # Once an answer has begun nothing can replace it: it stays unfinished, and the server, seeing
            # that, closes the connection, so the client does not take it for a whole one.
            unexpected = error
            if not outgoing.status:
                await say(RequestError())
        finally:
            seconds = time.perf_counter() - started_at
            route = route_of(inner)
            known = method if method in METHODS else "OTHER"
            # No status at all is an application that returned without answering: the server says 500.
            status = outgoing.status or 500
            self.metrics.request(known, route, status, seconds)
            problem = state.get("problem")
            duration_ms = round(seconds * 1000, 3)
            client = scope.get("client") if self.log_client_address else None
            address = None if client is None else client[0]
            user_id = state.get(USER_ID)
            if problem is None and unexpected is None and route not in PROBES:
                request_log.write(
                    text_id, known, route, status, duration_ms,
                    client=address, user_id=user_id, suspect_id=given,
                )  # fmt: skip
            else:
                facts = request_facts(known, route, status, duration_ms, address, user_id)
                _log(facts, problem, unexpected)
            request_id_bound.reset(bound_before)


def _log(facts: dict[str, Any], problem: RequestError | None, unexpected: BaseException | None) -> None:
    level = level_of_status(facts["status"])
    if problem is not None:
        facts["problem"] = problem.slug
        if reason := getattr(problem, "reason", None):
            facts["reason"] = reason
    if isinstance(unexpected, asyncio.CancelledError):
        log.warning("request", **facts, cancelled=True)
    elif unexpected is not None or isinstance(problem, InternalFault):
        log.error("request", **facts, exception=traceback_of(unexpected or problem))
    elif level == "error":
        log.error("request", **facts)
    elif facts["route"] in PROBES:
        # Asked every second, and 503 is what they are for.
        log.debug("request", **facts)
    elif level == "warning":
        log.warning("request", **facts)
    else:
        log.info("request", **facts)


def route_of(scope: Scope) -> str:
    """The template of the route that was chosen, prefixes of its routers included, or one word for none."""
    # An included router's routes know their prefix only in this context, which FastAPI leaves in the scope.
    known = scope.get("fastapi")
    chosen = (known and known.get("effective_route_context")) or scope.get("route")
    return getattr(chosen, "path_format", None) or _UNMATCHED


def traceback_of(error: BaseException | None) -> str:
    """The frames of an exception and its causes; messages that may quote values are left out."""
    parts: list[str] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        kind = type(error)
        message = "(message withheld)"
        if kind.__module__.partition(".")[0] not in _QUOTING:
            # Masked before it is cut: half an address no longer looks like one.
            message = redact_text(str(error))[:300]
        frames = "".join(traceback.format_tb(error.__traceback__))
        parts.append(f"{frames}{kind.__module__}.{kind.__qualname__}: {message}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\ncaused by:\n".join(parts)


def _without_traceback(scope: Scope, send: Send) -> Send:
    """Says in our own words why the start was refused, where Starlette would send a traceback."""

    async def one_line(message: Message) -> None:
        if message["type"] == "lifespan.startup.failed":
            refusal: GroundworkError | None = getattr(scope["app"].state, "refusal", None)
            if refusal is not None:
                message = {**message, "message": str(refusal)}
        await send(message)

    return one_line
