"""The database as the rest of the house sees it: statements, sessions, transactions, and what is known of it.

    row = await database.row(READ, owner=owner, task_id=task_id)        one statement, one round trip
    async with database.session() as session: ...                       SQLModel's AsyncSession, one transaction
    async with database.transaction() as connection: ...                the driver's connection, one transaction

All three live on the one budget of connections (`services.connections`). Errors leave as the family of
`errors`: 503 promises that nothing was written, 504 says that a write was sent and not answered.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import asyncpg
from sqlalchemy import event
from sqlmodel.ext.asyncio.session import AsyncSession

from ..errors import NestedAcquisition, OutcomeUnknown, RequestError, Unavailable
from ..models.base import make_engine
from .asking import rows_of
from .connections import Connection, Connections, Limits
from .faults import Diagnosis, Repeat, as_request_error, concerns_database, diagnose
from .health import Health, Schema
from .lending import OWNER, Lent, commit, name_owner, opening
from .statements import Statement
from .vitality import Observation, PoolObservation, SchemaObservation, Vitality

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncEngine

    from ..config.database import ConnectionSettings
    from ..config.settings import Settings
    from .line import Line
    from .metrics import DatabaseMetrics

__all__ = ["Database", "Limits", "Observation", "PoolObservation", "Schema", "SchemaObservation"]

T = TypeVar("T")


class _Holder:
    """Marks code that holds, or is about to hold, a connection of `database`."""

    __slots__ = ("active", "database")

    def __init__(self, database: Database) -> None:
        self.database = database
        self.active = True


_holding: ContextVar[_Holder | None] = ContextVar("holding_a_connection", default=None)


class Database:
    """One process's access to one database. Open it with `async with`; nothing connects before that."""

    def __init__(
        self,
        connection: ConnectionSettings,
        limits: Limits | None = None,
        *,
        passive: bool = False,
        schema: Schema | None = None,
        migrate: bool = False,
        metrics: DatabaseMetrics | None = None,
    ) -> None:
        self._limits = limits or Limits()
        if connection.connect_timeout_seconds is not None:
            self._limits = replace(self._limits, connect_timeout_seconds=connection.connect_timeout_seconds)
        self._metrics = metrics
        self._vitality = Vitality()
        self._connections = Connections(connection, self._limits, self._vitality, metrics)
        self._health = Health(
            self._connections, self._vitality, passive=passive, schema=schema, migrate=migrate
        )
        self._engine = make_engine(self._lend_to_session)
        event.listen(self._engine.sync_engine, "engine_connect", name_owner)

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        connection: ConnectionSettings,
        *,
        schema: Schema | None = None,
        metrics: DatabaseMetrics | None = None,
    ) -> Self:
        """A database as the operator configured it. `auto` probes are passive where it may scale to zero."""
        probes = settings.health_probes
        return cls(
            connection,
            Limits(
                pool_size=settings.database_pool_size,
                pool_timeout_seconds=settings.database_pool_timeout_seconds,
                connect_timeout_seconds=settings.database_connect_timeout_seconds,
                command_timeout_seconds=settings.database_command_timeout_seconds,
                statement_timeout_seconds=settings.database_statement_timeout_seconds,
                lock_timeout_seconds=settings.database_lock_timeout_seconds,
                recovery_wait_seconds=settings.database_recovery_wait_seconds,
                check_interval_seconds=settings.health_interval_seconds,
            ),
            passive=probes == "passive" or (probes == "auto" and connection.neon),
            schema=schema,
            migrate=settings.migrate_on_start,
            metrics=metrics,
        )

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Tries to connect once, and goes on trying in the background where waiting may help.

        A migration that is due begins, and is waited for up to one connect timeout.

        Raises `DatabaseRefused` when the first attempt met a wrong password, an unknown database or a rejected
        certificate, and `ConfigurationError` when a certificate file cannot be read: waiting does not mend these.
        """
        try:
            await self._connections.open(self._health.greet)
            await self._health.settle(self._limits.connect_timeout_seconds)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        await self._health.close()
        await self._connections.close()
        await self._engine.dispose()

    # -- one statement, one round trip -----------------------------------------------------------------------

    async def value(self, statement: Statement, **values: Any) -> Any:
        """The first column of the first row, None when there is none."""
        rows = await self._run(statement, values, 1)
        return rows[0][0] if rows else None

    async def row(self, statement: Statement, **values: Any) -> asyncpg.Record | None:
        """The first row, None when there is none."""
        rows = await self._run(statement, values, 1)
        return rows[0] if rows else None

    async def rows(self, statement: Statement, **values: Any) -> list[asyncpg.Record]:
        """All rows."""
        return await self._run(statement, values, 0)

    async def _run(self, statement: Statement, values: dict[str, Any], most: int) -> list[asyncpg.Record]:
        """Runs one autocommitted statement within one deadline, for the first `most` rows, or all for 0.

        Repeated where that can do no harm: nothing was sent, the server rolled it back, or the statement is
        repeatable. A write that was sent and lost its answer raises `OutcomeUnknown`, also when what was lost
        is the first attempt of several.
        """
        self._refuse_nesting()
        arguments = statement.arguments(values)
        started = time.monotonic()
        deadline = started + self._limits.command_timeout_seconds
        attempt = 0
        unanswered: Diagnosis | None = None
        while True:
            try:
                connection = self._connections.take() or await self._connections.acquire(deadline)
            except Unavailable:
                if unanswered is None:
                    raise
                raise _told(statement, unanswered, unanswered) from None
            # One millisecond at least: asyncpg takes a bound that has passed for a programming error.
            left = max(deadline - time.monotonic(), 0.001)
            bound = min(left, statement.within_seconds or left)
            try:
                result = await rows_of(connection, statement.sql, arguments, most, bound)
            except Exception as error:
                if bound < left and isinstance(error, TimeoutError):
                    # The server is asked to stop it. That it took long says nothing against the server.
                    self._connections.discard(connection)
                    self._count(statement.name, started, _TOO_SLOW)
                    raise as_request_error(_TOO_SLOW, sent=True, writing=False) from None
                diagnosis = diagnose(error)
                await self._take_back(connection, diagnosis, left)
                attempt += 1
                self._count(statement.name, started, diagnosis)
                if statement.writes and diagnosis.repeat is Repeat.IF_REPEATABLE:
                    unanswered = diagnosis
                if not _may_repeat(diagnosis, statement.repeatable) or not await self._pause(
                    diagnosis, attempt, deadline
                ):
                    raise _told(statement, diagnosis, unanswered) from _unexpected(error, diagnosis)
                if self._metrics is not None:
                    self._metrics.retry(statement.name)
            except BaseException:
                # The caller went away in mid-statement: the connection's state is not known any more.
                self._connections.discard(connection)
                raise
            else:
                now = time.monotonic()
                self._vitality.success("traffic", now)
                self._connections.release(connection)
                if self._metrics is not None:
                    self._metrics.statement(statement.name, now - started, "ok")
                return result

    # -- sessions and transactions ---------------------------------------------------------------------------

    @asynccontextmanager
    async def session(
        self, *, owner: UUID | None = None, read_only: bool = False
    ) -> AsyncIterator[AsyncSession]:
        """SQLModel's `AsyncSession` in one transaction: committed at the end, rolled back on any error.

        With an `owner` it meets their rows only, without one no row of anybody (unless the role is not bound by
        row-level security). A connection is taken at the first statement. Raises `OutcomeUnknown` when the
        connection was lost during COMMIT, other members of the family when the transaction was not committed.
        """
        holder = self._hold()
        session = AsyncSession(self._for_session(owner, read_only), expire_on_commit=False)
        committing = False
        try:
            yield session
            await session.flush()
            committing = True
            await session.commit()
        except BaseException as error:
            if not concerns_database(error):
                if isinstance(error, Exception) and not isinstance(error, TimeoutError):
                    await session.rollback()
                else:
                    # What is on the wire after a timeout or a cancellation is not known: nothing more is sent.
                    await session.invalidate()
                raise
            diagnosis = diagnose(error)
            self._failed(diagnosis)
            await (session.invalidate() if diagnosis.lost else session.rollback())
            raise as_request_error(diagnosis, sent=committing, writing=not read_only) from _unexpected(
                error, diagnosis
            )
        finally:
            holder.active = False
            await session.close()

    @asynccontextmanager
    async def transaction(
        self, *, owner: UUID | None = None, read_only: bool = False
    ) -> AsyncIterator[Connection]:
        """The driver's connection inside BEGIN and COMMIT; rolled back on any error. `owner` and errors as in
        `session`."""
        async with self._transaction(opening(owner, read_only=read_only), read_only, []) as connection:
            yield connection

    @asynccontextmanager
    async def _transaction(
        self, begin: str, read_only: bool, met: list[Diagnosis]
    ) -> AsyncIterator[Connection]:
        """As `transaction`; what the database did to it is added to `met`."""
        holder = self._hold()
        deadline = time.monotonic() + self._limits.command_timeout_seconds
        try:
            connection = await self._begin(deadline, begin)
        except BaseException:
            holder.active = False
            raise
        committing = False
        try:
            yield connection
            committing = True
            await commit(connection)
        except BaseException as error:
            if not concerns_database(error):
                # What is on the wire after a timeout or a cancellation is not known: nothing more is sent.
                clean = isinstance(error, Exception) and not isinstance(error, TimeoutError)
                await self._give_back(connection, clean=clean)
                raise
            diagnosis = diagnose(error)
            met.append(diagnosis)
            self._failed(diagnosis)
            await self._give_back(connection, clean=not diagnosis.lost)
            raise as_request_error(diagnosis, sent=committing, writing=not read_only) from _unexpected(
                error, diagnosis
            )
        else:
            await self._give_back(connection, clean=True)
        finally:
            holder.active = False

    async def atomically(
        self, work: Callable[[Connection], Awaitable[T]], *, owner: UUID | None = None, name: str = "unit"
    ) -> T:
        """Runs `work` in a transaction, and again as a whole when the server rolled it back or was lost before COMMIT.

        Serialization failures, deadlocks and lost connections repeat it, jittered, within one command timeout.
        """
        deadline = time.monotonic() + self._limits.command_timeout_seconds
        attempt = 0
        while True:
            met: list[Diagnosis] = []
            try:
                async with self._transaction(opening(owner), read_only=False, met=met) as connection:
                    return await work(connection)
            except Unavailable:
                # Nothing was written: the fault came before COMMIT was sent, or the server answered it by rolling back.
                attempt += 1
                if (
                    not met
                    or met[0].repeat is Repeat.NEVER
                    or not await self._pause(met[0], attempt, deadline)
                ):
                    raise
                if self._metrics is not None:
                    self._metrics.retry(name)

    async def _begin(self, deadline: float, begin: str) -> Connection:
        while True:
            connection = await self._connections.acquire(deadline)
            try:
                await connection.execute(begin)
            except Exception as error:
                diagnosis = diagnose(error)
                self._failed(diagnosis)
                self._connections.discard(connection)
                # BEGIN changes nothing: a connection found dead by it costs only another one.
                if diagnosis.repeat is Repeat.NEVER or time.monotonic() >= deadline:
                    raise as_request_error(diagnosis, sent=False, writing=False) from None
            except BaseException:
                self._connections.discard(connection)
                raise
            else:
                return connection

    def _for_session(self, owner: UUID | None, read_only: bool) -> AsyncEngine:
        """The engine whose connections begin their transactions in this way."""
        if owner is None and not read_only:
            return self._engine
        return self._engine.execution_options(postgresql_readonly=read_only, **{OWNER: owner})

    async def _lend_to_session(self) -> Connection:
        deadline = time.monotonic() + self._limits.command_timeout_seconds
        connection = await self._connections.acquire(deadline)
        return Lent(connection, self._give_back, self._connections.discard)  # type: ignore[return-value]

    async def _give_back(self, connection: Connection, *, clean: bool) -> None:
        """Returns a connection on which a caller's own statements ran, undoing whatever they left behind."""
        if not clean or connection.is_closed():
            self._connections.discard(connection)
            return
        try:
            if connection.is_in_transaction():
                await connection.execute("ROLLBACK")
            if self._connections.pooler == "none":
                # A SET of the caller's must not reach the next one; behind a pooler it is the pooler's to undo.
                await connection.execute("RESET ALL")
        except BaseException as error:
            self._connections.discard(connection)
            if not isinstance(error, Exception):
                raise
        else:
            # Whoever was lent a connection has asked the database something, and it has answered.
            self._vitality.success("traffic")
            self._connections.release(connection)

    # -- what is known ---------------------------------------------------------------------------------------

    @property
    def pooler(self) -> str:
        """What stands between: `none`, `transaction`, `tracking`, or `auto` before the first connection."""
        return self._connections.pooler

    @property
    def line(self) -> Line:
        """Where callers wait for a connection."""
        return self._connections.line

    def observe(self) -> Observation:
        """What is known now, from evidence that is there already: sends nothing, opens nothing."""
        return self._health.observe()

    async def check(self) -> Observation:
        """What is known, after at most one real check an interval however many ask; passive: never one."""
        return await self._health.check()

    # -- small print -----------------------------------------------------------------------------------------

    def _refuse_nesting(self) -> None:
        holder = _holding.get()
        if holder is not None and holder.active and holder.database is self:
            raise NestedAcquisition(
                "This code holds a connection and asks for another: on a full pool it would wait for itself. "
                "Use the session or connection at hand."
            )

    def _hold(self) -> _Holder:
        self._refuse_nesting()
        holder = _Holder(self)
        _holding.set(holder)
        return holder

    async def _take_back(self, connection: Connection, diagnosis: Diagnosis, waited_seconds: float) -> None:
        if diagnosis.lost or connection.is_closed():
            self._connections.discard(connection)
            self._connections.lost(diagnosis, waited_seconds=waited_seconds)
        else:
            # The server answered, with an error: it is alive and the connection is good.
            self._vitality.success("traffic")
            self._connections.release(connection)

    def _count(self, name: str, started: float, diagnosis: Diagnosis) -> None:
        if self._metrics is not None:
            self._metrics.error(diagnosis.reason)
            self._metrics.statement(name, time.monotonic() - started, "error")

    def _failed(self, diagnosis: Diagnosis) -> None:
        if self._metrics is not None:
            self._metrics.error(diagnosis.reason)
        if diagnosis.lost:
            self._connections.lost(diagnosis)

    async def _pause(self, diagnosis: Diagnosis, attempt: int, deadline: float) -> bool:
        """Waits before a repeat; False when the deadline leaves no room for one."""
        if diagnosis.lost:
            # acquire() waits for the healer, so there is nothing to wait for here.
            return time.monotonic() < deadline and attempt < 5
        pause = random.uniform(0, min(0.01 * 2**attempt, 0.5))  # noqa: S311 - jitter
        if time.monotonic() + pause >= deadline or attempt > 8:
            return False
        await asyncio.sleep(pause)
        return True


_TOO_SLOW = Diagnosis("statement-timeout", Unavailable)


def _told(statement: Statement, diagnosis: Diagnosis, unanswered: Diagnosis | None) -> RequestError:
    """What the caller is told of the last attempt, when an earlier one may have written."""
    if unanswered is None or not issubclass(diagnosis.becomes, Unavailable):
        return as_request_error(diagnosis, sent=True, writing=statement.writes)
    return OutcomeUnknown(unanswered.reason, retry_after_seconds=1 if statement.repeatable else None)


def _may_repeat(diagnosis: Diagnosis, repeatable: bool) -> bool:
    if diagnosis.repeat is Repeat.IF_REPEATABLE:
        return repeatable
    return diagnosis.repeat is not Repeat.NEVER


def _unexpected(error: BaseException, diagnosis: Diagnosis) -> BaseException | None:
    """A defect of ours keeps its cause for the log; an expected fault leaves the driver's words behind."""
    return error if diagnosis.reason in ("unexpected", "statement-refused") else None
