"""One worker process: uvicorn's server under our supervisor, which starts it and shuts it down.

The supervisor passes the listening socket, which all workers share, and one end of the control channel. When the
supervisor dies the channel ends, and the worker shuts down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import uvicorn
import uvloop
from starlette.types import ASGIApp, Message

from ..config.logging import configure_service, get_logger, log_refusal
from ..config.settings import Settings, load_settings, log_settings
from ..errors import GroundworkError
from .app_protocol import AppProtocol
from .control import (
    ACCEPT_WHEN_READY,
    ADMIN_LISTENER_FD,
    CANCEL_SECONDS,
    CLOSE_SECONDS,
    CONTROL_FD,
    HEARTBEAT_SECONDS,
    KILL_MARGIN_SECONDS,
    LINGER_SECONDS,
    LISTENER_FD,
    NOT_READY,
    READY,
    Shutdown,
)
from .sockets import BACKLOG

# Connections accepted in one turn of the loop.
_MAX_ACCEPTS = 32
_FIRST_REQUEST_SECONDS = 0.5

log = get_logger("groundwork.worker")


class StartCancelled(Exception):
    """A signal ended the start."""


class Lifespan:
    """The application's start and end. Keeps the exception, where uvicorn's own only logs it."""

    def __init__(self, app: ASGIApp) -> None:
        self.state: dict[str, Any] = {}
        self._app = app
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._started = asyncio.Event()
        self._failure: BaseException | None = None
        self._task: asyncio.Task[None] | None = None

    async def startup(self, stop: asyncio.Event) -> None:
        """Raises whatever the application raised, or StartCancelled when `stop` is set first."""
        self._task = asyncio.create_task(self._run())
        await self._inbox.put({"type": "lifespan.startup"})
        stopping = asyncio.create_task(stop.wait())
        started = asyncio.create_task(self._started.wait())
        await asyncio.wait((self._task, started, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not self._started.is_set() and not self._task.done():
            started.cancel()
            self._task.cancel()
            await asyncio.wait((self._task,), timeout=CLOSE_SECONDS)
            raise StartCancelled
        started.cancel()
        if self._failure is not None:
            raise self._failure
        if self._task.done():
            raise RuntimeError("The application's lifespan ended before it had started.")

    async def shutdown(self, seconds: float) -> None:
        """Raises whatever the application raised, or TimeoutError."""
        assert self._task is not None
        await self._inbox.put({"type": "lifespan.shutdown"})
        done, _ = await asyncio.wait((self._task,), timeout=seconds)
        if not done:
            raise TimeoutError(f"The application did not close within {seconds:.0f} s.")
        if self._failure is not None:
            raise self._failure

    async def _run(self) -> None:
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self.state,
        }
        try:
            await self._app(scope, self._inbox.get, self._send)
        except BaseException as error:  # SystemExit too: it would end the loop with nothing closed.
            self._failure = error

    async def _send(self, message: Message) -> None:
        # A failure is followed by the exception itself, which says more.
        if message["type"] == "lifespan.startup.complete":
            self._started.set()


class Worker(uvicorn.Server):
    """uvicorn's server with a start that raises why it failed, heartbeats, and a shutdown that loses no request."""

    def __init__(
        self,
        app: Any,
        config: uvicorn.Config,
        listener: socket.socket,
        admin: socket.socket | None,
        control: socket.socket,
        settings: Settings,
    ) -> None:
        super().__init__(config)
        self._app = app
        self._listener = listener
        self._admin = admin
        self._control = control
        self._settings = settings
        self._shutdown_order = 0
        self._stopping = asyncio.Event()
        self._order_changed = asyncio.Event()
        self._accept_when_ready = os.environ.pop(ACCEPT_WHEN_READY, "") != ""
        self._accepting = False
        self._adopting: set[asyncio.Future[Any]] = set()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, serve until the supervisor orders a shutdown, shut down. Raises what made the start fail."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._order, Shutdown.GRACEFUL)
        loop.add_reader(self._control, self._receive)
        if not self.config.loaded:
            self.config.load()
        lifespan = Lifespan(self.config.loaded_app)
        await lifespan.startup(self._stopping)
        self.lifespan = cast(Any, lifespan)
        try:
            await self.startup()
            await self.main_loop()
            await self.shutdown()
        finally:
            await lifespan.shutdown(CLOSE_SECONDS)

    # Serving

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        await self.on_tick(0)
        self.servers = []
        if self._accept_when_ready:
            # The worker that this one replaces is ready: a connection accepted here before would be answered 503.
            self._send_heartbeats()
            while not self._is_ready() and not self._stopping.is_set():
                await _wait(self._stopping, 0.05)
            if self._stopping.is_set():
                return
        self.servers = [await loop.create_server(self._accept_batch, sock=self._listener, backlog=BACKLOG)]
        if self._admin is not None:
            internal = partial(self._protocol, _make_config(self._app.state.admin, self._settings))
            self.servers.append(await loop.create_server(internal, sock=self._admin))
        self._accepting = True
        self.started = True
        if not self._accept_when_ready:
            self._send_heartbeats()

    def _is_ready(self) -> bool:
        state = self._app.state
        return not state.draining and bool(getattr(state, "is_ready", _always)())

    def _send_heartbeats(self) -> None:
        """On the loop, so that a blocked loop sends none. A full channel, of a stopped supervisor, is no error."""
        ready = self._accepting and self._is_ready()
        with contextlib.suppress(OSError):
            self._control.send(READY if ready else NOT_READY)
        # More often at first: a renewal waits for the first READY.
        seconds = HEARTBEAT_SECONDS if ready else HEARTBEAT_SECONDS / 5
        asyncio.get_running_loop().call_later(
            min(seconds, self._settings.worker_heartbeat_seconds / 4), self._send_heartbeats
        )

    async def main_loop(self) -> None:
        while not self._stopping.is_set():
            await self.on_tick(0)  # The date header, once a second.
            await _wait(self._stopping, 1.0)

    def _protocol(self, config: uvicorn.Config | None = None) -> asyncio.Protocol:
        kind = cast(Callable[..., asyncio.Protocol], self.config.http_protocol_class)
        return kind(
            config=config or self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def _accept_batch(self) -> asyncio.Protocol:
        """The protocol of a connection that the loop accepted: one a turn (libuv since 1.45).

        In the long turns of a busy worker the others, probes among them, would wait too long, so it accepts more, in
        proportion to its requests in progress. An idle worker leaves them to its siblings.
        """
        if self._accepting:
            for connection in _accept_waiting(
                self._listener, at_most=min(_MAX_ACCEPTS, len(self.server_state.tasks) // 4)
            ):
                self._adopt(connection)
        return self._protocol()

    def _adopt(self, connection: socket.socket) -> None:
        task = asyncio.ensure_future(
            asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)
        )
        # Without a reference the task may be garbage-collected; a connection that ends at once is no error.
        self._adopting.add(task)
        task.add_done_callback(self._adopted)

    def _adopted(self, task: asyncio.Future[Any]) -> None:
        self._adopting.discard(task)
        if not task.cancelled():
            task.exception()

    # Orders of the supervisor

    def _receive(self) -> None:
        try:
            orders = self._control.recv(64)
        except BlockingIOError:
            return
        except OSError:
            orders = b""
        if not orders:
            # The supervisor died. No load balancer is told first, and its successor needs the port.
            asyncio.get_running_loop().remove_reader(self._control)
            orders = bytes([Shutdown.FAST])
        self._order(Shutdown(max(orders)))

    def _order(self, how: Shutdown) -> None:
        self._shutdown_order = max(self._shutdown_order, how)
        self._stopping.set()
        self._order_changed.set()

    # Shutdown

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        began = time.monotonic()
        # From here every response closes its connection, so that its client's next request goes elsewhere.
        self.config.encoded_headers = [*self.config.encoded_headers, (b"connection", b"close")]
        await self.on_tick(0)
        for connection in self._connections():
            if connection.cycle is not None and not connection.cycle.response_complete:
                connection.cycle.keep_alive = False
        if self._shutdown_order == Shutdown.ROLLING:
            self._stop_accepting()
        else:
            self._app.state.draining = True
        await self._grace()
        self._stop_accepting()
        cancelled = await self._finish()
        say = log.warning if cancelled else log.debug
        say("worker.stopped", seconds=round(time.monotonic() - began, 3), cancelled_requests=cancelled)

    async def _grace(self) -> None:
        """Let load balancers see that we are not ready, and idle connections bring their next request."""
        began = time.monotonic()
        while self._shutdown_order < Shutdown.FAST:
            grace = (
                self._settings.drain_grace_seconds
                if self._shutdown_order > Shutdown.ROLLING
                else LINGER_SECONDS
            )
            left = began + grace - time.monotonic()
            if left <= 0:
                return
            if self._shutdown_order == Shutdown.ROLLING and not self.server_state.connections:
                return
            await self.on_tick(0)
            self._order_changed.clear()
            await _wait(
                self._order_changed, min(left, 1.0 if self._shutdown_order > Shutdown.ROLLING else 0.1)
            )

    def _stop_accepting(self) -> None:
        if not self._accepting:
            return
        self._accepting = False
        # Connections that wait when the last copy of the socket is closed are reset: accept them first. A worker that
        # is replaced leaves them to the others.
        waiting: list[socket.socket] = []
        if self._shutdown_order != Shutdown.ROLLING:
            waiting = _accept_waiting(self._listener, at_most=BACKLOG)
        for server in self.servers:
            server.close()
        for connection in waiting:
            self._adopt(connection)

    async def _finish(self) -> int:
        """Let requests end and close what is idle; gives the number of requests cancelled at the bound."""
        began = time.monotonic()
        while True:
            # The pause comes after the look at the clock, so that what had arrived by then is read before anything is
            # closed as silent, however long the machine lets us wait.
            elapsed = time.monotonic() - began
            await asyncio.sleep(0.02)
            for connection in self._connections():
                if _is_idle(connection, elapsed):
                    connection.transport.close()
            if not self.server_state.connections and not self.server_state.tasks and not self._adopting:
                return 0
            if self._shutdown_order >= Shutdown.FORCED or elapsed > self._settings.shutdown_timeout_seconds:
                return await self._cancel()

    async def _cancel(self) -> int:
        tasks = set(self.server_state.tasks)
        if tasks:
            for task in tasks:
                task.cancel("The drain has overrun its bound.")
            await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
        for connection in self._connections():
            connection.transport.close()
        await asyncio.sleep(0)
        return len(tasks)

    def _connections(self) -> list[AppProtocol]:
        return cast(list[AppProtocol], list(self.server_state.connections))


def _is_idle(connection: AppProtocol, elapsed: float) -> bool:
    """Whether nothing of an unanswered request has arrived on it."""
    if connection.scope is None:
        # Nothing has come yet. It was accepted a moment ago, so its request is probably on the way.
        return elapsed > _FIRST_REQUEST_SECONDS
    cycle = connection.cycle
    # A scope without its cycle is a request whose headers are still arriving.
    return cycle is not None and cycle.scope is connection.scope and cycle.response_complete


def _accept_waiting(listener: socket.socket, at_most: int) -> list[socket.socket]:
    waiting: list[socket.socket] = []
    with contextlib.suppress(OSError):  # BlockingIOError: the queue is empty.
        while len(waiting) < at_most:
            connection, _ = listener.accept()
            connection.setblocking(False)
            waiting.append(connection)
    return waiting


def _always() -> bool:
    return True


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


def _inherited(variable: str) -> socket.socket | None:
    number = os.environ.pop(variable, "")
    if not number:
        return None
    inherited = socket.socket(fileno=int(number))
    inherited.setblocking(False)
    inherited.set_inheritable(False)
    return inherited


def _exit_if_orphaned(control: socket.socket, seconds: float) -> None:
    """In a thread: exit `seconds` after the supervisor died, should the loop be blocked and not shut down by then."""
    poll = select.poll()
    poll.register(control, 0)  # POLLHUP is always reported, and nothing else is asked for.
    poll.poll()
    time.sleep(seconds)
    os._exit(1)


def _make_config(app: Any, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=AppProtocol,
        ws="none",
        interface="asgi3",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        # The protocol resolves them itself, because it bounds what clients hold before a request starts.
        proxy_headers=False,
        backlog=BACKLOG,
        workers=1,
    )


def main(create_app: Callable[[Settings], Any], settings: Settings | None = None) -> int:
    """Serve `create_app(settings)` on the sockets of the supervisor. Returns the exit code.

    0: shut down as ordered. 3: configuration or credentials. 1: anything else.
    """
    if CONTROL_FD not in os.environ:
        print("A worker is started by `python -m src serve`, never alone.", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener, admin, control = map(_inherited, (LISTENER_FD, ADMIN_LISTENER_FD, CONTROL_FD))
    assert listener is not None
    assert control is not None
    try:
        settings = settings or load_settings()
        configure_service(settings)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        timeout = settings.shutdown_timeout_seconds + CANCEL_SECONDS + CLOSE_SECONDS + KILL_MARGIN_SECONDS
        threading.Thread(target=_exit_if_orphaned, args=(control, timeout), daemon=True).start()
        app = create_app(settings)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(Worker(app, _make_config(app, settings), listener, admin, control, settings).serve())
    except StartCancelled:
        return 0
    except GroundworkError as error:
        if settings is None:
            configure_service(log_settings())
        return log_refusal(error)
    except Exception:
        log.exception("worker.failed")
        return 1
    return 0
