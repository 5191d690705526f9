"""This tree against another checkout, measured in turn: `make bench ARGS="against --checkout DIR"`.

Both run on copies of the same data. Each round measures both, a moment apart and in changing order, and what is printed
is the ratio of their CPU seconds a request within a round: the machine's speed drifts, the ratio does not.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from .data import HEAVY_USERS
from .measuring import Sample, ground, measure
from .operations import OPERATIONS
from .report import table
from .servers import OURS, Server

_USUAL: Final = "read,list,create"


def main(asked: argparse.Namespace) -> str:
    if asked.checkout is None:
        raise SystemExit("Pass the other checkout: --checkout DIR, which has its own backend/.venv.")
    backend = asked.checkout.resolve() / "backend"
    slugs = (asked.operations or _USUAL).split(",")
    with ground([OURS, _other(backend)], (asked.users, HEAVY_USERS)) as (server, data, servers):
        operations = [OPERATIONS[slug] for slug in slugs]
        samples = list(
            measure(server, data, servers, operations, asked.rounds, asked.seconds, asked.rate, ["32"])
        )
    return table(
        ["operation", "this, us", "other, us", "ratio", "quartiles", "errors"],
        [_row(OPERATIONS[slug].title, [one for one in samples if one.operation == slug]) for slug in slugs],
    )


def _other(backend: Path) -> Server:
    python = backend / ".venv" / "bin" / "python"
    return replace(
        OURS,
        slug="other",
        title="the other checkout",
        command=lambda server, port: [str(python), "-m", "src", "serve", "--port", str(port)],
        directory=backend,
    )


def _row(title: str, samples: Sequence[Sample]) -> list[str]:
    by_round: dict[int, dict[str, float]] = {}
    for sample in samples:
        by_round.setdefault(sample.round, {})[sample.server] = sample.server_us
    ours = [figures["ours"] for figures in by_round.values()]
    others = [figures["other"] for figures in by_round.values()]
    ratios = [figures["ours"] / figures["other"] for figures in by_round.values()]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    errors = sum(sum(sample.errors.values()) for sample in samples)
    return [
        title,
        f"{statistics.median(ours):.0f}",
        f"{statistics.median(others):.0f}",
        f"{statistics.median(ratios):.3f}",
        f"{quartiles[0]:.3f}-{quartiles[2]:.3f}",
        str(errors),
    ]
