"""systemd's service protocol: sd_notify(3) and socket activation (sd_listen_fds(3)); without systemd nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import Final

FIRST_FD: Final = 3


class Notifier:
    """Sends states to the service manager, in datagrams that never block. Removes its variables from the environment,
    so that workers do not notify in the supervisor's name."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        # A leading @ stands for the NUL byte of an abstract socket.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        microseconds, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        self.watchdog_seconds: float | None = None
        """Half of WATCHDOG_USEC: how often `WATCHDOG=1` is due. None without a watchdog for this process."""
        if address and microseconds.isdecimal() and pid in ("", str(os.getpid())):
            self.watchdog_seconds = int(microseconds) / 2_000_000

    def ready(self, status: str) -> None:
        self.notify(READY="1", STATUS=status)

    def reloading(self) -> None:
        self.notify(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000), STATUS="Reloading")

    def stopping(self) -> None:
        self.notify(STOPPING="1", STATUS="Stopping")

    def notify(self, **states: str) -> None:
        """Send these states in one datagram; a service manager that is gone is no error."""
        if self._socket is not None:
            text = "\n".join(f"{name}={value}" for name, value in states.items())
            with contextlib.suppress(OSError):
                self._socket.sendto(text.encode(), socket.MSG_DONTWAIT, self._address)


def activated_sockets() -> dict[str, socket.socket]:
    """Sockets passed by socket activation, by name (`FileDescriptorName=`); without names they are numbered."""
    pid, count, names = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    found: dict[str, socket.socket] = {}
    for fd, name in zip(
        range(FIRST_FD, FIRST_FD + int(count)), [*names.split(":"), *[""] * int(count)], strict=False
    ):
        passed = socket.socket(fileno=fd)
        passed.set_inheritable(False)
        passed.setblocking(False)
        found[name if name and name not in found else str(fd)] = passed
    return found
