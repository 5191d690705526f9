"""The line in front of the connections: so many are inside at a time, the others wait in the order of arrival.

Once the line has stood for as long as anybody is patient, whoever could not get in before his patience ends is
turned away at once, not after it: the time between two that leave, and how many wait already, say how long it would
take. A burst that is shorter is never judged: its first steps say little about the rest.
"""

from __future__ import annotations

import asyncio
import time

# How much the newest gap counts: some dozen of them outweigh what was before.
_NEWEST = 1 / 16


class NoProspect(Exception):
    """Nobody would leave in time, or nobody did."""


class Line:
    """`inside` and `waiting` are the numbers of callers."""

    def __init__(self, places: int, patience_seconds: float) -> None:
        self.inside = 0
        self.waiting = 0
        self._places = places
        self._patience = patience_seconds
        self._free = asyncio.Semaphore(places)
        # Since when somebody has waited all the time, and the seconds between two that left since. Forgotten whenever
        # the line is empty: what was slow an hour ago need not be slow now.
        self._standing_since: float | None = None
        self._gap = 0.0
        self._left_at = 0.0

    @property
    def full(self) -> bool:
        """Whether a caller would have to wait."""
        return self._free.locked()

    async def enter(self, seconds: float) -> None:
        """Waits for a place, `seconds` or the line's patience at most. Raises `NoProspect`."""
        if self._free.locked():
            patience = min(self._patience, max(seconds, 0.0))
            if self._standing_since is None:
                self._standing_since = self._left_at = time.monotonic()
            elif self.waiting >= self._places and self._expected_seconds() > patience:
                raise NoProspect
            self.waiting += 1
            try:
                async with asyncio.timeout(patience):
                    await self._free.acquire()
            except TimeoutError:
                raise NoProspect from None
            finally:
                self.waiting -= 1
        else:
            await self._free.acquire()
        self.inside += 1

    def leave(self) -> None:
        self.inside -= 1
        if self.waiting:
            now = time.monotonic()
            self._gap += (now - self._left_at - self._gap) * _NEWEST
            self._left_at = now
        else:
            self._standing_since, self._gap = None, 0.0
        self._free.release()

    def _expected_seconds(self) -> float:
        """How long the next to come would wait; nothing while that cannot be known."""
        if self._standing_since is None or time.monotonic() - self._standing_since < self._patience:
            return 0.0
        return (self.waiting + 1) * self._gap
