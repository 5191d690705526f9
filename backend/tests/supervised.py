"""A supervisor with workers of the tiny application in `serving.py`, as tests start and watch it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from processes import command_line, descendants
from waiting import PATIENCE, until

SCRIPT = Path(__file__).with_name("serving.py")


class Service:
    """One supervisor under test. Everything that it left behind is ended by pid, whatever the test did."""

    def __init__(
        self, directory: Path, settings: dict[str, Any], environment: dict[str, str], script: Path
    ) -> None:
        self.log_path = directory / f"log-{time.monotonic_ns()}"
        self.log_path.touch()
        self._seen: set[psutil.Process] = set()
        self._connections: list[Any] = []
        self.command = [
            sys.executable,
            str(script),
            "supervise",
            json.dumps({"port": 0, "log_format": "json"} | settings),
        ]
        self.environment = {**os.environ, "TEST_START_FILE": str(directory / "start"), **environment}

    def start(self, **more: Any) -> Service:
        with self.log_path.open("a") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log} | more,
            )
        self.supervisor_pid = self.process.pid
        return self

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def serving(self, workers: int = 1) -> Service:
        """Wait for the banner, and until that many workers have shown themselves."""
        until(lambda: self.events("service.ready") or self.process.poll() is not None, what=lambda: self.log)
        assert self.events("service.ready"), self.log
        if workers > 1:
            until(lambda: len({self.facts()["pid"] for _ in range(20)}) == workers)
        return self

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.events("service.ready")[0]["service"].removeprefix("http://").rpartition(":")
        return host, int(port)

    def connect(self) -> Any:
        self._connections.append(http.client.HTTPConnection(*self.address, timeout=PATIENCE))
        return self._connections[-1]

    def socket(self) -> Any:
        self._connections.append(socket.create_connection(self.address, timeout=PATIENCE))
        return self._connections[-1]

    def ask(self, path: str) -> tuple[int, bytes, http.client.HTTPResponse]:
        connection = self.connect()
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer
        finally:
            connection.close()

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ask("/facts")[1])
        return found

    def workers(self) -> list[int]:
        return [process.pid for process in self.children() if command_line(process)[-1:] == ["work"]]

    def children(self) -> list[psutil.Process]:
        """All that descends from the supervisor now; remembered, to be looked for afterwards."""
        self._seen.update(descendants(self.supervisor_pid))
        return [process for process in self._seen if alive(process)]

    def signal(self, number: int) -> None:
        self.children()
        self.process.send_signal(number)

    def ended(self, seconds: float = 60) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{self.log}")

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self.children()
        if hasattr(self, "process") and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        for process in self._seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
