"""What a start costs, measured on this machine: `python -m benchmarks.startup` in backend/.

CPU seconds from the start of the process to /readyz 200 (supervisor and one worker, on a migrated database), what
supervisor and worker hold in memory then, CPU seconds of the commands of every day, and the most expensive imports.
CPU time is counted and not the clock, and the least of some runs, so that neighbours disturb little. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from src.embedded.server import EmbeddedPostgres
from src.services.signing import new_key
from tests.postgres_server import give_away

BACKEND = Path(__file__).resolve().parents[1]
COMMANDS = (
    "--help",
    "config",
    "openapi",
    "user list",
    "user token ana@example.com --create",
    "migrate check",
)
SECONDS = 60

# Runs in a process of its own: the CPU time of each module's own lines, without that of what it imports.
PROFILE = """
import gc, importlib, json, sys
from importlib.machinery import ExtensionFileLoader, SourceFileLoader
from time import process_time
spent, below = {}, [0.0]
gc.disable()  # As a worker does.
def timed(loader, step, name_of):
    original = getattr(loader, step)
    def run(self, given):
        below.append(0.0)
        began = process_time()
        try:
            return original(self, given)
        finally:
            whole = process_time() - began
            name = name_of(given)
            spent[name] = spent.get(name, 0.0) + whole - below.pop()
            below[-1] += whole
    setattr(loader, step, run)
timed(SourceFileLoader, "exec_module", lambda module: module.__name__)
timed(ExtensionFileLoader, "create_module", lambda spec: spec.name)
for module in sys.argv[1:]:
    importlib.import_module(module)
print(json.dumps(spent))
"""


@dataclass(frozen=True)
class Process:
    """Of one process and its threads: CPU seconds, and megabytes in memory."""

    cpu: float
    resident: float
    own: float
    """What would be free without it; the rest it shares with others."""


def look(pid: int) -> Process:
    nanoseconds = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        nanoseconds += int((task / "schedstat").read_text().split()[0])
    sizes: Counter[str] = Counter()
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes = line.split()[:2]
        sizes[name] = int(kilobytes)
    own = sizes["Private_Clean:"] + sizes["Private_Dirty:"]
    return Process(nanoseconds / 1e9, sizes["Rss:"] / 1024, own / 1024)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment(url: str, key: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**kept, "DATABASE_URL": url, "SIGNING_KEYS": key, "LOG_FORMAT": "json"}


@contextmanager
def database() -> Iterator[str]:
    """The URL of a migrated database on a server of its own."""
    with tempfile.TemporaryDirectory(prefix="groundwork-startup-") as directory:
        give_away(Path(directory))
        with EmbeddedPostgres(Path(directory) / "data") as server:
            url = server.url
            done = subprocess.run(
                [sys.executable, "-m", "src", "migrate", "up"],
                cwd=BACKEND,
                env=environment(url, new_key()),
                capture_output=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            yield url


def start(url: str, key: str) -> tuple[Process, Process]:
    """Supervisor and worker at the moment when the service is ready."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "src", "serve", "--port", "0", "--workers", "1"],
            cwd=BACKEND,
            env=environment(url, key),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            address = _serving(process, log.fileno())
            _ready(address)
            [worker] = children(process.pid)
            return look(process.pid), look(worker)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(SECONDS)


def _serving(process: subprocess.Popen[bytes], log: int) -> str:
    deadline = time.monotonic() + SECONDS
    while True:
        said = os.pread(log, 1_000_000, 0).decode()
        for line in said.splitlines():
            if '"event":"service.ready"' in line and line.endswith("}"):
                return str(json.loads(line)["service"])
        assert process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.01)


def _ready(address: str) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"{address}/readyz", timeout=10).close()
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)


def command(words: str, url: str, key: str) -> float:
    """CPU seconds of one command, which has to succeed."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "src", *words.split()],
            cwd=BACKEND,
            env=environment(url, key),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, os.pread(said.fileno(), 10_000, 0).decode()
    return used.ru_utime + used.ru_stime


def imports(*modules: str, runs: int) -> dict[str, float]:
    """CPU seconds of each module that importing these brings in."""
    least: dict[str, float] = {}
    for _ in range(runs):
        done = subprocess.run(
            [sys.executable, "-c", PROFILE, *modules], cwd=BACKEND, capture_output=True, check=True
        )
        for name, seconds in json.loads(done.stdout).items():
            least[name] = min(seconds, least.get(name, seconds))
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="how often each thing is run (default: 5)")
    runs = parser.parse_args().runs
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores; the least of {runs} runs.\n")
    key = new_key()
    with database() as url:
        starts = [start(url, key) for _ in range(runs)]
        commands = {words: min(command(words, url, key) for _ in range(runs)) for words in COMMANDS}
    print(f"{min(one.cpu + other.cpu for one, other in starts):6.2f} s of CPU to /readyz 200, of which")
    for name, of in (("supervisor", 0), ("worker", 1)):
        cpu = min(pair[of].cpu for pair in starts)
        resident, own = (min(getattr(pair[of], what) for pair in starts) for what in ("resident", "own"))
        print(f"{cpu:6.2f} s {name}, which holds {resident:.0f} MB ({own:.0f} MB of its own)")
    print("\nCPU of a command")
    for words, seconds in commands.items():
        print(f"{seconds:6.2f} s {words}")
    found = imports("src.server.worker", "src.main", runs=runs)
    print(
        f"\n{sum(found.values()):6.2f} s of CPU to import what a worker runs ({len(found)} modules), most of it"
    )
    packages: Counter[str] = Counter()
    for name, seconds in found.items():
        packages[name.split(".")[0]] += seconds  # type: ignore[assignment]
    for title, costs in (("by package", packages), ("by module", Counter(found))):
        print(f"  {title}")
        for name, seconds in costs.most_common(10):
            print(f"{seconds * 1000:8.0f} ms {name}")


if __name__ == "__main__":
    main()
