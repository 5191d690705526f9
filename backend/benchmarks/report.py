"""Figures become tables. Everything printed is worked out from the samples of one run; nothing is kept here."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from . import targets
from .operations import JUDGED, OPERATIONS

OURS: Final = "ours"
Samples = list[dict[str, Any]]


class Spread(NamedTuple):
    middle: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))


def select(samples: Samples, **wanted: object) -> Samples:
    return [sample for sample in samples if all(sample[name] == value for name, value in wanted.items())]


def spread(samples: Samples, figure: str, **wanted: object) -> Spread | None:
    found = [sample[figure] for sample in select(samples, **wanted)]
    return Spread.of(found) if found else None


def ratios(samples: Samples, figure: str, server: str, **wanted: object) -> Spread | None:
    """Ours through theirs, each pair from the same round."""
    ours = {sample["round"]: sample[figure] for sample in select(samples, server=OURS, **wanted)}
    theirs = {sample["round"]: sample[figure] for sample in select(samples, server=server, **wanted)}
    pairs = [ours[number] / theirs[number] for number in ours if theirs.get(number)]
    return Spread.of(pairs) if pairs else None


def text(result: Mapping[str, Any]) -> str:
    samples: Samples = result["samples"]
    titles: Mapping[str, str] = result["titles"]
    parts = [heading(result)]
    slugs = list(dict.fromkeys(sample["operation"] for sample in samples))
    parts += [operation_table(samples, titles, slug) for slug in slugs]
    parts.append(memory_table(result))
    if OURS in titles:
        parts.append(targets_table(result))
    wrong = [sample for sample in samples if sample["errors"]]
    parts.append(f"Errors: {sum(sum(sample['errors'].values()) for sample in wrong)}")
    parts += [f"  {s['server']} {s['operation']} {s['way']}: {s['errors']}" for s in wrong]
    return "\n\n".join(parts) + "\n"


def heading(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    said = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    lines = [
        f"{machine['processor']}, {machine['cores']} cores for servers, PostgreSQL and load together, "
        f"{machine['memory_gb']} GB, Linux {machine['kernel']}, Python {machine['python']}, "
        f"load average {machine['load_average']:.0f} before and {result['load_average_at_the_end']:.0f} after",
        said,
    ]
    if machine["peers"]:
        lines.append("peers: " + ", ".join(f"{name} {version}" for name, version in machine["peers"].items()))
    lines.append(
        f"{result['rounds']} rounds of {result['seconds']} s; medians, and from the least to the most"
    )
    return "\n".join(lines)


def operation_table(samples: Samples, titles: Mapping[str, str], operation: str) -> str:
    head = ["CPU us", "least-most", "x ours", "PostgreSQL us", "requests/s", "p50", "p99"]
    judged = operation in JUDGED
    if judged:
        head += ["p99 at 256", "p50 at rate", "p99 at rate", "CPU us at rate"]
    rows = []
    for slug, title in titles.items():
        here = {"server": slug, "operation": operation}
        cpu = spread(samples, "server_us", way="32", **here)
        if cpu is None:
            continue
        share = ratios(samples, "server_us", slug, operation=operation, way="32")

        def middle(figure: str, way: str = "32", digits: int = 1, here: dict[str, str] = here) -> str:
            found = spread(samples, figure, way=way, **here)
            return "-" if found is None else f"{found.middle:,.{digits}f}"

        row = [
            title,
            f"{cpu.middle:,.0f}",
            f"{cpu.least:,.0f}-{cpu.most:,.0f}",
            "-" if share is None else f"{1 / share.middle:.2f}",
            middle("database_us", digits=0),
            middle("requests_a_second", digits=0),
            middle("p50_ms"),
            middle("p99_ms"),
        ]
        if judged:
            row += [
                middle("p99_ms", "256"),
                middle("p50_ms", "rate", 2),
                middle("p99_ms", "rate", 2),
                middle("server_us", "rate", 0),
            ]
        rows.append(row)
    return table([OPERATIONS[operation].title, *head], rows)


def memory_table(result: Mapping[str, Any]) -> str:
    rows = [
        [result["titles"][slug], f"{held['all_mb']:.0f}", f"{held['largest_mb']:.0f}"]
        for slug, held in result["memory"].items()
    ]
    return table(["memory", "MB", "MB of the largest process"], rows)


def targets_table(result: Mapping[str, Any]) -> str:
    samples: Samples = result["samples"]
    rows = []
    for slug, limits in targets.CPU.items():
        if slug not in result["titles"]:
            continue
        for operation, limit in limits.items():
            title = f"{OPERATIONS[operation].title} against {result['titles'][slug]}"
            here = {"operation": operation}
            rows += judged(f"CPU, {title}", ratios(samples, "server_us", slug, way="32", **here), limit)
            found = ratios(samples, "requests_a_second", slug, way="32", **here)
            rows += judged(f"requests/s, {title}", found, 1 / limit, at_least=True)
            for way in ("32", "256"):
                found = ratios(samples, "p99_ms", slug, way=way, **here)
                rows += judged(f"p99 at {way}, {title}", found, 1.0)
    for operation in JUDGED:
        # The other way round: how many times one worker two are.
        found = ratios(samples, "requests_a_second", "ours-2", operation=operation, way="32")
        times = None if found is None else Spread(1 / found.middle, 1 / found.most, 1 / found.least)
        title = f"requests/s of two workers through one, {OPERATIONS[operation].title}"
        rows += judged(title, times, targets.TWO_WORKERS, at_least=True)
    held = result["memory"].get(OURS)
    if held:
        rows.append(
            verdict("MB of a worker", Spread.of([held["largest_mb"]]), targets.WORKER_MB, at_least=False)
        )
    return table(["ours through theirs", "median", "least-most", "target", ""], rows)


def judged(title: str, found: Spread | None, limit: float, *, at_least: bool = False) -> list[list[str]]:
    return [] if found is None else [verdict(title, found, limit, at_least=at_least)]


def verdict(title: str, found: Spread, limit: float, *, at_least: bool) -> list[str]:
    met = found.middle >= limit if at_least else found.middle <= limit
    sign = ">=" if at_least else "<="
    return [
        title,
        f"{found.middle:.3g}",
        f"{found.least:.3g}-{found.most:.3g}",
        f"{sign} {limit:.3g}",
        "met" if met else "missed",
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def aligned(row: list[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()

    return "\n".join([aligned(head), "  ".join("-" * width for width in widths), *map(aligned, rows)])
