"""The application: `create_app(settings)`, and `app` for `uvicorn src.main:app` and `fastapi run`.

Importing this module reads and starts nothing. `app` is created, from the environment, when it is first accessed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI

from .api import admin, health, reference, tasks, tokens, users
from .api.application import Application
from .api.cors import Cors
from .api.cursors import Cursors
from .api.fast_path import FastPath
from .api.transfers import IMPORTS_AT_ONCE, Slots
from .config.logging import configure_service, get_logger, log_refusal
from .config.settings import Settings, load_settings, log_settings, migration_connection, require_database
from .config.version import VERSION
from .errors import ConfigurationError, DatabaseRefused
from .services.accounts import Accounts
from .services.database import Database
from .services.identity import Identity
from .services.metrics import Metrics
from .services.revision import CodeRevision

log = get_logger(__name__)

TITLE = "Groundwork"
DESCRIPTION = """The backend and data layer of a multi-user task service, on PostgreSQL.

Errors are `application/problem+json`; [the catalogue](/problems) explains each kind. 2xx means committed,
and 503 means that nothing was written. Every answer carries an `X-Request-ID`; one of your own is kept when
it is 1 to 128 letters, digits or `._:=+/-`.

Beside what each operation lists, HTTP itself may be refused: 400 for a request that is none, 405 for a method
that is not answered, 431 for headers over 32 KiB. Within `/v1` fields and operations are added, and nothing that
is there changes its meaning or goes; what has to, comes as `/v2` beside it."""

TAGS = [
    {"name": "accounts", "description": "Accounts of our own, their sessions, and the keys of our tokens."},
    {"name": "tasks", "description": "What somebody wants done. Everybody sees and changes their own only."},
    {
        "name": "health",
        "description": "For load balancers, orchestrators and monitoring; no token is needed.",
    },
]


def create_app(settings: Settings, database: Database | None = None) -> FastAPI:
    """The application for these settings. It opens and closes a `Database` of its own with the server's
    lifespan; a given one is used as it is and stays its owner's."""
    metrics = Metrics(VERSION)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                identity = await stack.enter_async_context(Identity.from_settings(settings))
                app.state.identity = identity
                app.state.accounts = await stack.enter_async_context(
                    Accounts.from_settings(settings, identity.signing)
                )
                app.state.cursors = Cursors(identity.signing.derive_all(b"cursors"))
                opened = _database(settings, metrics) if database is None else database
                if database is None:
                    await stack.enter_async_context(opened)
            except (ConfigurationError, DatabaseRefused) as refusal:
                # The middleware lets the server say this in one line, without a traceback.
                app.state.refusal = refusal
                raise
            app.state.database = opened
            app.state.is_ready = lambda: opened.observe().ready
            sampler = asyncio.create_task(metrics.sample(opened.observe), name="event-loop-lag")
            try:
                yield
            finally:
                sampler.cancel()
                with suppress(asyncio.CancelledError):
                    await sampler

    app = Application(
        title=TITLE,
        version=VERSION,
        description=DESCRIPTION,
        license_info={"name": "MIT", "identifier": "MIT"},
        servers=[{"url": "/", "description": "This service."}],
        openapi_tags=TAGS,
        lifespan=lifespan,
        # The reference serves these itself, without the internet.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        # A redirect would repeat the Host header, which is input.
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        # It would hand exceptions, and the values in their messages, to whatever listens; and it asks the environment
        # at every request whether somebody does.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.settings = settings
    app.state.cors = cors = Cors(settings.cors_origins) if settings.cors_origins else None
    app.state.metrics = metrics
    app.state.database = database
    app.state.identity = None
    app.state.description = None
    app.state.accounts = None
    app.state.imports = Slots(IMPORTS_AT_ONCE)
    app.state.body_limits = {
        f"{tasks.PREFIX}/batch": settings.max_batch_bytes,
        f"{tasks.PREFIX}/import": settings.max_import_bytes,
    }
    # The server buffers every other body before the request starts.
    app.state.streamed_paths = frozenset({f"{tasks.PREFIX}/import"})
    app.state.draining = False
    app.state.refusal = None
    app.include_router(tasks.router)
    for router in (users.router, tokens.router, tokens.published):
        app.include_router(router)
    app.include_router(health.router)
    if settings.admin_port is None:
        app.include_router(health.numbers)
    else:
        app.state.admin = admin.beside(app, health.insiders)
    reference.install(app)
    app.passing(
        metrics=metrics,
        max_body_bytes=settings.max_body_bytes,
        larger=app.state.body_limits,
        cors=cors,
        fast_path=FastPath(app, [tasks.router, health.router]) if settings.fast_path else None,
        log_client_address=settings.log_client_address,
    )
    return app


def _database(settings: Settings, metrics: Metrics) -> Database:
    connection = require_database(settings)
    warnings = [*settings.warnings, *((connection.variable, warning) for warning in connection.warnings)]
    for variable, warning in warnings:
        log.warning("configuration.weak", variable=variable, warning=warning)
    revision = CodeRevision(migration_connection(settings))
    return Database.from_settings(settings, connection, schema=revision, metrics=metrics)


def _app_from_environment() -> FastAPI:
    try:
        settings = load_settings()
        require_database(settings)
    except ConfigurationError as error:
        configure_service(log_settings())
        raise SystemExit(log_refusal(error)) from None
    configure_service(settings)
    return create_app(settings)


def __dir__() -> list[str]:
    # `fastapi dev` and `fastapi run` look for an application in dir().
    return sorted({*globals(), "app"})


def __getattr__(name: str) -> Any:
    if name == "app":
        globals()["app"] = app = _app_from_environment()
        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
