"""PostgreSQL's processes: found, ended and killed."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from .errors import NotInstalled

try:
    import psutil
    from psutil import Popen as Popen
except ModuleNotFoundError as error:
    raise NotInstalled from error


def running(process: psutil.Process) -> bool:
    """Whether it runs; a zombie that its parent has not reaped does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def wait(processes: Iterable[psutil.Process], seconds: float) -> bool:
    """Whether all have ended within the time. psutil's own function waits for zombies too."""
    deadline = time.monotonic() + seconds
    pause = 0.002
    while any(running(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    return True


def end(postmaster: psutil.Process, *, first: signal.Signals, seconds: float) -> None:
    """Send `first`, then SIGQUIT (no checkpoint, no data lost), then SIGKILL, each if the one before had no effect."""
    for number, timeout in ((first, seconds), (signal.SIGQUIT, seconds / 2)):
        with contextlib.suppress(psutil.NoSuchProcess):
            postmaster.send_signal(number)
        if wait([postmaster], timeout):
            return
    kill(postmaster)


def kill(postmaster: psutil.Process) -> None:
    """SIGKILL for the postmaster and its children; returns when the last one is gone."""
    family = [postmaster]
    with contextlib.suppress(psutil.NoSuchProcess):
        postmaster.suspend()  # it must not start children while they are listed
        family += postmaster.children(recursive=True)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    wait(family, 30)


def end_all_in(data: Path, seconds: float) -> None:
    """End every PostgreSQL process whose data directory is `data`, and delete the pid file of one that is gone.

    Only for the owner of the lock. The pid file outlives a kill -9, and its number may meanwhile be another
    program's, which PostgreSQL would then take for a running server.
    """
    pid_file = data / "postmaster.pid"
    with contextlib.suppress(OSError, ValueError):
        postmaster = int(pid_file.read_text().split("\n", 1)[0])
        for process in _working_in(data):
            if process.pid == postmaster:
                end(process, first=signal.SIGINT, seconds=seconds)
    for process in _working_in(data):
        kill(process)
    pid_file.unlink(missing_ok=True)


def _working_in(data: Path) -> list[psutil.Process]:
    """The postgres processes whose working directory is `data`, by whatever path it is reached."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.name().startswith("postgres") and data.samefile(process.cwd()):
                found.append(process)
    return found
