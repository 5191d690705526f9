"""All of an owner's tasks out, and many in: NDJSON, one task a line, in memory that does not grow with them.

Both hold one connection for as long as they take, so a process does one of them at a time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple
from uuid import UUID
from weakref import WeakSet

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Boolean, Integer, Text, Uuid, cast, func, select
from sqlalchemy.dialects.postgresql import asyncpg as asyncpg_dialect
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col

from ..errors import InputFault, Invalid, TooManyRequests, Unavailable
from ..models import Task, TaskImport, TaskRead
from ..models.rendering import as_object, fields, render_timestamp
from .ownership import Author, me_making, me_writing, revoked_is_unauthenticated
from .statements import Statement
from .task_rows import after, array_rows, instant

if TYPE_CHECKING:
    from .connections import Connection
    from .database import Database

STALL_SECONDS: Final = 30.0
"""An export ends when nobody takes its next piece, or the database gives none, for so long."""

LINE_MAX_BYTES: Final = 256 * 1024
"""The longest task, with every character escaped, has half of it."""

BLANK_LINES_MAX: Final = 1000
"""Enough for every habit of writing, too few to keep anybody waiting."""

FAULTS_MAX: Final = 20
"""After so many faulty lines an import looks no further."""

_PIECES: Final = 4
_SLICE_LINES: Final = 100
_CHUNK_LINES: Final = 1_000
# The longest tasks fill a chunk sooner: while one is stored the next is read, so two are held at a time.
_CHUNK_BYTES: Final = 1 << 20
# asyncpg's bound on a whole COPY, which may take as long as its reader likes: STALL_SECONDS bounds each piece.
_COPY_SECONDS: Final = 24 * 3600.0
_BEGIN_EXPORT: Final = (
    f"LOCK TABLE {Task.__tablename__} IN ACCESS SHARE MODE; SET LOCAL statement_timeout = 0"
)

_busy: WeakSet[Any] = WeakSet()


@contextmanager
def _alone(db: Database) -> Iterator[None]:
    if db in _busy:
        raise TooManyRequests("bulk-busy", "Another export or import is under way.", retry_after_seconds=5)
    _busy.add(db)
    try:
        yield
    finally:
        _busy.discard(db)


# Out


async def export(db: Database, owner: UUID) -> AsyncGenerator[bytes, None]:
    """The owner's tasks as they are at one moment, oldest first: a line of `TaskRead` each, in pieces of any size.

    Nothing is begun, and nothing held, before the first piece is asked for; `TooManyRequests` and `Unavailable`
    are raised there. Closing it early gives everything back. A later failure ends it by an error.
    """
    with _alone(db):
        pieces: asyncio.Queue[bytes] = asyncio.Queue(_PIECES)
        copying = asyncio.create_task(_copy(db, owner, pieces), name="tasks-export")
        try:
            while (piece := await _next(pieces, copying)) is not None:
                yield piece
        finally:
            copying.cancel()
            await asyncio.gather(copying, return_exceptions=True)


async def _next(pieces: asyncio.Queue[bytes], copying: asyncio.Task[None]) -> bytes | None:
    if pieces.empty() and not copying.done():
        waiting = asyncio.ensure_future(pieces.get())
        try:
            await asyncio.wait((waiting, copying), timeout=STALL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
        finally:
            waiting.cancel()
        if not copying.done():
            raise Unavailable("timeout")
    if not pieces.empty():
        return pieces.get_nowait()
    await copying
    return None


async def _copy(db: Database, owner: UUID, pieces: asyncio.Queue[bytes]) -> None:
    async def put(piece: bytes) -> None:
        try:
            async with asyncio.timeout(STALL_SECONDS):
                # The driver gives bytearrays.
                await pieces.put(bytes(piece))
        except TimeoutError:
            # Not the database's fault, which a TimeoutError out of the driver would be taken for.
            raise Unavailable("export-stalled") from None

    async with db.transaction(owner=owner, read_only=True) as connection:
        # COPY looks by a snapshot that it takes before it waits for its table. Where a migration has written the
        # table anew meanwhile, that finds it empty: so wait for the table first.
        await connection.execute(_BEGIN_EXPORT)
        # JSON has no control character in it: with these for delimiter and quote, CSV writes it as it is.
        await connection.copy_from_query(
            _everything(owner),
            output=put,
            format="csv",
            delimiter="\x02",
            quote="\x01",
            timeout=_COPY_SECONDS,
        )


def _everything(owner: UUID) -> str:
    """COPY takes no parameters, so the owner stands in the text; a UUID prints as hexadecimal digits and hyphens."""
    mine = select(*fields(TaskRead, Task)).where(col(Task.user_id) == owner)
    ordered = mine.order_by(col(Task.created_at), col(Task.id)).subquery("task")
    compiled = as_object(ordered).compile(
        dialect=asyncpg_dialect.dialect(),  # type: ignore[no-untyped-call]
        compile_kwargs={"literal_binds": True},
    )
    return f"/* tasks.export */ {compiled}"


# In


@dataclass(frozen=True, slots=True)
class Loaded:
    """How many tasks an import made."""

    count: int


class _Line(NamedTuple):
    number: int
    size: int
    task: TaskImport


async def load(
    db: Database, author: Author, file: BinaryIO, *, on_progress: Callable[[int], None] | None = None
) -> Loaded:
    """Makes a task of every line of `file` (open at its beginning), or none and raises `Invalid`.

    Its faults point at lines as an array's elements and name them by number, `FAULTS_MAX` at most: what is no
    task, and ids that the owner has or that came before. Blank lines, `BLANK_LINES_MAX` at most, count but
    mean nothing. `on_progress` is told how many lines are stored so far.

    The whole file is looked at first, without a connection; then it is loaded in chunks, in one transaction.
    """
    with _alone(db):
        faults: list[InputFault] = []
        async for _ in _read(file, faults):
            if len(faults) >= FAULTS_MAX:
                break
        if faults:
            raise Invalid(_said(faults), faults=faults)
        await asyncio.to_thread(file.seek, 0)
        with revoked_is_unauthenticated():
            async with db.transaction(owner=author.user_id) as connection:
                return await _load(connection, author, file, on_progress)


async def _load(
    connection: Connection, author: Author, file: BinaryIO, on_progress: Callable[[int], None] | None
) -> Loaded:
    values = {"owner": author.user_id, "epoch": author.epoch, "email": author.email}
    await connection.execute(PROVISION.sql, *PROVISION.arguments(values))
    count = size = 0
    chunk: list[_Line] = []
    storing: asyncio.Task[int] | None = None
    try:
        # While PostgreSQL stores a chunk, the next one is read.
        async for lines in _read(file, []):
            chunk += lines
            size += sum(line.size for line in lines)
            if len(chunk) >= _CHUNK_LINES or size >= _CHUNK_BYTES:
                count += await storing if storing is not None else 0
                storing = asyncio.create_task(_store(connection, author, chunk), name="tasks-import")
                chunk, size = [], 0
                if on_progress is not None:
                    on_progress(count)
        count += await storing if storing is not None else 0
    finally:
        if storing is not None:
            storing.cancel()
            await asyncio.gather(storing, return_exceptions=True)
    if chunk:
        count += await _store(connection, author, chunk)
    if on_progress is not None:
        on_progress(count)
    return Loaded(count)


async def _store(connection: Connection, author: Author, lines: list[_Line]) -> int:
    """Raises `Invalid` for ids that are taken."""
    values: dict[str, Any] = {"owner": author.user_id, "epoch": author.epoch}
    values |= {f"new_{name}": [getattr(line.task, name) for line in lines] for name in _COLUMNS}
    values |= {f"new_{name}": [_written(getattr(line.task, name)) for line in lines] for name in _INSTANTS}
    stored = set(await connection.fetchval(STORE.sql, *STORE.arguments(values)) or ())
    faults: list[InputFault] = []
    for line in lines:
        if line.task.id in stored:
            # Whoever comes with the same id again does not find it any more.
            stored.discard(line.task.id)
        elif len(faults) < FAULTS_MAX:
            faults.append(_fault(line.number, "/id", "There is a task of this id."))
    if faults:
        raise Invalid(_said(faults), faults=faults)
    return len(lines)


async def _read(file: BinaryIO, faults: list[InputFault]) -> AsyncIterator[list[_Line]]:
    """The lines in slices that are looked at in a millisecond or two; what is wrong with others goes to `faults`.

    Reading waits in a thread. Validating does not: a thread that keeps the interpreter busy would delay whatever
    the event loop does by its switch interval, each time.
    """
    number = blank = 0
    while raw := await asyncio.to_thread(_some, file):
        for start in range(0, len(raw), _SLICE_LINES):
            lines = []
            for text in raw[start : start + _SLICE_LINES]:
                number += 1
                if not text.strip():
                    blank += 1
                    if blank > BLANK_LINES_MAX:
                        # Millions of them would keep the transaction waiting for a line that is one.
                        faults.append(
                            _fault(number, "", f"Is one of more than {BLANK_LINES_MAX} blank lines.")
                        )
                        return
                elif (task := _task(number, text, faults)) is not None:
                    lines.append(_Line(number, len(text), task))
            yield lines
            await asyncio.sleep(0)


def _some(file: BinaryIO) -> list[bytes]:
    """The next lines; of one that is too long, no more than shows that it is."""
    lines: list[bytes] = []
    size = 0
    while len(lines) < _CHUNK_LINES and size < LINE_MAX_BYTES and (line := file.readline(LINE_MAX_BYTES + 1)):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(LINE_MAX_BYTES)):
            pass
        lines.append(line)
        size += len(line)
    return lines


def _task(number: int, text: bytes, faults: list[InputFault]) -> TaskImport | None:
    if len(text) > LINE_MAX_BYTES:
        faults.append(_fault(number, "", f"Is longer than {LINE_MAX_BYTES} bytes."))
        return None
    try:
        return _IMPORT.validate_python(_JSON.decode(text.decode("utf-8-sig" if number == 1 else "utf-8")))
    except ValidationError as error:
        for each in error.errors(include_url=False, include_context=False, include_input=False):
            # An unknown field's own name is input, and is not said.
            known = () if each["type"] == "extra_forbidden" else each["loc"]
            faults.append(_fault(number, "".join(f"/{step}" for step in known), f"{each['msg']}."))
    except (ValueError, RecursionError):
        faults.append(_fault(number, "", "Is not a JSON object in UTF-8 that names each field once."))
    return None


def _written(moment: datetime | None) -> str | None:
    return None if moment is None else render_timestamp(moment)


def _fault(number: int, field: str, detail: str) -> InputFault:
    return InputFault(f"/{number - 1}{field}", f"Line {number}: {detail}")


def _said(faults: list[InputFault]) -> str:
    del faults[FAULTS_MAX:]
    listed = "The first faults are listed. " if len(faults) == FAULTS_MAX else ""
    return f"{listed}Nothing was imported."


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


# SQLModel's own model_validate() takes half as long again.
_IMPORT: Final = TypeAdapter(TaskImport)
_JSON: Final = json.JSONDecoder(object_pairs_hook=_each_once)
_COLUMNS: Final = ("id", "title", "description", "is_completed", "version")
_INSTANTS: Final = ("created_at", "updated_at")


def _provision() -> Any:
    return select(cast(me_making().c.v, Text).label("owner"))


def _store_lines() -> Any:
    # Each chunk looks anew, because a long import must not outlive the log-out that it began before.
    who = me_writing()
    types = (Uuid, Text, Text, Boolean, Integer, Text, Text)
    lines = array_rows("new", (*_COLUMNS, *_INSTANTS), types)
    created, updated = (instant(lines.c[name]) for name in _INSTANTS)
    given: dict[str, Any] = {name: lines.c[name] for name in _COLUMNS}
    given["created_at"] = func.coalesce(created, func.now())
    given["updated_at"] = func.coalesce(updated, created, func.now())
    new = insert(Task).from_select(
        ["user_id", *given], select(who.c.v, *given.values()), include_defaults=False
    )
    stored = new.on_conflict_do_nothing().returning(col(Task.id)).cte("stored")
    return after(who, select(func.array_agg(stored.c.id).label("ids")))


PROVISION = Statement("tasks.import_provision", _provision, repeatable=False)
STORE = Statement("tasks.import", _store_lines, repeatable=False)
