"""HTTP/1.1 as far as the harness needs it, at a tenth of a client library's cost: what loads has to be cheap.

One request at a time on one connection, which is opened when it is needed and kept for as long as both sides like.
"""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple, cast

IDLE_SECONDS: Final = 1.0
"""A connection that was not used for so long may be closed by the server while the next request is on its way."""


class Answer(NamedTuple):
    """A whole answer; names of headers in small letters."""

    status: int
    headers: dict[str, str]
    body: bytes


class Unsent(Exception):
    """No connection could be had, so nothing was sent."""


class Cut(Exception):
    """The request was sent, and no whole answer came. `idle`: the connection had lain idle before, and not one byte
    of an answer came, as when the server closes it at that moment. `late`: it never ended."""

    def __init__(self, *, idle: bool = False, late: bool = False) -> None:
        self.idle = idle
        self.late = late
        super().__init__("late" if late else "cut")


class Wire:
    """A connection to `host:port`, opened anew whenever the last one is gone."""

    def __init__(self, host: str, port: int, *, patience_seconds: float = 20.0) -> None:
        self._address = (host, port)
        self._patience = patience_seconds
        self._line: _Line | None = None

    async def ask(self, request: bytes, *, hang_up_after: float | None = None) -> Answer:
        """Raises `Unsent` and `Cut`. With `hang_up_after` the connection is closed after so many seconds."""
        line = self._line
        if line is None or line.gone:
            line = self._line = await self._open()
        return await line.ask(request, self._patience, hang_up_after)

    async def _open(self) -> _Line:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._patience):
                _, line = await loop.create_connection(_Line, *self._address)
        except OSError as error:
            raise Unsent(type(error).__name__) from None
        return line

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None


class _Line(asyncio.Protocol):
    def __init__(self) -> None:
        self.gone = False
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[Answer] | None = None
        self._heard = bytearray()
        self._answered_at: float | None = None
        self._idle = False
        self._head: tuple[int, dict[str, str], int, int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.gone = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(Cut(idle=self._idle and not self._heard))

    async def ask(self, request: bytes, patience: float, hang_up_after: float | None) -> Answer:
        assert self._transport is not None
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        self._heard.clear()
        self._idle = self._answered_at is not None and loop.time() - self._answered_at > IDLE_SECONDS
        self._head = None
        self._transport.write(request)
        bound = loop.call_later(patience, self._give_up)
        leaving = None if hang_up_after is None else loop.call_later(hang_up_after, self.close)
        try:
            answer = await self._waiting
        finally:
            bound.cancel()
            if leaving is not None:
                leaving.cancel()
        self._answered_at = loop.time()
        if answer.headers.get("connection", "").lower() == "close":
            self.close()
        return answer

    def data_received(self, data: bytes) -> None:
        self._heard += data
        if self._head is None:
            end = self._heard.find(b"\r\n\r\n")
            if end < 0:
                return
            first, *rest = self._heard[:end].decode("latin-1").split("\r\n")
            headers = {}
            for line in rest:
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            status = int(first[9:12])
            length = 0 if status in (204, 304) else int(headers.get("content-length", "0"))
            self._head = (status, headers, end + 4, length)
        status, headers, start, length = self._head
        if len(self._heard) >= start + length and self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(Answer(status, headers, bytes(self._heard[start : start + length])))

    def _give_up(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(Cut(late=True))
        self.close()

    def close(self) -> None:
        self.gone = True
        if self._transport is not None:
            self._transport.abort()
