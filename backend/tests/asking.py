"""Asking the service as people do, with real tokens, every answer held to the contract.

async with people(serve, app) as (ana, bob):
    made = await ana("POST", "/v1/tasks", json={"title": "x"}, expect=201)
"""

from __future__ import annotations

import json as jsonlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import httpx
from fastapi import FastAPI

from processes import copy_program
from src.api import problems
from src.services.signing import SigningKeys
from waiting import eventually

BACKEND: Final = Path(__file__).resolve().parents[1]
TASKS: Final = "/v1/tasks"
ALWAYS: Final = ("type", "title", "status", "request_id")

Serve = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]


def hold(answer: httpx.Response, *, keyed: bool = False) -> httpx.Response:
    """Holds an answer to the contract, whatever was asked. `keyed`: the request bore an Idempotency-Key."""
    status, headers = answer.status_code, answer.headers
    shown = f"{answer.request.method} {answer.request.url} -> {status} {answer.text[:500]}"
    assert headers["x-request-id"], shown
    assert headers["x-content-type-options"] == "nosniff", shown
    assert status != 500, shown
    if status < 400:
        assert status in (200, 201, 204, 304), shown
        assert "retry-after" not in headers, shown
        assert (status in (204, 304)) == (answer.content == b"") or answer.request.method == "HEAD", shown
        return answer
    assert headers["content-type"] == problems.MEDIA_TYPE, shown
    if answer.request.method != "HEAD":
        body = answer.json()
        problems.Problem.model_validate(body)
        assert [name for name in ALWAYS if name not in body] == [], shown
        assert body["status"] == status, shown
        assert body["request_id"] == headers["x-request-id"], shown
        slug = body["type"].removeprefix("/problems/")
        assert slug in _slugs(status), shown
        if status == 422 and slug == "invalid":
            assert all("pointer" in fault and fault["detail"] for fault in body["errors"]), shown
    # 503 and 429 promise that nothing was written, so a repeat is always safe; after a 504 only a key makes it so.
    promised = status in (429, 503) or (status == 504 and keyed)
    assert headers.get("retry-after", "").isdigit() == promised, shown
    assert ("www-authenticate" in headers) == (status == 401), shown
    assert ("allow" in headers) == (status == 405), shown
    return answer


@cache
def _slugs(status: int) -> frozenset[str]:
    return frozenset(kind.slug for kind in problems.kinds() if kind.status == status)


class Caller:
    """Somebody with a token, who never existed before. Calling asks; `expect` is a status, or several."""

    def __init__(self, client: httpx.AsyncClient, keys: SigningKeys, email: str | None = None) -> None:
        self.client = client
        self.keys = keys
        self.id = uuid4()
        self.headers = {"authorization": f"Bearer {keys.mint(self.id, email, 3600)}"}

    def stranger(self) -> Caller:
        """Somebody else, by the same client."""
        return Caller(self.client, self.keys)

    async def __call__(
        self,
        method: str,
        path: str = TASKS,
        *,
        json: Any = None,
        content: Any = None,
        headers: Mapping[str, str] | None = None,
        params: Any = None,
        expect: int | tuple[int, ...] | None = None,
    ) -> httpx.Response:
        given = {**self.headers, **(headers or {})}
        if json is not None:
            content = jsonlib.dumps(json).encode()
        if content is not None:
            given.setdefault("content-type", "application/json")
        answer = await self.client.request(
            method, path, content=content, headers=given, params=params or None
        )
        hold(answer, keyed="idempotency-key" in {name.lower() for name in given})
        if expect is not None:
            wanted = (expect,) if isinstance(expect, int) else expect
            assert answer.status_code in wanted, f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        return answer

    async def create(self, title: str = "a task", **more: Any) -> dict[str, Any]:
        made: dict[str, Any] = (await self("POST", json={"title": title, **more}, expect=201)).json()
        return made

    async def all(self, **params: Any) -> list[dict[str, Any]]:
        """Every task, by following the cursor to its end."""
        found: list[dict[str, Any]] = []
        cursor: dict[str, Any] = {}
        while True:
            page = (await self("GET", params={"limit": 200, **params, **cursor}, expect=200)).json()
            found += page["items"]
            if page["next_cursor"] is None:
                return found
            cursor = {"cursor": page["next_cursor"]}


async def well(client: httpx.AsyncClient) -> httpx.Response:
    """What /health answers once it says `pass`: a loop that a busy machine held up is a warning for ten seconds."""
    answers: list[httpx.Response] = []

    async def it_passes() -> bool:
        answers.append(await client.get("/health"))
        return answers[-1].json()["status"] == "pass"

    await eventually(it_passes, lambda: answers[-1].text)
    return answers[-1]


def problem(answer: httpx.Response) -> str:
    """The slug of a problem."""
    return str(answer.json()["type"]).removeprefix("/problems/")


@asynccontextmanager
async def people(serve: Serve, app: FastAPI) -> AsyncIterator[tuple[Caller, Caller]]:
    """Two strangers to each other in front of this application."""
    async with serve(app) as client:
        ana = Caller(client, app.state.identity.signing, f"ana-{uuid4().hex}@example.com")
        yield ana, ana.stranger()


class Served:
    """A running service of its own processes, at `address`; `log` is what it has said so far."""

    def __init__(self, address: str, log_file: Path, pid: int) -> None:
        self.address = address
        self.pid = pid
        self._log_file = log_file

    @property
    def log(self) -> str:
        return self._log_file.read_text(errors="replace")


@contextmanager
def served(*, source: Path | None = None, **settings: str) -> Iterator[Served]:
    """`python -m src serve` with these settings and no others, from a copy of the code that has no .env.

    `source` is another `src` than ours.
    """
    with tempfile.TemporaryDirectory(prefix="groundwork-served-") as directory:
        root = Path(directory)
        if source is None:
            copy_program(root)
        else:
            shutil.copytree(source, root / "src")
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "SIGNING_KEYS") if name in os.environ}
        with (root / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "src", "serve", "--port", "0"],
                cwd=root,
                env={
                    **kept,
                    "LOG_FORMAT": "json",
                    **{name.upper(): value for name, value in settings.items()},
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + 60
            while '"event":"service.ready"' not in (said := (root / "log").read_text()):
                assert process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.05)
            (line,) = [jsonlib.loads(line) for line in said.splitlines() if '"event":"service.ready"' in line]
            yield Served(line["service"], root / "log", process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
