"""The HTTP protocol with this application's collaborators.

`serve` uses it, and any uvicorn does by `uvicorn src.main:app --http src.server.app_protocol:AppProtocol`. Without it
uvicorn answers malformed input with a text/plain 400, has no limit for heads, bodies and slow clients, and refuses
nothing under overload before the pool queue does.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from typing import TYPE_CHECKING, Any, Final

from ..api import problems
from ..api.middleware import METHODS, ON_EVERY_ANSWER, PROBES, SANE_REQUEST_ID, WHOLE, traceback_of
from ..config.logging import get_logger
from ..errors import Overloaded, RequestError, TooManyRequests
from .client_address import ClientAddresses
from .protocol import Collaborators, Headers, HttpError, HttpProtocol, Limits, ServerContext

if TYPE_CHECKING:
    import uvicorn
    from uvicorn.server import ServerState

    from ..api.cors import Cors
    from ..config.settings import Settings
    from ..services.database import Database
    from ..services.metrics import Metrics

_PROBLEMS: Final[dict[int, type[RequestError]]] = {
    kind.status: kind
    for kind in (problems.Malformed, problems.TooSlow, problems.TooLarge, problems.HeadersTooLarge)
}

log = get_logger("groundwork.http")


class AppProtocol(HttpProtocol):
    """`HttpProtocol` with what the application has in its state."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if not config.loaded:
            config.load()
        super().__init__(config, server_state, app_state, _loop, context=_context_of(config, server_state))


class ErrorRenderer:
    """Renders the protocol's own errors as problem documents, and logs and counts them."""

    def __init__(self, metrics: Metrics | None, cors: Cors | None) -> None:
        self._metrics = metrics
        self._cors = cors
        self._prefix = os.urandom(8).hex()
        self._count = itertools.count(1)

    def __call__(self, error: HttpError, method: str, headers: Headers) -> tuple[Headers, bytes]:
        request_id = next(
            (
                value.decode("ascii")
                for name, value in reversed(headers)
                if name == b"x-request-id" and SANE_REQUEST_ID.fullmatch(value)
            ),
            None,
        )
        request_id = request_id or f"{self._prefix}-{next(self._count):x}"
        problem = _problem(error)
        body = problems.body_of(problem, request_id)
        fields = problems.headers_of(problem)
        rendered = [
            *((name.encode("ascii"), value.encode("ascii")) for name, value in fields.items()),
            (b"content-type", problems.MEDIA_TYPE.encode("ascii")),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", request_id.encode("ascii")),
            *ON_EVERY_ANSWER,
        ]
        if self._cors is not None:
            rendered += self._cors.headers({"headers": headers})
        known = method if method in METHODS else "OTHER"
        if self._metrics is not None:
            self._metrics.request(known, "unmatched", error.status, 0.0)
        if error.status != Overloaded.status:
            # Refusals for overload are logged by the admission controller, once a second.
            facts = {"method": known, "route": "unmatched", "status": error.status, "duration_ms": 0.0}
            log.info("request", **facts, problem=problem.slug, request_id=request_id)
        return rendered, body


def _problem(error: HttpError) -> RequestError:
    if error.status == Overloaded.status:
        return Overloaded("too-many-requests", retry_after_seconds=error.retry_after_seconds or 1)
    if error.status == TooManyRequests.status:
        return TooManyRequests(error.reason, error.detail, retry_after_seconds=error.retry_after_seconds or 1)
    return _PROBLEMS[error.status](error.detail)


def _context_of(config: uvicorn.Config, state: ServerState) -> ServerContext:
    """The context of a server's connections, made with the first of them."""
    kept = vars(state)
    if "http_context" not in kept:
        app: Any = config.loaded_app
        while not hasattr(app, "state") and hasattr(app, "app"):
            app = app.app  # uvicorn's own wrappers
        kept["http_context"] = _make_context(getattr(app, "state", None), state)
    context: ServerContext = kept["http_context"]
    return context


def _make_context(app_state: Any, state: ServerState) -> ServerContext:
    settings: Settings | None = getattr(app_state, "settings", None)
    database: Database | None = getattr(app_state, "database", None)
    metrics: Metrics | None = getattr(app_state, "metrics", None)
    bodies = getattr(app_state, "body_limits", {})
    collaborators = Collaborators(
        render_error=ErrorRenderer(metrics, getattr(app_state, "cors", None)),
        count_closed=(lambda reason: None) if metrics is None else metrics.cut,
        describe_exception=traceback_of,
        probe_paths=PROBES,
        body_limits=bodies,
        streamed_paths=getattr(app_state, "streamed_paths", frozenset()),
        whole_response=WHOLE,
        addresses=ClientAddresses()
        if settings is None
        else ClientAddresses(settings.trusted_proxies, settings.trusted_proxy_hops),
        max_concurrent_requests=float("inf") if settings is None else settings.max_concurrent_requests,
        pool_queue=None if database is None else database.line,
        pool_timeout_seconds=float("inf") if settings is None else settings.database_pool_timeout_seconds,
    )
    limits = Limits() if settings is None else Limits.from_settings(settings)
    return ServerContext(state, limits, collaborators)
