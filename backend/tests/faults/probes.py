"""Watching from beside the load: when the service writes again after a fault, and whether `/livez` ever says no."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from src.services.signing import SigningKeys

from .asker import TASKS, Asker, Person
from .clients import Keyed
from .contract import content_of
from .journal import Clock
from .wire import Cut, Unsent, Wire

# Several connections, so that each worker has some of them.
LINES: Final = 6
_WATCHING_SECONDS: Final = 0.01
_IDLE_SECONDS: Final = 0.25


class Watch:
    """Writes on a few connections of its own, past the clients' network: now and then, and without a pause while
    somebody waits for a recovery."""

    def __init__(self, askers: Sequence[Asker], keys: SigningKeys, clock: Clock) -> None:
        self.open_keys: list[tuple[Asker, Keyed]] = []
        self._askers = askers
        self._keys = keys
        self._clock = clock
        self._good: list[float] = [-1.0] * len(askers)
        self._since: float | None = None
        self._first: list[float | None] = [None] * len(askers)
        self._all = asyncio.Event()
        # Set while somebody waits for a recovery: a line that slept on would make it look slower than it was.
        self._awaited = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(len(self._askers)):
                group.create_task(self._line(number, stop))

    async def recovered(self, since: float, seconds: float) -> tuple[float | None, float | None]:
        """Seconds from `since` until the first connection, and until all, have had a write acknowledged again."""
        self._first = [None] * len(self._askers)
        self._all.clear()
        self._since = since
        self._awaited.set()
        try:
            async with asyncio.timeout(seconds):
                await self._all.wait()
        except TimeoutError:
            pass
        finally:
            self._since = None
            self._awaited.clear()
        came = [moment - since for moment in self._first if moment is not None]
        return (min(came) if came else None), (max(came) if len(came) == len(self._askers) else None)

    async def _line(self, number: int, stop: asyncio.Event) -> None:
        asker, person = self._askers[number], Person(self._keys)
        while not stop.is_set():
            mark = asker.new_mark()
            keyed = Keyed("create", person, TASKS, content_of(mark), person.next_key(), mark)
            done = await asker.attempt("create", person, "POST", body=keyed.body, key=keyed.key, mark=mark)
            if done.kind == "unknown":
                self.open_keys.append((asker, keyed))
            if done.ok and self._since is not None and self._first[number] is None:
                now = self._clock()
                if now >= self._since:
                    self._first[number] = now
                    if None not in self._first:
                        self._all.set()
            if self._since is not None and self._first[number] is None:
                await asyncio.sleep(_WATCHING_SECONDS)
            else:
                await self._rest()

    async def _rest(self) -> None:
        """Until somebody begins to wait for a recovery, or for a while."""
        if self._awaited.is_set():
            await asyncio.sleep(_IDLE_SECONDS)
            return
        try:
            async with asyncio.timeout(_IDLE_SECONDS):
                await self._awaited.wait()
        except TimeoutError:
            pass

    async def settle(self, seconds: float) -> int:
        """As clients do; gives how many could not be settled."""
        until = asyncio.get_running_loop().time() + seconds
        while self.open_keys and asyncio.get_running_loop().time() < until:
            asker, keyed = self.open_keys.pop(0)
            done = await asker.attempt(
                "create", keyed.person, "POST", body=keyed.body, key=keyed.key, mark=keyed.mark
            )
            if not done.ok:
                self.open_keys.append((asker, keyed))
                await asyncio.sleep(0.05)
        return len(self.open_keys)


class Pulse:
    """Asks `/livez` on a new connection several times a second: whoever answers has to say 200."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.asked = 0
        self.refused = 0
        self.unanswered = 0
        self.said_no: list[int] = []
        self.slowest_seconds = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        while not stop.is_set():
            wire, began = Wire("127.0.0.1", self._port, patience_seconds=10), loop.time()
            self.asked += 1
            try:
                answer = await wire.ask(b"GET /livez HTTP/1.1\r\nhost: service\r\nconnection: close\r\n\r\n")
            except Unsent:
                self.refused += 1
            except Cut:
                self.unanswered += 1
            else:
                self.slowest_seconds = max(self.slowest_seconds, loop.time() - began)
                if answer.status != 200:
                    self.said_no.append(answer.status)
            finally:
                wire.close()
            await asyncio.sleep(_IDLE_SECONDS)
