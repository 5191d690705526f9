"""One small document from another service over HTTPS: bounded in size and time, redirected nowhere.

Written on asyncio itself: a client in a thread cannot be stopped when a server drips its answer byte by byte, and
an idle thread would hold up the end of the process.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, Final
from urllib.parse import urlsplit

import httptools

from ..config.tls import system_context
from ..config.version import VERSION

SECONDS: Final = 5.0
"""For everything together: name, connection, TLS and answer."""
MOST_BYTES: Final = 262_144

_PIECE = 16_384


class FetchFailed(Exception):
    """`reason` is a slug for logs: `timeout`, `status-404`, `redirected`, `too-large`, ..."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Fetcher:
    """Fetches by GET. What is verified with is loaded once, at the first use of https."""

    def __init__(self) -> None:
        self._context: ssl.SSLContext | None = None

    async def fetch(self, url: str) -> bytes:
        """The body of a 200. Raises `FetchFailed`."""
        try:
            async with asyncio.timeout(SECONDS):
                return await self._get(url)
        except TimeoutError:
            reason = "timeout"
        except ssl.SSLCertVerificationError:
            reason = "certificate-rejected"
        except ssl.SSLError:
            reason = "tls-failed"
        except ConnectionRefusedError:
            reason = "connection-refused"
        except (OSError, UnicodeError):  # The latter: a host that DNS cannot spell.
            reason = "unreachable"
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            reason = "not-http"
        raise FetchFailed(reason)

    async def _get(self, url: str) -> bytes:
        parts = urlsplit(url)
        secure, host = parts.scheme == "https", parts.hostname or ""
        if secure and self._context is None:
            # Reading the authorities takes tens of milliseconds.
            self._context = await asyncio.to_thread(system_context)
        reader, writer = await asyncio.open_connection(
            host, parts.port or (443 if secure else 80), ssl=self._context if secure else None
        )
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            lines = (
                f"GET {path} HTTP/1.1",
                f"Host: {parts.netloc}",
                f"User-Agent: Groundwork/{VERSION}",
                "Accept: application/jwk-set+json, application/json",
                "Accept-Encoding: identity",
                # A cache on the way would hide a key that was published a moment ago.
                "Cache-Control: no-cache",
                "Connection: close",
                "\r\n",
            )
            writer.write("\r\n".join(lines).encode("ascii"))
            return await _answer(reader)
        finally:
            # Not closed politely: the other side might never say goodbye.
            writer.transport.abort()


async def _answer(reader: asyncio.StreamReader) -> bytes:
    answer = _Answer()
    parser: Any = httptools.HttpResponseParser(answer)
    read = 0
    while not answer.complete:
        piece = await reader.read(_PIECE)
        read += len(piece)
        if read > MOST_BYTES:
            raise FetchFailed("too-large")
        if not piece:
            break
        parser.feed_data(piece)
        if answer.headers_complete:
            status = parser.get_status_code()
            if 300 <= status < 400:
                raise FetchFailed("redirected")
            if status != 200:
                raise FetchFailed(f"status-{status}")
    if not answer.headers_complete or (answer.framed and not answer.complete):
        raise FetchFailed("cut-off")
    return b"".join(answer.pieces)


class _Answer:
    """What the parser calls."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.framed = False
        self.headers_complete = False
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.framed = self.framed or name.lower() in {b"content-length", b"transfer-encoding"}

    def on_headers_complete(self) -> None:
        self.headers_complete = True

    def on_body(self, piece: bytes) -> None:
        self.pieces.append(piece)

    def on_message_complete(self) -> None:
        self.complete = True
