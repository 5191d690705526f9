"""The line in front of the connections: so many are inside at a time, the others wait in the order of arrival.

Whoever could not get in before his patience ends is turned away at once, not after it: the time between two that
leave, and how many wait already, say how long it would take.
"""

from __future__ import annotations

import asyncio
import time

# How much the newest gap counts: a handful of them outweighs what was before.
_NEWEST = 1 / 8


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
        # Seconds between two that leave while others wait. Unknown (0) at the beginning of each such time, because
        # what was slow an hour ago need not be slow now.
        self._gap = 0.0
        self._gaps = 0
        self._left_at: float | None = None

    @property
    def full(self) -> bool:
        """Whether a caller would have to wait."""
        return self._free.locked()

    async def enter(self, seconds: float) -> None:
        """Waits for a place, `seconds` or the line's patience at most. Raises `NoProspect`."""
        if self._free.locked():
            patience = min(self._patience, max(seconds, 0.0))
            # One gap may be a pause of the whole machine, after which all who are inside leave at once.
            known = self._gaps >= 2 * self._places
            if known and self.waiting >= self._places and (self.waiting + 1) * self._gap > patience:
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
            if self._left_at is not None:
                gap = now - self._left_at
                self._gap = gap if not self._gap else self._gap + (gap - self._gap) * _NEWEST
                self._gaps += 1
            self._left_at = now
        else:
            self._gap, self._gaps, self._left_at = 0.0, 0, None
        self._free.release()
