"""The long mode of the tests that make their own input: `make fuzz SECONDS=600 SEED=1`.

Two things side by side, until the time is up: schemathesis, in all of its phases, against a service in processes of its
own; and round after round of every test that hypothesis feeds and of the corpora in every place, each round with
another seed and another part of the corpora. What fails is shown with the command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

ROOT: Final = Path(__file__).resolve().parents[2]
TESTS: Final = ROOT / "backend" / "tests"
DESCRIBED: Final = "backend/tests/api/test_schemathesis.py"
CORPORA: Final = "backend/tests/api/test_surface.py"
# What a run needs before its first test, and after its last.
MARGIN_SECONDS: Final = 30


def fed_by_hypothesis() -> list[str]:
    """The modules whose tests hypothesis feeds, found by what they import."""
    return [
        path.relative_to(ROOT).as_posix()
        for path in sorted(TESTS.rglob("test_*.py"))
        if re.search(r"^from hypothesis import", path.read_text(), re.MULTILINE)
    ]


@dataclass
class Run:
    """One pytest under way, its words kept in a file."""

    words: list[str]
    variables: dict[str, str]
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    @classmethod
    def started(cls, *words: str, **variables: str) -> Run:
        log = tempfile.TemporaryFile(prefix="groundwork-fuzz-")  # noqa: SIM115, it lives as long as the process
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return cls(list(words), variables, process, log)

    def ended_by(self, deadline: float) -> bool:
        """Waits for it. False: its time was up before its work, and it was told to clean up and go."""
        try:
            self.process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            return False
        return True

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode("utf-8", "replace")

    @property
    def again(self) -> str:
        given = " ".join(f"{name}={value}" for name, value in self.variables.items())
        return f"{given} backend/.venv/bin/python -m pytest -x {' '.join(self.words)}"


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(arguments: list[str]) -> int:
    """0 when nothing was found, else 1."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="how long (at least 90)")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="where chance begins; default: the clock"
    )
    given = parser.parse_args(arguments)
    seconds, seed = max(given.seconds, 90), given.seed
    say(f"Fuzzing for {seconds} s; SEED={seed}")
    began = time.monotonic()
    deadline = began + seconds
    described = Run.started(
        DESCRIBED,
        GROUNDWORK_FUZZ_SECONDS=str(seconds - 2 * MARGIN_SECONDS),
        GROUNDWORK_FUZZ_SEED=str(seed),
        GROUNDWORK_TEST_SECONDS=str(seconds + 600),
    )
    found: list[Run] = []
    fed = fed_by_hypothesis()
    rounds = tests = 0
    try:
        while time.monotonic() + MARGIN_SECONDS < deadline and not found:
            number = seed + rounds
            run = Run.started(
                *fed,
                CORPORA,
                f"--hypothesis-seed={number}",
                GROUNDWORK_FUZZ_ROUND=str(number),
                GROUNDWORK_TEST_SECONDS="900",
            )
            whole = run.ended_by(deadline)
            if whole and run.process.returncode:
                found.append(run)
            counted = re.search(r"^(\d+) tests were run", run.said(), re.MULTILINE)
            tests += int(counted[1]) if counted else 0
            rounds += 1
            cut = "" if whole else ", cut off by the time"
            say(f"  round {rounds} (seed {number}): {counted[0] if counted else 'no test was ended'}{cut}")
        if not described.ended_by(deadline + 4 * MARGIN_SECONDS):
            say("  schemathesis did not end in its time")
            found.append(described)
        elif described.process.returncode:
            found.append(described)
    finally:
        for run in (described, *found):
            if run.process.poll() is None:
                run.process.send_signal(signal.SIGINT)
                run.process.wait(60)
    for run in found:
        say("\n".join(line[:2_000] for line in run.said().splitlines()[-400:]))
        say(f"Found something. Again: {run.again}")
    say(
        f"{rounds} rounds, {tests} tests, schemathesis {'failed' if described in found else 'passed'}, "
        f"{time.monotonic() - began:.0f} s, {len(found)} found; SEED={seed}"
    )
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
