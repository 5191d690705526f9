"""Whether the harness finds what it is for: each mutant is run until a check that has to find it has found it.

A mutant that is found by nothing but a check that was not meant for it has survived. `control` is no mutant but its
opposite: with one wall down and the other standing, nothing forbidden may happen.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from src.embedded.roles import APPLICATION, NAME

from .run import Result, perform
from .schedule import chosen, schedule
from .stage import staged

MOST_SECONDS: Final = 300.0
"""So long a mutant may live."""

_NO_POLICIES: Final = tuple(
    f"ALTER TABLE {table} {words} ROW LEVEL SECURITY"
    for table in ("users", "deleted_users", "tasks", "idempotency_keys")
    for words in ("DISABLE", "NO FORCE")
)
_RECONNECT: Final = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{APPLICATION}'"
_LOSING: Final = "db-reset db-reply-lost pg-terminate"
_CRASHING: Final = "pg-kill worker-kill"


@dataclass(frozen=True)
class Mutant:
    """What is broken in a sentence, which columns have to say so, and what is needed for it to show."""

    sentence: str
    caught_by: frozenset[str]
    breakage: str
    kinds: str = "db-reset"
    role: str = APPLICATION
    prepare: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    workers: int = 1
    control: bool = False


def _mutant(sentence: str, caught_by: str, breakage: str, kinds: str = "db-reset", **more: object) -> Mutant:
    return Mutant(sentence, frozenset(caught_by.split()), breakage, kinds, **more)  # type: ignore[arg-type]


MUTANTS: Final[dict[str, Mutant]] = {
    # Nothing lost, nothing claimed
    "answers-before-commit": _mutant(
        "2xx leaves 5 ms before the commit", "lost stale", "answers-before-commit", f"{_LOSING} {_CRASHING}"
    ),
    "claims-success": _mutant(
        "201 where the outcome is not known", "lost", "claims-success", "db-reset db-refuse"
    ),
    "synchronous-commit-off": _mutant(
        "commits are answered before they are written: a kill takes what was in PostgreSQL's own buffers",
        "lost",
        "nothing",
        "pg-kill",
        prepare=(f"ALTER ROLE {APPLICATION} SET synchronous_commit = off", _RECONNECT),
    ),
    "fsync-off": _mutant(
        "nothing is forced to the disk: no kill can show it, so the setting is asked for",
        "verify",
        "nothing",
        options=(("fsync", "off"),),
    ),
    "tells-503-of-what-may-be-written": _mutant(
        "503 where the answer of a write was lost", "lie", "tells-503-of-what-may-be-written", _LOSING
    ),
    "says-500": _mutant("500 where it is 503", "contract", "says-500", "pg-cancel pg-lock db-reset"),
    "leaves-out-retry-after": _mutant(
        "503 without Retry-After", "contract", "leaves-out-retry-after", "pg-cancel db-refuse"
    ),
    # Once
    "ignores-the-key": _mutant(
        "an Idempotency-Key means nothing", "doubled", "ignores-the-key", "net-reply-lost"
    ),
    "keeps-the-key-after-the-write": _mutant(
        "task and key are two transactions", "doubled", "keeps-the-key-after-the-write", _LOSING
    ),
    "takes-any-request-under-a-key": _mutant(
        "the hash of the request is not compared", "doubled", "takes-any-request-under-a-key"
    ),
    "shares-keys-between-users": _mutant(
        "one user's key gives another's answer", "isolation", "shares-keys-between-users"
    ),
    "repeats-any-write": _mutant(
        "a write without a key is sent again when its answer is lost",
        "doubled",
        "repeats-any-write",
        "db-reply-lost",
    ),
    "updates-twice": _mutant("a change without a condition is made twice", "doubled", "updates-twice"),
    # Versions, deletions, reads
    "drops-the-version-check": _mutant(
        "If-Match takes any version", "lost-update", "drops-the-version-check"
    ),
    "forgets-a-deletion": _mutant(
        "one deletion in ten is answered and not done", "undead", "forgets-a-deletion"
    ),
    "reads-from-a-cache": _mutant(
        "a read may be a second old", "stale backwards undead", "reads-from-a-cache"
    ),
    # Between users: the first wall is the statement's own filter, the second is row-level security
    "filter-dropped-role-unbound": _mutant(
        "no filter by owner, and a role that no policy binds: both walls are down",
        "isolation",
        "drops-the-owner-filter",
        role=NAME,
    ),
    "filter-dropped-policies-off": _mutant(
        "no filter by owner, and no policies: both walls are down",
        "isolation",
        "drops-the-owner-filter",
        prepare=_NO_POLICIES,
    ),
    "policies-off": _mutant(
        "no policies: the second wall is down, and the first still stands",
        "isolation",
        "nothing",
        prepare=_NO_POLICIES,
    ),
    "caches-reads-for-everybody": _mutant(
        "a cache of reads that does not know whose they are: no wall in the database helps",
        "isolation",
        "caches-reads-for-everybody",
    ),
    "takes-one-for-another": _mutant(
        "one request in fifty is taken for another person's", "isolation", "takes-one-for-another"
    ),
    "filter-dropped-behind-policies": _mutant(
        "no filter by owner, and the second wall stands: nothing forbidden may happen",
        "",
        "drops-the-owner-filter",
        control=True,
    ),
    # Staying there
    "leaks-connections": _mutant(
        "a connection that saw trouble is never given back", "recovery", "leaks-connections", "db-reset"
    ),
    "cuts-connections-when-it-retires": _mutant(
        "a worker that is renewed closes its connections in mid-request",
        "renewal",
        "cuts-connections-when-it-retires",
        "workers-renew",
        workers=2,
    ),
}


def hunt(names: Sequence[str], *, seconds: float, seed: int, clients: int) -> int:
    """Runs the mutants, prints what found each, and gives 1 when one has survived."""
    unknown = [name for name in names if name not in MUTANTS]
    if unknown:
        print(f"no mutants: {', '.join(unknown)} (there are {', '.join(MUTANTS)})")
        return 2
    survivors = []
    for name in names or MUTANTS:
        began = time.monotonic()
        found = _hunted(MUTANTS[name], seconds=seconds, seed=seed, clients=clients)
        mutant = MUTANTS[name]
        told = ", ".join(f"{column} {count}" for column, count in found.items() if count) or "nothing"
        if mutant.control:
            right, verdict = not any(found.values()), "held"
        else:
            right, verdict = any(found[column] for column in mutant.caught_by), "caught"
        if not right:
            survivors.append(name)
            verdict = "NOT HELD" if mutant.control else "SURVIVED"
        print(
            f"{verdict:<9} {name:<34} in {time.monotonic() - began:3.0f} s by {told}\n{'':<10}{mutant.sentence}",
            flush=True,
        )
    print(
        f"{len(names or MUTANTS) - len(survivors)} of {len(names or MUTANTS)} as they have to be"
        + (f"; not: {', '.join(survivors)}" if survivors else "")
    )
    return 1 if survivors else 0


def _hunted(mutant: Mutant, *, seconds: float, seed: int, clients: int) -> dict[str, int]:
    """What the checks found, after as many rounds as it took."""
    until = time.monotonic() + MOST_SECONDS
    found: dict[str, int] = {}
    journals = Path(tempfile.mkdtemp(prefix="groundwork-mutant-"))
    try:
        with staged(
            workers=mutant.workers,
            mutant=mutant.breakage,
            role=mutant.role,
            options=dict(mutant.options),
            prepare=mutant.prepare,
        ) as stage:
            number = 0
            while not found or (
                not mutant.control
                and not any(found[column] for column in mutant.caught_by)
                and time.monotonic() + seconds < until
            ):
                kinds = chosen(mutant.kinds.split())
                result = Result(seed + number, kinds, mutant.workers, clients)
                faults = schedule(seed + number, kinds, rest=(0.2, 0.8))
                perform(
                    stage, faults, result, journals / str(number), seconds=seconds, say=lambda *_: None,
                    verifying="verify" in mutant.caught_by or mutant.control,
                )  # fmt: skip
                found = result.findings.counts
                stage.sql("TRUNCATE users CASCADE")
                number += 1
    finally:
        shutil.rmtree(journals, ignore_errors=True)
    return found
