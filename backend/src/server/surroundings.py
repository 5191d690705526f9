"""What is around the supervisor: signals, files that change, the workers' metrics, the limits of the machine."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..embedded.processes import alive

# Followed by the supervisor's process id.
_METRICS = "groundwork-metrics-"
_MOST_DESCRIPTORS = 65536
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD)


class Sources:
    """Python files below `root`, watched by their times: no library, and it works on every file system."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen = self._look()

    def changed(self) -> Path | None:
        """One of the files that changed, came or went since the last call."""
        now = self._look()
        before, self._seen = self._seen, now
        different = before.items() ^ now.items()
        return min(path for path, _ in different) if different else None

    def _look(self) -> dict[Path, int]:
        times: dict[Path, int] = {}
        for path in self._root.rglob("*.py"):
            with contextlib.suppress(FileNotFoundError):
                times[path] = path.stat().st_mtime_ns
        return times


@contextlib.contextmanager
def signals_as_bytes() -> Iterator[socket.socket]:
    """A socket that gives the number of each signal, so that one selector waits for everything."""
    readable, writable = socket.socketpair()
    readable.setblocking(False)
    writable.setblocking(False)
    # Who starts us with a signal ignored (nohup) wants it ignored.
    wanted = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _leave_it_to_the_socket) for number in wanted}
    wakeup_before = signal.set_wakeup_fd(writable.fileno(), warn_on_full_buffer=False)
    try:
        yield readable
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        readable.close()
        writable.close()


def _leave_it_to_the_socket(number: int, frame: object) -> None:
    pass


def raise_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        # Not worth failing for; some systems refuse below their own bound.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextlib.contextmanager
def metrics_directory() -> Iterator[Path]:
    """Where several workers keep their metrics. Takes away what supervisors that were killed outright have left."""
    for left in Path(tempfile.gettempdir()).glob(f"{_METRICS}*"):
        pid = left.name.removeprefix(_METRICS).partition("-")[0]
        if pid.isdecimal() and not alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{_METRICS}{os.getpid()}-") as directory:
        yield Path(directory)
