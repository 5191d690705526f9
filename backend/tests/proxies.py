"""A network between client and server that can be counted, and that can fail: `Proxy`; and a `Thief`.

They run in threads of their own and are used through plain calls, from sync and async tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

from postgres_server import free_port

T = TypeVar("T")
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)


def at(url: str, port: int, host: str | None = None) -> str:
    """`url` with another port, and another host where one is given."""
    parts = urlsplit(url)
    credentials, _, address = parts.netloc.rpartition("@")
    old_host = address.rpartition(":")[0]
    return urlunsplit(parts._replace(netloc=f"{credentials}@{host or old_host}:{port}"))


# The proxy


@dataclass(frozen=True)
class Traffic:
    """What went through a proxy so far. A round trip is a turn of the client: it spoke after the server, or first."""

    connections: int = 0
    round_trips: int = 0
    bytes_to_server: int = 0
    bytes_to_client: int = 0

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(
            self.connections - earlier.connections,
            self.round_trips - earlier.round_trips,
            self.bytes_to_server - earlier.bytes_to_server,
            self.bytes_to_client - earlier.bytes_to_client,
        )


class _LoopThread:
    """An event loop in a daemon thread, spoken to from outside.

    `ends` are the connections that may be open when it closes: a transport with something left to send would outlive
    a polite close, and its loop.
    """

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.ends: weakref.WeakSet[asyncio.WriteTransport] = weakref.WeakSet()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    async def listen(self, serve: Serve, port: int) -> asyncio.Server:
        """Every connection is one of the ends from the moment it is there, before its task has begun."""
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.ends.add(writer.transport)
            task = self.loop.create_task(serve(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        return await asyncio.start_server(accept, "127.0.0.1", port, backlog=512)

    def close(self) -> None:
        async def cancel() -> None:
            # A connection that was accepted a moment ago has its task some turns later.
            await asyncio.sleep(0.01)
            while tasks := [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await asyncio.sleep(0.01)
            for end in list(self.ends):
                end.abort()
            await asyncio.sleep(0.01)  # transports close in the loop's next turns

        self.run(cancel())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@dataclass(eq=False)
class _Link:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    client_spoke_last: bool = False
    swallowed: bool = False
    pending: list[asyncio.Task[None]] = field(default_factory=list)


class Proxy:
    """A TCP proxy on 127.0.0.1 between clients and one server, which can do to them what networks do.

    `tls` ends PostgreSQL's TLS here and speaks plain text to the server, so that TLS can be tested in front of a
    server built without it. `target` may be changed while running: new connections go there.
    """

    def __init__(
        self, target_port: int, *, target_host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
    ) -> None:
        self.target = (target_host, target_port)
        self.tls = tls
        self.port = free_port()
        self.delay_seconds = 0.0
        self._traffic = Traffic()
        self._links: set[_Link] = set()
        self._black_hole = False
        self._drop_replies = False
        self._lose_replies = 0
        self._server: asyncio.Server | None = None
        self._thread: _LoopThread | None = None
        self._flowing: asyncio.Event | None = None

    def __enter__(self) -> Self:
        self._thread = _LoopThread("proxy")
        self._run(self._open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread is not None
        self.refuse()
        self.reset_all()
        self._thread.close()

    def through(self, url: str, host: str | None = None) -> str:
        """`url` with this proxy in place of its address."""
        return at(url, self.port, host or "127.0.0.1")

    # What is seen

    @property
    def traffic(self) -> Traffic:
        return self._traffic

    @property
    def open_connections(self) -> int:
        return len(self._links)

    @contextlib.contextmanager
    def counting(self) -> Iterator[Callable[[], Traffic]]:
        """`with proxy.counting() as count: ...; count().round_trips` - what went through since the start."""
        start = self._traffic
        yield lambda: self._traffic - start

    # What is done

    def freeze(self) -> None:
        """Connections stay open, new ones are accepted, and bytes wait here until `thaw`."""
        self._call(lambda: self._gate().clear())

    def thaw(self) -> None:
        self._call(lambda: self._gate().set())

    def black_hole(self) -> None:
        """Connections stay open, new ones are accepted, and what is sent is gone, both ways."""
        self._call(lambda: setattr(self, "_black_hole", True))

    def drop_replies(self) -> None:
        """The server hears its clients and does what they ask; its answers are gone."""
        self._call(lambda: setattr(self, "_drop_replies", True))

    def lose_replies(self, count: int = 1) -> None:
        """The next `count` answers of the server are thrown away and their connections reset."""
        self._call(lambda: setattr(self, "_lose_replies", count))

    def heal(self) -> None:
        """Everything flows again. A connection that lost bytes is reset, as its peers' timers would end it."""

        def mend() -> None:
            self._black_hole = self._drop_replies = False
            self._lose_replies = 0
            self.delay_seconds = 0.0
            self._gate().set()
            for link in [link for link in self._links if link.swallowed]:
                self._reset(link)

        self._call(mend)
        self.accept()

    def reset_all(self) -> None:
        """Every connection ends with RST, at both sides."""

        def reset() -> None:
            for link in list(self._links):
                self._reset(link)

        self._call(reset)

    def refuse(self) -> None:
        """New connections are refused; open ones go on."""
        self._run(self._close_listener())

    def accept(self) -> None:
        """New connections are accepted again, at the same port."""
        if self._server is None:
            self._run(self._open())

    # How

    def _gate(self) -> asyncio.Event:
        assert self._flowing is not None
        return self._flowing

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        assert self._thread is not None
        return self._thread.run(coroutine)

    def _call(self, action: Callable[[], object]) -> None:
        async def act() -> None:
            action()

        self._run(act())

    async def _open(self) -> None:
        if self._flowing is None:
            self._flowing = asyncio.Event()
            self._flowing.set()
        assert self._thread is not None
        self._server = await self._thread.listen(self._serve, self.port)

    async def _close_listener(self) -> None:
        if self._server is not None:
            # Without wait_closed: since Python 3.12 it waits for the open connections too.
            self._server.close()
            self._server = None

    def _reset(self, link: _Link) -> None:
        for writer in (link.client, link.server):
            if writer is None:
                continue
            raw = writer.get_extra_info("socket")
            if raw is not None and raw.fileno() != -1:
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        for task in link.pending:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(writer)
        self._links.add(link)
        assert self._thread is not None
        self._traffic = replace(self._traffic, connections=self._traffic.connections + 1)
        task = asyncio.current_task()
        assert task is not None
        link.pending.append(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                first = await self._begin_tls(reader, writer) if self.tls else b""
                await self._gate().wait()
                if self._black_hole:
                    link.swallowed = True
                    await reader.read(-1)
                    return
                server_reader, link.server = await asyncio.open_connection(*self.target)
                self._thread.ends.add(link.server.transport)
                if first:
                    await self._pass(link, link.server, first, to_server=True)
                pumps = [
                    asyncio.create_task(self._pump(link, reader, link.server, to_server=True)),
                    asyncio.create_task(self._pump(link, server_reader, writer, to_server=False)),
                ]
                link.pending += pumps
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            self._links.discard(link)
            for end in (link.client, link.server):
                if end is not None:
                    end.close()

    async def _begin_tls(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """Answers the client's request for TLS; gives what it said instead, where it asked for none."""
        first = await reader.readexactly(8)
        if first != _SSL_REQUEST:
            return first
        writer.write(b"S")
        await writer.drain()
        assert self.tls is not None
        await writer.start_tls(self.tls)
        return b""

    async def _pump(
        self, link: _Link, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, to_server: bool
    ) -> None:
        """Reads on while earlier bytes are still under way, so that latency does not become less bandwidth."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)
        loop = asyncio.get_running_loop()

        async def deliver() -> None:
            while True:
                due, data = await under_way.get()
                if due > loop.time():
                    await asyncio.sleep(due - loop.time())
                if not data:
                    return
                await self._gate().wait()
                await self._pass(link, sink, data, to_server=to_server)

        delivery = asyncio.create_task(deliver())
        try:
            while data := await source.read(65536):
                await under_way.put((loop.time() + self.delay_seconds, data))
            await under_way.put((loop.time() + self.delay_seconds, b""))
            await delivery
        finally:
            delivery.cancel()
            await asyncio.gather(delivery, return_exceptions=True)

    async def _pass(self, link: _Link, sink: asyncio.StreamWriter, data: bytes, *, to_server: bool) -> None:
        if self._black_hole or (self._drop_replies and not to_server):
            link.swallowed = True
            return
        if self._lose_replies and not to_server:
            self._lose_replies -= 1
            self._reset(link)
            return
        seen = self._traffic
        if to_server:
            turn = 0 if link.client_spoke_last else 1
            self._traffic = replace(
                seen, round_trips=seen.round_trips + turn, bytes_to_server=seen.bytes_to_server + len(data)
            )
        else:
            self._traffic = replace(seen, bytes_to_client=seen.bytes_to_client + len(data))
        link.client_spoke_last = to_server
        sink.write(data)
        await sink.drain()


class Thief:
    """A server that is not PostgreSQL: it asks whoever comes for the password in clear text, and remembers.

    Without `tls` it answers "no TLS" to those who ask for it; with it, it shows that certificate. `heard` is every
    byte that clients said after (or without) TLS; `passwords` what they answered to the question.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.port = free_port()
        self.heard = b""
        self.passwords: list[str] = []
        self.connections = 0
        self._thread: _LoopThread | None = None
        self._server: asyncio.Server | None = None

    def __enter__(self) -> Self:
        self._thread = _LoopThread("thief")
        self._server = self._thread.run(self._thread.listen(self._serve, self.port))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread is not None
        assert self._server is not None
        self._thread.loop.call_soon_threadsafe(self._server.close)
        self._thread.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                start = await reader.readexactly(8)
                if start == _SSL_REQUEST:
                    writer.write(b"S" if self.tls else b"N")
                    await writer.drain()
                    if self.tls:
                        await writer.start_tls(self.tls)
                    start = await reader.readexactly(8)
                rest = await reader.readexactly(struct.unpack("!i", start[:4])[0] - 8)
                self.heard += start + rest
                writer.write(b"R" + struct.pack("!ii", 8, 3))  # AuthenticationCleartextPassword
                await writer.drain()
                head = await reader.readexactly(5)
                said = await reader.readexactly(struct.unpack("!i", head[1:])[0] - 4)
                self.heard += head + said
                self.passwords.append(said.rstrip(b"\0").decode())
        finally:
            writer.close()
