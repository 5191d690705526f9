"""A copy of the program for tests of the command line: processes, environment, and a query of its database."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import asyncpg

from forking import Commands
from processes import copy_program

SECONDS = 100


class Installation:
    """A copy of the program in a path with a space, so that no backend/.env and no data of the developer's is met."""

    def __init__(self, root: Path) -> None:
        self.backend = root / "a clone" / "backend"
        copy_program(self.backend)

    @cached_property
    def commands(self) -> Commands:
        return Commands(self.backend, self.environment())

    def close(self) -> None:
        if "commands" in vars(self):
            self.commands.close()

    def environment(self, **more: str) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("GROUNDWORK", "PYTHON"))
        }
        # Port 1 is nobody's: whatever runs on this machine is no part of these tests.
        return {**kept, "PORT": "1", **more}

    def run(
        self, *arguments: str, url: str | None = None, typed: str = "", **more: str
    ) -> subprocess.CompletedProcess[str]:
        """A command in a process of its own, forked from one that has loaded the program."""
        environment = self.environment(**({"DATABASE_URL": url} if url else {}), **more)
        return self.commands.run(*arguments, environment=environment, seconds=SECONDS, typed=typed)

    def start(self, *arguments: str, url: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        """The same with a start of its own, where Python's own part in it is claimed."""
        return subprocess.run(
            [sys.executable, "-m", "src", *arguments],
            cwd=self.backend,
            env=self.environment(**({"DATABASE_URL": url} if url else {}), **more),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=SECONDS,
        )

    def run_on_terminal(self, *arguments: str, url: str, **more: str) -> str:
        """What a person sees: both streams on one terminal."""
        ours, theirs = pty.openpty()
        environment = self.environment(DATABASE_URL=url, TERM="xterm", **more)
        with ThreadPoolExecutor(1) as other:
            seen = other.submit(_until_closed, ours)
            try:
                self.commands.run_on([theirs] * 3, *arguments, environment=environment, seconds=SECONDS)
            finally:
                os.close(theirs)
            return seen.result().decode()


def fetch(url: str, query: str) -> list[asyncpg.Record]:
    async def work() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(url)
        try:
            return list(await connection.fetch(query))
        finally:
            await connection.close()

    return asyncio.run(work())


def _until_closed(terminal: int) -> bytes:
    seen = b""
    try:
        while chunk := os.read(terminal, 65536):
            seen += chunk
    except OSError:
        pass  # The other end is closed: Linux says so by EIO.
    finally:
        os.close(terminal)
    return seen
