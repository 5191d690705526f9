"""Where our CPU goes: samples of the worker's stack under load, by layer. `make bench ARGS=profile`.

A layer's own share is what its frames and the foreign code below them take; a sample belongs to the innermost frame
that a layer knows. C code has no frames of its own, so it counts for the Python that called it: what uvloop and
httptools do by themselves stands under "loop".
"""

from __future__ import annotations

import random
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from src.embedded.server import EmbeddedPostgres

from .clocks import cpu_seconds, family
from .data import Data
from .load import Plan, run
from .operations import JUDGED, OPERATIONS
from .servers import HERE, Running

PY_SPY: Final = HERE / ".venv" / "bin" / "py-spy"

LAYERS: Final = (
    ("asyncpg", ("asyncpg/",)),
    ("database, pool", ("services/database.py", "services/connections.py", "services/statements.py",
                        "services/vitality.py", "services/lending.py", "services/attending.py")),
    ("metrics", ("services/metrics.py", "prometheus_client/")),
    ("log", ("config/logging.py", "config/redaction.py", "structlog/", "logging/__init__.py")),
    ("identity", ("services/identity.py", "services/tokens.py", "services/keys.py", "services/signing.py", "jwt/")),
    ("middleware", ("api/middleware.py", "api/cors.py", "api/problems.py", "starlette/middleware/")),
    ("bodies", ("api/bodies.py", "api/conditions.py", "services/idempotency.py")),
    ("cursors, pages", ("api/pages.py", "api/cursors.py", "services/task_pages.py")),
    ("tasks", ("api/tasks.py", "services/tasks.py", "services/task_rows.py", "services/task_batches.py")),
    ("dependencies", ("api/deps.py", "fastapi/dependencies/", "contextlib.py")),
    ("FastAPI", ("fastapi/",)),
    ("Starlette: response", ("starlette/responses.py", "starlette/background.py")),
    ("Starlette: routing", ("starlette/",)),
    ("validation", ("pydantic/", "pydantic_core/")),
    ("uvicorn, protocol", ("uvicorn/", "src/server/protocol.py", "src/server/app_protocol.py", "src/server/worker.py")),
    ("loop", ("asyncio/", "uvloop/")),
)  # fmt: skip


def layer_of(stack: str) -> str:
    """`stack` as py-spy writes it: `function (file:line);...`, the outermost first."""
    for frame in reversed(stack.split(";")):
        file = frame.rpartition("(")[2]
        for name, places in LAYERS:
            if any(place in file for place in places):
                return name
    return "other"


def shares(lines: Iterable[str]) -> Counter[str]:
    """Samples of each layer, out of py-spy's raw format: a stack, a space, a count."""
    found: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        if stack:
            found[layer_of(stack)] += int(count)
    return found


def profile(server: EmbeddedPostgres, data: Data, one: Running, where: Path, seconds: float) -> str:
    """A table: microseconds of CPU a request by layer, for the operations that are judged."""
    from .report import table

    columns: dict[str, dict[str, float]] = {}
    worker = max(family(one.pid), key=cpu_seconds)
    for slug in JUDGED:
        operation = OPERATIONS[slug]
        plan = Plan(
            port=one.port,
            requests=operation.requests(data, one.speech, one.port, random.Random(6)),
            status=operation.status,
            connections=32,
            seconds=seconds,
            rate=None,
            warm_up_seconds=1.0,
            warm_up_requests=1_200,
            server=one.pid,
            database=server.pid,
            first_number=hash(slug) & 0xFFFF_FFFF,
            seed=1,
        )
        # What it costs is measured without the profiler, where it goes with it.
        undisturbed = run(plan)
        cost = undisturbed.server_cpu / len(undisturbed.latencies) * 1e6
        raw = where / f"{slug}.raw"
        words = ["record", "--pid", str(worker), "--rate", "400", "--duration", str(int(seconds) + 1)]
        watching = subprocess.Popen(
            [str(PY_SPY), *words, "--format", "raw", "--output", str(raw), "--nonblocking"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        run(Plan(**{**plan.__dict__, "seconds": seconds + 2, "first_number": plan.first_number + (1 << 32)}))
        watching.wait(60)
        found = shares(raw.read_text().splitlines())
        total = sum(found.values())
        columns[operation.title] = {name: cost * count / total for name, count in found.items()}
    names = [*(name for name, _ in LAYERS), "other"]
    rows = [
        [name, *(f"{column.get(name, 0):.0f}" for column in columns.values())]
        for name in names
        if any(name in column for column in columns.values())
    ]
    rows.append(["together", *(f"{sum(column.values()):.0f}" for column in columns.values())])
    return table(["CPU us a request", *columns], rows)
