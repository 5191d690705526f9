"""A run: all servers alive at once on databases of their own, measured in turn, again and again.

What is compared was measured within the same round, a few seconds apart, because the machine's speed drifts. The
order changes from round to round, so that nobody is always the one after the heavy one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from src.embedded.server import EmbeddedPostgres
from tests.postgres_server import give_away

from . import contract, picture, report, statements
from .clocks import difference, family, memory_bytes, spent
from .data import HEAVY_USERS, Data, clone, fill, postgres, tidy
from .installing import install
from .load import Plan, Window, run
from .machine import describe
from .operations import JUDGED, OPERATIONS, Operation
from .profiling import profile
from .servers import SERVERS, NotInstalled, Running, Server, database_of, running

WAYS: Final = ("32", "256", "rate")
"""Closed with 32 connections, closed with 256, and at a fixed rate on 32."""
POOLS: Final = (2, 4, 8, 16, 40)
RESULTS: Final = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Sample:
    """One measurement. CPU is in microseconds a request, without what the processes spend idle; times in ms."""

    server: str
    operation: str
    way: str
    round: int
    requests: int
    errors: dict[str, int]
    requests_a_second: float
    server_us: float
    database_us: float
    load_us: float
    p50_ms: float
    p99_ms: float
    late_p99_ms: float


@dataclass(frozen=True)
class Idle:
    """Seconds of CPU a second that are spent without any request."""

    servers: dict[str, float]
    database: float


def main(asked: argparse.Namespace) -> int:
    quick = asked.what == "quick"
    wanted = [SERVERS[slug] for slug in asked.servers.split(",")]
    if quick:
        wanted = [server for server in wanted if server.needs is None]
    install(wanted)
    if asked.what in ("profile", "statements"):
        wanted = [SERVERS["ours"]] if asked.what == "profile" else []
    elif asked.what == "sweep":
        wanted = [variant for server in wanted for variant in pools(server)]
    # A quick run only sees that it works, so few rows do.
    sizes = (50, 1) if quick else (asked.users, HEAVY_USERS)
    with ground(wanted, sizes) as (server, data, servers):
        for one in servers:
            count = contract.check(one, server, data)
            say(f"{one.server.title}: {count} answers are as they should be")
        if asked.what == "contract":
            return 0
        if asked.what == "statements":
            print(statements.main(server, asked.seconds * 3))
            return 0
        if asked.what == "profile":
            with tempfile.TemporaryDirectory() as where:
                print(profile(server, data, servers[0], Path(where), asked.seconds * 4))
            return 0
        return compare(asked, server, data, servers)


def compare(
    asked: argparse.Namespace, server: EmbeddedPostgres, data: Data, servers: Sequence[Running]
) -> int:
    """Measures, and prints what came out. Every round is kept as soon as it is over."""
    slugs = asked.operations.split(",") if asked.operations else list(OPERATIONS)
    operations = [OPERATIONS[slug] for slug in slugs]
    quick = asked.what == "quick"
    rounds, seconds = (1, 0.3) if quick else (asked.rounds, asked.seconds)
    ways = ["32", "rate"] if quick else asked.ways.split(",")
    began = describe()
    samples: list[Sample] = []
    text = ""
    measured = measure(server, data, servers, operations, rounds, seconds, asked.rate, ways)
    for number, some in itertools.groupby(measured, lambda sample: sample.round):
        samples += some
        result: dict[str, Any] = {
            "machine": began,
            "load_average_at_the_end": os.getloadavg()[0],
            "rounds": number + 1,
            "seconds": seconds,
            "rate": asked.rate,
            "titles": {one.server.slug: one.server.title for one in servers},
            "memory": {one.server.slug: memory_of(one) for one in servers},
            "samples": [asdict(sample) for sample in samples],
        }
        text = report.text(result)
        if asked.out is not None:
            asked.out.mkdir(parents=True, exist_ok=True)
            (asked.out / "results.json").write_text(as_json(result))
            (asked.out / "results.txt").write_text(text)
            (asked.out / "picture.svg").write_text(picture.draw(result))
    print(text)
    return 1 if quick and any(sample.errors for sample in samples) else 0


def pools(server: Server) -> list[Server]:
    """The same server with as many connections as might be its best."""
    return [
        replace(server, slug=f"{server.slug}-{size}", title=f"{server.title}, {size}", pool=size)
        for size in POOLS
    ]


def as_json(result: Mapping[str, Any]) -> str:
    """A sample a line, so that two runs can be compared by eye."""
    head = json.dumps({name: value for name, value in result.items() if name != "samples"}, indent=1)
    samples = ",\n".join(f"  {json.dumps(sample)}" for sample in result["samples"])
    return head.removesuffix("\n}") + f',\n "samples": [\n{samples}\n ]\n}}\n'


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def ground(
    wanted: Sequence[Server], sizes: tuple[int, int]
) -> Iterator[tuple[EmbeddedPostgres, Data, list[Running]]]:
    """PostgreSQL with the data, and every server of `wanted` that is installed, each on a database of its own."""
    with ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="groundwork-bench-")))
        # PostgreSQL runs as an unprivileged user where root starts it.
        give_away(where)
        server = stack.enter_context(postgres(where / "postgres"))
        say("PostgreSQL is started; filling it ...")
        data = fill(server, users=sizes[0], heavy=sizes[1])
        servers = []
        for one in wanted:
            database = database_of(one)
            clone(server, database)
            try:
                servers.append(stack.enter_context(running(one, server, database, where)))
            except NotInstalled as missing:
                say(f"left out: {missing}")
        yield server, data, servers


def measure(
    server: EmbeddedPostgres,
    data: Data,
    servers: Sequence[Running],
    operations: Sequence[Operation],
    rounds: int,
    seconds: float,
    rate: float,
    ways: Sequence[str] = WAYS,
) -> Iterator[Sample]:
    numbers = itertools.count(int(time.time()) << 16, 1 << 20)
    prepared = {
        (one.server.slug, operation.slug): operation.requests(data, one.speech, one.port, random.Random(6))
        for one in servers
        for operation in operations
    }

    def planned(one: Running, operation: Operation, way: str, number: int) -> Plan:
        return Plan(
            port=one.port,
            requests=prepared[one.server.slug, operation.slug],
            status=operation.status,
            connections=256 if way == "256" else 32,
            seconds=seconds,
            rate=rate if way == "rate" else None,
            warm_up_seconds=seconds / 4,
            warm_up_requests=0,
            server=one.pid,
            database=server.pid,
            first_number=next(numbers),
            seed=number,
        )

    for one in servers:
        for operation in operations:
            # Long enough that every token has been seen, every statement prepared, every function compiled.
            first = 1_200 if operation.slug in JUDGED and seconds >= 1 else 0
            run(replace(planned(one, operation, "32", -1), seconds=0.1, warm_up_requests=first))
    for number in range(rounds):
        tidy(server, [one.database for one in servers])
        idle = idling(server, servers)
        for operation, way in turns(operations, ways):
            order = list(servers)
            random.Random(f"{number} {operation.slug} {way}").shuffle(order)
            for one in order:
                window = run(planned(one, operation, way, number))
                sample = sampled(one, operation, way, number, window, idle)
                say(
                    f"{number} {operation.title:13} {way:4} {one.server.title:32}"
                    f" {sample.requests_a_second:8.0f}/s {sample.server_us:7.0f} us"
                )
                yield sample


def turns(operations: Sequence[Operation], ways: Sequence[str]) -> list[tuple[Operation, str]]:
    return [
        (operation, way)
        for operation in operations
        for way in ways
        if way == "32" or operation.slug in JUDGED
    ]


def sampled(one: Running, operation: Operation, way: str, number: int, window: Window, idle: Idle) -> Sample:
    times = sorted(window.latencies)
    done = max(len(times), 1)
    return Sample(
        server=one.server.slug,
        operation=operation.slug,
        way=way,
        round=number,
        requests=len(times),
        errors=dict(window.errors),
        requests_a_second=len(times) / window.seconds,
        server_us=(window.server_cpu - idle.servers[one.server.slug] * window.seconds) / done * 1e6,
        database_us=(window.database_cpu - idle.database * window.seconds) / done * 1e6,
        load_us=window.load_cpu / done * 1e6,
        p50_ms=quantile(times, 0.5) * 1e3,
        p99_ms=quantile(times, 0.99) * 1e3,
        late_p99_ms=quantile(sorted(window.late), 0.99) * 1e3,
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


def idling(server: EmbeddedPostgres, servers: Sequence[Running], seconds: float = 1.5) -> Idle:
    families = {one.server.slug: family(one.pid) for one in servers}
    database = family(server.pid)
    before = {slug: spent(pids) for slug, pids in families.items()}
    database_before = spent(database)
    started = time.perf_counter()
    time.sleep(seconds)
    passed = time.perf_counter() - started
    return Idle(
        {slug: difference(before[slug], spent(pids)) / passed for slug, pids in families.items()},
        difference(database_before, spent(database)) / passed,
    )


def memory_of(one: Running) -> dict[str, float]:
    pids = family(one.pid)
    return {
        "all_mb": memory_bytes(pids) / 1e6,
        "largest_mb": max(memory_bytes([pid]) for pid in pids) / 1e6,
    }
