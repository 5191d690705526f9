"""A check, its result, and what checks share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncpg

    from ..config.database import ConnectionSettings, Host
    from ..config.settings import Settings


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    WARNED = "warned"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check; `cause` and `remedy` are set unless it passed or did not run.

    `exit_code` counts where the outcome is FAILED: 1, or 3 when the configuration or a credential is at fault.
    """

    outcome: Outcome
    summary: str
    cause: str | None = None
    remedy: str | None = None
    exit_code: int = 1


def passed(summary: str) -> CheckResult:
    return CheckResult(Outcome.PASSED, summary)


def warned(summary: str, cause: str, remedy: str) -> CheckResult:
    return CheckResult(Outcome.WARNED, summary, cause, remedy)


def failed(summary: str, cause: str, remedy: str, *, exit_code: int = 1) -> CheckResult:
    return CheckResult(Outcome.FAILED, summary, cause, remedy, exit_code)


def not_run(reason: str) -> CheckResult:
    return CheckResult(Outcome.NOT_RUN, reason)


def statements_as(role: str, *statements: str) -> str:
    """A remedy in SQL: the role that has the rights to run it in this database, and the statements."""
    return "\n".join([f'As role "{role}":', *(f"{statement};" for statement in statements)])


@dataclass
class CheckContext:
    """State of one run. A check sets what the checks that require it read."""

    load: Callable[[], Settings]
    source: str
    settings: Settings = field(init=False)
    address: ConnectionSettings = field(init=False)
    ip_addresses: dict[Host, tuple[str, ...]] = field(init=False, default_factory=dict)
    reachable: Host = field(init=False)
    connection: asyncpg.Connection[Any] = field(init=False)
    closers: list[Callable[[], Awaitable[None]]] = field(init=False, default_factory=list)

    @property
    def connect_timeout_seconds(self) -> float:
        """The timeout of one attempt to connect: the URL's, else the setting."""
        of_url = self.address.connect_timeout_seconds
        return self.settings.database_connect_timeout_seconds if of_url is None else of_url

    async def fetch(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        """Rows of a catalogue query.

        Each runs in a transaction: behind a pooler, preparing and executing a statement outside of one may
        reach two different backends.
        """
        async with self.connection.transaction(readonly=True):
            return list(await self.connection.fetch(query, *arguments))

    async def limit_lock_wait(self) -> None:
        """Apply the service's lock timeout to this transaction: describing a table takes a lock, too."""
        timeout = f"{int(1000 * self.settings.database_lock_timeout_seconds)}ms"
        await self.connection.fetchval("SELECT set_config('lock_timeout', $1::text, true)", timeout)


@dataclass(frozen=True, slots=True)
class Check:
    """A named check. It runs only if the checks named in `requires` passed, perhaps with a warning."""

    name: str
    description: str
    run: Callable[[CheckContext], Awaitable[CheckResult]]
    requires: tuple[str, ...] = ()
    timeout_seconds: float = 10.0
