"""Our parts one by one, without sockets: `make bench ARGS=micro`.

CPU in microseconds a call, the least of several rounds in which every part has its turn: what disturbs only adds. With
`--instructions` each is also run under valgrind (Debian's package), whose count of instructions moves by less than a
hundredth where a neighbour moves the clock by a third.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final
from uuid import UUID

from src.api import problems
from src.api.cursors import Cursors
from src.api.middleware import RequestMiddleware
from src.config.logging import configure
from src.errors import NotFound
from src.services.identity import Identity
from src.services.metrics import Metrics
from src.services.signing import SigningKeys, new_key
from src.services.task_pages import PageQuery, Position

from .report import table
from .servers import BACKEND

Call = Callable[[], Awaitable[Any]]
ROUNDS: Final = 7
USER: Final = UUID("01a204f3-ab21-72c9-b90e-cf69b28b5f0d")
SCOPE: Final = {
    "type": "http",
    "method": "GET",
    "path": "/v1/tasks/01a204f3-b0bc-7152-add9-319aa4219a8a",
    "query_string": b"",
    "headers": [(b"host", b"127.0.0.1:8000"), (b"user-agent", b"curl/8"), (b"accept", b"*/*")],
}


async def _receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _send(message: Any) -> None:
    pass


async def _application(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"{}"})


def parts() -> dict[str, Call]:
    """What is measured, by name."""
    from src.config.auth import seeds

    signing = SigningKeys(seeds(new_key()))
    bearer = f"Bearer {signing.mint(USER, None, 3600)}"
    remembering, forgetting = Identity(signing, {}), Identity(signing, {}, most_cached=0)
    bare = RequestMiddleware(_application, Metrics("0"), 65536)
    cursors = Cursors(signing.derive_all(b"cursors"))
    query = PageQuery()
    position = Position("2026-11-22T20:30:09.087219Z", USER)
    sealed = cursors.seal(position, USER, query)

    async def nothing() -> None:
        pass

    async def middleware() -> None:
        await bare({**SCOPE, "state": {}}, _receive, _send)

    async def problem() -> None:
        await problems.answer(NotFound("There is no such task."), "0123-4")(SCOPE, _receive, _send)

    async def seal() -> None:
        cursors.seal(position, USER, query)

    async def unseal() -> None:
        cursors.open(sealed, USER, query)

    return {
        "an empty call": nothing,
        "a token that is remembered": lambda: remembering.principal(bearer),
        "a token that is new": lambda: forgetting.principal(bearer),
        "the middleware: id, limits, metrics, log line": middleware,
        "a problem's body": problem,
        "sealing a cursor": seal,
        "opening a cursor": unseal,
    }


async def repeat(call: Call, times: int) -> None:
    for _ in range(times):
        await call()


def main(*, instructions: bool) -> str:
    configure("info", "json", stream=io.StringIO())
    found = parts()
    least: dict[str, float] = {}
    with asyncio.Runner() as runner:
        for _ in range(ROUNDS):
            for name, call in found.items():
                runner.run(repeat(call, 50))
                # The log goes to memory, and is not to grow.
                configure("info", "json", stream=io.StringIO())
                started = time.process_time()
                runner.run(repeat(call, 2_000))
                spent = (time.process_time() - started) / 2_000 * 1e6
                least[name] = min(spent, least.get(name, spent))
    counted = {name: count(number) for number, name in enumerate(found)} if instructions else {}
    head = ["one call", "CPU us", *(["instructions"] if counted else [])]
    rows = [
        [name, f"{spent:.1f}", *([f"{counted[name]:,.0f}"] if counted else [])]
        for name, spent in least.items()
    ]
    return table(head, rows)


def count(number: int) -> float:
    """Instructions of one call, by valgrind: two runs that differ in nothing but the number of calls."""
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind is not there: apt-get install valgrind")
    few, many = (_instructions(number, times) for times in (20, 220))
    return (many - few) / 200


def _instructions(number: int, times: int) -> int:
    code = f"from benchmarks.micro import run_one; run_one({number}, {times})"
    words = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={os.devnull}", sys.executable, "-c", code]
    done = subprocess.run(
        words,
        cwd=BACKEND,
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONMALLOC": "malloc"},
        capture_output=True,
        text=True,
        check=True,
    )
    told = re.search(r"Collected : (\d+)", done.stderr)
    assert told is not None, done.stderr[-500:]
    return int(told[1])


def run_one(number: int, times: int) -> None:
    configure("info", "json", stream=io.StringIO())
    call = list(parts().values())[number]
    asyncio.run(repeat(call, times))
