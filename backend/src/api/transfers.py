"""Bodies that are too large to hold: an import is kept on disk while it arrives, an export leaves as it is made."""

# FastAPI reads the annotations of dependencies, so they stay real types here.

import asyncio
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, Final, TypeVar

from anyio import to_thread
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from ..errors import TooManyRequests, Unavailable
from ..models import TaskImport
from ..services.task_transfer import STALL_SECONDS, require_idle
from . import problems
from .bodies import require

LINES: Final = "application/x-ndjson"
IMPORTS_AT_ONCE: Final = 2
"""Bodies that a process receives at a time: they bound what lies on disk, however slowly clients send."""
_PIECE_BYTES: Final = 256 << 10

Result = TypeVar("Result")


class Imported(BaseModel):
    """What an import came to."""

    count: int = Field(ge=0, description="The tasks that were made.")


class Slots:
    """So many may be inside at a time; nobody waits."""

    def __init__(self, number: int) -> None:
        self._left = number

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Raises `TooManyRequests` when none is free."""
        if not self._left:
            raise TooManyRequests("imports-busy", "Other imports are under way.", retry_after_seconds=5)
        self._left -= 1
        try:
            yield
        finally:
            self._left += 1


class Spooled:
    """Writes a body of lines to an unnamed file and gives that, at its beginning; it is gone with the request."""

    def __init__(self, examples: Mapping[str, str]) -> None:
        self.examples = examples

    async def __call__(self, request: Request) -> AsyncIterator[BinaryIO]:
        # All that can refuse the import comes before the first byte of its body is asked for.
        require(request, LINES)
        require_idle(request.app.state.database)
        with request.app.state.imports.taken():
            file = await _on_disk(_temporary)
            try:
                await _fill(file, request)
                yield file
            finally:
                # Closing may wait for the disk; the file has no name by which anybody could find it.
                await to_thread.run_sync(file.close)

    def describe(self, operation: dict[str, Any]) -> type[BaseModel]:
        operation["requestBody"] = {
            "required": True,
            "description": "A task a line, each a JSON object as `TaskImport` describes it, such as an export gives.",
            "content": {
                LINES: {
                    "schema": {"type": "string"},
                    "examples": {name: {"value": value} for name, value in self.examples.items()},
                }
            },
        }
        return TaskImport


def _temporary() -> BinaryIO:
    return tempfile.TemporaryFile(prefix="groundwork-import-")


async def _on_disk(work: Callable[..., Result], *arguments: Any) -> Result:
    try:
        return await to_thread.run_sync(work, *arguments)
    except OSError:
        raise Unavailable("no-room", "There is no room to keep the body while it is checked.") from None


async def _fill(file: BinaryIO, request: Request) -> None:
    held = bytearray()
    try:
        async for piece in request.stream():
            held += piece
            if len(held) >= _PIECE_BYTES:
                await _on_disk(file.write, bytes(held))
                held.clear()
    except ClientDisconnect:
        raise problems.Malformed("The body broke off.") from None
    await _on_disk(file.write, bytes(held))
    await _on_disk(file.seek, 0)


class Stream(StreamingResponse):
    """Sends pieces as fast as the client takes them, and ends their source when the client is gone or stalls."""

    def __init__(self, pieces: AsyncGenerator[bytes, None], **more: Any) -> None:
        super().__init__(pieces, **more)
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def patient(message: Message) -> None:
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    await send(message)
            except TimeoutError:
                # A client that reads no more, and stays, would keep everybody else from exporting for ever.
                raise Unavailable("export-stalled") from None

        try:
            await super().__call__(scope, receive, patient)
        finally:
            await self._pieces.aclose()


async def begun(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The same pieces, the first already there: what goes wrong before it can still be answered as a problem."""
    first = await anext(pieces, b"")
    return _after(first, pieces)


async def _after(first: bytes, pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    try:
        # The driver's pieces are bytearrays, which Starlette does not know.
        yield bytes(first)
        async for piece in pieces:
            yield bytes(piece)
    finally:
        if isinstance(pieces, AsyncGenerator):
            await pieces.aclose()
