"""An application on a real, migrated database of the test's own, and a client that speaks to it in-process."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI

from src.config import logging
from src.config.settings import load_settings
from src.main import create_app

Serve = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]
MakeApp = Callable[..., FastAPI]


@pytest.fixture
def make_app(database_url: str) -> MakeApp:
    """Makes an application with these settings on the test's database."""

    def make(**settings: Any) -> FastAPI:
        return create_app(load_settings(**{"database_url": database_url, **settings}))

    return make


@pytest.fixture
def serve() -> Serve:
    """Runs an application's lifespan and gives a client for it."""

    @asynccontextmanager
    async def serving(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                yield client

    return serving


@pytest.fixture
async def client(make_app: MakeApp, serve: Serve) -> AsyncIterator[httpx.AsyncClient]:
    async with serve(make_app()) as opened:
        yield opened


class Log:
    """What the service logged, as text and as events."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    @property
    def requests(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.text.splitlines()]
        return [line for line in lines if line["event"] == "request"]


@pytest.fixture
def log() -> Iterator[Log]:
    kept = Log()
    logging.configure("debug", "json", kept.stream)
    yield kept
    structlog.contextvars.clear_contextvars()
    logging.configure()
