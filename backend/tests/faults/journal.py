"""What a client did and what it was told: one append-only log each, a JSON object a line.

    {"at": 12.503114, "n": 7, "e": "invoke", "do": "create", "user": "...", "mark": "3-7", "key": "k2"}
    {"at": 12.507950, "n": 7, "e": "ok", "status": 201, "task": "...", "mark": "3-7", "version": 1, "etag": "..."}

`at` is seconds of one monotonic clock since the run began, `n` counts a client's attempts. An attempt ends as `ok`
(it was done), `fail` (it was not), or `unknown`; one without an end is unknown too. A repeat is another attempt with
the same `mark`: a mark stands for one intention, and is the title that is written.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Final

_encode: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Clock:
    """Seconds since the run began."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._began


class Journal:
    """Opened by the first line and closed by `close`."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path = path
        self._clock = clock
        self._file = path.open("a", encoding="utf-8", buffering=1 << 16)
        self._attempts = 0

    def invoke(self, **facts: Any) -> int:
        """Notes what is about to be sent; gives the attempt's number."""
        self._attempts += 1
        self._write({"at": round(self._clock(), 6), "n": self._attempts, "e": "invoke", **facts})
        return self._attempts

    def end(self, attempt: int, outcome: str, **facts: Any) -> None:
        self._write({"at": round(self._clock(), 6), "n": attempt, "e": outcome, **facts})

    def note(self, event: str, **facts: Any) -> None:
        """Something that is no attempt of a client: a fault that begins, an answer of a probe."""
        self._write({"at": round(self._clock(), 6), "e": event, **facts})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(_encode(line) + "\n")

    def close(self) -> None:
        self._file.close()
