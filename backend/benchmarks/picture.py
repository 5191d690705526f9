"""The picture in the README: what a request costs each server, as bars. Drawn from the samples of one run."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, Final

from .operations import JUDGED, OPERATIONS
from .report import OURS, spread

_WIDTH: Final = 860
_NAMES: Final = 240
_ROW: Final = 24
_GAP: Final = 44
_TOP: Final = 64
_COLOURS: Final = {OURS: "#2563a8", "floor": "#7d8590"}
_OTHERS: Final = "#c9a26b"


def draw(result: Mapping[str, Any]) -> str:
    """An SVG with a light ground of its own, so that it can be read on a dark page too."""
    titles: Mapping[str, str] = result["titles"]
    parts: list[str] = []
    y = _TOP
    for operation in JUDGED:
        found = {
            slug: spread(result["samples"], "server_us", server=slug, operation=operation, way="32")
            for slug in titles
        }
        costs = {slug: cost for slug, cost in found.items() if cost is not None}
        if not costs:
            continue
        longest = max(cost.most for cost in costs.values())
        scale = (_WIDTH - _NAMES - 110) / longest
        parts.append(_text(20, y, OPERATIONS[operation].title, weight="bold"))
        y += 10
        for slug in sorted(costs, key=lambda slug: costs[slug].middle):
            cost = costs[slug]
            long, least, most = (value * scale for value in (cost.middle, cost.least, cost.most))
            middle = y + _ROW / 2
            parts.append(_text(_NAMES - 8, middle + 5, titles[slug], anchor="end", weight=_weight(slug)))
            colour = _COLOURS.get(slug, _OTHERS)
            parts.append(
                f'<rect x="{_NAMES}" y="{y + 4}" width="{max(long, 1):.1f}" height="{_ROW - 8}" fill="{colour}"/>'
            )
            parts.append(
                f'<path d="M{_NAMES + least:.1f} {middle}H{_NAMES + most:.1f}" stroke="#1f2328" stroke-width="1.5"/>'
            )
            told = f"{cost.middle:,.0f}"
            parts.append(_text(_NAMES + max(long, most) + 8, middle + 5, told, weight=_weight(slug)))
            y += _ROW
        y += _GAP
    height = y - _GAP + 20
    title = _text(
        20, 30, "CPU of the server, microseconds a request (less is better)", weight="bold", size=16
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        f'height="{height}" font-family="system-ui, sans-serif" role="img" '
        f'aria-label="CPU a request of each server">\n'
        f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="#fbfaf7"/>\n'
        + "\n".join([title, *parts])
        + "\n</svg>\n"
    )


def _weight(slug: str) -> str:
    return "bold" if slug == OURS else "normal"


def _text(
    x: float, y: float, said: str, *, anchor: str = "start", weight: str = "normal", size: int = 13
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="#1f2328">{escape(said)}</text>'
    )
