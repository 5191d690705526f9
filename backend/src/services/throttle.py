"""How often one may try: guessing is slowed where it comes from, and nobody can lock somebody else out.

Counted are the attempts of one address at one account, and those of one address at all accounts; never those at an
account from everywhere, which would hand its owner's door to every stranger. The counts are this process's own: each
worker has others, and a restart begins anew.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from ipaddress import IPv4Address, ip_address
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Self

from limits.storage import Storage
from limits.strategies import FixedWindowRateLimiter

from ..config.accounts import rules
from ..errors import TooManyRequests

if TYPE_CHECKING:
    from limits import RateLimitItem

    from ..config.settings import Settings

Kind = Literal["log-in", "sign-up", "refresh"]
"""`log-in` is every time that a password is tried, also by a user who is signed in, under their id."""

MOST_KEPT: Final = 10_000
"""Counts of one rule. Beyond them the oldest makes room: who has so many addresses needs none of them twice."""
_SWEPT_AT_ONCE = 16


class Throttle:
    """The limits of log-ins, sign-ups and refreshes, each in the notation of the settings.

    Not for several threads: between looking and counting nobody else may come.
    """

    def __init__(
        self,
        *,
        login: str,
        login_address: str,
        sign_up: str,
        refresh: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        # Neither addresses nor e-mail addresses are kept, and nobody can choose two that share a count.
        self._secret = secrets.token_bytes(32)
        self._pair = _limit("login-limit", login, clock)
        self._addresses: dict[Kind, _Limit] = {
            "log-in": _limit("login-address-limit", login_address, clock),
            "sign-up": _limit("sign-up-limit", sign_up, clock),
            "refresh": _limit("refresh-limit", refresh, clock),
        }

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls(
            login=settings.login_rate_limit,
            login_address=settings.login_address_rate_limit,
            sign_up=settings.sign_up_rate_limit,
            refresh=settings.refresh_rate_limit,
        )

    def attempt(self, kind: Kind, address: str | None, account: str | None = None) -> None:
        """Count an attempt, before it is made. Raises `TooManyRequests`, and then has counted nothing.

        `account` is the normalised e-mail address, whether or not there is such an account, or a user's id.
        """
        counts = list(self._counts(kind, address, account))
        full = [
            (rule.ends_at(who), limit.reason)
            for limit, who in counts
            for rule in limit.rules
            if rule.is_used_up_by(who)
        ]
        if full:
            ends_at, reason = max(full)
            wait = max(1, math.ceil(ends_at - self._clock()))
            raise TooManyRequests(reason, "Too many attempts from this address.", retry_after_seconds=wait)
        for limit, who in counts:
            for rule in limit.rules:
                rule.count(who)

    def succeeded(self, kind: Kind, address: str | None, account: str) -> None:
        """The password was right: what this address tried at this account is forgiven, but not at the others'.

        Else who has one account could try at all of them for ever, with a log-in of their own between.
        """
        for limit, who in self._counts(kind, address, account):
            if limit is self._pair:
                for rule in limit.rules:
                    rule.forget(who)

    def _counts(self, kind: Kind, address: str | None, account: str | None) -> Iterator[tuple[_Limit, str]]:
        network = network_of(address)
        yield self._addresses[kind], self._name(network)
        if kind == "log-in" and account is not None:
            yield self._pair, self._name(network, account)

    def _name(self, *parts: str) -> str:
        text = "\0".join(parts).encode("utf-8", "surrogatepass")
        return blake2b(text, key=self._secret, digest_size=16).hexdigest()


def network_of(address: str | None) -> str:
    """Whose attempts count together: one IPv4 address, or the /64 that an IPv6 address lies in.

    A home or a telephone has a whole /64, and may take another address of it for every request. Without an address,
    as behind a Unix socket, all are one.
    """
    try:
        found = ip_address(address or "")
    except ValueError:
        return "elsewhere"
    if isinstance(found, IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or f"{int(found) >> 64:x}")


class _Rule:
    """One rule of a limit, with the counts of everybody it was used for."""

    def __init__(self, item: RateLimitItem, clock: Callable[[], float]) -> None:
        self._item = item
        self._counts = FixedWindowRateLimiter(_Counts(clock))

    def is_used_up_by(self, who: str) -> bool:
        return not self._counts.test(self._item, who)

    def ends_at(self, who: str) -> float:
        """When a new window can begin, by the same clock."""
        return self._counts.get_window_stats(self._item, who).reset_time

    def count(self, who: str) -> None:
        self._counts.hit(self._item, who)

    def forget(self, who: str) -> None:
        self._counts.clear(self._item, who)


class _Limit(NamedTuple):
    reason: str
    rules: Sequence[_Rule]


def _limit(reason: str, text: str, clock: Callable[[], float]) -> _Limit:
    return _Limit(reason, [_Rule(item, clock) for item in rules(text)])


class _Window(NamedTuple):
    attempts: int
    ends_at: float


class _Counts(Storage):
    """Counts in windows of one length, each of which begins with its first attempt.

    The library's own store goes by the wall clock, which may be set; starts a thread for an attempt, or looks through
    everything that it keeps; and keeps as much as comes. Here the windows stand in the order in which they end, so that
    a few steps for each new one suffice to let go of those that have ended.
    """

    STORAGE_SCHEME = None

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._windows: OrderedDict[str, _Window] = OrderedDict()

    @property
    def base_exceptions(self) -> type[Exception]:
        return Exception

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        now = self._clock()
        there = self._windows.get(key)
        if there is None or there.ends_at <= now:
            self._windows.pop(key, None)
            self._sweep(now)
            there = _Window(0, now + expiry)
        self._windows[key] = there = there._replace(attempts=there.attempts + amount)
        return there.attempts

    def get(self, key: str) -> int:
        there = self._windows.get(key)
        return 0 if there is None or there.ends_at <= self._clock() else there.attempts

    def get_expiry(self, key: str) -> float:
        there = self._windows.get(key)
        return self._clock() if there is None else there.ends_at

    def clear(self, key: str) -> None:
        self._windows.pop(key, None)

    def check(self) -> bool:
        return True

    def reset(self) -> int:
        kept = len(self._windows)
        self._windows.clear()
        return kept

    def _sweep(self, now: float) -> None:
        """A few of those that have ended, so that nobody pays for a flood at once; always room for one."""
        for _ in range(_SWEPT_AT_ONCE):
            first = next(iter(self._windows.values()), None)
            if first is None or (first.ends_at > now and len(self._windows) < MOST_KEPT):
                return
            self._windows.popitem(last=False)
