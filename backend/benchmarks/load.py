"""The load: a process of its own that sends prepared requests and measures, so that its CPU is nobody else's.

It takes a pickled `Plan` and gives the pickled `Window`. Two ways:

- closed: each connection sends its next request when the last was answered. Tells what a server can do.
- at a fixed rate: requests are due at moments drawn before the start, whether the server keeps up or not, and time is
  counted from the moment when each was due. A server that stalls cannot make the load wait for it and look fast
  (coordinated omission).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import random
import selectors
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import uvloop

from .clocks import difference, family, spent

_PATIENCE_SECONDS = 15.0

COUNTED = b"@@@@@@@@@@@@"
"""Stands in a request where a number has to be that no request had before: twelve hexadecimal digits."""


@dataclass(frozen=True)
class Plan:
    port: int
    requests: Sequence[bytes]
    status: int
    connections: int
    seconds: float
    rate: float | None
    """Requests a second; None: as many as the connections can."""
    warm_up_seconds: float
    warm_up_requests: int
    """It goes on until both are reached."""
    server: int
    """The first process of the server; it and its children are what is measured."""
    database: int
    """The first process of PostgreSQL."""
    first_number: int
    """Of `COUNTED`."""
    seed: int


@dataclass
class Window:
    """What was measured. CPU is in seconds and whole: what would have been spent idle is in it too."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    server_cpu: float = 0.0
    database_cpu: float = 0.0
    load_cpu: float = 0.0
    late: list[float] = field(default_factory=list)
    """At a fixed rate: how much later than due each request was sent though a connection was free. That is the
    load's own fault, and bounds what can be said of the server."""


def run(plan: Plan, core: int | None = None) -> Window:
    """Runs the plan in a process of its own, on `core` alone where one is given."""
    done = subprocess.run(
        [sys.executable, "-c", "from benchmarks.load import main; main()"],
        input=pickle.dumps((plan, core)),
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[1],
        check=True,
        timeout=plan.seconds + plan.warm_up_seconds + 60,
    )
    window = pickle.loads(done.stdout)
    assert isinstance(window, Window)
    return window


class Source:
    """The requests in turn, from a random place on, each with its own number where it needs one."""

    def __init__(self, plan: Plan, chance: random.Random) -> None:
        self._requests = list(plan.requests)
        chance.shuffle(self._requests)
        self._counted = COUNTED in self._requests[0]
        self._next = 0
        self._number = plan.first_number

    def take(self) -> bytes:
        request = self._requests[self._next]
        self._next = (self._next + 1) % len(self._requests)
        if self._counted:
            self._number += 1
            return request.replace(COUNTED, b"%012x" % self._number)
        return request


class _Client(asyncio.Protocol):
    """One kept connection, with one request on it at a time."""

    def __init__(self, load: _Load) -> None:
        self.load = load
        self.transport: asyncio.Transport | None = None
        self.due = 0.0
        self.waiting = False
        self.abandoned = False
        self._head = b""
        self._left = 0
        self._right = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's own transport is none of asyncio's classes.
        self.transport = cast(asyncio.Transport, transport)

    def send(self, request: bytes, due: float) -> None:
        assert self.transport is not None
        self.due = due
        self.waiting = True
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self._left:
            self._left -= len(data)
        else:
            data = self._head + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._head = data
                return
            self._head = b""
            head = data[:end].lower()
            self._right = head[9:12] == self.load.status
            if not self._right:
                self.load.wrong(head[9:12].decode("latin-1"))
            at = head.find(b"\r\ncontent-length:")
            if at < 0:
                self.load.wrong("no content-length")
                length = 0
            else:
                stop = head.find(b"\r\n", at + 2)
                length = int(head[at + 17 : stop if stop >= 0 else end])
            self._left = length - (len(data) - end - 4)
        if not self._left:
            self.waiting = False
            self.load.answered(self, self._right)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.abandoned:
            self.load.lost(self)


class _Load:
    """Clients, and what they have met since `begin`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.status = str(plan.status).encode()
        self.clients: list[_Client] = []
        self.window = Window()
        self._chance = random.Random(plan.seed)
        self._source = Source(plan, self._chance)
        self._until = 0.0
        self._at_least = 0
        self._under_way = 0
        self._done: asyncio.Event = asyncio.Event()
        self._free: deque[_Client] = deque()
        self._due: deque[float] = deque()
        self._all_due = True

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(self.plan.connections):
            _, client = await loop.create_connection(lambda: _Client(self), "127.0.0.1", self.plan.port)
            self.clients.append(client)

    def close(self) -> None:
        for client in self.clients:
            client.abandoned = True
            if client.transport is not None:
                client.transport.close()

    # What clients tell

    def wrong(self, what: str) -> None:
        self.window.errors[what] += 1

    def answered(self, client: _Client, right: bool) -> None:
        now = time.perf_counter()
        if client.abandoned:
            return
        if right:
            self.window.latencies.append(now - client.due)
        self._under_way -= 1
        if not self._all_due or self._due:
            self._free.append(client)
            self._hand_out()
        elif now < self._until or len(self.window.latencies) < self._at_least:
            self._under_way += 1
            client.send(self._source.take(), now)
        elif not self._under_way:
            self._done.set()

    def lost(self, client: _Client) -> None:
        self.wrong("connection lost")
        self.clients.remove(client)
        if client in self._free:
            self._free.remove(client)
        if client.waiting:
            self._under_way -= 1
        if not self.clients or (self._all_due and not self._due and not self._under_way):
            self._done.set()

    # The two ways

    async def as_fast_as_it_goes(self, seconds: float, at_least: int = 0) -> None:
        self._begin()
        now = time.perf_counter()
        self._until = now + seconds
        self._at_least = at_least
        self._under_way = len(self.clients)
        for client in self.clients:
            client.send(self._source.take(), now)
        await self._finish(seconds + _PATIENCE_SECONDS)

    async def at_a_rate(self, seconds: float, rate: float) -> None:
        """Arrivals as of many who know nothing of each other; for the same seed always the same."""
        self._begin()
        gaps = [self._chance.expovariate(rate) for _ in range(round(seconds * rate))]
        self._free = deque(self.clients)
        self._all_due = False
        self._until = 0.0
        self._at_least = 0
        moment = time.perf_counter()
        for gap in gaps:
            moment += gap
            wait = moment - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
                if self._free:
                    self.window.late.append(time.perf_counter() - moment)
            self._due.append(moment)
            self._hand_out()
        self._all_due = True
        if self._due or self._under_way:
            await self._finish(_PATIENCE_SECONDS)

    async def _finish(self, seconds: float) -> None:
        """Waits for the last answers, and no longer than this: a server may have stopped answering."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._done.wait(), seconds)
        unanswered = len(self._due) + self._under_way
        if unanswered:
            self.window.errors["unanswered"] += unanswered
            self._until = 0.0
            self._due.clear()
            self.close()
            self.clients = []
            await self.open()

    def _begin(self) -> None:
        self.window = Window()
        self._done = asyncio.Event()
        self._under_way = 0

    def _hand_out(self) -> None:
        while self._due and self._free:
            self._under_way += 1
            self._free.popleft().send(self._source.take(), self._due.popleft())


async def _measure(plan: Plan) -> Window:
    load = _Load(plan)
    await load.open()
    if plan.warm_up_seconds or plan.warm_up_requests:
        await load.as_fast_as_it_goes(plan.warm_up_seconds, plan.warm_up_requests)
    # Looked up while nothing runs: it takes milliseconds.
    server, database = family(plan.server), family(plan.database)
    gc.collect()
    gc.disable()
    servers, databases = spent(server), spent(database)
    own = time.process_time()
    started = time.perf_counter()
    if plan.rate is None:
        await load.as_fast_as_it_goes(plan.seconds)
    else:
        await load.at_a_rate(plan.seconds, plan.rate)
    window = load.window
    window.seconds = time.perf_counter() - started
    window.server_cpu = difference(servers, spent(server))
    window.database_cpu = difference(databases, spent(database))
    window.load_cpu = time.process_time() - own
    load.close()
    await asyncio.sleep(0)
    return window


def main() -> None:
    plan, core = pickle.loads(sys.stdin.buffer.read())
    if core is not None:
        os.sched_setaffinity(0, {core})

    # uvloop costs the machine less, and its clock ticks in milliseconds; select waits to the microsecond.
    def exact() -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop(selectors.SelectSelector())

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if plan.rate is None else exact) as runner:
        window = runner.run(_measure(plan))
    sys.stdout.buffer.write(pickle.dumps(window))
