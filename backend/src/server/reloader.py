"""Detection of changed source files, for `serve --reload`."""

from __future__ import annotations

import contextlib
from pathlib import Path


class SourceWatcher:
    """Python files below `root`, compared by modification time: works on every file system, without a library."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._times = self._read_times()

    def changed(self) -> Path | None:
        """One of the files that were changed, added or removed since the last call."""
        now = self._read_times()
        before, self._times = self._times, now
        different = before.items() ^ now.items()
        return min(path for path, _ in different) if different else None

    def _read_times(self) -> dict[Path, int]:
        times: dict[Path, int] = {}
        for path in self._root.rglob("*.py"):
            with contextlib.suppress(FileNotFoundError):
                times[path] = path.stat().st_mtime_ns
        return times
