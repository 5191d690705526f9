"""What processes cost, as the kernel counts it: CPU to the nanosecond, memory without what is shared counted twice.

Linux only: another process's CPU clock and the files below /proc are its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of `pid`, those that ended included. Raises `OSError` when it is gone."""
    # The number that clock_getcpuclockid(3) gives. utime and stime in /proc count in hundredths of a second.
    return time.clock_gettime((~pid << 3) | 2)


def spent(pids: Iterable[int]) -> dict[int, float]:
    found: dict[int, float] = {}
    for pid in pids:
        with suppress(OSError):
            found[pid] = cpu_seconds(pid)
    return found


def difference(before: dict[int, float], after: dict[int, float]) -> float:
    """Seconds of CPU between two times; of a process that came between them, all of it."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def family(pid: int) -> list[int]:
    """`pid`, its children, and theirs."""
    found = [pid]
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += family(int(child))
    return found


def memory_bytes(pids: Iterable[int]) -> int:
    """What these processes hold together: a page that several share is divided among them."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total
