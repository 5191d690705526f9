"""A network that fails on demand: `Network`, in front of the database or in front of the service.

Like `proxies.Proxy`, and leaner, because every byte of a long run passes two of them: it lives in the loop of the
clients, has no tasks and no queues while nothing is wrong, and is told from another thread what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from tests.postgres_server import free_port

T = TypeVar("T")

_RESET = struct.pack("ii", 1, 0)
# What PostgreSQL's answer to a statement outside a transaction ends with: ReadyForQuery, idle.
_READY = b"Z\x00\x00\x00\x05I"


class Network:
    """From 127.0.0.1:`port` to `target`. Every method but `open` may be called from any thread, and returns when it
    has been done."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: int, *, speaks_postgres: bool) -> None:
        self.port = free_port()
        self.target = target
        self.loop = loop
        self.connections = 0
        self.delay_seconds = 0.0
        self.stalled = False
        self.hole = False
        self.losing = 0
        self.cutting = 0
        self._speaks_postgres = speaks_postgres
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None

    # What is done

    def delay(self, seconds: float) -> None:
        """Every byte takes so much longer, each way."""
        self._do(lambda: setattr(self, "delay_seconds", seconds))

    def stall(self) -> None:
        """What is sent waits here until `heal`."""
        self._do(lambda: setattr(self, "stalled", True))

    def swallow(self) -> None:
        """What is sent is gone, both ways; connections stay open and new ones are taken."""
        self._do(lambda: setattr(self, "hole", True))

    def lose_replies(self, count: int) -> None:
        """The next `count` answers of the server never arrive: their connections are reset instead."""
        self._do(lambda: setattr(self, "losing", count))

    def cut_replies(self, count: int) -> None:
        """Of the next `count` answers only the first half arrives."""
        self._do(lambda: setattr(self, "cutting", count))

    def reset(self) -> None:
        """Every connection ends with RST, at both sides."""
        self._do(lambda: [link.reset() for link in list(self._links)])

    def refuse(self) -> None:
        """New connections are refused."""
        self._run(self._close())

    def heal(self) -> None:
        """Everything flows. A connection that lost bytes is reset, as its peers' timers would end it."""

        def mend() -> None:
            self.delay_seconds = 0.0
            self.stalled = self.hole = False
            self.losing = self.cutting = 0
            for link in list(self._links):
                if link.swallowed:
                    link.reset()
                else:
                    link.flush()

        self._do(mend)
        self._run(self.open())

    # How

    async def open(self) -> None:
        if self._server is None:
            self._server = await self.loop.create_server(
                lambda: _Near(_Link(self)), "127.0.0.1", self.port, backlog=512
            )

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _do(self, action: Callable[[], object]) -> None:
        async def act() -> None:
            action()

        self._run(act())

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def begun(self, link: _Link) -> None:
        self.connections += 1
        self._links.add(link)

    def ended(self, link: _Link) -> None:
        self._links.discard(link)

    def is_answer(self, data: bytes) -> bool:
        """Whether the server's bytes end the answer to something that a client asked."""
        return not self._speaks_postgres or data.endswith(_READY)


class _Link:
    """One connection: the near side is the client's, the far side the server's."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.near: asyncio.Transport | None = None
        self.far: asyncio.Transport | None = None
        self.swallowed = False
        self.closed = False
        # Bytes on their way, both directions in one line so that nothing overtakes: (due, to the server, bytes).
        self.waiting: deque[tuple[float, bool, bytes]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def opened(self, near: asyncio.Transport) -> None:
        self.near = near
        self.network.begun(self)
        if self.network.hole:
            self.swallowed = True
        else:
            task = self.network.loop.create_task(self._reach())
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _reach(self) -> None:
        try:
            far, _ = await self.network.loop.create_connection(
                lambda: _Far(self), "127.0.0.1", self.network.target
            )
        except OSError:
            self.reset()
            return
        if self.closed:
            far.abort()
            return
        self.far = far
        self.flush()

    def carry(self, data: bytes, *, to_server: bool) -> None:
        network = self.network
        if network.hole:
            self.swallowed = True
            return
        if not to_server and (network.losing or network.cutting) and network.is_answer(data):
            self._spoil(data)
            return
        sink = self.far if to_server else self.near
        if sink is not None and not (network.stalled or network.delay_seconds or self.waiting):
            sink.write(data)
            return
        self.waiting.append((network.loop.time() + network.delay_seconds, to_server, data))
        self._arrange()

    def _spoil(self, data: bytes) -> None:
        network = self.network
        if network.losing:
            network.losing -= 1
            self.reset()
        else:
            network.cutting -= 1
            if self.near is not None and not self.waiting:
                self.near.write(data[: len(data) // 2])
                # An orderly end after half an answer: the harder one to notice.
                self.near.close()
            if self.far is not None:
                self.far.abort()

    def flush(self) -> None:
        """Delivers what is due."""
        network = self.network
        while self.waiting and not network.stalled:
            due, to_server, data = self.waiting[0]
            sink = self.far if to_server else self.near
            if sink is None or (network.delay_seconds and due > network.loop.time()):
                break
            self.waiting.popleft()
            sink.write(data)
        self._arrange()

    def _arrange(self) -> None:
        if self._timer is not None or not self.waiting or self.network.stalled:
            return
        # Before the far side is reached there is nobody to deliver to: `_reach` flushes.
        if (self.far if self.waiting[0][1] else self.near) is not None:
            self._timer = self.network.loop.call_at(self.waiting[0][0], self._due)

    def _due(self) -> None:
        self._timer = None
        if not self.closed:
            self.flush()

    def reset(self) -> None:
        for transport in (self.near, self.far):
            if transport is not None:
                raw = transport.get_extra_info("socket")
                if raw is not None:
                    with contextlib.suppress(OSError):
                        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                transport.abort()
        self.lost()

    def lost(self) -> None:
        if not self.closed:
            self.closed = True
            self.network.ended(self)
            if self._timer is not None:
                self._timer.cancel()

    def half_closed(self, *, by_server: bool) -> None:
        """One side went away: the other follows, once it has what was sent before."""
        other = self.near if by_server else self.far
        if self.waiting and not self.closed and by_server and other is not None and not self.network.stalled:
            for _, to_server, data in self.waiting:
                if not to_server:
                    other.write(data)
        if other is not None:
            if by_server:
                other.close()
            else:
                other.abort()
        self.lost()


class _Near(asyncio.Protocol):
    def __init__(self, link: _Link) -> None:
        self.link = link

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self.link.opened(cast(asyncio.Transport, transport))

    def data_received(self, data: bytes) -> None:
        self.link.carry(data, to_server=True)

    def connection_lost(self, error: Exception | None) -> None:
        self.link.half_closed(by_server=False)


class _Far(asyncio.Protocol):
    def __init__(self, link: _Link) -> None:
        self.link = link

    def data_received(self, data: bytes) -> None:
        self.link.carry(data, to_server=False)

    def connection_lost(self, error: Exception | None) -> None:
        self.link.half_closed(by_server=True)
