"""A crowd: people who come whether or not those before them were served, and who leave when it takes too long.

A process of its own, as `load` is. Each arrival takes a connection that nobody uses, or opens one; who is answered 503
rests with his connection for as long as he was asked to; who is not answered in time closes it. Health is asked beside
them four ways: two probes on a kept connection and on a new one, as monitoring and orchestrators do.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import itertools
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

import uvloop

from .clocks import difference, family, spent
from .load import Plan, Source

TICK_SECONDS: Final = 0.002
"""Whoever is due since the last tick comes with the next: what it adds to his time is the load's own fault."""
PROBE_SECONDS: Final = 0.2
PROBES: Final = ("/livez", "/readyz")


@dataclass
class Outcome:
    """What became of those who came. Times in seconds, from the moment when each was due; CPU in seconds, whole."""

    seconds: float = 0.0
    came: int = 0
    served: list[float] = field(default_factory=list)
    """Of those who were served while others still came."""
    refused: list[float] = field(default_factory=list)
    gave_up: int = 0
    unheard: int = 0
    """No connection was left for them: the load's own bound."""
    errors: Counter[str] = field(default_factory=Counter)
    health: list[float] = field(default_factory=list)
    server_cpu: float = 0.0
    database_cpu: float = 0.0
    load_cpu: float = 0.0


def run(plan: Plan, patience_seconds: float, core: int | None) -> Outcome:
    """Lets the crowd of `plan` come, in a process of its own, on `core` alone."""
    with tempfile.NamedTemporaryFile(prefix="groundwork-crowd-") as told:
        subprocess.run(
            [sys.executable, "-c", "from benchmarks.crowd import main; main()"],
            input=pickle.dumps((plan, patience_seconds, core, told.name)),
            cwd=Path(__file__).resolve().parents[1],
            check=True,
            timeout=plan.seconds + 60,
        )
        outcome = pickle.loads(Path(told.name).read_bytes())
    assert isinstance(outcome, Outcome)
    return outcome


class _Person(asyncio.Protocol):
    """A connection, and who has it now."""

    def __init__(self, crowd: _Crowd) -> None:
        self.crowd = crowd
        self.transport: asyncio.Transport | None = None
        self.request: bytes | None = None
        self.due = 0.0
        self.waiting = False
        self.rest = 1.0
        self.status = b""
        self._head = b""
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if not self.waiting:
            self.transport.close()
        elif self.request is not None:
            self.transport.write(self.request)

    def ask(self, request: bytes, due: float) -> None:
        self.due, self.waiting, self.request = due, True, request
        if self.transport is not None:
            self.transport.write(request)

    def leave(self) -> None:
        self.waiting = False
        if self.transport is not None:
            self.transport.close()

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
            self.status = data[9:12]
            head = data[:end].lower()
            at = head.find(b"\r\ncontent-length:")
            stop = head.find(b"\r\n", at + 2)
            self._left = int(head[at + 17 : stop if stop >= 0 else end]) - (len(data) - end - 4)
            if self.status == b"503":
                at = head.find(b"\r\nretry-after:") + 14
                self.rest = float(head[at : head.find(b"\r\n", at)])
        if not self._left and self.waiting:
            self.waiting = False
            self.crowd.answered(self, self.status)

    def connection_lost(self, exc: Exception | None) -> None:
        self.crowd.lost(self)


class _Crowd:
    def __init__(self, plan: Plan, patience_seconds: float) -> None:
        self.plan = plan
        self.outcome = Outcome()
        self._status = str(plan.status).encode()
        self._patience = patience_seconds
        self._chance = random.Random(plan.seed)
        self._source = Source(plan, self._chance)
        self._free: list[_Person] = []
        self._resting: list[tuple[float, int, _Person]] = []
        self._order = itertools.count()
        self._waiting: deque[tuple[float, _Person]] = deque()
        self._open = 0
        self._opening: set[asyncio.Task[None]] = set()
        self._until = 0.0

    async def come(self, rate: float) -> None:
        loop = asyncio.get_running_loop()
        outcome = self.outcome
        began = time.perf_counter()
        self._until = began + self.plan.seconds
        due = began + self._chance.expovariate(rate)
        probing = [loop.create_task(self._probe(path, kept)) for path in PROBES for kept in (True, False)]
        while (now := time.perf_counter()) < self._until:
            self._let_go(now)
            while due <= now:
                outcome.came += 1
                self._arrive(due)
                due += self._chance.expovariate(rate)
            await asyncio.sleep(TICK_SECONDS)
        outcome.seconds = now - began
        await asyncio.gather(*probing)
        # Those who still wait keep the server busy, but count no more.
        for _, person in self._waiting:
            person.leave()
        for person in [*self._free, *(person for _, _, person in self._resting)]:
            person.leave()
        await asyncio.gather(*self._opening, return_exceptions=True)

    def _arrive(self, due: float) -> None:
        while self._free:
            person = self._free.pop()
            if person.transport is not None and not person.transport.is_closing():
                break
        else:
            if self._open >= self.plan.connections:
                self.outcome.unheard += 1
                return
            person = _Person(self)
            self._open += 1
            task = asyncio.get_running_loop().create_task(self._connect(person))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
        person.ask(self._source.take(), due)
        self._waiting.append((due + self._patience, person))

    async def _connect(self, person: _Person) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: person, "127.0.0.1", self.plan.port)
        except OSError as error:
            self._open -= 1
            if person.waiting:
                person.waiting = False
                self.outcome.errors[type(error).__name__] += 1

    def _let_go(self, now: float) -> None:
        while self._waiting and (not self._waiting[0][1].waiting or self._waiting[0][0] <= now):
            until, person = self._waiting.popleft()
            if person.waiting and until >= person.due + self._patience:
                self.outcome.gave_up += 1
                person.leave()
        while self._resting and self._resting[0][0] <= now:
            self._free.append(heapq.heappop(self._resting)[2])

    def answered(self, person: _Person, status: bytes) -> None:
        now = time.perf_counter()
        if now > self._until:
            return
        if status == self._status:
            self.outcome.served.append(now - person.due)
            self._free.append(person)
        elif status == b"503":
            self.outcome.refused.append(now - person.due)
            heapq.heappush(self._resting, (now + person.rest, next(self._order), person))
        else:
            self.outcome.errors[status.decode("latin-1")] += 1
            self._free.append(person)

    def lost(self, person: _Person) -> None:
        self._open -= 1
        if person.waiting:
            person.waiting = False
            if time.perf_counter() <= self._until:
                self.outcome.errors["connection lost"] += 1

    async def _probe(self, path: str, kept: bool) -> None:
        """Asks for health again and again; one at a time, so a slow answer counts for those not asked meanwhile."""
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.plan.port}\r\n\r\n".encode()
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while (began := time.perf_counter()) < self._until:
            try:
                async with asyncio.timeout(10):
                    if streams is None:
                        streams = await asyncio.open_connection("127.0.0.1", self.plan.port)
                    reader, writer = streams
                    writer.write(request)
                    head = (await reader.readuntil(b"\r\n\r\n")).lower()
                    at = head.index(b"content-length:") + 15
                    await reader.readexactly(int(head[at : head.index(b"\r\n", at)]))
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                self.outcome.errors[f"health: {type(error).__name__}"] += 1
                streams = None
                continue
            took = time.perf_counter() - began
            # Who asks every so often would have asked meanwhile, and waited for what was left.
            while took > 0:
                self.outcome.health.append(took)
                took -= PROBE_SECONDS
            if head[9:12] != b"200":
                self.outcome.errors[f"health: {head[9:12].decode('latin-1')}"] += 1
            if not kept:
                writer.close()
                streams = None
            await asyncio.sleep(PROBE_SECONDS)
        if streams is not None:
            streams[1].close()


async def _measure(plan: Plan, patience_seconds: float) -> Outcome:
    assert plan.rate is not None
    crowd = _Crowd(plan, patience_seconds)
    server, database = family(plan.server), family(plan.database)
    gc.collect()
    gc.disable()
    servers, databases = spent(server), spent(database)
    own = time.process_time()
    await crowd.come(plan.rate)
    outcome = crowd.outcome
    outcome.server_cpu = difference(servers, spent(server))
    outcome.database_cpu = difference(databases, spent(database))
    outcome.load_cpu = time.process_time() - own
    return outcome


def main() -> None:
    plan, patience_seconds, core, told = pickle.loads(sys.stdin.buffer.read())
    if core is not None:
        os.sched_setaffinity(0, {core})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(_measure(plan, patience_seconds))
    Path(told).write_bytes(pickle.dumps(outcome))
