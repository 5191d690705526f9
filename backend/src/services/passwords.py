"""Passwords: what is derived from them by Argon2id, beside the event loop and never more at a time than is allowed.

Nobody is ever given a hash to compare with. Stored are a *recipe* (how to derive: the head of a PHC text, up to
its salt) and a *verifier* (the SHA-256 of what was derived, which is the *proof*). Who has read both cannot log in
with them: that takes a proof.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
import secrets
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from pwdlib.hashers.argon2 import Argon2Hasher

from ..config.accounts import MAX_MEMORY_KIB, MAX_TIME_COST
from ..errors import TooManyRequests

if TYPE_CHECKING:
    from ..config.settings import Settings

PROOF_BYTES: Final = 32
SALT_BYTES: Final = 16
_MOST_LANES: Final = 4
_HEAD = "$argon2id$v=19"
_RECIPE = re.compile(
    re.escape(_HEAD)
    + r"\$m=([1-9][0-9]{0,9}),t=([1-9][0-9]{0,9}),p=([1-9][0-9]{0,9})\$([A-Za-z0-9+/]{11,86})",
    re.ASCII,
)
# On two cores with a load of 19 by other programs, a loop's turns came up to 27 ms late (p99) while passwords were
# hashed without it, 18 ms with it, and 8 to 12 ms without any hashing. At 19 it is 14 ms, but where others
# compute all day, nobody would log in any more.
NICENESS: Final = 10


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Derived:
    """What a password gives with a recipe. Neither part shows itself."""

    recipe: str
    proof: bytes

    @property
    def verifier(self) -> bytes:
        """What is stored to know the proof again: 32 bytes."""
        return hashlib.sha256(self.proof).digest()


class _Cost(NamedTuple):
    memory_kib: int
    passes: int
    lanes: int = 1


class Passwords:
    """Derives proofs from passwords, in threads of its own. Open it with `async with`.

    `threads` at a time, `queue` more wait, and everybody else is refused at once.
    """

    def __init__(self, *, memory_kib: int, passes: int, threads: int = 1, queue: int = 64) -> None:
        self._today = _Cost(memory_kib, passes)
        self._number = threads
        self._places = threading.BoundedSemaphore(threads + queue)
        self._threads: ThreadPoolExecutor | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls(
            memory_kib=settings.password_hash_memory_kib,
            passes=settings.password_hash_time_cost,
            threads=settings.password_hash_threads,
            queue=settings.password_hash_queue,
        )

    async def __aenter__(self) -> Self:
        self._threads = ThreadPoolExecutor(
            self._number, thread_name_prefix="passwords", initializer=_let_others_go_first
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Whoever waits is cancelled; what is under way, a second at the most, is waited for."""
        threads, self._threads = self._threads, None
        if threads is not None:
            await asyncio.to_thread(threads.shutdown, cancel_futures=True)

    async def derive(self, password: str, recipe: str | None = None) -> Derived:
        """The proof that this password gives: by a recipe that is stored, or by a new one of today's strength.

        Raises `ValueError` for a recipe that cannot be used or a password that is not Unicode, and
        `TooManyRequests` when all places are taken.
        """
        if recipe is None:
            cost, salt = self._today, secrets.token_bytes(SALT_BYTES)
            recipe = _written(cost, salt)
        else:
            cost, salt = _read(recipe)
        given = _encoded(password)
        if self._threads is None:
            raise RuntimeError("Passwords is not open")
        if not self._places.acquire(blocking=False):
            raise TooManyRequests("passwords-busy", "Too many passwords are being checked just now.")
        try:
            work = self._threads.submit(_proof, given, cost, salt)
        except BaseException:
            self._places.release()
            raise
        # Called once, when it is over or cancelled before it began; a caller that has gone does not end it.
        work.add_done_callback(self._leave)
        return Derived(recipe, await asyncio.wrap_future(work))

    def outdated(self, recipe: str) -> bool:
        """Whether it is of another strength than today's, so that its owner's next log-in should renew it.

        Raises `ValueError` for a recipe that cannot be used.
        """
        return _read(recipe)[0] != self._today

    def _leave(self, _: Future[bytes]) -> None:
        self._places.release()


def _proof(password: bytes, cost: _Cost, salt: bytes) -> bytes:
    hasher = Argon2Hasher(cost.passes, cost.memory_kib, cost.lanes, hash_len=PROOF_BYTES)
    return _decoded(hasher.hash(password, salt=salt).rpartition("$")[2])


def _encoded(password: str) -> bytes:
    try:
        return password.encode()
    except UnicodeEncodeError:
        # That error would show the whole of it.
        raise ValueError("a password that is not Unicode") from None


def _read(recipe: str) -> tuple[_Cost, bytes]:
    """Bounded, because what stands in the database may have been put there to keep us busy for an hour."""
    found = _RECIPE.fullmatch(recipe)
    if found is None:
        raise ValueError("not a recipe for a password")
    cost = _Cost(*map(int, found.groups()[:3]))
    if cost.memory_kib > MAX_MEMORY_KIB or cost.passes > MAX_TIME_COST or cost.lanes > _MOST_LANES:
        raise ValueError("a recipe that asks for too much")
    if cost.memory_kib < 8 * cost.lanes:
        raise ValueError("a recipe with less memory than Argon2 takes")
    salt = _decoded(found[4])
    if _written(cost, salt) != recipe:
        raise ValueError("a recipe that is not written as we write it")
    return cost, salt


def _written(cost: _Cost, salt: bytes) -> str:
    text = base64.b64encode(salt).decode().rstrip("=")
    return f"{_HEAD}$m={cost.memory_kib},t={cost.passes},p={cost.lanes}${text}"


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise ValueError("a recipe that is not in base64") from None


def _let_others_go_first() -> None:
    """On Linux a thread has a priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
