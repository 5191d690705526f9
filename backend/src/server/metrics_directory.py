"""The directory in which prometheus-client keeps the metrics of several workers."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..embedded.lifetime import alive
from ..errors import GroundworkError

# Followed by the supervisor's process id.
_PREFIX = "groundwork-metrics-"


class NoMetricsDirectory(GroundworkError):
    """No temporary directory is writable, and several workers need one. Exit code 1."""

    exit_code = 1


@contextlib.contextmanager
def metrics_directory() -> Iterator[Path]:
    """A temporary directory; directories of supervisors that were killed are removed. Raises NoMetricsDirectory."""
    try:
        for left_over in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            pid = left_over.name.removeprefix(_PREFIX).partition("-")[0]
            if pid.isdecimal() and not alive(int(pid)):
                shutil.rmtree(left_over, ignore_errors=True)
        directory = tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-")
    except OSError as error:
        raise NoMetricsDirectory(
            "No temporary directory is writable (TMPDIR, /tmp, /var/tmp, /usr/tmp, the working directory), and several "
            f"workers share their metrics in one: {error.strerror or error}. Set TMPDIR to a writable directory, or "
            "WORKERS=1, which needs none."
        ) from error
    with directory as path:
        yield Path(path)


def remove_gauges(directory: Path, pid: int) -> None:
    """Remove the live gauges of a process that ended; its counters stay in the sums."""
    for file in directory.glob(f"gauge_live*_{pid}.db"):
        file.unlink(missing_ok=True)
