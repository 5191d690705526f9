"""What is left of the service when five times as much is asked as it can do. `make bench ARGS=overload`.

Each round finds the peak (closed, 32 connections) before and after, and lets a crowd come between, at the peak's rate,
at twice and at five times of it. Server and PostgreSQL have one core and the load another, so that neither starves the
other. On a machine with neighbours requests a second say little by themselves; what is served for a second of CPU that
server and PostgreSQL were given says it as well, and its ratio to the peak's is printed beside.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from src.embedded.server import EmbeddedPostgres

from . import crowd
from .crowd import Outcome
from .data import HEAVY_USERS, Data
from .load import Plan, run
from .measuring import ground, quantile, say
from .operations import OPERATIONS
from .report import Spread, table
from .servers import OURS, Running

TIMES = (1, 2, 5)
PATIENCE_SECONDS = 2.0
# A worker holds 4096 of them, and probes come beside.
CONNECTIONS = 4_000
_USUAL = "read,create"


@dataclass(frozen=True)
class Peak:
    """Requests a second, and for a second of CPU."""

    a_second: float
    a_cpu_second: float


@dataclass(frozen=True)
class Step:
    times: float
    peak: Peak
    rate: float
    outcome: Outcome

    @property
    def goodput(self) -> float:
        return len(self.outcome.served) / self.outcome.seconds

    @property
    def of_the_peak(self) -> float:
        return self.goodput / self.peak.a_second

    @property
    def of_the_peak_by_cpu(self) -> float:
        spent = self.outcome.server_cpu + self.outcome.database_cpu
        return len(self.outcome.served) / spent / self.peak.a_cpu_second


def main(asked: argparse.Namespace) -> str:
    cores = sorted(os.sched_getaffinity(0))
    core = None
    if len(cores) > 1:
        core = cores[1]
        os.sched_setaffinity(0, {cores[0]})
    told = []
    with ground([OURS], (asked.users, HEAVY_USERS)) as (server, data, (ours,)):
        for slug in (asked.operations or _USUAL).split(","):
            steps = list(_steps(server, data, ours, slug, asked.rounds, asked.seconds * 5, core))
            told.append(_told(slug, steps))
    if core is None:
        told.append("One core for everything: the load took of the server's.")
    return "\n\n".join(told)


def _steps(
    server: EmbeddedPostgres,
    data: Data,
    ours: Running,
    slug: str,
    rounds: int,
    seconds: float,
    core: int | None,
) -> Iterator[Step]:
    operation = OPERATIONS[slug]
    numbers = itertools.count(int(time.time()) << 16, 1 << 24)
    requests = operation.requests(data, ours.speech, ours.port, random.Random(6))
    plan = Plan(
        port=ours.port,
        requests=requests,
        status=operation.status,
        connections=32,
        seconds=seconds / 3,
        rate=None,
        warm_up_seconds=0.5,
        warm_up_requests=1_200,
        server=ours.pid,
        database=server.pid,
        first_number=0,
        seed=0,
    )

    def peak() -> Peak:
        window = run(replace(plan, first_number=next(numbers)), core)
        done = len(window.latencies)
        return Peak(done / window.seconds, done / (window.server_cpu + window.database_cpu))

    for number in range(rounds):
        before = peak()
        come = []
        for times in TIMES:
            rate = before.a_second * times
            whole = replace(
                plan,
                connections=CONNECTIONS,
                seconds=seconds,
                rate=rate,
                first_number=next(numbers),
                seed=number,
            )
            outcome = crowd.run(whole, PATIENCE_SECONDS, core)
            come.append((times, rate, outcome))
            say(
                f"{number} {slug} {times}x: {rate:.0f}/s came, {len(outcome.served) / outcome.seconds:.0f}/s served,"
                f" {len(outcome.refused) / outcome.seconds:.0f}/s refused, errors {dict(outcome.errors)}"
            )
            # What the last step has left behind is not the next one's.
            time.sleep(2)
        after = peak()
        middle = Peak((before.a_second + after.a_second) / 2, (before.a_cpu_second + after.a_cpu_second) / 2)
        for times, rate, outcome in come:
            yield Step(times, middle, rate, outcome)


def _told(slug: str, steps: Sequence[Step]) -> str:
    peaks = Spread.of(step.peak.a_second for step in steps)
    by_cpu = Spread.of(step.peak.a_cpu_second for step in steps)
    rows = [_row([step for step in steps if step.times == times]) for times in TIMES]
    head = [
        "came, of the peak", "a second", "served", "of the peak", "of it by CPU", "refused", "gave up", "unheard",
        "served p50 ms", "p99 ms", "refused p99 ms", "health p99 ms", "load's CPU", "errors",
    ]  # fmt: skip
    title = OPERATIONS[slug].title
    return (
        f"{title}: the peak is {peaks.middle:.0f} a second ({peaks.least:.0f}-{peaks.most:.0f}), "
        f"{by_cpu.middle:.0f} for a second of CPU; load average {os.getloadavg()[0]:.0f}\n"
        + table(head, rows)
    )


def _row(steps: Sequence[Step]) -> list[str]:
    def spread(figures: list[float], form: str = ".0f") -> str:
        one = Spread.of(figures)
        return f"{one.middle:{form}} ({one.least:{form}}-{one.most:{form}})"

    def late(lists: list[list[float]], share: float) -> str:
        return spread([quantile(sorted(values), share) * 1e3 for values in lists])

    outcomes = [step.outcome for step in steps]
    errors = sum((outcome.errors for outcome in outcomes), start=type(outcomes[0].errors)())
    return [
        f"{steps[0].times}x",
        spread([step.outcome.came / step.outcome.seconds for step in steps]),
        spread([step.goodput for step in steps]),
        spread([step.of_the_peak for step in steps], ".2f"),
        spread([step.of_the_peak_by_cpu for step in steps], ".2f"),
        spread([len(one.refused) / one.seconds for one in outcomes]),
        spread([one.gave_up / one.seconds for one in outcomes]),
        spread([one.unheard / one.seconds for one in outcomes]),
        late([one.served for one in outcomes], 0.5),
        late([one.served for one in outcomes], 0.99),
        late([one.refused for one in outcomes], 0.99),
        late([one.health for one in outcomes], 0.99),
        spread([one.load_cpu / one.seconds for one in outcomes], ".2f"),
        str(dict(errors) or "none"),
    ]
