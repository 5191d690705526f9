"""What will go wrong, and when: a pure function of the seed and the kinds, so that a run can be repeated.

A fault waits (`rest`), begins, lasts (`hold`), and ends; some also have an `amount`. A round has every kind once, in
an order of its own. The pauses are lengths and not moments: how long it takes to recover is for the service to say.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Kind:
    """What a fault is in a sentence, how long it lasts (seconds, from and to), and whether the database is hit."""

    sentence: str
    hold: tuple[float, float] = (0.0, 0.0)
    amount: tuple[int, int] = (0, 0)
    database: bool = True


KINDS: Final[dict[str, Kind]] = {
    "db-reset": Kind("every connection to the database is reset"),
    "db-black-hole": Kind("what is sent to the database, and what it answers, is gone", (0.2, 1.2)),
    "db-stall": Kind("bytes between service and database wait, and then flow", (0.2, 1.0)),
    "db-latency": Kind("bytes between service and database take so many ms longer", (0.5, 1.5), (20, 200)),
    "db-refuse": Kind("connections to the database are reset and new ones refused", (0.1, 1.2)),
    "db-reply-lost": Kind("the database does so many statements, and its answers are lost", (0.1, 0.5), (1, 12)),
    "pg-restart": Kind("PostgreSQL is restarted in immediate mode", (0.0, 0.8)),
    "pg-kill": Kind("every process of PostgreSQL is killed by SIGKILL, and it is started again", (0.0, 1.0)),
    "pg-kill-backend": Kind("one backend is killed by SIGKILL, so PostgreSQL restarts all of them"),
    "pg-freeze": Kind("every process of PostgreSQL is stopped by SIGSTOP", (0.2, 1.2)),
    "pg-terminate": Kind("every connection of the service is ended by pg_terminate_backend"),
    "pg-cancel": Kind("every statement of the service is cancelled, so many times", (0.0, 0.2), (1, 5)),
    "pg-lock": Kind("another holds the table of tasks in ACCESS EXCLUSIVE mode", (0.2, 1.5)),
    "pg-read-only": Kind("transactions are read-only", (0.2, 1.0)),
    "pg-crowded": Kind("others take every connection that PostgreSQL has", (0.2, 1.0)),
    "pg-password": Kind("the password of the service's role is another one, and nobody is connected", (0.2, 1.0)),
    "pg-revoke": Kind("the service's role may not write tasks", (0.2, 1.0)),
    "pg-alter": Kind("columns come, go and change their type, as in a migration", (0.1, 0.6)),
    "pg-slow": Kind("every write takes so many ms longer in PostgreSQL", (0.5, 1.5), (100, 900)),
    "pg-commit-fails": Kind("one commit in so many fails at its very end", (0.2, 1.0), (2, 6)),
    "worker-kill": Kind("one worker of the service is killed by SIGKILL", database=False),
    "worker-freeze": Kind("one worker of the service is stopped by SIGSTOP", (0.2, 1.5), database=False),
    "workers-renew": Kind("every worker is renewed by SIGHUP, one after the other", database=False),
    "service-restart": Kind("the service is ended by SIGTERM and started again", database=False),
    "net-reset": Kind("every connection of the clients is reset", database=False),
    "net-stall": Kind("bytes between clients and service wait, and then flow", (0.2, 0.8), database=False),
    "net-latency": Kind("bytes between them take so many ms longer", (0.3, 1.0), (5, 80), database=False),
    "net-reply-lost": Kind("so many answers of the service never arrive", (0.1, 0.5), (1, 25), database=False),
    "net-reply-cut": Kind("of so many answers of the service half arrives", (0.1, 0.5), (1, 25), database=False),
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One fault of a schedule; written and read as `rest kind hold amount`, and perhaps the kind of another that
    happens while this one lasts."""

    kind: str
    rest: float
    hold: float
    amount: int
    beside: str = ""

    def __str__(self) -> str:
        return f"{self.rest:.3f} {self.kind} {self.hold:.3f} {self.amount} {self.beside}".rstrip()

    @property
    def other(self) -> Fault:
        """The one beside it."""
        return Fault(self.beside, 0.0, 0.0, max(1, KINDS[self.beside].amount[0]))


BESIDE: Final = ("worker-kill", "worker-freeze", "net-reset", "net-stall", "net-reply-lost", "net-reply-cut")
"""What can happen while the database is hit and leaves it as it is."""


def schedule(
    seed: int, kinds: Iterable[str], *, rest: tuple[float, float] = (0.3, 1.0), pairs: bool = False
) -> Iterator[Fault]:
    """Faults without end. With `pairs` every second one that hits the database has another beside it."""
    chance, second = random.Random(seed), random.Random(f"{seed}/beside")
    names = sorted(set(kinds))
    while True:
        chance.shuffle(names)
        for name in names:
            kind = KINDS[name]
            yield Fault(
                name,
                round(chance.uniform(*rest), 3),
                round(chance.uniform(*kind.hold), 3),
                chance.randint(*kind.amount),
                second.choice(BESIDE) if pairs and kind.database and second.random() < 0.5 else "",
            )


def read(text: str) -> list[Fault]:
    """A schedule as it was printed, perhaps shortened since; empty lines and those with # are passed over."""
    lines = (line.split() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return [
        Fault(kind, float(rest), float(hold), int(amount), *beside)
        for rest, kind, hold, amount, *beside in lines
    ]


def chosen(words: Sequence[str]) -> list[str]:
    """The kinds that these words mean: a name, or the beginning of several (`pg`, `net-reply`). Empty: all."""
    if not words:
        return list(KINDS)
    found = [name for name in KINDS if any(name == word or name.startswith(f"{word}-") for word in words)]
    unknown = [
        word for word in words if not any(name == word or name.startswith(f"{word}-") for name in KINDS)
    ]
    if unknown:
        raise ValueError(f"no kinds of fault: {', '.join(unknown)} (there are {', '.join(KINDS)})")
    return found
