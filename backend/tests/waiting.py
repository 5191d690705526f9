"""Waiting for the very thing that a test asserts: not for a time, and not for something that comes before it."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Final

from src.services.database import Limits

PATIENCE: Final = 60.0
"""What a busy machine may take for anything that happens at all."""
PATIENT: Final = Limits(
    pool_timeout_seconds=60,
    connect_timeout_seconds=60,
    command_timeout_seconds=60,
    statement_timeout_seconds=50,
    lock_timeout_seconds=40,
    recovery_wait_seconds=50,
)
"""For what is promised to succeed, and where how fast the machine is makes no difference."""


def _it_never_did() -> str:
    return "it did not come true in time"


def until(true: Callable[[], object], what: Callable[[], str] = _it_never_did) -> None:
    """Returns once `true` is; fails with what `what` says when that takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


async def eventually(
    true: Callable[[], bool | Awaitable[bool]], what: Callable[[], str] = _it_never_did
) -> None:
    """As `until`, while the loop goes on; `true` may be something to await."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = true()
        if await found if inspect.isawaitable(found) else found:
            return
        assert time.monotonic() < deadline, what()
        await asyncio.sleep(0.02)
