"""The directory in which prometheus-client keeps the metrics of several workers."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..embedded.lifetime import alive

# Followed by the supervisor's process id.
_PREFIX = "groundwork-metrics-"


@contextlib.contextmanager
def metrics_directory() -> Iterator[Path]:
    """A temporary directory; directories of supervisors that were killed are removed."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = directory.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not alive(int(pid)):
            shutil.rmtree(directory, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-") as path:
        yield Path(path)


def remove_gauges(directory: Path, pid: int) -> None:
    """Remove the live gauges of a process that ended; its counters stay in the sums."""
    for file in directory.glob(f"gauge_live*_{pid}.db"):
        file.unlink(missing_ok=True)
