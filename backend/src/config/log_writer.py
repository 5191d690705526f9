"""The thread that writes log lines, so that a sink that blocks (a pipe that is not read, a frozen terminal) delays
neither a request nor a shutdown. docs/decisions/0074-log-writer-thread.md has the reasons and the measurements.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import select
import stat
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Final

BATCH_SECONDS: Final = 0.1
"""How long a batched line may stay in the queue while the sink accepts lines."""
MAX_QUEUED_CHARACTERS: Final = 4 << 20
"""Size of the queue, about 14,000 request lines."""
MAX_BATCHED_CHARACTERS: Final = MAX_QUEUED_CHARACTERS // 2
"""The part of it that batched lines may use: the rest is for warnings and errors."""
CLOSE_SECONDS: Final = 1.0
"""How long a process that ends waits until its last lines are written."""
_MAX_FILE_WRITE: Final = 256 << 10

_writers: weakref.WeakSet[LogWriter] = weakref.WeakSet()


def dropped_lines() -> int:
    """The number of log lines that this process has lost so far."""
    return LogWriter.dropped_total


class LogWriter:
    """A bounded queue of lines and the daemon thread that writes them to a copy of `descriptor`.

    Lines that find the queue full, or that the sink refuses (a closed pipe, a full disk), are dropped and counted.
    Once the sink accepts lines again, the line `report(count)` follows. The thread starts with the first line; the
    process waits for it at its exit, `CLOSE_SECONDS` at most.
    """

    dropped_total = 0

    def __init__(self, descriptor: int, encoding: str, report: Callable[[int], str]) -> None:
        # A copy: a number that the process closes and reuses would lead log lines into another file or connection.
        self._descriptor = os.dup(descriptor)
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        self._encoding = encoding
        self._report = report
        # Processes share a pipe. It keeps writes of at most PIPE_BUF bytes in one piece, a regular file all of them.
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._max_write = _MAX_FILE_WRITE if regular else select.PIPE_BUF
        self._torn = False
        self._closing = False
        self._reset()

    def _reset(self) -> None:
        # Reentrant: the garbage collector can run a finalizer that logs while this thread holds the lock.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._lines: list[str] = []
        self._characters = 0
        self._urgent = False
        self._writing = False
        self._dropped = 0

    def write(self, line: str, *, batched: bool = False) -> None:
        """Queue one line; a `batched` one is written together with others, up to `BATCH_SECONDS` later."""
        with self._lock:
            size = len(line) + 1
            if self._characters + size > (MAX_BATCHED_CHARACTERS if batched else MAX_QUEUED_CHARACTERS):
                self._count_dropped(1)
                return
            self._lines.append(line)
            self._characters += size
            if not batched:
                self._urgent = True
            if self._urgent or len(self._lines) == 1:
                self._changed.notify_all()
            if self._thread is None:
                self._start()

    def flush(self, seconds: float = CLOSE_SECONDS) -> bool:
        """Wait until every queued line is written; False when that takes longer than `seconds`."""
        with self._changed:
            self._urgent = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not (self._lines or self._writing), seconds)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Write what is queued and end the thread, within `seconds`. Later lines are written by their callers."""
        with self._changed:
            self._closing = True
            thread = self._thread
            self._changed.notify_all()
        atexit.unregister(self.close)
        if thread is not None:
            thread.join(seconds)

    def _start(self) -> None:
        if self._closing:
            self._run()  # The interpreter may start no thread any more.
            return
        _handle_forks()
        _writers.add(self)
        atexit.register(self.close)
        thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        # Where the system has no thread left, the next line tries again.
        with contextlib.suppress(RuntimeError):
            thread.start()
            self._thread = thread

    def _count_dropped(self, count: int) -> None:
        self._dropped += count
        LogWriter.dropped_total += count

    # The thread

    def _run(self) -> None:
        last = False
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines or self._closing)
                if not self._lines and (last or not self._dropped):
                    self._thread = None
                    return
                last = self._closing
                if not (self._urgent or last):
                    self._changed.wait(BATCH_SECONDS)
                self._writing = True
                self._urgent = False
                lines, self._lines, self._characters = self._lines, [], 0
                dropped, self._dropped = self._dropped, 0
            self._write_lines(lines)
            # After them: the queue was full of them when lines were dropped.
            if dropped and not self._write_piece(self._encode(self._report(dropped))):
                with self._lock:
                    self._dropped += dropped

    def _write_lines(self, lines: list[str]) -> None:
        for count, piece in self._pieces(lines):
            if not self._write_piece(piece):
                with self._lock:
                    self._count_dropped(count)

    def _pieces(self, lines: list[str]) -> Iterator[tuple[int, bytes]]:
        """Whole lines, as many as may be written at once, and their number."""
        piece: list[bytes] = []
        size = 0
        for line in lines:
            encoded = self._encode(line)
            if piece and size + len(encoded) > self._max_write:
                yield len(piece), b"".join(piece)
                piece, size = [], 0
            piece.append(encoded)
            size += len(encoded)
        if piece:
            yield len(piece), b"".join(piece)

    def _encode(self, line: str) -> bytes:
        return (line + "\n").encode(self._encoding, "backslashreplace")

    def _write_piece(self, piece: bytes) -> bool:
        # After half a line, on a disk that is full, the next line must not continue it.
        rest = memoryview(b"\n" + piece if self._torn else piece)
        while rest:
            try:
                written = os.write(self._descriptor, rest)
            except BlockingIOError:
                # A process that shares this descriptor made it non-blocking: wait instead of losing the line.
                _wait_until_writable(self._descriptor)
            except OSError:
                return False
            else:
                rest = rest[written:]
                self._torn = bool(rest)
        return True


def _wait_until_writable(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    poll.poll()


@functools.cache
def _handle_forks() -> None:
    """A forked child has no thread, and what is queued is written by its parent."""

    def reset() -> None:
        for writer in _writers:
            writer._reset()

    os.register_at_fork(after_in_child=reset)
