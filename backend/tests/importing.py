"""Imports modules under an audit hook and says what they did: `python importing.py <import root> <package> <module>...`

Prints JSON: `{module: [what it did, ...]}`. Sockets, processes, threads and writing count whoever causes them.
Reading a file or the environment counts only where the package's own code does it: libraries have their reasons.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PROCESSES = {
    "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn",
}  # fmt: skip
_CHANGES = {
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.chmod",
    "os.chown",
    "os.symlink",
    "os.truncate",
}
_ENVIRONMENT = ("importing.py", "/os.py", "<frozen os>", "<frozen _collections_abc>", "_collections_abc.py")
_MACHINERY = ("<frozen importlib", "<frozen zipimport")


class Watch:
    """What has happened since it was last asked."""

    def __init__(self, package: Path) -> None:
        self._package = str(package) + os.sep
        self._seen: list[str] = []
        self._busy = False

    def take(self) -> list[str]:
        seen, self._seen = self._seen, []
        return seen

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            self._judge(event, arguments)
        finally:
            self._busy = False

    def environment(self) -> None:
        for frame in _frames():
            name = frame.f_code.co_filename
            if not name.endswith(_ENVIRONMENT):
                if name.startswith(self._package):
                    self._seen.append("reads the environment")
                return

    def thread(self) -> None:
        self._seen.append("starts a thread")

    def _judge(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith("socket.") and event != "socket.gethostname":
            self._seen.append(f"uses a socket: {event}")
        elif event in _PROCESSES:
            self._seen.append(f"starts a process: {event}")
        elif event in _CHANGES or event.startswith(("shutil.", "tempfile.")):
            self._seen.append(f"changes files: {event}")
        elif event in {"os.putenv", "os.unsetenv"}:
            self._seen.append("changes the environment")
        elif event == "open":
            path, mode, flags = arguments
            if (mode and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._seen.append(f"writes {path}")
            elif self._own_doing():
                self._seen.append(f"reads {path}")

    def _own_doing(self) -> bool:
        """Whether the package's own code is at it, and not an import on its behalf."""
        for frame in _frames():
            name = frame.f_code.co_filename
            if name.startswith(_MACHINERY):
                return False
            if name.startswith(self._package):
                return True
        return False


def _frames() -> Iterator[types.FrameType]:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _handlers() -> list[Any]:
    return [signal.getsignal(number) for number in sorted(signal.valid_signals())]


def main(root: str, package: str, *modules: str) -> None:
    sys.dont_write_bytecode = True
    sys.path.insert(0, root)
    watch = Watch(Path(root, package).resolve())

    class Environment(os._Environ):  # type: ignore[type-arg]
        def __getitem__(self, key: str) -> str:
            watch.environment()
            return super().__getitem__(key)

        def __iter__(self) -> Iterator[str]:
            watch.environment()
            return super().__iter__()

        def __contains__(self, key: object) -> bool:
            watch.environment()
            return super().__contains__(key)

    class Thread(threading.Thread):
        def start(self) -> None:
            watch.thread()
            super().start()

    os.environ.__class__ = Environment
    # Python before 3.13 has no audit event for threads.
    threading.Thread = Thread  # type: ignore[misc]
    sys.addaudithook(watch.hook)
    did: dict[str, list[str]] = {}
    handlers = _handlers()
    for module in modules:
        importlib.import_module(module)
        did[module] = watch.take()
        threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
        if threads and "starts a thread" not in did[module]:
            did[module].append(f"threads run: {', '.join(threads)}")
        if _handlers() != handlers:
            did[module].append("handles signals")
            handlers = _handlers()
    print(json.dumps(did))


if __name__ == "__main__":
    main(*sys.argv[1:])
