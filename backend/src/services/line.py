"""The line in front of the connections: so many are inside at a time, the others wait in the order of arrival.

Once the line has stood for as long as anybody is patient, whoever could not get in before his patience ends is
turned away at once, not after it: the time between two that leave, and how many wait already, say how long it would
take. A burst that is shorter is never judged: its first steps say little about the rest.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

# How much the newest gap counts: some dozen of them outweigh what was before.
_NEWEST = 1 / 16


class NoProspect(Exception):
    """Nobody would leave in time, or nobody did."""


class Forsaken(NoProspect):
    """Nobody waits any more for what this caller would have done."""


class Line:
    """`inside` is the number of callers who have a place, `places` bounds it.

    `on_leaving` is called once, when the next caller leaves: for whoever keeps others from coming here too early.
    """

    def __init__(self, places: int, patience_seconds: float) -> None:
        self.inside = 0
        self.places = places
        self.on_leaving: Callable[[], object] | None = None
        self._patience = patience_seconds
        # Whoever leaves hands his place to the first of these: it is never free while somebody waits.
        # With each the moment at which his patience ends.
        self._turns: OrderedDict[asyncio.Task[Any] | None, tuple[asyncio.Future[None], float]] = OrderedDict()
        # One timer for all of them, which is most often set for somebody who has left by then.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = float("inf")
        # Since when somebody has waited all the time, and the seconds between two that left since. Forgotten whenever
        # the line is empty: what was slow an hour ago need not be slow now.
        self._standing_since: float | None = None
        self._gap = 0.0
        self._left_at = 0.0
        self._emptied: asyncio.Event | None = None

    @property
    def waiting(self) -> int:
        """The number of callers who wait for a place."""
        return len(self._turns)

    @property
    def full(self) -> bool:
        """Whether a caller would have to wait."""
        return self.inside >= self.places

    async def enter(self, seconds: float) -> None:
        """Waits for a place, `seconds` or the line's patience at most. Raises `NoProspect`, of which
        `Forsaken` is one."""
        if self.inside < self.places:
            self.inside += 1
            return
        patience = min(self._patience, max(seconds, 0.0))
        now = time.monotonic()
        if self._standing_since is None:
            self._standing_since = self._left_at = now
        elif self.waiting >= self.places and self._expected_seconds() > patience:
            raise NoProspect
        # Asked once: before Python 3.12 it costs a system call (getpid) each time.
        loop = self._loop = self._loop or asyncio.get_running_loop()
        caller = asyncio.current_task(loop)
        turn = loop.create_future()
        until = now + patience
        self._turns[caller] = turn, until
        if until < self._rings_at:
            self._ring_at(until, now)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._turns.pop(caller, None)
            elif turn.exception() is None:
                # His turn had come in the same moment.
                self.leave()
            raise

    def leave(self) -> None:
        if self.on_leaving is not None:
            told, self.on_leaving = self.on_leaving, None
            told()
        if not self._turns:
            self._standing_since, self._gap = None, 0.0
            self._free_a_place()
            return
        now = time.monotonic()
        self._gap += (now - self._left_at - self._gap) * _NEWEST
        self._left_at = now
        while self._turns:
            _, (turn, _) = self._turns.popitem(last=False)
            if not turn.done():
                turn.set_result(None)
                return
        self._free_a_place()

    def forsake(self, caller: asyncio.Task[Any]) -> None:
        """Lets `caller` go with `Forsaken` where he waits here; elsewhere nothing happens."""
        turn, _ = self._turns.pop(caller, (None, 0.0))
        if turn is not None and not turn.done():
            turn.set_exception(Forsaken())

    async def emptied(self) -> None:
        """Waits until nobody has a place."""
        if self.inside:
            self._emptied = asyncio.Event()
            await self._emptied.wait()

    def _free_a_place(self) -> None:
        self.inside -= 1
        if self._emptied is not None and not self.inside:
            self._emptied.set()

    def _ring_at(self, moment: float, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = moment
        assert self._loop is not None
        self._timer = self._loop.call_later(moment - now, self._ring)

    def _ring(self) -> None:
        """Lets those go whose patience is at its end."""
        now = time.monotonic()
        late = [caller for caller, (_, until) in self._turns.items() if until <= now]
        for caller in late:
            turn, _ = self._turns.pop(caller)
            if not turn.done():
                turn.set_exception(NoProspect())
        self._timer, self._rings_at = None, float("inf")
        if self._turns:
            self._ring_at(min(until for _, until in self._turns.values()), now)

    def _expected_seconds(self) -> float:
        """How long the next to come would wait; nothing while that cannot be known."""
        if self._standing_since is None or time.monotonic() - self._standing_since < self._patience:
            return 0.0
        return (self.waiting + 1) * self._gap
