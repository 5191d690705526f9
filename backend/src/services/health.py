"""Health of the database: observed from evidence, checked only where checking is allowed.

Passive: nothing is ever sent for the sake of health, so a database that scales to zero may sleep. Active: one
real check an interval at most, and none while traffic proves the same.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

import asyncpg

from ..config.logging import get_logger
from ..errors import DatabaseRefused, OutcomeUnknown, RequestError, Unavailable
from .connections import Connection, Connections
from .faults import diagnose
from .vitality import Observation, SchemaObservation, Vitality

log = get_logger(__name__)

# Seconds after which an active check looks at the schema's revision again although traffic proves the rest.
_SCHEMA_EVIDENCE_SECONDS = 10.0
# A check that got no answer for so long says so; the budget of a Kubernetes probe is of this size.
_CHECK_SECONDS = 1.5
_MIGRATION_RETRY_SECONDS = 10.0
# A server that says so about the table of the revision is there and answers; only the revision stays unknown.
_UNREADABLE = frozenset({"insufficient-privilege", "schema-mismatch"})


class Schema(Protocol):
    """What health asks of the schema: which revision it has, and to bring it to the code's own."""

    expected: str

    async def migrate(self) -> None: ...
    async def inspect(self, connection: Connection) -> SchemaObservation: ...


class Health:
    """Answers `observe` and `check`, and has the schema migrated when that is due."""

    def __init__(
        self,
        connections: Connections,
        vitality: Vitality,
        *,
        passive: bool,
        schema: Schema | None,
        migrate: bool,
    ) -> None:
        self._connections = connections
        self._limits = connections.limits
        self._vitality = vitality
        self._passive = passive
        self._schema = schema
        self._migration_due = migrate and schema is not None
        self._migration_reason: str | None = None
        self._unreadable_reason: str | None = None
        self._schema_seen = SchemaObservation("unknown", None, schema.expected if schema else "")
        self._schema_seen_at = float("-inf")
        self._check: asyncio.Task[None] | None = None
        self._migrator: asyncio.Task[None] | None = None
        self._migration_tried = asyncio.Event()

    async def settle(self, seconds: float) -> None:
        """Waits for the outcome of a migration that start-up has begun, so that what follows meets its tables."""
        if self._migrator is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._migration_tried.wait()

    async def close(self) -> None:
        tasks = [task for task in (self._check, self._migrator) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def observe(self) -> Observation:
        """What is known now, from evidence that is there already: sends nothing, opens nothing."""
        vitality, pool = self._vitality, self._connections.observe()
        status = vitality.status(passive=self._passive, open_connections=pool.open)
        reason = vitality.reason if status in ("starting", "down") else None
        schema = self._schema_seen
        ready = status in ("up", "asleep")
        if ready and self._schema is not None and schema.status not in ("current", "ahead"):
            ready = False
            reason = self._migration_reason or self._unreadable_reason or f"schema-{schema.status}"
        elif ready and schema.status == "ahead":
            reason = "schema-ahead"
        return Observation(
            status=status,
            ready=ready,
            reason=reason,
            evidence=vitality.evidence,
            evidence_at=vitality.evidence_at,
            evidence_age_seconds=vitality.age_seconds,
            mode="passive" if self._passive else "active",
            pool=pool,
            schema=schema,
            server_version=self._connections.server_version,
            read_only=self._connections.read_only,
        )

    async def check(self) -> Observation:
        """What is known, after at most one real check an interval however many ask; passive: never one.

        Returns within about 1.5 s. A schema that is not the code's is looked at again in both modes.
        """
        if self._check_is_due() and (self._check is None or self._check.done()):
            self._check = asyncio.create_task(self._look(), name="database-check")
        if self._check is not None and not self._check.done():
            await asyncio.wait({self._check})
        return self.observe()

    def _check_is_due(self) -> bool:
        if self._vitality.outage_since is not None:
            return False  # the healer is at it
        now, interval = time.monotonic(), self._limits.check_interval_seconds
        schema_age = now - self._schema_seen_at
        if self._schema is not None and self._schema_seen.status not in ("current", "ahead"):
            return schema_age >= interval
        if self._passive or not self._connections.idle_available:
            return False
        age = self._vitality.age_seconds
        return age is None or age >= interval or schema_age >= max(interval, _SCHEMA_EVIDENCE_SECONDS)

    async def _look(self) -> None:
        """One real check: the schema's revision, or a constant where there is no schema to look for."""
        budget = min(_CHECK_SECONDS, self._limits.command_timeout_seconds)
        deadline = time.monotonic() + budget
        try:
            connection = await asyncio.wait_for(self._connections.acquire(deadline), budget)
        except RequestError:
            return  # acquiring has told the vitality already
        except TimeoutError:
            self._connections.unanswered("timeout")
            return
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0.001)):
                await self._inspect(connection)
        except Exception as error:
            diagnosis = diagnose(error)
            self._connections.discard(connection)
            if diagnosis.lost:
                self._connections.unanswered(diagnosis.reason)
            else:
                log.warning("database.check_failed", reason=diagnosis.reason)
        except BaseException:
            self._connections.discard(connection)
            raise
        else:
            self._vitality.success("probe")
            self._connections.release(connection)

    async def _inspect(self, connection: Connection) -> None:
        if self._schema is None:
            await connection.fetchval("SELECT 1")
            return
        try:
            seen = await self._schema.inspect(connection)
        except asyncpg.PostgresError as error:
            reason = diagnose(error).reason
            if reason not in _UNREADABLE:
                raise
            if reason != self._unreadable_reason:
                log.warning("schema.unreadable", reason=reason, expected=self._schema.expected)
            # What was seen before stays: a right taken from this one table stops no request.
            self._unreadable_reason = reason
            self._schema_seen_at = time.monotonic()
            return
        self._unreadable_reason = None
        if seen.status != self._schema_seen.status:
            log.info("schema.seen", status=seen.status, found=seen.found, expected=seen.expected)
        self._schema_seen = replace(seen, seen_at=datetime.now(UTC))
        self._schema_seen_at = time.monotonic()

    async def greet(self, connection: Connection) -> None:
        """On the first connection of a recovery: look at the schema, and have it migrated where that is due."""
        async with asyncio.timeout(self._limits.command_timeout_seconds):
            await self._inspect(connection)
        if self._migration_due:
            if self._schema_seen.status in ("current", "ahead"):
                self._migration_due = False
            elif self._migrator is None or self._migrator.done():
                self._migration_reason = "migrating"
                self._migrator = asyncio.create_task(self._migrate(), name="database-migrate")

    async def _migrate(self) -> None:
        """Upgrades to head, on connections of its own; tried again until it succeeds."""
        assert self._schema is not None
        while True:
            try:
                await self._schema.migrate()
                connection = await self._connections.acquire(time.monotonic() + 60)
                try:
                    await self._inspect(connection)
                finally:
                    self._connections.discard(connection)
            except DatabaseRefused as refusal:
                # Waiting does not mend it, but an operator may, while this process goes on.
                self._migration_reason = refusal.reason
                log.error("schema.migration_refused", reason=refusal.reason, detail=str(refusal))  # noqa: TRY400
            except (Unavailable, OutcomeUnknown) as error:
                # A right, a lock, a read-only or a lost server: its name says all, a traceback would say less.
                self._migration_reason = "migration-failed"
                log.error("schema.migration_failed", reason=error.reason, detail=str(error))  # noqa: TRY400
            except Exception as error:
                diagnosis = diagnose(error)
                self._migration_reason = "migration-failed"
                log.exception("schema.migration_failed", reason=diagnosis.reason)
            else:
                self._migration_due, self._migration_reason = False, None
                return
            finally:
                self._migration_tried.set()
            await asyncio.sleep(_MIGRATION_RETRY_SECONDS)
