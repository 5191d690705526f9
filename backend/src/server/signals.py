"""Signals as bytes on a socket, so that one selector waits for signals, workers and the clock."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD)


@contextlib.contextmanager
def signals_as_bytes() -> Iterator[socket.socket]:
    """A socket that receives the number of each signal as one byte. Signals that are ignored stay ignored (nohup)."""
    readable, writable = socket.socketpair()
    readable.setblocking(False)
    writable.setblocking(False)
    handled = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    former_handlers = {number: signal.signal(number, _no_operation) for number in handled}
    former_wakeup = signal.set_wakeup_fd(writable.fileno(), warn_on_full_buffer=False)
    try:
        yield readable
    finally:
        signal.set_wakeup_fd(former_wakeup)
        for number, handler in former_handlers.items():
            signal.signal(number, handler)
        readable.close()
        writable.close()


def _no_operation(number: int, frame: object) -> None:
    """A Python handler has to be set for the wakeup descriptor to be written."""
