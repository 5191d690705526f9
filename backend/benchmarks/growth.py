"""What size costs: `make bench ARGS=growth`, with the sizes in GROWTH="10000,1000000" (ten million take long).

The same service on a small and on large tables at once, measured in turn: a page, a read, a creation; then, on the
largest, a page far back against the first, an import against psql's COPY into the same table, and an export.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import uuid
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from src.embedded.server import EmbeddedPostgres
from tests.postgres_server import give_away

from .clocks import cpu_seconds, family
from .data import Data, fill, postgres
from .measuring import Sample, measure, say
from .operations import JUDGED, OPERATIONS
from .report import Spread, table
from .servers import OURS, Running, running

SIZES: Final = os.environ.get("GROWTH", "10000,1000000")
EACH: Final = 100
DEEP_PAGE: Final = 10_000
DEEP_LIMIT: Final = 10
BYTES_EACH: Final = 3_000
"""Of disk for a task, with its indexes, what is written ahead of it, and what is sorted while it is made."""
LINES: Final[tuple[int, ...]] = (20_000, 200_000)
"""Tasks imported and exported: the memory of the second is held against that of the first."""


def main(rounds: int, seconds: float) -> str:
    sizes = [int(size) for size in SIZES.split(",")]
    with ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="groundwork-bench-")))
        give_away(where)
        if shutil.disk_usage(where).free < sum(sizes) * BYTES_EACH:
            raise SystemExit(f"{where} has no room for {sum(sizes):,} tasks: see TMPDIR.")
        server = stack.enter_context(postgres(where / "postgres", {"max_wal_size": "32GB"}))
        told: list[list[str]] = []
        servers: list[Running] = []
        data: Data | None = None
        for size in sizes:
            say(f"filling {size:,} tasks ...")
            heavy = DEEP_PAGE * DEEP_LIMIT + DEEP_LIMIT if size == max(sizes) else EACH
            found = fill(
                server,
                users=size // EACH,
                heavy=1,
                heavy_each=heavy,
                database=f"size_{size}",
                most_told=1_000,
            )
            # The users of the smallest are in all of them, under the same ids.
            data = data or found
            if size == max(sizes):
                heavy_user = next(iter(found.heavy))
            named = replace(OURS, slug=f"ours-{size}", title=f"{size:,} tasks")
            servers.append(stack.enter_context(running(named, server, f"size_{size}", where)))
        assert data is not None
        operations = [OPERATIONS[slug] for slug in JUDGED]
        samples = list(measure(server, data, servers, operations, rounds, seconds, 100.0, ["rate"]))
        told += sized(samples, sizes)
        largest = servers[sizes.index(max(sizes))]
        told += deep(largest, heavy_user)
        told += moved(largest, server)
    return table(["growth", "", "target", ""], told)


def sized(samples: list[Sample], sizes: list[int]) -> list[list[str]]:
    """The median time at a fixed rate, and its ratio to that of the smallest in the same round."""
    rows = []
    least, *larger = sizes
    for slug in JUDGED:
        of = {
            size: {s.round: s.p50_ms for s in samples if s.server == f"ours-{size}" and s.operation == slug}
            for size in sizes
        }
        middle = statistics.median(of[least].values())
        rows.append([f"{OPERATIONS[slug].title}: p50 at {least:,} tasks", f"{middle:.2f} ms", "", ""])
        for size in larger:
            found = Spread.of(of[size][number] / of[least][number] for number in of[least])
            rows.append(compared(f"{OPERATIONS[slug].title}: p50 at {size:,} through that", found, 1.25))
    return rows


def compared(title: str, found: Spread, most: float) -> list[str]:
    told = f"{found.middle:.2f} ({found.least:.2f}-{found.most:.2f})"
    return [title, told, f"<= {most}", "met" if found.middle <= most else "missed"]


def deep(one: Running, owner: uuid.UUID) -> list[list[str]]:
    """Page 10,000 against page 1, in turn on one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", one.port)

    def page(words: str) -> tuple[float, Any]:
        started = time.perf_counter()
        connection.request("GET", f"/v1/tasks?{words}", headers=one.speech.identify(owner))
        content = connection.getresponse().read()
        return time.perf_counter() - started, json.loads(content)

    cursor = ""
    for _ in range(DEEP_PAGE * DEEP_LIMIT // 200):
        cursor = page(f"limit=200{cursor}")[1]["next_cursor"]
        cursor = f"&cursor={cursor}"
    found = []
    for _ in range(11):
        first = statistics.median(page(f"limit={DEEP_LIMIT}")[0] for _ in range(60))
        late = statistics.median(page(f"limit={DEEP_LIMIT}{cursor}")[0] for _ in range(60))
        found.append(late / first)
    connection.close()
    return [compared(f"page {DEEP_PAGE:,} through page 1, p50", Spread.of(found), 1.1)]


def moved(one: Running, server: EmbeddedPostgres) -> list[list[str]]:
    """Imports and exports of the same lines by people who have nothing yet, and psql's COPY of the same rows."""
    worker = max(family(one.pid), key=cpu_seconds)
    rows: list[list[str]] = []
    rates: dict[int, tuple[float, float]] = {}
    peaks: dict[int, float] = {}
    for count in LINES:
        owner = uuid.uuid4()
        lines = io.BytesIO()
        for number in range(count):
            task = {
                "title": f"Water the plants {number}",
                "description": "The ferns in the hall want little.",
            }
            lines.write(json.dumps(task).encode() + b"\n")
        _forget_peak(worker)
        seconds = _import(one, owner, lines.getvalue())
        copied = _copy(server, one.database, count)
        rates[count] = (count / seconds, count / copied)
        exported, received = _export(one, owner)
        assert received == count, f"{received} of {count} tasks came out again"
        peaks[count] = _peak(worker)
        rows.append([f"import of {count:,} tasks", f"{count / seconds:,.0f}/s", "", ""])
        rows.append([f"psql's COPY of {count:,} rows", f"{count / copied:,.0f}/s", "", ""])
        rows.append([f"export of {count:,} tasks", f"{count / exported:,.0f}/s", "", ""])
        rows.append([f"most memory of the worker meanwhile, {count:,}", f"{peaks[count]:.0f} MB", "", ""])
    many = max(LINES)
    ours, theirs = rates[many]
    share = ours / theirs
    rows.append(["import through COPY", f"{share:.2f}", ">= 0.7", "met" if share >= 0.7 else "missed"])
    rate = many / exported
    rows.append(
        ["export, tasks a second", f"{rate:,.0f}", ">= 300000", "met" if rate >= 300_000 else "missed"]
    )
    grown = peaks[many] - peaks[min(LINES)]
    constant = "met" if grown <= 16 else "missed"
    rows.append([f"memory of {many:,} over that of {min(LINES):,}", f"{grown:.0f} MB", "<= 16 MB", constant])
    return rows


def _import(one: Running, owner: uuid.UUID, lines: bytes) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=300)
    headers = {**one.speech.identify(owner), "Content-Type": "application/x-ndjson"}
    started = time.perf_counter()
    connection.request("POST", "/v1/tasks/import", lines, headers)
    answer = connection.getresponse()
    text = answer.read()
    seconds = time.perf_counter() - started
    connection.close()
    assert answer.status == 200, text[:300]
    return seconds


def _export(one: Running, owner: uuid.UUID) -> tuple[float, int]:
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=300)
    started = time.perf_counter()
    connection.request("GET", "/v1/tasks/export", headers=one.speech.identify(owner))
    answer = connection.getresponse()
    count = 0
    while piece := answer.read(1 << 20):
        count += piece.count(b"\n")
    seconds = time.perf_counter() - started
    connection.close()
    return seconds, count


def _copy(server: EmbeddedPostgres, database: str, count: int) -> float:
    """Seconds that psql takes to bring the same rows into the same table for somebody who is there already."""
    owner = uuid.uuid4()
    rows = "".join(
        f"{owner}\t{uuid.uuid4()}\tWater the plants {number}\tThe ferns in the hall want little.\n"
        for number in range(count)
    )
    psql = [
        str(server.binaries / "psql"),
        "--no-psqlrc",
        "--quiet",
        "--set=ON_ERROR_STOP=1",
        server.url_for(database),
    ]
    insert = f"INSERT INTO users (id, email) VALUES ('{owner}', '{owner}@example.com')"
    subprocess.run([*psql, "--command", insert], check=True)
    command = "COPY tasks (user_id, id, title, description) FROM STDIN"
    started = time.perf_counter()
    subprocess.run([*psql, "--command", command], input=rows.encode(), check=True)
    return time.perf_counter() - started


def _forget_peak(pid: int) -> None:
    # 5: what VmHWM says begins anew.
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _peak(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1e3
    return 0.0
