"""Passwords: what is derived is Argon2id's, costs what was agreed and no more, and shows itself nowhere."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import sys
import threading
import traceback
from collections.abc import AsyncIterator
from typing import Any

import pytest
from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError

from leaks import CANARY, forms
from src.config.settings import Settings
from src.errors import TooManyRequests
from src.services import passwords as passwords_module
from src.services.passwords import NICENESS, Derived, Passwords
from waiting import PATIENCE, eventually

HEAD = "$argon2id$v=19"
SALT = base64.b64encode(b"s" * 16).decode().rstrip("=")


@pytest.fixture
async def passwords() -> AsyncIterator[Passwords]:
    """Weak ones, so that tests are quick."""
    async with Passwords(memory_kib=64, passes=1) as opened:
        yield opened


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While it is cleared, a thread stays at the hash that it is at: how fast the machine is makes no difference."""
    may_go = threading.Event()
    may_go.set()
    work = passwords_module._proof

    def proof_in_time(*given: Any) -> bytes:
        assert may_go.wait(PATIENCE)
        return work(*given)

    monkeypatch.setattr(passwords_module, "_proof", proof_in_time)
    return may_go


def phc(derived: Derived) -> str:
    """As everybody else writes it: recipe and hash in one."""
    return f"{derived.recipe}${base64.b64encode(derived.proof).decode().rstrip('=')}"


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("passwords")]


async def test_a_proof_is_what_argon2_makes_of_password_and_salt(passwords: Passwords) -> None:
    # From the test vectors of the reference implementation.
    recipe = f"{HEAD}$m=256,t=2,p=1${base64.b64encode(b'somesalt').decode().rstrip('=')}"
    derived = await passwords.derive("password", recipe)
    assert derived.proof.hex() == "9dfeb910e80bad0311fee20f9c0e2b12c17987b4cac90c2ef54d5b3021c68bfe"
    assert derived.recipe == recipe


async def test_the_same_password_gives_the_same_proof_by_its_recipe_only(passwords: Passwords) -> None:
    first = await passwords.derive("grüße aus köln")
    again = await passwords.derive("grüße aus köln", first.recipe)
    wrong = await passwords.derive("grüße aus bonn", first.recipe)
    salted = await passwords.derive("grüße aus köln")
    assert (again.recipe, again.proof) == (first.recipe, first.proof)
    assert wrong.recipe == first.recipe
    assert len({first.proof, wrong.proof, salted.proof}) == 3
    assert salted.recipe != first.recipe
    PasswordHasher().verify(phc(first), "grüße aus köln")
    with pytest.raises(VerifyMismatchError):
        PasswordHasher().verify(phc(first), "grüße aus bonn")


async def test_the_verifier_is_the_digest_of_the_proof(passwords: Passwords) -> None:
    derived = await passwords.derive("a password")
    assert derived.verifier == hashlib.sha256(derived.proof).digest()
    assert (len(derived.proof), len(derived.verifier)) == (32, 32)


async def test_the_default_is_owasps_least_and_a_recipe_says_so() -> None:
    async with Passwords.from_settings(Settings()) as opened:
        derived = await opened.derive("a password")
    assert derived.recipe.startswith(f"{HEAD}$m=19456,t=2,p=1$")


@pytest.mark.parametrize(
    "recipe",
    [
        "",
        "password",
        f"{HEAD}$m=64,t=1,p=1",
        f"{HEAD}$m=64,t=1,p=1$",
        f"{HEAD}$m=64,t=1,p=1${SALT}$",
        f"{HEAD}$m=64,t=1,p=1${SALT}$" + "A" * 43,
        f"{HEAD}$m=64,t=1,p=1${SALT}==",
        f"{HEAD}$m=64,t=1,p=1${SALT}\n",
        f"{HEAD}$m=64,t=1,p=1${SALT[:-1]}z",
        f"{HEAD}$m=64,t=1,p=1$" + "A" * 10,
        f"{HEAD}$m=64,t=1,p=1$" + "A" * 13,
        f"{HEAD}$m=64,t=1,p=1$" + "A" * 90,
        f"{HEAD}$m=064,t=1,p=1${SALT}",
        f"{HEAD}$m=٦٤,t=1,p=1${SALT}",
        f"{HEAD}$m=64,t=0,p=1${SALT}",
        f"{HEAD}$m=7,t=1,p=1${SALT}",
        f"{HEAD}$m=16,t=1,p=4${SALT}",
        f"{HEAD}$m=64,t=1,p=5${SALT}",
        f"{HEAD}$m=262145,t=1,p=1${SALT}",
        f"{HEAD}$m=107374182,t=1,p=1${SALT}",
        f"{HEAD}$m=64,t=9,p=1${SALT}",
        f"{HEAD}$m=64,t=4000000000,p=1${SALT}",
        f"{HEAD}$m=64,t=1,p=1,data=AAAA${SALT}",
        f"$argon2i$v=19$m=64,t=1,p=1${SALT}",
        f"$argon2id$v=16$m=64,t=1,p=1${SALT}",
        f"$argon2id$m=64,t=1,p=1${SALT}",
        "$2b$12$" + "A" * 22,
    ],
)
async def test_a_recipe_that_is_not_ours_or_asks_for_too_much_is_refused(
    passwords: Passwords, recipe: str
) -> None:
    with pytest.raises(ValueError, match="recipe"):
        await passwords.derive("password", recipe)
    with pytest.raises(ValueError, match="recipe"):
        passwords.outdated(recipe)
    # Nothing was begun for it.
    assert ours() == []


async def test_a_recipe_of_another_strength_is_outdated(passwords: Passwords) -> None:
    assert not passwords.outdated((await passwords.derive("password")).recipe)
    for cost in ("m=65,t=1,p=1", "m=64,t=2,p=1", "m=64,t=1,p=2"):
        assert passwords.outdated(f"{HEAD}${cost}${SALT}")


async def test_whoever_finds_no_place_is_refused_at_once_and_the_others_are_served(
    go: threading.Event,
) -> None:
    async with Passwords(memory_kib=64, passes=1, threads=1, queue=3) as opened:
        go.clear()
        asked = [asyncio.create_task(opened.derive(f"password {n}")) for n in range(10)]
        await eventually(lambda: sum(one.done() for one in asked) == 6)
        go.set()
        came = await asyncio.gather(*asked, return_exceptions=True)
        served = [one for one in came if isinstance(one, Derived)]
        refused = [one for one in came if isinstance(one, TooManyRequests)]
        assert (len(served), len(refused)) == (4, 6)
        assert {error.reason for error in refused} == {"passwords-busy"}
        assert all(error.retry_after_seconds == 1 for error in refused)
        # Their places are free again.
        assert len(await asyncio.gather(*(opened.derive("password") for _ in range(4)))) == 4


async def test_no_more_are_hashed_at_a_time_than_there_are_threads() -> None:
    async with Passwords(memory_kib=64, passes=1, threads=2, queue=50) as opened:
        await asyncio.gather(*(opened.derive("password") for _ in range(50)))
        assert 1 <= len(ours()) <= 2


async def test_callers_that_hang_up_leave_every_place_free(go: threading.Event) -> None:
    async with Passwords(memory_kib=4096, passes=4, threads=1, queue=3) as opened:
        for _ in range(10):
            callers = [asyncio.create_task(opened.derive("password")) for _ in range(4)]
            await asyncio.sleep(0)
            for caller in callers:
                caller.cancel()
            gone = await asyncio.gather(*callers, return_exceptions=True)
            assert all(isinstance(one, asyncio.CancelledError) for one in gone)
            # The one that a thread is at keeps its place until it is done; those who waited have left theirs.
            came = await asyncio.gather(*(opened.derive("password") for _ in range(3)))
            assert len(came) == 3
        go.clear()
        asked = [asyncio.create_task(opened.derive("password")) for _ in range(5)]
        await eventually(lambda: any(one.done() for one in asked))
        go.set()
        came_again = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(one) for one in came_again] == [Derived] * 4 + [TooManyRequests]


@pytest.mark.parametrize("priority", [NICENESS] if sys.platform == "linux" else [0])
async def test_hashing_lets_requests_go_first(passwords: Passwords, priority: int) -> None:
    await passwords.derive("password")
    (thread,) = ours()
    assert thread is not threading.current_thread()
    if sys.platform == "linux":
        assert os.getpriority(os.PRIO_PROCESS, thread.native_id or 0) >= priority
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < priority


async def test_closing_ends_the_threads_and_whoever_waits() -> None:
    async with Passwords(memory_kib=4096, passes=4, threads=1, queue=10) as opened:
        callers = [asyncio.create_task(opened.derive("password")) for _ in range(5)]
        await asyncio.sleep(0)
    assert ours() == []
    ended = await asyncio.gather(*callers, return_exceptions=True)
    assert all(isinstance(one, Derived | asyncio.CancelledError) for one in ended)
    with pytest.raises(RuntimeError, match="not open"):
        await opened.derive("password")


async def test_nothing_of_a_password_is_in_any_repr_or_traceback(passwords: Passwords) -> None:
    derived = await passwords.derive(CANARY)
    said = [repr(derived), str(derived), repr(passwords), f"{[derived]}"]
    with pytest.raises(ValueError, match="recipe") as refused:
        await passwords.derive(CANARY, CANARY)
    with pytest.raises(ValueError, match="not Unicode") as unwritable:
        await passwords.derive(f"{CANARY}\ud800")
    said += ["".join(traceback.format_exception(unwritable.value)), repr(unwritable.value)]
    said += ["".join(traceback.format_exception(refused.value)), repr(refused.value)]
    text = "\n".join(said).encode()
    assert [name for name, form in forms(CANARY).items() if form in text] == []
    for secret in (
        derived.recipe,
        derived.recipe.rpartition("$")[2],
        derived.proof.hex(),
        repr(derived.proof),
    ):
        assert secret.encode() not in text
