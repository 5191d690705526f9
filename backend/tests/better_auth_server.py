"""A real Better Auth server: a process of its own, a database of its own, and people who sign up over its HTTP API.

    with BetterAuth(database_url) as issuer:
        token = issuer.sign_up("ana@example.com").token()

For tests marked `node`. The configuration is `tests/better_auth/auth.mjs`, which docs/identity.md shows, or
`varied.mjs` with the options that a test gives.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from uuid import uuid4

import httpx
import psutil

from postgres_server import end_process, free_port
from src.embedded.lifetime import die_with_parent

PLACE: Final = Path(__file__).resolve().parent / "better_auth"
_SECONDS = 60
_PASSWORD = "correct horse battery staple"


class BetterAuth:
    """`options`, where given, take the place of `auth.mjs`: those of Better Auth, with the JWT plugin's under `jwt`."""

    def __init__(self, database_url: str, options: dict[str, Any] | None = None) -> None:
        self.database_url = database_url
        self.options = options
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.secret = secrets.token_urlsafe(32)
        self._directory = Path(tempfile.mkdtemp(prefix="groundwork-better-auth-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._people: list[Person] = []

    @property
    def log(self) -> str:
        return (self._directory / "log").read_text(errors="replace")

    def entry(self, audience: str = "tasks") -> dict[str, str]:
        """The server as AUTH_ISSUERS has it."""
        return {"issuer": self.url, "jwks_url": f"{self.url}/api/auth/jwks", "audience": audience}

    def start(self) -> None:
        """Start it, and return once it serves. Also starts it again after `stop`."""
        node = shutil.which("node")
        if node is None or not (PLACE / "node_modules").exists():
            raise RuntimeError(
                "Better Auth is not installed: `make test-issuers` does it, with Node.js and npm."
            )
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    node,
                    "server.mjs",
                    "./auth.mjs" if self.options is None else "./varied.mjs",
                    str(self.port),
                ],
                cwd=PLACE,
                env={
                    "PATH": os.environ["PATH"],
                    "BETTER_AUTH_URL": self.url,
                    "BETTER_AUTH_SECRET": self.secret,
                    "BETTER_AUTH_DATABASE_URL": self.database_url,
                    "BETTER_AUTH_TELEMETRY": "0",
                    "TEST_OPTIONS": json.dumps(self.options or {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509
            )
        deadline = time.monotonic() + _SECONDS
        while '"serving"' not in self.log:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Better Auth did not start:\n{self.log}")
            time.sleep(0.05)

    def stop(self) -> None:
        if self._process is not None:
            end_process(psutil.Process(self._process.pid))
            self._process.wait()
            self._process = None

    def sign_up(self, email: str | None = None) -> Person:
        """Somebody new, signed in; their address is verified where the configuration asks for it."""
        person = Person(self, email or f"{uuid4().hex}@example.com")
        self._people.append(person)
        person.sign_up()
        return person

    def link_sent_to(self, email: str) -> str:
        """The last link that was mailed to this address."""
        deadline = time.monotonic() + _SECONDS
        while True:
            sent = [json.loads(line) for line in re.findall(r'^\{"to":.+\}$', self.log, re.MULTILINE)]
            links: list[str] = [mail["url"] for mail in sent if mail["to"] == email]
            if links:
                return links[-1]
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for person in self._people:
            person.browser.close()
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)


class Person:
    """Somebody with a session at a Better Auth server, as a browser has it: by cookies."""

    def __init__(self, server: BetterAuth, email: str) -> None:
        self.server = server
        self.email = email
        # Better Auth refuses a POST with cookies that does not say from which page it comes.
        self.browser = httpx.Client(base_url=server.url, headers={"origin": server.url}, timeout=_SECONDS)
        self.id = ""

    def sign_up(self) -> None:
        self.id = str(self._post("sign-up", name="Somebody")["user"]["id"])
        if self.server.options is None:
            # To a page of the application, which is not there.
            assert self.browser.get(self.server.link_sent_to(self.email)).status_code == 302
        self.sign_in()

    def sign_in(self) -> None:
        """A new session."""
        self._post("sign-in")

    def token(self) -> str:
        """A new access token, as the JWT plugin gives it."""
        answer = self.browser.get("/api/auth/token").raise_for_status()
        return str(answer.json()["token"])

    def _post(self, what: str, **more: str) -> dict[str, Any]:
        body = {"email": self.email, "password": _PASSWORD, **more}
        answer = self.browser.post(f"/api/auth/{what}/email", json=body)
        assert answer.status_code == 200, f"{answer.text}\n{self.server.log}"
        found: dict[str, Any] = answer.json()
        return found
