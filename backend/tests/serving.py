"""A service for the tests of the process model: our supervisor and worker around a tiny application.

`python serving.py supervise '{"workers": 2}'` runs the supervisor; it starts `python serving.py work`.
What the application does at its start is said by TEST_START (ok, refused, configuration, exit, broken, kill,
kill once, hang, stuck, or unready); a file named by TEST_START_FILE overrides it. With TEST_APP=product it
is the product, and beside its own routes some that do what no route may.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from src.cli import banner
from src.config import settings as settings_module
from src.config.settings import Settings, load_settings
from src.errors import ConfigurationError, DatabaseRefused, Fault
from src.server import supervisor, worker


def _behaviour() -> str:
    name = os.environ.get("TEST_START_FILE")
    if name and Path(name).exists():
        return Path(name).read_text().strip()
    return os.environ.get("TEST_START", "ok")


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    match _behaviour():
        case "refused":
            raise DatabaseRefused("authentication-failed", "The server refuses the password.", "Mend it.")
        case "exit":
            raise SystemExit(3)
        case "broken":
            raise RuntimeError("the start is broken")
        case "kill":
            os.kill(os.getpid(), 9)
        case "kill once":
            Path(os.environ["TEST_START_FILE"]).write_text("ok")
            os.kill(os.getpid(), 9)
        case "hang":
            print("hanging", file=sys.stderr, flush=True)
            await asyncio.sleep(60)
    try:
        yield
    finally:
        await asyncio.sleep(0.05)
        print(f"closed {os.getpid()}", file=sys.stderr, flush=True)


async def _ready(request: Request) -> Response:
    draining = request.app.state.draining
    return JSONResponse({"draining": draining}, 503 if draining else 200)


async def _facts(request: Request) -> Response:
    """What this process knows of itself; takes `seconds` to say it."""
    await asyncio.sleep(float(request.query_params.get("seconds", "0")))
    client = request.client
    assert client is not None
    names = (
        "DATABASE_URL",
        "DATABASE_MIGRATION_URL",
        "PROMETHEUS_MULTIPROC_DIR",
        "GROUNDWORK_EMBEDDED",
        "PORT",
        "WORKERS",
    )
    return JSONResponse(
        {
            "pid": os.getpid(),
            "client": client.host,
            "draining": request.app.state.draining,
            "descriptor_limit": resource.getrlimit(resource.RLIMIT_NOFILE),
            "environment": {name: os.environ[name] for name in names if name in os.environ},
            "descriptors": {
                number: os.readlink(f"/proc/self/fd/{number}")
                for number in os.listdir("/proc/self/fd")
                if os.path.exists(f"/proc/self/fd/{number}")
            },
        }
    )


async def _stubborn(request: Request) -> Response:
    """Never answers by itself; answers 504 when it is cancelled, as the product's middleware does."""
    try:
        await asyncio.sleep(300)
    except asyncio.CancelledError:
        return PlainTextResponse("outcome unknown", 504)
    return PlainTextResponse("never")


async def _stream(request: Request) -> Response:
    async def pieces() -> AsyncIterator[str]:
        for number in range(10):
            yield f"{number}\n"
            await asyncio.sleep(0.05)

    return StreamingResponse(pieces())


async def _block(request: Request) -> Response:
    """What an `async def` must never do."""
    time.sleep(float(request.query_params["seconds"]))
    return PlainTextResponse("blocked")


async def _take(request: Request) -> Response:
    """Takes every file descriptor that is left, or gives them back."""
    taken: list[int] = request.app.state.taken
    if request.method == "DELETE":
        while taken:
            os.close(taken.pop())
        return PlainTextResponse("0")
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return PlainTextResponse(f"{len(taken)} {errno.errorcode[error.errno or 0]}")


def _product(settings: Settings) -> Starlette:
    from src.main import create_app

    app = create_app(settings)
    app.state.taken = []
    app.add_route("/block", _block, methods=["POST"])
    app.add_route("/descriptors", _take, methods=["POST", "DELETE"])
    return app


def make_app(settings: Settings) -> Starlette:
    if os.environ.get("TEST_APP") == "product":
        return _product(settings)
    if _behaviour() == "configuration":
        raise ConfigurationError([Fault("DATABASE_URL", "is not set.", "Set it.")])
    if _behaviour() == "stuck":
        print("stuck", file=sys.stderr, flush=True)
        time.sleep(60)  # No loop runs yet that could hear anything.
    app = Starlette(
        lifespan=_lifespan,
        routes=[
            Route("/readyz", _ready),
            Route("/facts", _facts),
            Route("/stubborn", _stubborn, methods=["POST"]),
            Route("/stream", _stream),
            Route("/block", _block, methods=["POST"]),
        ],
    )
    app.state.draining = False
    app.state.settings = settings
    ready = _behaviour() != "unready"
    app.state.is_ready = lambda: ready
    return app


def main() -> int:
    settings_module.ENV_FILE = Path("/nonexistent/.env")  # Never the developer's own.
    if sys.argv[1] == "work":
        return worker.main(make_app)
    supervisor._RENEWAL_SECONDS = float(os.environ.get("TEST_RENEWAL_SECONDS", supervisor._RENEWAL_SECONDS))
    given = json.loads(sys.argv[2])
    embedded, reload = given.pop("embedded", False), given.pop("reload", False)
    settings = load_settings(**given)
    return supervisor.run(
        settings,
        embedded=embedded,
        reload=reload,
        workers=settings.workers,
        announce=banner.show,
        worker_command=(sys.executable, __file__, "work"),
    )


if __name__ == "__main__":
    raise SystemExit(main())
