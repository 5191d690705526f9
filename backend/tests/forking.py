"""Commands in processes of their own, forked from one that has loaded the program already.

Starting Python and importing is nine tenths of what a command costs. Here it is done once: each command then has a
process, an environment, a working directory, streams and an exit code of its own, and shares nothing with the others.
What this leaves out, the start itself, is claimed where commands are started anew: test_secrets does so with one of
each group of commands.

With `-c` first, it is the program that follows, as with Python's own `-c`.

`Commands(backend, environment)` is the tests' side; run as a program, this file is the other.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOADED = (
    "src.cli.app", "src.main", "src.config.settings_docs", "src.embedded.database_target", "src.embedded.server",
    "src.services.schema", "src.services.task_transfer", "src.services.users", "src.verify.runner",
    "alembic.config", "alembic.script", "alembic.runtime.environment",
)  # fmt: skip
LONGEST = 1 << 20


class Commands:
    """The program in `backend`, loaded once; `run` is one command, from its start to its end."""

    def __init__(self, backend: Path, environment: Mapping[str, str]) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            cwd=backend,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def run(
        self, *arguments: str, environment: Mapping[str, str], seconds: float, typed: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """`typed` is what it finds on its standard input, which ends there."""
        with (
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as said,
            tempfile.TemporaryFile() as told,
        ):
            given.write(typed.encode())
            given.seek(0)
            streams = [stream.fileno() for stream in (given, said, told)]
            code = self.run_on(streams, *arguments, environment=environment, seconds=seconds)
            said.seek(0)
            told.seek(0)
            return subprocess.CompletedProcess(arguments, code, said.read().decode(), told.read().decode())

    def run_on(
        self, streams: Sequence[int], *arguments: str, environment: Mapping[str, str], seconds: float
    ) -> int:
        """The exit code of one that has these three descriptors for its streams."""
        request = json.dumps({"arguments": arguments, "environment": dict(environment)}).encode()
        socket.send_fds(self._link, [request], list(streams))
        self._link.settimeout(seconds)
        return int(self._link.recv(LONGEST))

    def close(self) -> None:
        self._link.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()


def main(link: socket.socket) -> None:
    sys.path.insert(0, os.getcwd())
    for module in LOADED:
        importlib.import_module(module)
    gc.freeze()
    while True:
        request, descriptors, _, _ = socket.recv_fds(link, LONGEST, 3)
        if not request:
            return
        child = os.fork()
        if child == 0:
            link.close()
            sys.exit(command(json.loads(request), descriptors))
        for descriptor in descriptors:
            os.close(descriptor)
        _, status = os.waitpid(child, 0)
        link.send(str(os.waitstatus_to_exitcode(status)).encode())


def command(request: dict[str, Any], descriptors: list[int]) -> int:
    """In the child: all that a start gives a command, and the command."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    # Those of the process that we were forked from remember what they were: files, or a terminal.
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    sys.argv = ["src", *request["arguments"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.argv[1:2] == ["-c"]:
        exec(sys.argv[2], {"__name__": "__main__"})
        return 0
    from src.cli.app import main as run

    return run()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
