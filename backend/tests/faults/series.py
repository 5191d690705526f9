"""What happened in each second, and how long it took: for the picture and the figures of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from .history import Ended

READS: Final = frozenset({"read", "list", "foreign-read"})
# Trying what must not work, and asking for an answer once more, is no acknowledged write.
NO_WRITES: Final = READS | {"foreign", "reuse", "replay"}


@dataclass
class Series:
    """Counts by the second in which an attempt ended: acknowledged writes, all good answers, refusals, unknowns."""

    written: Counter[int] = field(default_factory=Counter)
    good: Counter[int] = field(default_factory=Counter)
    refused: Counter[int] = field(default_factory=Counter)
    unknown: Counter[int] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    waits: Counter[int] = field(default_factory=Counter)
    """Milliseconds that good answers took, in steps of a few per cent."""

    def add(self, ended: Iterable[Ended]) -> None:
        for each in ended:
            second = int(min(each.told, each.asked + 3600))
            self.statuses[f"{each.do} {each.status or each.kind}"] += 1
            if each.kind == "ok":
                self.good[second] += 1
                self.waits[_step((each.told - each.asked) * 1000)] += 1
                if each.do not in NO_WRITES:
                    self.written[second] += 1
            elif each.kind == "unknown":
                self.unknown[second] += 1
            elif each.status in (0, 429, 503):
                self.refused[second] += 1

    @property
    def acknowledged(self) -> int:
        return sum(self.written.values())

    def wait_ms(self, quantile: float) -> float:
        whole, seen = sum(self.waits.values()), 0
        for step, count in sorted(self.waits.items()):
            seen += count
            if seen >= whole * quantile:
                return round(1.05**step, 2)
        return 0.0


def _step(milliseconds: float) -> int:
    from math import ceil, log

    return ceil(log(max(milliseconds, 0.05)) / log(1.05))
