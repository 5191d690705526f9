"""`make bench`, and its parts: `make bench ARGS=growth`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import against, growth, measuring, micro, overload
from .data import USERS
from .servers import SERVERS

USUAL = [slug for slug, server in SERVERS.items() if server.usual]

COMMANDS = (
    "run",
    "quick",
    "contract",
    "profile",
    "micro",
    "growth",
    "statements",
    "sweep",
    "overload",
    "against",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        default="run",
        choices=[*COMMANDS],
    )
    parser.add_argument("--servers", default=",".join(USUAL), help="which, with commas between them")
    parser.add_argument("--operations", default=None, help="which, with commas between them")
    parser.add_argument(
        "--ways", default=",".join(measuring.WAYS), help="32 and 256 connections, a fixed rate"
    )
    parser.add_argument("--users", type=int, default=USERS, help="people with 100 tasks each")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long one measurement takes")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second at the fixed rate")
    parser.add_argument("--out", type=Path, default=None, help="the directory for the results")
    parser.add_argument("--instructions", action="store_true", help="micro: count them too, by valgrind")
    parser.add_argument("--checkout", type=Path, default=None, help="against: the directory of the other one")
    asked = parser.parse_args()
    if asked.what == "micro":
        print(micro.main(instructions=asked.instructions))
        return 0
    if asked.what == "growth":
        print(growth.main(asked.rounds, asked.seconds))
        return 0
    if asked.what == "against":
        print(against.main(asked))
        return 0
    if asked.what == "overload":
        print(overload.main(asked))
        return 0
    if asked.out is None and asked.what == "run":
        asked.out = measuring.RESULTS
    return measuring.main(asked)


if __name__ == "__main__":
    sys.exit(main())
