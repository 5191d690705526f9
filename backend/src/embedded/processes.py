"""PostgreSQL's processes and ports as the operating system shows them."""

# ruff: noqa: S603, S607 - every word of the commands below is ours; `ps` is found by PATH.
from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_LINUX: Final = sys.platform.startswith("linux")


def die_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    """What a child runs before exec so that the kernel sends it `number` when we die, even by kill -9.

    None where there is no such signal (not Linux), and in any thread but the main one: the signal is tied to
    the thread that spawned, and a worker thread ends long before the process does.
    """
    if not _LINUX or threading.current_thread() is not threading.main_thread():
        return None
    # Looked up before the fork: a child must not wait for a lock that another thread held.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # the parent died between the fork and the line above

    return arrange


def alive(pid: int) -> bool:
    """Whether `pid` runs; a zombie that nobody has reaped yet does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _status(pid)[0] != "Z"


def children(pid: int) -> list[int]:
    if _LINUX:
        candidates = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
        return [candidate for candidate in candidates if _status(candidate)[1] == pid]
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False
    ).stdout
    pairs = [line.split() for line in listing.splitlines()]
    return [int(pair[0]) for pair in pairs if pair[1] == str(pid)]


def _status(pid: int) -> tuple[str, int]:
    """State letter and parent of a process."""
    if not _LINUX:
        said = subprocess.run(
            ["ps", "-o", "state=,ppid=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        return (said[0][0], int(said[1])) if len(said) == 2 else ("Z", 0)
    try:
        # The command name stands in parentheses and may itself hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ("Z", 0)
    return (fields[0], int(fields[1]))


def signal_tree(pid: int, number: signal.Signals) -> None:
    """The postmaster first, so that it starts nobody meanwhile; a process that ended on its own is fine."""
    for target in (pid, *children(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, number)


def end(
    pid: int, *, first: signal.Signals, seconds: float, child: subprocess.Popen[bytes] | None = None
) -> None:
    """Ask with `first`, then with SIGQUIT (no checkpoint, nothing lost), then kill."""
    for number, patience in ((first, seconds), (signal.SIGQUIT, seconds / 2)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        if _gone([pid], patience, child):
            return
    kill(pid, child=child)


def kill(pid: int, *, child: subprocess.Popen[bytes] | None = None) -> None:
    """SIGKILL for the postmaster and its children; returns when the last one is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)  # it must not start new children while they are counted
    family = children(pid)
    for target in (pid, *family):
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGKILL)
    _gone([pid, *family], 30, child)


def _gone(pids: list[int], seconds: float, child: subprocess.Popen[bytes] | None) -> bool:
    deadline = time.monotonic() + seconds
    pause = 0.002
    while True:
        if not any(alive(pid) for pid in pids):
            if child is not None:
                child.wait()
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def end_all_of(data: Path, seconds: float) -> None:
    """End every PostgreSQL process on `data`, and take away the note of one that is gone.

    Only for the owner of the lock. The note (`postmaster.pid`) outlives a kill -9, and its number may meanwhile
    be another program's, whom PostgreSQL would then take for a running server.
    """
    postmaster = _postmaster_of(data)
    if postmaster is not None:
        end(postmaster, first=signal.SIGINT, seconds=seconds)
    for left in _working_in(data):
        kill(left)
    (data / "postmaster.pid").unlink(missing_ok=True)


def _postmaster_of(data: Path) -> int | None:
    try:
        pid = int((data / "postmaster.pid").read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return None
    if _LINUX:
        return pid if pid in _working_in(data) else None
    command = subprocess.run(
        ["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, check=False
    ).stdout
    return pid if os.fsencode(data) in command else None


def _working_in(data: Path) -> list[int]:
    """The postgres processes whose working directory is `data`, by whatever name it is reached. Linux only."""
    found = []
    for entry in Path("/proc").iterdir() if _LINUX else ():
        with contextlib.suppress(OSError):
            here = entry.name.isdigit() and (entry / "cwd").samefile(data)
            if here and (entry / "exe").readlink().name.startswith("postgres"):
                found.append(int(entry.name))
    return found


def postmaster_ready(data: Path, pid: int) -> bool:
    """Whether the postmaster `pid` has written into its own file that it takes connections."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except OSError:
        return False
    return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"


def answers(port: int, seconds: float = 2.0) -> bool:
    """Whether a PostgreSQL on 127.0.0.1 answers a start-up packet by asking for the password."""
    body = struct.pack("!i", 196608) + b"user\0groundwork\0database\0groundwork\0\0"
    try:
        with socket.socket() as connection:
            connection.settimeout(seconds)
            connection.connect(("127.0.0.1", port))
            connection.sendall(struct.pack("!i", len(body) + 4) + body)
            return connection.recv(1) == b"R"
    except OSError:
        return False


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As PostgreSQL itself binds: old connections in TIME_WAIT do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A random free port below the range that the kernel gives to outgoing connections.

    A port of that range can be taken, while the server is down, by any outgoing connection; a client that
    keeps reconnecting to it on loopback can even connect to itself.
    """
    for _ in range(200):
        port = random.randrange(20_000, 32_000)  # noqa: S311 - nothing secret about a port
        if port_is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
