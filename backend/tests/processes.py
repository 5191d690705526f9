"""Processes that tests start and watch: what they are started from, and who descends from them."""

from __future__ import annotations

import compileall
import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

BACKEND = Path(__file__).resolve().parents[1]


def copy_program(backend: Path) -> None:
    """The program as it is in a clone, in `backend`: no .env and no data of the developer's is met there.

    Its bytecode comes along: a copy that has to be compiled first costs a second of CPU at each start.
    """
    compileall.compile_dir(BACKEND / "src", quiet=1)
    shutil.copytree(BACKEND / "src", backend / "src")
    shutil.copy(BACKEND / "verify_db.py", backend)


_KERNEL_TELLS = Path("/proc/1/task/1/children").exists()


def lend_packages(environment: Path) -> None:
    """A virtual environment that borrows this one's packages, pip among them: nothing is downloaded or unpacked."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python3*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")


def descendants(pid: int) -> list[psutil.Process]:
    """All that descends from it now; nothing when it is gone.

    Asked of the kernel, which costs a hundredth of reading every process's parent: tests ask again and again while
    they wait, and what they burn is taken from what they wait for.
    """
    found: list[psutil.Process] = []
    if not _KERNEL_TELLS:
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(pid).children(recursive=True)
        return found
    numbers = [pid]
    for number in numbers:
        # Whatever has ended meanwhile has no children any more.
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{number}/task").iterdir():
                numbers += map(int, (task / "children").read_text().split())
    for number in numbers[1:]:
        with contextlib.suppress(psutil.Error):
            found.append(psutil.Process(number))
    return found


def command_line(process: psutil.Process) -> list[str]:
    """Nothing, once it has ended: it may do so while it is looked at."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []
