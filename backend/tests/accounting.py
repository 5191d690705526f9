"""Accounts over HTTP, for tests: signing up and logging in, every answer held to the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
from fastapi import FastAPI

from asking import hold

PASSWORD: Final = "seven small boats at noon"
OTHER: Final = "eight large ships at dawn"
EMAIL: Final = "ana@example.com"
USERS: Final = "/v1/users"
ME: Final = "/v1/users/me"
TOKENS: Final = "/v1/tokens"
REFRESH: Final = "/v1/tokens/refresh"
REVOKE: Final = "/v1/tokens/revoke"


class Visitor:
    """Somebody at one address, with the tokens of the last log-in or exchange."""

    def __init__(self, app: FastAPI, address: str = "192.0.2.1", email: str = EMAIL) -> None:
        transport = httpx.ASGITransport(app, client=(address, 40000))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")
        self.email = email
        self.access = ""
        self.refresh_token = ""

    async def ask(
        self, method: str, path: str, expect: int | None = None, *, token: str | None = None, **more: Any
    ) -> httpx.Response:
        """With the access token; `token=""` sends none."""
        headers = dict(more.pop("headers", {}))
        bearer = self.access if token is None else token
        if bearer:
            headers["authorization"] = f"Bearer {bearer}"
        keyed = "idempotency-key" in headers
        answer = hold(await self.client.request(method, path, headers=headers, **more), keyed=keyed)
        assert expect is None or answer.status_code == expect, f"{method} {path}: {answer.text}"
        return answer

    async def sign_up(self, expect: int = 201, password: str = PASSWORD) -> httpx.Response:
        return await self.ask(
            "POST", USERS, expect, token="", json={"email": self.email, "password": password}
        )

    async def log_in(
        self, expect: int = 200, password: str = PASSWORD, email: str | None = None
    ) -> httpx.Response:
        given = {"email": email or self.email, "password": password}
        return self._kept(await self.ask("POST", TOKENS, expect, token="", json=given))

    async def refresh(
        self, expect: int = 200, refresh_token: str | None = None, key: str | None = None
    ) -> httpx.Response:
        given = {"refresh_token": refresh_token or self.refresh_token}
        headers = {} if key is None else {"idempotency-key": key}
        return self._kept(await self.ask("POST", REFRESH, expect, token="", json=given, headers=headers))

    def _kept(self, answer: httpx.Response) -> httpx.Response:
        if answer.status_code == 200:
            self.access, self.refresh_token = answer.json()["access_token"], answer.json()["refresh_token"]
        return answer


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[FastAPI]:
    async with app.router.lifespan_context(app):
        yield app


async def member(app: FastAPI, address: str = "192.0.2.1", email: str = EMAIL) -> Visitor:
    """Somebody who has signed up and logged in."""
    visitor = Visitor(app, address, email)
    await visitor.sign_up()
    await visitor.log_in()
    return visitor
