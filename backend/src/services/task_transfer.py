"""All of an owner's tasks out, and many in: NDJSON, one task a line, in memory that does not grow with them.

Both hold one connection for as long as they take, so a process does one of them at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, Final
from uuid import UUID
from weakref import WeakSet

from sqlalchemy import (
    ARRAY,
    Boolean,
    Integer,
    Text,
    Uuid,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    select,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import asyncpg as asyncpg_dialect
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col

from ..errors import Conflict, InputFault, Invalid, TooManyRequests, Unavailable
from ..models import Task, TaskImport
from ..models.rendering import Moment, written_timestamp
from .ownership import Author, me_making, me_writing, revoked_is_unauthenticated
from .statements import Statement
from .task_lines import CHUNK_LINES, FAULTS_MAX, fault, read, said
from .task_rows import TASK_KEY, after, array_rows, as_json, instant

if TYPE_CHECKING:
    from .connections import Connection
    from .database import Database

STALL_SECONDS: Final = 30.0
"""An export ends when nobody takes its next piece, or the database gives none, for so long."""

_PIECES: Final = 4
# The longest tasks fill a chunk sooner: while one is stored the next is read, so two are held at a time.
_CHUNK_BYTES: Final = 1 << 20
# asyncpg's bound on a whole COPY, which may take as long as its reader likes: STALL_SECONDS bounds each piece.
_COPY_SECONDS: Final = 24 * 3600.0
_BEGIN_EXPORT: Final = (
    f"LOCK TABLE {Task.__tablename__} IN ACCESS SHARE MODE; SET LOCAL statement_timeout = 0"
)

_busy: WeakSet[Any] = WeakSet()


def require_idle(db: Database) -> None:
    """Raises `TooManyRequests` while an export or import runs. For refusing an import before its body is read."""
    if db in _busy:
        raise TooManyRequests("bulk-busy", "Another export or import is under way.", retry_after_seconds=5)


@contextmanager
def _alone(db: Database) -> Iterator[None]:
    require_idle(db)
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
    created = written_timestamp(col(Task.created_at)).label("created")
    mine = select(*Task.__table__.columns, created).where(col(Task.user_id) == owner)  # type: ignore[attr-defined]
    # OFFSET keeps PostgreSQL from writing the moment at each place that it is put to. Most tasks have one only.
    ordered = mine.order_by(col(Task.created_at), col(Task.id)).offset(literal_column("0")).subquery("task").c
    changed = ordered.updated_at != ordered.created_at
    updated = case((changed, written_timestamp(ordered.updated_at)), else_=ordered.created)
    moments = {
        "created_at": type_coerce(ordered.created, Moment()),
        "updated_at": type_coerce(updated, Moment()),
    }
    compiled = select(as_json(SimpleNamespace(**{**ordered, **moments}))).compile(
        dialect=asyncpg_dialect.dialect(),  # type: ignore[no-untyped-call]
        compile_kwargs={"literal_binds": True},
    )
    return f"/* tasks.export */ {compiled}"


# In


@dataclass(frozen=True, slots=True)
class Loaded:
    """How many tasks an import made."""

    count: int


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
        async for _ in read(file, faults, only_to_look=True):
            if len(faults) >= FAULTS_MAX:
                break
        if faults:
            raise Invalid(said(faults), faults=faults)
        with revoked_is_unauthenticated():
            try:
                return await _in_one_transaction(db, author, file, on_progress, STORE)
            except Conflict as conflict:
                if conflict.constraint != TASK_KEY:
                    raise
            # An id is taken. To store in such a way that it can be said which takes PostgreSQL a fifth longer.
            return await _in_one_transaction(db, author, file, on_progress, STORE_NEW)


async def _in_one_transaction(
    db: Database,
    author: Author,
    file: BinaryIO,
    on_progress: Callable[[int], None] | None,
    store: Statement,
) -> Loaded:
    await asyncio.to_thread(file.seek, 0)
    async with db.transaction(owner=author.user_id) as connection:
        return await _load(connection, author, file, on_progress, store)


async def _load(
    connection: Connection,
    author: Author,
    file: BinaryIO,
    on_progress: Callable[[int], None] | None,
    store: Statement,
) -> Loaded:
    values = {"owner": author.user_id, "epoch": author.epoch, "email": author.email}
    await connection.execute(PROVISION.sql, *PROVISION.arguments(values))
    count = size = 0
    numbers: list[int] = []
    tasks: list[TaskImport] = []
    storing: asyncio.Task[int] | None = None
    try:
        # While PostgreSQL stores a chunk, the next one is read.
        async for lines in read(file, []):
            numbers += lines.numbers
            tasks += lines.tasks
            size += lines.size
            if len(tasks) >= CHUNK_LINES or size >= _CHUNK_BYTES:
                values = _columns(author, tasks)
                count += await storing if storing is not None else 0
                storing = asyncio.create_task(_store(connection, store, values, numbers), name="tasks-import")
                numbers, tasks, size = [], [], 0
                if on_progress is not None:
                    on_progress(count)
        count += await storing if storing is not None else 0
    finally:
        if storing is not None:
            storing.cancel()
            await asyncio.gather(storing, return_exceptions=True)
    if tasks:
        count += await _store(connection, store, _columns(author, tasks), numbers)
    if on_progress is not None:
        on_progress(count)
    return Loaded(count)


def _columns(author: Author, tasks: list[TaskImport]) -> dict[str, Any]:
    values: dict[str, Any] = {"owner": author.user_id, "epoch": author.epoch}
    values |= {f"new_{name}": list(map(attrgetter(name), tasks)) for name in _COLUMNS}
    values |= {f"new_{name}": list(map(_written, map(attrgetter(name), tasks))) for name in _INSTANTS}
    for name, usual in _USUAL.items():
        if values[name].count(usual) == len(tasks):
            # The driver looks at every element of an array, also at what nobody gave.
            values[name] = None
    return values


async def _store(connection: Connection, store: Statement, values: dict[str, Any], numbers: list[int]) -> int:
    """Raises `Invalid` for ids that are taken, where `store` leaves those out."""
    row = await connection.fetchrow(store.sql, *store.arguments(values))
    assert row is not None
    count, ids = row
    if count == len(numbers):
        return len(numbers)
    stored = set(ids or ())
    faults: list[InputFault] = []
    for number, task_id in zip(numbers, values["new_id"], strict=True):
        if task_id in stored:
            # Whoever comes with the same id again does not find it any more.
            stored.discard(task_id)
        elif len(faults) < FAULTS_MAX:
            faults.append(fault(number, "/id", "There is a task of this id."))
    raise Invalid(said(faults), faults=faults)


def _written(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


_COLUMNS: Final = ("id", "title", "description", "is_completed", "version")
_INSTANTS: Final = ("created_at", "updated_at")


_USUAL: Final = {
    "new_description": None,
    "new_is_completed": False,
    "new_version": 1,
    "new_created_at": None,
    "new_updated_at": None,
}
"""What a line without the field means; the statement means it too where it is given nothing."""


def _provision() -> Any:
    return select(cast(me_making().c.v, Text).label("owner"))


def _store_lines(only_new: bool) -> Any:
    # Each chunk looks anew, because a long import must not outlive the log-out that it began before.
    who = me_writing()
    types = (Uuid, Text, Text, Boolean, Integer, Text, Text)
    lines = array_rows("new", (*_COLUMNS, *_INSTANTS), types)
    created, updated = (instant(lines.c[name]) for name in _INSTANTS)
    given: dict[str, Any] = {name: lines.c[name] for name in _COLUMNS}
    given["is_completed"] = func.coalesce(given["is_completed"], literal_column("false"))
    given["version"] = func.coalesce(given["version"], literal_column("1"))
    given["created_at"] = func.coalesce(created, func.now())
    given["updated_at"] = func.coalesce(updated, created, func.now())
    new = insert(Task).from_select(
        ["user_id", *given], select(who.c.v, *given.values()), include_defaults=False
    )
    new = new.on_conflict_do_nothing() if only_new else new
    stored = new.returning(col(Task.id)).cte("stored")
    # Which ids are new is asked only where some are not: a thousand of them take the driver as long as the lines.
    count = func.count(stored.c.id)
    ids = case(
        (count < func.cardinality(bindparam("new_id", type_=ARRAY(Uuid))), func.array_agg(stored.c.id))
    )
    return after(who, select(count.label("count"), ids.label("ids")))


PROVISION = Statement("tasks.import_provision", _provision, repeatable=False)
STORE = Statement("tasks.import", lambda: _store_lines(only_new=False), repeatable=False)
STORE_NEW = Statement("tasks.import_new", lambda: _store_lines(only_new=True), repeatable=False)
