"""Guessing is slowed where it comes from, its counts are bounded, and no stranger locks an owner out."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest

from src.config.settings import Settings
from src.errors import TooManyRequests
from src.services.throttle import _SWEPT_AT_ONCE, MOST_KEPT, Kind, Throttle, _Window, network_of

HERE, THERE = "203.0.113.7", "198.51.100.9"
ADA, BOB = "ada@example.com", "bob@example.com"


class Clock:
    """Moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def made(clock: Callable[[], float] = time.monotonic, **limits: str) -> Throttle:
    off = {"login": "off", "login_address": "off", "sign_up": "off", "refresh": "off"}
    return Throttle(**off | limits, clock=clock)


def refusal(
    throttle: Throttle, kind: Kind, address: str | None, account: str | None = None
) -> tuple[str, int]:
    with pytest.raises(TooManyRequests) as refused:
        throttle.attempt(kind, address, account)
    return refused.value.reason, refused.value.retry_after_seconds or 0


def passes(throttle: Throttle, kind: Kind, address: str | None, account: str | None = None) -> int:
    """How many attempts are let through before one is refused; 50 are enough to know."""
    for number in range(50):
        try:
            throttle.attempt(kind, address, account)
        except TooManyRequests:
            return number
    return 50


def test_who_guesses_at_an_account_is_stopped_and_its_owner_is_not() -> None:
    throttle = made(login="5/minute;30/hour")
    assert passes(throttle, "log-in", THERE, ADA) == 5
    assert refusal(throttle, "log-in", THERE, ADA)[0] == "login-limit"
    # The owner comes from elsewhere, and the stranger's address may try others.
    assert passes(throttle, "log-in", HERE, ADA) == 5
    assert passes(throttle, "log-in", THERE, BOB) == 5


def test_a_thousand_strangers_do_not_lock_the_owner_out() -> None:
    throttle = made(login="5/minute", login_address="60/minute")
    for number in range(1000):
        for _ in range(6):
            try:
                throttle.attempt("log-in", f"10.0.{number >> 8}.{number & 255}", ADA)
            except TooManyRequests:
                break
    throttle.attempt("log-in", HERE, ADA)
    throttle.succeeded("log-in", HERE, ADA)
    assert passes(throttle, "log-in", HERE, ADA) == 5


def test_who_tries_one_password_at_many_accounts_is_stopped() -> None:
    throttle = made(login="5/minute", login_address="20/minute")
    tried = 0
    with pytest.raises(TooManyRequests) as refused:
        for number in range(1000):
            throttle.attempt("log-in", HERE, f"user{number}@example.com")
            tried += 1
    assert (tried, refused.value.reason) == (20, "login-address-limit")
    throttle.attempt("log-in", THERE, ADA)


def test_success_forgives_the_pair_and_not_the_address() -> None:
    throttle = made(login="5/minute;30/hour", login_address="12/minute")
    for _ in range(2):
        for _ in range(5):
            throttle.attempt("log-in", HERE, ADA)
        throttle.succeeded("log-in", HERE, ADA)
    # An account of one's own does not make guessing at the others free.
    throttle.attempt("log-in", HERE, BOB)
    throttle.succeeded("log-in", HERE, ADA)
    throttle.attempt("log-in", HERE, BOB)
    assert refusal(throttle, "log-in", HERE, ADA)[0] == "login-address-limit"


def test_success_at_one_account_does_not_forgive_attempts_at_another() -> None:
    throttle = made(login="5/minute")
    assert passes(throttle, "log-in", HERE, BOB) == 5
    throttle.succeeded("log-in", HERE, ADA)
    throttle.succeeded("log-in", THERE, BOB)
    assert refusal(throttle, "log-in", HERE, BOB)[0] == "login-limit"
    throttle.succeeded("log-in", HERE, BOB)
    throttle.attempt("log-in", HERE, BOB)


async def test_a_burst_is_counted_before_any_of_it_is_answered() -> None:
    throttle = made(login="5/minute")

    async def log_in() -> None:
        throttle.attempt("log-in", HERE, ADA)
        await asyncio.sleep(0.01)

    came = await asyncio.gather(*(log_in() for _ in range(100)), return_exceptions=True)
    assert sum(isinstance(one, TooManyRequests) for one in came) == 95


@pytest.mark.parametrize(
    "limit", ["5/minute", "5/minute;6/hour", "5/minute;5/hour", "1/second;5/minute", "3/2minutes", "10/day"]
)
def test_retry_after_is_true(limit: str) -> None:
    clock = Clock()
    throttle = made(clock, login=limit)
    refusals = 0
    for _ in range(20):
        passes(throttle, "log-in", HERE, ADA)
        wait = refusal(throttle, "log-in", HERE, ADA)[1]
        refusals += 1
        clock.now += wait - 1.25
        # A second earlier it is still too early, where the wait is not a second anyway.
        if wait > 1:
            assert refusal(throttle, "log-in", HERE, ADA)[1] <= 2
        clock.now += 1.25
        throttle.attempt("log-in", HERE, ADA)
    assert refusals == 20


def test_what_is_refused_is_not_counted() -> None:
    clock = Clock()
    throttle = made(clock, login="5/minute;8/hour", login_address="7/minute")
    assert passes(throttle, "log-in", HERE, ADA) == 5
    for _ in range(100):
        assert refusal(throttle, "log-in", HERE, ADA)[0] == "login-limit"
    # The address has two left, and the hour three.
    assert passes(throttle, "log-in", HERE, BOB) == 2
    clock.now += 60
    assert passes(throttle, "log-in", HERE, ADA) == 3
    assert refusal(throttle, "log-in", HERE, ADA) == ("login-limit", 3540)


@pytest.mark.parametrize(("kind", "reason"), [("sign-up", "sign-up-limit"), ("refresh", "refresh-limit")])
def test_each_kind_has_a_limit_of_its_own(kind: Kind, reason: str) -> None:
    throttle = made(login="5/minute", login_address="5/minute", sign_up="3/hour", refresh="3/hour")
    assert passes(throttle, kind, HERE) == 3
    assert refusal(throttle, kind, HERE)[0] == reason
    assert passes(throttle, kind, THERE) == 3
    assert passes(throttle, "log-in", HERE, ADA) == 5


def test_a_limit_that_is_off_lets_everything_through() -> None:
    throttle = made()
    for kind in ("log-in", "sign-up", "refresh"):
        assert passes(throttle, kind, HERE, ADA) == 50


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff:ffff:ffff:ffff", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:203.0.113.7", "203.0.113.7", True),
        ("::ffff:203.0.113.7", "::ffff:203.0.113.8", False),
        ("203.0.113.7", "203.0.113.8", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        (None, "", True),
        (None, "a socket", True),
        ("::1", "127.0.0.1", False),
    ],
)
def test_an_ipv6_address_counts_by_its_64(one: str | None, other: str | None, same: bool) -> None:
    assert (network_of(one) == network_of(other)) is same
    throttle = made(sign_up="1/hour")
    assert passes(throttle, "sign-up", one) == 1
    assert passes(throttle, "sign-up", other) == (0 if same else 1)


def test_address_and_account_cannot_be_shifted_into_each_other() -> None:
    throttle = made(login="1/hour")
    odd = ["a@b.example", "a@b.example\0", "", "\0", "\ud800", "7", "é", "e\u0301", ADA]
    assert [passes(throttle, "log-in", HERE, account) for account in odd] == [1] * len(odd)


def inside(throttle: Throttle) -> Iterator[object]:
    """Everything that it holds, however deep."""
    seen: set[int] = set()
    left: list[object] = [vars(throttle)]
    while left:
        found = left.pop()
        if id(found) in seen or isinstance(found, type | type(time)) or callable(found):
            continue
        seen.add(id(found))
        yield found
        left += gc.get_referents(found)


def test_neither_addresses_nor_accounts_are_kept() -> None:
    throttle = made(login="5/minute", login_address="5/minute", sign_up="5/minute")
    throttle.attempt("log-in", HERE, ADA)
    throttle.attempt("sign-up", HERE)
    texts = [one for one in inside(throttle) if isinstance(one, str)]
    assert any(text.endswith("/5/1/minute") for text in texts)
    assert [text for text in texts if HERE in text or "ada" in text] == []


def windows(throttle: Throttle) -> list[OrderedDict[str, _Window]]:
    """What is kept for each rule, in its order."""
    limits = [*throttle._addresses.values(), throttle._pair]
    return [rule._counts.storage._windows for limit in limits for rule in limit.rules]  # type: ignore[attr-defined]


def test_a_flood_of_addresses_costs_a_bounded_memory_and_no_thread() -> None:
    throttle = made(login="5/minute;30/hour", login_address="60/minute")
    threads = threading.active_count()
    tracemalloc.start()
    try:
        for number in range(MOST_KEPT + 5_000):
            address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
            throttle.attempt("log-in", address, ADA)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    # Three rules; a count takes some 300 bytes.
    assert [len(kept) for kept in windows(throttle)] == [MOST_KEPT] * 3
    assert taken < 3 * MOST_KEPT * 500
    assert threading.active_count() <= threads
    # The newest are kept.
    assert passes(throttle, "log-in", address, ADA) == 4


def test_counts_go_when_their_time_has_passed_without_a_stall() -> None:
    clock = Clock()
    throttle = made(clock, refresh="2/minute")
    (kept,) = windows(throttle)
    for number in range(5000):
        throttle.attempt("refresh", f"10.0.{number >> 8}.{number & 255}")
    clock.now += 61
    throttle.attempt("refresh", HERE)
    assert len(kept) == 5001 - _SWEPT_AT_ONCE
    for number in range(400):
        throttle.attempt("refresh", f"10.1.{number >> 8}.{number & 255}")
    assert len(kept) == 401


def test_counts_are_kept_in_the_order_in_which_they_end() -> None:
    clock = Clock()
    throttle = made(clock, sign_up="9/minute")
    (kept,) = windows(throttle)
    for number in range(60):
        throttle.attempt("sign-up", f"10.0.0.{number}")
    clock.now += 61
    # Far behind more windows that have ended than are let go at once.
    throttle.attempt("sign-up", "10.0.0.50")
    ends = [window.ends_at for window in kept.values()]
    assert len(ends) == 60 - _SWEPT_AT_ONCE
    assert ends == sorted(ends)


def test_a_clock_that_is_set_by_an_hour_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    throttle = Throttle.from_settings(Settings())
    assert passes(throttle, "log-in", HERE, ADA) == 5
    true = time.time
    for step in (3600, -3600):
        monkeypatch.setattr(time, "time", lambda step=step: true() + step)
        reason, wait = refusal(throttle, "log-in", HERE, ADA)
        assert reason == "login-limit"
        assert 1 <= wait <= 60


def test_the_settings_are_what_is_counted_by() -> None:
    settings = Settings(
        login_rate_limit="2/minute", login_address_rate_limit="3/minute", sign_up_rate_limit="4/minute",
        refresh_rate_limit="5/minute",
    )  # fmt: skip
    throttle = Throttle.from_settings(settings)
    assert passes(throttle, "log-in", HERE, ADA) == 2
    assert passes(throttle, "log-in", HERE, BOB) == 1
    assert passes(throttle, "sign-up", HERE) == 4
    assert passes(throttle, "refresh", HERE) == 5


def test_a_person_who_mistypes_and_an_office_behind_one_address_are_let_in_by_the_defaults() -> None:
    clock = Clock()
    throttle = Throttle(
        **{
            name: Settings.model_fields[f"{name}_rate_limit"].default
            for name in ("login", "login_address", "sign_up", "refresh")
        },
        clock=clock,
    )
    assert passes(throttle, "log-in", HERE, ADA) == 5
    attempts = 0
    for number in range(250):
        # One after another for an hour, and each mistypes once.
        clock.now += 14
        account = f"user{number}@example.com"
        for _ in range(2):
            throttle.attempt("log-in", THERE, account)
            attempts += 1
        throttle.succeeded("log-in", THERE, account)
        for _ in range(10):
            throttle.attempt("refresh", THERE)
    assert attempts == 500
    # A minute later the one who mistyped may go on.
    assert passes(throttle, "log-in", HERE, ADA) == 5
    # And who goes on mistyping is still told to wait.
    assert passes(throttle, "log-in", THERE, "user250@example.com") == 5
