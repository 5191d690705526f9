"""What this service has to cost, as a share of what each peer costs in the same run. Ours has everything on."""

from __future__ import annotations

from typing import Final

CPU: Final[dict[str, dict[str, float]]] = {
    "template": {"read": 1 / 16, "list": 1 / 25, "create": 1 / 20},
    "orm": {"read": 1 / 9, "list": 1 / 14, "create": 1 / 12},
    "litestar": {"read": 0.6, "list": 0.35, "create": 0.8},
    "express": {"read": 0.65, "list": 0.3, "create": 0.65},
    "fastify": {"read": 1.5, "list": 0.55, "create": 1.5},
    "floor": {"read": 1.5, "list": 1.4, "create": 1.8},
}
"""Our CPU a request through theirs, at most. Requests a second: ours through theirs, the reciprocal at least."""

WORKER_MB: Final = 100.0

TWO_WORKERS: Final = 1.6
"""Requests a second of two workers through those of one, at least, where PostgreSQL leaves room."""
