"""The public keys of an issuer, as its JWKS address publishes them: fetched, kept, and looked for anew.

A key that is not known is looked for at once, so that a rotation costs nobody a request; how often is bounded, so
that made-up key ids cost the issuer a handful of requests a minute. While the address does not answer, the keys
that are known go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from ..config.logging import get_logger
from ..errors import Unavailable
from .fetching import FetchFailed
from .keys import PUBLIC, VerificationKey, from_jwk

MOST_KEYS: Final = 100
AT_ONCE: Final = 3
"""How many searches for unknown keys may follow each other without a pause, per issuer and process."""
PAUSE_SECONDS: Final = 20.0
"""After how long another one may: three a minute while a flood lasts."""
FRESH_SECONDS: Final = 300.0
"""How old the keys may grow before they are fetched again, so that a withdrawn one is noticed."""
RETRY_SECONDS: Final = 30.0

log = get_logger(__name__)


@dataclass(slots=True)
class KeySet:
    """The usable keys of a JWKS, and how many others it has, by why they are not used."""

    named: dict[str, VerificationKey] = field(default_factory=dict)
    nameless: list[VerificationKey] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)

    def all(self) -> list[VerificationKey]:
        return [*self.named.values(), *self.nameless]


def key_set(body: bytes) -> KeySet:
    """Reads a JWKS. Raises `FetchFailed` for what is none; keys that cannot be used are left out."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise FetchFailed("not-a-jwks")
    if len(entries) > MOST_KEYS:
        raise FetchFailed("too-many-keys")
    found = KeySet()
    keys: list[VerificationKey] = []
    for entry in entries:
        key = from_jwk(entry)
        if isinstance(key, str):
            found.unused[key] += 1
        else:
            keys.append(key)
    names = Counter(key.kid for key in keys)
    for key in keys:
        if key.kid is None:
            found.nameless.append(key)
        elif names[key.kid] == 1:
            found.named[key.kid] = key
        else:
            # Which of them a token means would be the token's choice.
            found.unused["duplicate-kid"] += 1
    return found


@dataclass(frozen=True, slots=True)
class _Flight:
    started_at: float
    task: asyncio.Task[None]


class PublishedKeys:
    """One issuer's keys. `open` and `close` belong to the service's lifespan; durations are monotonic."""

    algorithms = PUBLIC

    def __init__(
        self,
        issuer: str,
        url: str,
        fetch: Callable[[str], Awaitable[bytes]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._issuer = issuer
        self._url = url
        self._fetch = fetch
        self._clock = clock
        self._keys: KeySet | None = None
        self._failing = False
        self._due_at = 0.0
        self._flight: _Flight | None = None
        self._allowance = float(AT_ONCE)
        self._counted_at = clock()

    def open(self) -> None:
        """Begins to fetch; who asks meanwhile waits for it. The service starts also while this address is down."""
        self._start()

    async def close(self) -> None:
        if self._flight is not None:
            self._flight.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._flight.task

    async def find(
        self, kid: str | None, *, instead_of: VerificationKey | None = None
    ) -> VerificationKey | None:
        """The key with this id; without an id the only one there is. See `KeySource.find`."""
        key = self._known(kid, instead_of)
        if key is not None:
            if self._clock() >= self._due_at and self._flight is None:
                self._start()
            return key
        if kid is None and instead_of is None and self._keys is not None:
            # There are several, or none: another look would not tell which is meant.
            return None
        arrived_at = self._clock()
        # Twice at most: what was asked before we came may have been answered before the key was published.
        while True:
            flight = self._flight
            if flight is None:
                if not self._may_search():
                    break
                flight = self._start()
            await asyncio.shield(flight.task)
            key = self._known(kid, instead_of)
            if key is not None:
                return key
            if flight.started_at >= arrived_at:
                break
        if self._failing:
            raise Unavailable(
                "issuer-unreachable",
                "The keys that would verify this token cannot be fetched just now.",
                retry_after_seconds=int(PAUSE_SECONDS),
            )
        return None

    def _known(self, kid: str | None, instead_of: VerificationKey | None) -> VerificationKey | None:
        if self._keys is None:
            return None
        if kid is not None:
            key = self._keys.named.get(kid)
        else:
            every = self._keys.all()
            key = every[0] if len(every) == 1 else None
        return None if key is instead_of else key

    def _may_search(self) -> bool:
        now = self._clock()
        earned = (now - self._counted_at) / PAUSE_SECONDS
        self._allowance = min(float(AT_ONCE), self._allowance + earned)
        self._counted_at = now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True

    def _start(self) -> _Flight:
        task = asyncio.create_task(self._refresh(), name="jwks")
        self._flight = _Flight(self._clock(), task)
        return self._flight

    async def _refresh(self) -> None:
        try:
            found = key_set(await self._fetch(self._url))
        except FetchFailed as failure:
            self._failing = True
            self._due_at = self._clock() + RETRY_SECONDS
            log.warning(
                "jwks.not-fetched",
                issuer=self._issuer,
                reason=failure.reason,
                known=len(self._keys.all()) if self._keys is not None else 0,
            )
        else:
            self._take(found)
        finally:
            self._flight = None

    def _take(self, found: KeySet) -> None:
        before = {key.thumbprint: key for key in self._keys.all()} if self._keys is not None else {}
        now = {key.thumbprint for key in found.all()}
        for thumbprint, key in before.items():
            if thumbprint not in now:
                # Principals that were verified by it are let go (see `Identity`).
                key.withdrawn = True
        # The same key stays the same object, so that what was verified by it stays verified.
        found.named = {
            kid: before[key.thumbprint] if _same(before.get(key.thumbprint), key) else key
            for kid, key in found.named.items()
        }
        found.nameless = [
            before[key.thumbprint] if _same(before.get(key.thumbprint), key) else key
            for key in found.nameless
        ]
        if self._keys is None or self._failing or {*before} != now:
            log.info("jwks.fetched", issuer=self._issuer, keys=len(now), unused=dict(found.unused) or None)
        self._keys = found
        self._failing = False
        self._due_at = self._clock() + FRESH_SECONDS


def _same(known: VerificationKey | None, key: VerificationKey) -> bool:
    return known is not None and known.kid == key.kid
