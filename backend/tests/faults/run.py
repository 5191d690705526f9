"""One run: a stage, clients, a schedule, and then the reckoning."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from . import history, tables
from .asker import Asker, Person
from .checker import Findings, check
from .clients import Client, Family, Town
from .journal import Clock, Journal
from .nemesis import Nemesis
from .probes import LINES, Pulse, Watch
from .schedule import Fault
from .series import Series
from .stage import DURABLE, Stage
from .wire import Wire

SETTLE_SECONDS: Final = 60.0

Say = Callable[[float, int, str], None]


@dataclass
class Result:
    """What a run was, what it found, and what it measured."""

    seed: int
    kinds: list[str]
    workers: int
    clients: int
    seconds: float = 0.0
    faults: list[dict[str, Any]] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    series: Series = field(default_factory=Series)
    rows: int = 0
    pulse: dict[str, Any] = field(default_factory=dict)
    durability: dict[str, str] = field(default_factory=dict)
    checking_seconds: float = 0.0


def perform(
    stage: Stage,
    faults: Iterable[Fault],
    result: Result,
    journals: Path,
    *,
    seconds: float,
    say: Say,
    verifying: bool = True,
) -> None:
    """Loads the service for `seconds` while the faults are carried out, and fills in `result`."""
    journals.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    crew = stage.loop.run(_gather(stage, journals, clock, result))
    nemesis = Nemesis(stage, Journal(journals / "nemesis.jsonl", clock), clock, crew.witness)
    crew.start()
    began = time.monotonic()
    try:
        for fault in faults:
            _rest(fault.rest, began, seconds, say, len(nemesis.faults), fault.kind)
            if time.monotonic() - began >= seconds:
                break
            nemesis.strike(fault)
            say((time.monotonic() - began) / seconds, len(nemesis.faults), fault.kind)
        _rest(seconds - (time.monotonic() - began), began, seconds, say, len(nemesis.faults), "")
    finally:
        result.seconds = time.monotonic() - began
        result.faults = nemesis.faults
        unsettled = crew.end()
        nemesis.close()
    say(1.0, len(nemesis.faults), "checking")
    for sentence in nemesis.misdeeds:
        result.findings.add("process", "misdeed", sentence)
    for _ in range(unsettled):
        result.findings.add("settling", "key", "an unknown write could not be settled")
    result.pulse = crew.pulse_facts()
    for status in crew.pulse.said_no:
        result.findings.add("contract", "livez", f"/livez said {status}")
    _reckon(stage, result, journals, crew.families, verifying=verifying)


def _rest(seconds: float, began: float, whole: float, say: Say, count: int, kind: str) -> None:
    until = min(time.monotonic() + seconds, began + whole)
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.5))
        say((time.monotonic() - began) / whole, count, "")


class _Crew:
    """Everybody who asks the service something, in the loop's thread; the methods are for the main thread."""

    def __init__(
        self, stage: Stage, clients: list[Client], watch: Watch, askers: list[Asker], pulse: Pulse
    ) -> None:
        self.stage = stage
        self.clients = clients
        self.watch = watch
        self.askers = askers
        self.pulse = pulse
        self.stop = asyncio.Event()
        self.families: list[list[str]] = [
            *(
                [first.asker.name, second.asker.name]
                for first, second in zip(clients[::2], clients[1::2], strict=True)
            ),
            [asker.name for asker in askers],
        ]
        self._all: Any = None

    def start(self) -> None:
        async def everybody() -> None:
            async with asyncio.TaskGroup() as group:
                for client in self.clients:
                    group.create_task(client.run(self.stop))
                group.create_task(self.watch.run(self.stop))
                group.create_task(self.pulse.run(self.stop))

        self._all = asyncio.run_coroutine_threadsafe(everybody(), self.stage.loop.loop)

    def witness(self, since: float, seconds: float) -> tuple[float | None, float | None]:
        return self.stage.loop.run(self.watch.recovered(since, seconds), seconds + 30)

    def end(self) -> int:
        """Lets everybody finish, settles what is open, closes the journals; gives how many stayed unsettled."""
        self.stage.loop.loop.call_soon_threadsafe(self.stop.set)
        self._all.result(60)

        async def settle() -> int:
            left = await asyncio.gather(
                *(client.settle(SETTLE_SECONDS) for client in self.clients), self.watch.settle(SETTLE_SECONDS)
            )
            for client in self.clients:
                client.close()
            for asker in self.askers:
                asker.close()
            return sum(left)

        return self.stage.loop.run(settle(), SETTLE_SECONDS * 3)

    def pulse_facts(self) -> dict[str, Any]:
        return {
            "asked": self.pulse.asked,
            "refused": self.pulse.refused,
            "unanswered": self.pulse.unanswered,
            "slowest_seconds": round(self.pulse.slowest_seconds, 3),
        }


async def _gather(stage: Stage, journals: Path, clock: Clock, result: Result) -> _Crew:
    keys, town = stage.keys, Town()
    clients = []
    for number in range(result.clients):
        if number % 2 == 0:
            family = Family(Person(keys))
        asker = Asker(
            f"c{number}", Wire("127.0.0.1", stage.clients.port), Journal(journals / f"c{number}.jsonl", clock)
        )
        chance = random.Random(f"{result.seed}/{number}")
        clients.append(Client(asker, family, town, keys, chance))
    askers = [
        Asker(f"p{number}", Wire("127.0.0.1", stage.port), Journal(journals / f"p{number}.jsonl", clock))
        for number in range(LINES)
    ]
    return _Crew(stage, clients, Watch(askers, keys, clock), askers, Pulse(stage.port))


def _reckon(
    stage: Stage, result: Result, journals: Path, families: list[list[str]], *, verifying: bool
) -> None:
    began = time.monotonic()
    asyncio.run(_compare(stage, result, journals, families))
    result.durability = stage.durability()
    for name in DURABLE:
        if result.durability[name] != "on":
            result.findings.add("verify", "durability", f"{name} is {result.durability[name]}")
    for line in stage.verify()["checks"] if verifying else ():
        if line["outcome"] == "failed":
            result.findings.add("verify", line["name"], str(line.get("cause")))
    for fault in result.faults:
        if fault["all"] is None:
            result.findings.add("recovery", fault["fault"], f"after {fault['ended']:.3f}")
    result.checking_seconds = time.monotonic() - began


async def _compare(stage: Stage, result: Result, journals: Path, families: list[list[str]]) -> None:
    connection = await stage.connect()
    try:
        known = 0
        for names in families:
            past = history.History()
            for name in names:
                with (journals / f"{name}.jsonl").open(encoding="utf-8") as journal:
                    history.read(name, history.lines(journal), past)
            rows, keys = await tables.of(connection, past.users)
            known += len(rows)
            check(past, rows, keys, result.findings)
            result.series.add(past.ended)
            _renewals(past, result)
        result.rows = await tables.count(connection)
        if result.rows != known:
            result.findings.add("phantom", "rows", f"{result.rows} rows, and {known} of users of ours")
        for table, seen in (await tables.seen_by_nobody(stage)).items():
            if seen:
                result.findings.add("isolation", "second-wall", f"{seen} rows of {table} without an owner")
    finally:
        await connection.close()


def _renewals(past: history.History, result: Result) -> None:
    """While workers are renewed every request is answered; one on an idle connection may have to be sent again."""
    for fault in result.faults:
        if fault["fault"] != "workers-renew":
            continue
        for each in past.ended:
            failed = each.kind == "unknown" or each.status in (0, 429, 503, 504)
            if fault["began"] <= each.asked <= fault["ended"] and failed and not each.forgiven:
                result.findings.add("renewal", str(each.status), f"{each.do} at {each.asked:.3f}")
