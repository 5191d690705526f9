"""HTTP spoken byte by byte: a server with our protocol around any application, and lines to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from src.config.settings import load_settings
from src.server.app_protocol import AppProtocol
from src.services.metrics import Metrics

Answer = tuple[int, dict[str, str], bytes]


class Line:
    """One connection, as bytes go over it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def say(self, sent: bytes) -> None:
        """Sends; that the server is gone meanwhile is no fault of the test's."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(sent)
            await self.writer.drain()

    async def rest(self, seconds: float = 60) -> bytes:
        """Everything until the server closes; fails when it does not."""
        received = b""
        try:
            async with asyncio.timeout(seconds):
                while piece := await self.reader.read(1 << 20):
                    received += piece
        except ConnectionError:
            pass  # It was reset, perhaps while we went on sending.
        return received

    async def answers(self, seconds: float = 60) -> list[Answer]:
        return answers_in(await self.rest(seconds))

    async def answer(self) -> Answer:
        """The next one, on a connection that stays open."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        status, headers = _head_of(head[:-4])
        return status, headers, await self.reader.readexactly(int(headers["content-length"]))


class Server:
    def __init__(self, address: tuple[str, int], state: ServerState, metrics: Metrics) -> None:
        self.address = address
        self.state = state
        self.metrics = metrics
        self._writers: list[asyncio.StreamWriter] = []

    async def line(self) -> Line:
        reader, writer = await asyncio.open_connection(*self.address)
        self._writers.append(writer)
        return Line(reader, writer)

    def cut(self, reason: str) -> float:
        """How many connections were ended for this reason."""
        return (
            self.metrics.registry.get_sample_value("groundwork_connections_cut_total", {"reason": reason})
            or 0.0
        )

    def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


class _Stateful:
    """An application with the state that ours have."""

    def __init__(self, application: Any, more: dict[str, Any], **settings: Any) -> None:
        self.state = SimpleNamespace(settings=load_settings(**settings), metrics=Metrics("test"), **more)
        self._application = application

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._application(scope, receive, send)


@asynccontextmanager
async def serving(
    application: Any,
    app_state: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Server]:
    """`more` is what else the application's own state has."""
    app = _Stateful(application, more or {}, **settings)
    config = uvicorn.Config(app, http=AppProtocol, log_config=None, lifespan="off")
    config.load()
    state = ServerState()
    listening = await asyncio.get_running_loop().create_server(
        lambda: AppProtocol(config=config, server_state=state, app_state=app_state or {}), "127.0.0.1", 0
    )
    opened = Server(listening.sockets[0].getsockname(), state, app.state.metrics)
    async with listening:
        try:
            yield opened
        finally:
            opened.close()
            await ended(listening, state)


async def ended(listening: asyncio.Server, state: ServerState) -> None:
    """Ends every connection of the server, whatever is still to be sent on it: the loop may end right after."""
    listening.close()
    # One that was accepted a moment ago is among the connections two turns later.
    await asyncio.sleep(0.01)
    while state.connections:
        for connection in list(state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)


def answers_in(received: bytes) -> list[Answer]:
    found = []
    while received:
        head, complete, received = received.partition(b"\r\n\r\n")
        if not complete:
            break  # A reset has overtaken the rest.
        status, headers = _head_of(head)
        length = int(headers.get("content-length", "0"))
        found.append((status, headers, received[:length]))
        received = received[length:]
    return found


def _head_of(head: bytes) -> tuple[int, dict[str, str]]:
    status, *lines = head.decode("ascii").split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines)
