"""What a run says of itself: as text, as JSON, and as a picture."""

from __future__ import annotations

import json
import os
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any, Final, TextIO

from .checker import COLUMNS
from .picture import draw
from .run import Result, Say
from .schedule import KINDS

_QUANTILES: Final = (0.5, 0.9, 0.99, 1.0)


def progress(stream: TextIO) -> Say:
    """A bar on a terminal, else a line every ten per cent."""
    said = -1

    def bar(done: float, count: int, kind: str) -> None:
        full = round(30 * min(done, 1))
        stream.write(f"\r[{'#' * full}{'.' * (30 - full)}] {done:4.0%} {count} faults {kind:<16}")
        if kind == "checking":
            stream.write("\n")
        stream.flush()

    def line(done: float, count: int, kind: str) -> None:
        nonlocal said
        tenth = int(min(done, 1) * 10)
        if tenth > said or kind == "checking":
            said = tenth
            stream.write(f"{done:4.0%}  {count} faults  {kind}\n")
            stream.flush()

    return bar if stream.isatty() else line


def machine() -> str:
    """Where it ran, and what else was running there."""
    one, _, fifteen = os.getloadavg()
    model = "unknown processor"
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        model = platform.processor() or model
    return (
        f"{os.cpu_count()} x {model}, {platform.system()}, Python {platform.python_version()}, "
        f"load {one:.1f} (15 min: {fifteen:.1f})"
    )


def quantile(values: list[float], share: float) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def recoveries(result: Result, *, database: bool) -> dict[str, Any]:
    """Seconds from a fault's end until the first connection, and until all of them, wrote again."""
    faults = [fault for fault in result.faults if KINDS[fault["fault"]].database == database]
    document: dict[str, Any] = {"faults": len(faults)}
    for which in ("first", "all"):
        times = [fault[which] for fault in faults if fault[which] is not None]
        document[which] = {
            "count": len(times),
            "within_250_ms": sum(time <= 0.25 for time in times),
            "within_1_s": sum(time <= 1.0 for time in times),
            **{f"p{share * 100:g}": quantile(times, share) for share in _QUANTILES},
        }
    return document


def document(result: Result) -> dict[str, Any]:
    series, findings = result.series, result.findings
    kinds: dict[str, int] = defaultdict(int)
    for fault in result.faults:
        kinds[fault["fault"]] += 1
    return {
        "seed": result.seed,
        "seconds": round(result.seconds, 1),
        "workers": result.workers,
        "clients": result.clients,
        "machine": machine(),
        "acknowledged_writes": series.acknowledged,
        "good_answers": sum(series.good.values()),
        "refused": sum(series.refused.values()),
        "unknown": sum(series.unknown.values()),
        "rows_at_the_end": result.rows,
        "wait_ms": {f"p{share * 100:g}": series.wait_ms(share) for share in _QUANTILES},
        "answers": dict(sorted(series.statuses.items())),
        "faults": len(result.faults),
        "faults_by_kind": dict(sorted(kinds.items())),
        "recovery_after_database_faults": recoveries(result, database=True),
        "recovery_after_other_faults": recoveries(result, database=False),
        "slowest_recoveries": sorted(result.faults, key=lambda fault: fault["all"] or 1e9)[-12:],
        "livez": result.pulse,
        "durability": result.durability,
        "checking_seconds": round(result.checking_seconds, 1),
        "forbidden": findings.counts,
        "words": {column: dict(words) for column, words in findings.words.items()},
        "examples": dict(findings.examples),
        "clean": findings.clean,
    }


def text(result: Result) -> str:
    """The report for people."""
    facts, findings = document(result), result.findings
    rate = facts["acknowledged_writes"] / max(result.seconds, 1)
    lines = [
        "",
        f"seed {result.seed}, {facts['seconds']} s, {result.workers} workers, {result.clients} clients",
        f"on {facts['machine']}",
        f"{facts['acknowledged_writes']:,} acknowledged writes ({rate:,.0f} a second), {facts['faults']} faults of "
        f"{len(facts['faults_by_kind'])} kinds, {facts['refused']:,} refused, {facts['unknown']:,} unknown, "
        f"{facts['rows_at_the_end']:,} rows at the end",
        f"answers in ms: {', '.join(f'{name} {value:g}' for name, value in facts['wait_ms'].items())}",
    ]
    for which, words in (("first", "the first connection"), ("all", "all connections")):
        told = facts["recovery_after_database_faults"][which]
        if told["count"]:
            lines.append(
                f"after a database fault {words} wrote again within 250 ms {told['within_250_ms']} times of "
                f"{told['count']}, within 1 s {told['within_1_s']} times; "
                f"p50 {told['p50']:.3f} s, p99 {told['p99']:.3f} s, longest {told['p100']:.3f} s"
            )
    lines.append("")
    for column, count in findings.counts.items():
        lines.append(f"{'NO' if count else 'ok'} {count:>6}  {column:<12} {COLUMNS[column]}")
    for column, examples in findings.examples.items():
        lines += [
            "",
            f"{column}: {dict(findings.words[column])}",
            *(f"  {example}" for example in examples[:6]),
        ]
    lines += ["", "Nothing forbidden happened." if findings.clean else "Something forbidden happened."]
    return "\n".join(lines)


def write(result: Result, place: Path) -> str:
    """Writes report.txt, report.json and report.svg into `place`; gives the text."""
    told = text(result)
    (place / "report.txt").write_text(told + "\n", encoding="utf-8")
    (place / "report.json").write_text(json.dumps(document(result), indent=2) + "\n", encoding="utf-8")
    (place / "report.svg").write_text(draw(result), encoding="utf-8")
    return told
