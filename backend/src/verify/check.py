"""What the checks of `verify` share: the shape of a finding, and the things one check leaves for the next."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncpg

    from ..config.database import ConnectionSettings, Host
    from ..config.settings import Settings
    from ..services.database import Database


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    WARNED = "warned"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found: a figure for people; when something is wrong, its cause and the next thing to type.

    `exit_code` counts only where the outcome is FAILED: 1, or 3 when the configuration or a credential is at fault.
    """

    outcome: Outcome
    figure: str
    cause: str | None = None
    remedy: str | None = None
    exit_code: int = 1


def passed(figure: str) -> Finding:
    return Finding(Outcome.PASSED, figure)


def warned(figure: str, cause: str, remedy: str) -> Finding:
    return Finding(Outcome.WARNED, figure, cause, remedy)


def failed(figure: str, cause: str, remedy: str, *, exit_code: int = 1) -> Finding:
    return Finding(Outcome.FAILED, figure, cause, remedy, exit_code)


def not_run(why: str) -> Finding:
    return Finding(Outcome.NOT_RUN, why)


@dataclass
class Examination:
    """One run of the checks. A check fills in what the checks that need it read."""

    load: Callable[[], Settings]
    source: str
    settings: Settings = field(init=False)
    connection: ConnectionSettings = field(init=False)
    addresses: dict[Host, tuple[str, ...]] = field(init=False, default_factory=dict)
    reachable: Host = field(init=False)
    wire: asyncpg.Connection[Any] = field(init=False)
    database: Database = field(init=False)
    closers: list[Callable[[], Awaitable[None]]] = field(init=False, default_factory=list)

    @property
    def connect_seconds(self) -> float:
        """How long one attempt to connect may take: the address's own word, else the setting."""
        asked = self.connection.connect_timeout_seconds
        return self.settings.database_connect_timeout_seconds if asked is None else asked

    async def ask(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        """The rows of a catalogue query.

        In a transaction of its own: behind a pooler, preparing and running a statement outside of one may
        meet two different backends.
        """
        async with self.wire.transaction(readonly=True):
            return list(await self.wire.fetch(query, *arguments))

    async def be_brief(self) -> None:
        """In this transaction wait no longer for a lock than requests do: describing a table takes one, too."""
        patience = f"{int(1000 * self.settings.database_lock_timeout_seconds)}ms"
        await self.wire.fetchval("SELECT set_config('lock_timeout', $1::text, true)", patience)


@dataclass(frozen=True, slots=True)
class Check:
    """One promise that can be looked at. `needs` names the checks without which it cannot run."""

    name: str
    promise: str
    look: Callable[[Examination], Awaitable[Finding]]
    needs: tuple[str, ...] = ()
    bound_seconds: float = 10.0
