"""The picture of a run as SVG: acknowledged writes, refusals and unknowns in each second, and the faults above them."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Final

from .run import Result
from .schedule import KINDS

_WIDTH: Final = 1200
_LEFT: Final = 60
_GRAPH: Final = 260
_LANE: Final = 9
_COLOURS: Final = {
    "db": "#c0392b",
    "pg": "#8e44ad",
    "worker": "#d68910",
    "workers": "#d68910",
    "service": "#d68910",
    "net": "#2471a3",
}


def draw(result: Result) -> str:
    """One SVG document."""
    seconds = max(1, round(result.seconds + 1))
    lanes = [kind for kind in KINDS if any(fault["fault"] == kind for fault in result.faults)]
    top = 40 + _LANE * len(lanes)
    scale = _Scale(seconds, top, max([*result.series.good.values(), 1]))
    height = top + _GRAPH + 50
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
            'font-family="sans-serif" font-size="11">',
            '<rect width="100%" height="100%" fill="white"/>',
            f'<text x="{_LEFT}" y="16" font-size="13">{escape(_title(result))}</text>',
            *_lanes(result, lanes, scale),
            *_grid(seconds, scale),
            *_lines(result, seconds, scale, height),
            "</svg>",
            "",
        ]
    )


class _Scale:
    """Where a second and a count lie on the paper."""

    def __init__(self, seconds: int, top: int, peak: int) -> None:
        self.across = (_WIDTH - _LEFT - 20) / seconds
        self.bottom = top + _GRAPH
        self.peak = peak

    def x(self, second: float) -> float:
        return round(_LEFT + second * self.across, 1)

    def y(self, count: float) -> float:
        return round(self.bottom - count / self.peak * _GRAPH, 1)


def _lanes(result: Result, lanes: list[str], scale: _Scale) -> Iterator[str]:
    for number, kind in enumerate(lanes):
        line = 28 + number * _LANE
        colour = _COLOURS[kind.partition("-")[0]]
        yield f'<text x="{_LEFT - 4}" y="{line + 7}" font-size="7" text-anchor="end">{kind}</text>'
        for fault in result.faults:
            if fault["fault"] == kind:
                width = max(1.5, (fault["ended"] - fault["began"]) * scale.across)
                yield (
                    f'<rect x="{scale.x(fault["began"])}" y="{line}" width="{width:.1f}" height="{_LANE - 2}" '
                    f'fill="{colour}"><title>{kind} at {fault["began"]:.1f} s</title></rect>'
                )


def _grid(seconds: int, scale: _Scale) -> Iterator[str]:
    for quarter in range(5):
        count = scale.peak * quarter / 4
        level = scale.y(count)
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{level}" y2="{level}" stroke="#ddd"/>'
        yield f'<text x="{_LEFT - 6}" y="{level + 4}" text-anchor="end">{count:.0f}</text>'
    for fifth in range(6):
        second = seconds * fifth / 5
        yield f'<text x="{scale.x(second)}" y="{scale.bottom + 16}" text-anchor="middle">{second:.0f} s</text>'


def _lines(result: Result, seconds: int, scale: _Scale, height: int) -> Iterator[str]:
    series = result.series
    for number, (counts, colour, name) in enumerate(
        (
            (series.good, "#2e86c1", "good answers a second"),
            (series.written, "#1e8449", "acknowledged writes"),
            (series.refused, "#e67e22", "refused (503)"),
            (series.unknown, "#c0392b", "unknown (504, or no answer)"),
        )
    ):
        points = " ".join(f"{scale.x(second)},{scale.y(counts[second])}" for second in range(seconds))
        yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"/>'
        yield f'<text x="{_LEFT + number * 200}" y="{height - 12}" fill="{colour}">{name}</text>'


def _title(result: Result) -> str:
    verdict = "nothing forbidden" if result.findings.clean else "SOMETHING FORBIDDEN"
    written, count = result.series.acknowledged, len(result.faults)
    return f"seed {result.seed}: {written:,} acknowledged writes, {count} faults, {verdict}"
