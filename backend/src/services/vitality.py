"""What is known about the database, from evidence alone: what was seen, when, and by whom.

    starting ──success──> up <──success── down
                          │ └──failure──>──┘
                          └─ every connection closed by the server while idle ─> asleep (passive mode only)

Nothing here asks the database anything. Traffic, the healer and active checks report what they saw.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

Status = Literal["starting", "up", "asleep", "down"]
Evidence = Literal["traffic", "probe", "connect"]


@dataclass(frozen=True, slots=True)
class PoolObservation:
    """Connections of this process: the bound, those open now, those in use, and the callers waiting for one."""

    size: int
    open: int
    in_use: int
    waiting: int


@dataclass(frozen=True, slots=True)
class SchemaObservation:
    """`found` is the revision in the database (None: no migration ever ran), `expected` the code's own.

    `seen_at` is when it was last read, in UTC. `foreign`: the revision is that of another program's migrations.
    """

    status: Literal["current", "behind", "ahead", "foreign", "unknown"]
    found: str | None
    expected: str
    seen_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known now. `reason` is a slug when something is wrong; `evidence_at` is UTC."""

    status: Status
    ready: bool
    reason: str | None
    evidence: Evidence | None
    evidence_at: datetime | None
    evidence_age_seconds: float | None
    mode: Literal["passive", "active"]
    pool: PoolObservation
    schema: SchemaObservation
    server_version: str | None
    read_only: bool


class Vitality:
    """The state that evidence adds up to.

    An outage begins with the first loss. It is only *suspected* until an attempt to connect fails or a
    statement goes unanswered: one killed connection is not a dead server.
    """

    def __init__(self) -> None:
        self.ever_up = False
        self.down = False
        self.reason: str | None = "connecting"
        self.outage_since: float | None = time.monotonic()
        self._evidence: Evidence | None = None
        self._evidence_at: float | None = None
        self._restored = asyncio.Event()

    def success(self, evidence: Evidence, at: float | None = None) -> None:
        """The database answered, now or `at` a moment of the monotonic clock. Called for every statement, so it does
        next to nothing."""
        self._evidence = evidence
        self._evidence_at = time.monotonic() if at is None else at

    def suspect(self, reason: str) -> None:
        """A connection was lost. Callers wait for the healer's verdict from now on."""
        if self.outage_since is None:
            self.outage_since = time.monotonic()
            self.reason = reason
            self._restored.clear()

    def failure(self, reason: str, evidence: Evidence) -> None:
        """The database did not answer, or could not be reached."""
        self.suspect(reason)
        self.down = True
        self.reason = reason
        self._evidence = evidence
        self._evidence_at = time.monotonic()

    def restore(self, evidence: Evidence) -> None:
        """The healer reached the database: the outage is over."""
        self.success(evidence)
        self.ever_up = True
        self.down = False
        self.reason = None
        self.outage_since = None
        self._restored.set()

    async def wait_restored(self, until: float) -> bool:
        """Waits for the end of the outage, at the latest until `until` on the monotonic clock."""
        left = until - time.monotonic()
        if left > 0 and self.outage_since is not None:
            try:
                async with asyncio.timeout(left):
                    await self._restored.wait()
            except TimeoutError:
                pass
        return self.outage_since is None

    def status(self, *, passive: bool, open_connections: int) -> Status:
        if not self.ever_up:
            return "down" if self.down else "starting"
        if self.down:
            return "down"
        if passive and open_connections == 0 and self.outage_since is None:
            return "asleep"
        return "up"

    @property
    def age_seconds(self) -> float | None:
        """Seconds since the last evidence, good or bad; None before the first."""
        return None if self._evidence_at is None else time.monotonic() - self._evidence_at

    @property
    def evidence(self) -> Evidence | None:
        return self._evidence

    @property
    def evidence_at(self) -> datetime | None:
        """The moment of the last evidence on the wall clock: now less its age, so that clock steps do not count."""
        age = self.age_seconds
        return None if age is None else datetime.now(UTC) - timedelta(seconds=age)
