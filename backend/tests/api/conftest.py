"""An application on a real, migrated database of the test's own, and a client that speaks to it in-process."""

from __future__ import annotations

import io
import json
import os
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
from src.models.base import new_id
from src.services import signing
from waiting import PATIENT

KEY = signing.new_key()
# `false` runs every test of the API on FastAPI alone.
FAST_PATH = os.environ.get("GROUNDWORK_FAST_PATH", "true")
# Whoever wants to see a bound of the database's at work sets it.
AS_LONG_AS_IT_TAKES = {
    f"database_{name}": getattr(PATIENT, name)
    for name in (
        "pool_timeout_seconds",
        "command_timeout_seconds",
        "statement_timeout_seconds",
        "lock_timeout_seconds",
    )
}
Serve = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]
MakeApp = Callable[..., FastAPI]


@pytest.fixture
def make_app(database_url: str) -> MakeApp:
    """Makes an application with these settings on the test's database."""

    def make(**settings: Any) -> FastAPI:
        usual = {
            "database_url": database_url,
            "signing_keys": KEY,
            "fast_path": FAST_PATH,
            **AS_LONG_AS_IT_TAKES,
        }
        return create_app(load_settings(**{**usual, **settings}))

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


class Person:
    """Somebody with an access token of ours. The account is made by the first write."""

    def __init__(self, client: httpx.AsyncClient, email: str | None = None) -> None:
        self.id = new_id()
        self.client = client
        self.token = signing.SigningKeys(signing.seeds(KEY)).mint(self.id, email, 3600)

    async def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.token}", **more.pop("headers", {})}
        return await self.client.request(method, path, headers=headers, **more)

    async def create(self, title: str = "a", **more: Any) -> dict[str, Any]:
        answer = await self.ask("POST", "/v1/tasks", json={"title": title, **more})
        assert answer.status_code == 201, answer.text
        task: dict[str, Any] = answer.json()
        return task


@pytest.fixture
def somebody() -> type[Person]:
    """`somebody(client)`: a new person who asks through that client."""
    return Person


@pytest.fixture
def ana(client: httpx.AsyncClient) -> Person:
    return Person(client, "ana@example.com")


@pytest.fixture
def ben(client: httpx.AsyncClient) -> Person:
    return Person(client, "ben@example.com")


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
