"""The request's trip: which of the product's functions and files one PATCH crosses (`python -m benchmarks.trip`).

A real service of `--checkout` (default: this one) runs on an embedded PostgreSQL of its own. Its processes load a
`sitecustomize` that turns `sys.setprofile` on and off at SIGUSR2, so no line of the product takes part. Counted is what
every one of several equal requests calls: timers that happen to fire in between do not count.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import psutil

from .servers import BACKEND

REQUESTS: Final = 5
SECONDS: Final = 60.0

_PROFILER: Final = """
import os, signal, sys

calls = set()

def _profile(frame, event, argument):
    if event == "call" and _ROOT in frame.f_code.co_filename:
        calls.add((frame.f_code.co_filename.split(_ROOT)[1], frame.f_code.co_qualname))

def _toggle(number, frame):
    if sys.getprofile() is None:
        calls.clear()
        sys.setprofile(_profile)
        return
    sys.setprofile(None)
    path = os.path.join(os.environ["TRIP_DIRECTORY"], str(os.getpid()))
    with open(path + ".part", "w") as file:
        file.write("\\n".join(f"{name}\\t{function}" for name, function in sorted(calls)))
    os.replace(path + ".part", path)

_ROOT = os.environ.get("TRIP_ROOT", "/backend/src/")
signal.signal(signal.SIGUSR2, _toggle)
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trip", description=__doc__)
    parser.add_argument("--checkout", type=Path, default=BACKEND.parent, help="a checkout with backend/.venv")
    parser.add_argument("--verbose", action="store_true", help="print each function")
    asked = parser.parse_args()
    crossed = measure(asked.checkout.resolve() / "backend")
    files = Counter(file for file, _ in crossed)
    print(f"PATCH /v1/tasks/{{id}}: {len(crossed)} functions in {len(files)} files")
    for file, count in sorted(files.items()):
        print(f"  {file:<32} {count:>3}")
        if asked.verbose:
            for function in sorted(function for place, function in crossed if place == file):
                print(f"      {function}")
    return 0


def measure(backend: Path) -> set[tuple[str, str]]:
    """The functions, as (file below src/, qualified name), that each of several equal requests calls."""
    with tempfile.TemporaryDirectory(prefix="groundwork-trip-") as name:
        directory = Path(name)
        (directory / "sitecustomize.py").write_text(_PROFILER)
        python = str(backend / ".venv" / "bin" / "python")
        environment = {
            **os.environ,
            "PYTHONPATH": name,
            "TRIP_DIRECTORY": name,
            "TRIP_ROOT": f"{backend}/src/",
            "DATA_DIRECTORY": str(directory / "data"),
            "LOG_FORMAT": "json",
            "PORT": "0",
            # The general way: the fast path answers reads only, and would hide nothing here.
            "ENVIRONMENT": "test",
        }
        log_path = directory / "log"
        with log_path.open("w") as log:
            service = subprocess.Popen(
                [python, "-m", "src", "serve", "--embedded"],
                cwd=backend,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            address = _address(log_path, service)
            token = subprocess.check_output(
                [python, "-m", "src", "user", "token", "trip@example.com", "--create"],
                cwd=backend,
                env=environment,
                text=True,
                stderr=subprocess.DEVNULL,
            ).strip()
            return _profiled(address, token, _worker(service.pid), directory)
        finally:
            service.send_signal(signal.SIGTERM)
            service.wait(SECONDS)


def _address(log_path: Path, service: subprocess.Popen[bytes]) -> tuple[str, int]:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and service.poll() is None:
        for line in log_path.read_text(errors="replace").splitlines():
            found: dict[str, Any] = json.loads(line) if line.startswith("{") else {}
            if url := found.get("service") or found.get("url"):
                host, _, port = str(url).removeprefix("http://").rpartition(":")
                return host.strip("[]"), int(port)
        time.sleep(0.05)
    raise SystemExit(f"The service did not start:\n{log_path.read_text(errors='replace')[-2000:]}")


def _worker(pid: int) -> int:
    """The process that serves: the one child that runs Python, or the process itself without a supervisor."""
    for child in psutil.Process(pid).children():
        if "python" in child.name():
            return int(child.pid)
    return pid


def _profiled(address: tuple[str, int], token: str, pid: int, directory: Path) -> set[tuple[str, str]]:
    connection = http.client.HTTPConnection(*address, timeout=SECONDS)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def ask(method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection.request(method, path, json.dumps(body), headers)
        response = connection.getresponse()
        content = response.read()
        if response.status >= 300:
            raise SystemExit(f"{method} {path}: {response.status} {content.decode()}")
        found: dict[str, Any] = json.loads(content)
        return found

    path = f"/v1/tasks/{ask('POST', '/v1/tasks', {'title': 'A trip'})['id']}"
    for number in range(20):
        ask("PATCH", path, {"title": f"Trip {number}"})
    trips: list[set[tuple[str, str]]] = []
    for number in range(REQUESTS):
        os.kill(pid, signal.SIGUSR2)
        time.sleep(0.2)
        ask("PATCH", path, {"title": f"Profiled trip {number}"})
        os.kill(pid, signal.SIGUSR2)
        seen = directory / str(pid)
        deadline = time.monotonic() + SECONDS
        while not seen.exists():
            if time.monotonic() > deadline:
                raise SystemExit("The worker wrote no profile.")
            # The signal's handler runs once the loop wakes up: a probe wakes it.
            connection.request("GET", "/livez")
            connection.getresponse().read()
        lines = seen.read_text().splitlines()
        seen.unlink()
        trips.append({(file, function) for file, _, function in (line.partition("\t") for line in lines)})
    connection.close()
    return set.intersection(*trips)


if __name__ == "__main__":
    sys.exit(main())
