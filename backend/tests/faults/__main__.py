"""The harness that proves that nothing is lost: `make faults`, and `make mutants` to prove that it would notice."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from . import mutants, report
from .run import Result, perform
from .schedule import Fault, chosen, read, schedule
from .stage import BACKEND, staged

REPORTS = BACKEND / ".data" / "faults"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="load the service while faults happen, then compare")
    run.add_argument("--seconds", type=float, default=180)
    run.add_argument("--seed", type=int, default=None, help="default: another one each time; it is printed")
    run.add_argument(
        "--kinds", default="", help="names of faults, or beginnings of names, with commas between"
    )
    run.add_argument("--workers", type=int, default=2)
    run.add_argument("--clients", type=int, default=12, help="an even number: each two are a family")
    run.add_argument("--schedule", type=Path, default=None, help="carry out the faults in this file instead")
    run.add_argument("--print-schedule", action="store_true", help="print what the seed means, and stop")
    run.add_argument(
        "--pairs", action="store_true", help="every second fault of the database has another beside it"
    )
    run.add_argument("--keep", action="store_true", help="keep the journals although all is well")
    caught = commands.add_parser("mutants", help="break the service on purpose, and see each breakage found")
    caught.add_argument("names", nargs="*", help="default: all")
    caught.add_argument("--seconds", type=float, default=20, help="of a round; a mutant has several")
    caught.add_argument("--seed", type=int, default=1)
    caught.add_argument("--clients", type=int, default=12)
    given = parser.parse_args(arguments)
    # Ctrl-C and SIGTERM alike: everything that was started is ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if given.command == "mutants":
        return mutants.hunt(given.names, seconds=given.seconds, seed=given.seed, clients=given.clients)
    return _run(given)


def _run(given: argparse.Namespace) -> int:
    seed = int(time.time()) % 1_000_000 if given.seed is None else given.seed
    try:
        kinds = chosen([word for word in given.kinds.replace(",", " ").split() if word])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    faults: itertools.chain[Fault] | list[Fault]
    faults = (
        list(read(given.schedule.read_text()))
        if given.schedule
        else itertools.chain(schedule(seed, kinds, pairs=given.pairs))
    )
    if given.print_schedule:
        for fault in itertools.islice(faults, round(given.seconds)):
            print(fault)
        return 0
    clients = max(2, given.clients + given.clients % 2)
    place = REPORTS / f"{time.strftime('%Y%m%d-%H%M%S')}-seed-{seed}"
    place.mkdir(parents=True)
    result = Result(seed, kinds, given.workers, clients)
    print(
        f"seed {seed}, {given.seconds:.0f} s, {given.workers} workers, {clients} clients, {len(kinds)} kinds of fault"
    )
    with staged(workers=given.workers) as stage:
        perform(
            stage, faults, result, place / "journals", seconds=given.seconds, say=report.progress(sys.stderr)
        )
        if not result.findings.clean:
            shutil.copy(stage.log_path, place / "service.log")
    print(report.write(result, place))
    if result.findings.clean and not given.keep:
        shutil.rmtree(place / "journals")
    print(f"Report: {os.path.relpath(place)}")
    return 0 if result.findings.clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
