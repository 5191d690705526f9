"""Users at the command line: passwords that are asked for, accounts that are closed and opened, tokens that end."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path

import jwt
import pytest

from conftest import open_directory
from installation import Installation
from src.config.database import parse
from src.config.settings import load_settings
from src.errors import LogInFailed, Unauthenticated
from src.models import TaskCreate
from src.models.account import LogIn
from src.services import tasks
from src.services.accounts import Accounts
from src.services.database import Database
from src.services.signing import SigningKeys

BACKEND = Path(__file__).resolve().parents[2]
EMAIL = "ana@example.com"
FIRST, SECOND = "seven small boats at noon", "eight large ships at dawn"


Ask = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def user() -> Iterator[Ask]:
    """`user(url, ...)`: `python -m src user ...` where no .env is, with what is `typed` on its standard input."""
    with open_directory() as directory, closing(Installation(directory)) as installation:
        yield lambda url, *words, typed="": installation.run("user", *words, url=url, typed=typed)


def typed_at_a_terminal(url: str, *words: str, answers: list[str]) -> tuple[int, str]:
    """The exit code, and all that a person saw; each answer is typed when it is asked for."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir("/")
        environment = {**os.environ, "PYTHONPATH": str(BACKEND), "DATABASE_URL": url}
        os.execve(sys.executable, [sys.executable, "-m", "src", "user", *words], environment)
    seen, left = b"", list(answers)
    try:
        while chunk := os.read(terminal, 4096):
            seen += chunk
            if left and seen.rstrip(b" ").endswith(b":"):
                os.write(terminal, left.pop(0).encode() + b"\n")
    except OSError:
        pass  # The other end is closed: Linux says so by EIO.
    finally:
        os.close(terminal)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), seen.decode()


@pytest.fixture
async def door() -> AsyncIterator[Accounts]:
    settings = load_settings()
    async with Accounts.from_settings(settings, SigningKeys.from_settings(settings)) as opened:
        yield opened


async def test_passwords_are_given_changed_and_accounts_disabled_and_enabled_by_command(
    user: Ask, database_url: str, app_database_url: str, door: Accounts
) -> None:
    async with Database(parse(app_database_url)) as database:

        async def log_in(password: str) -> None:
            await door.log_in(database, LogIn(email=EMAIL, password=password), "192.0.2.1")

        made = user(database_url, "create", EMAIL, "--password", typed=f"{FIRST}\n")
        assert made.returncode == 0, made.stderr
        assert json.loads(made.stdout)["email"] == EMAIL
        assert FIRST not in made.stdout + made.stderr
        await log_in(FIRST)

        changed = user(database_url, "set-password", EMAIL, typed=SECOND)
        assert changed.returncode == 0, changed.stderr
        await log_in(SECOND)
        with pytest.raises(LogInFailed):
            await log_in(FIRST)

        token = user(database_url, "token", EMAIL).stdout.strip()
        claims = jwt.decode(token, options={"verify_signature": False})
        assert claims["epoch"] == 2  # One for each password.
        author = tasks.Known(tasks.UUID(claims["sub"]), EMAIL, claims["epoch"])
        await tasks.create(database, author, TaskCreate(title="a"))

        assert user(database_url, "disable", EMAIL).returncode == 0
        with pytest.raises(LogInFailed):
            await log_in(SECOND)
        with pytest.raises(Unauthenticated):
            await tasks.create(database, author, TaskCreate(title="b"))
        refused = user(database_url, "token", EMAIL)
        assert (refused.returncode, "disabled" in refused.stderr) == (2, True)

        assert user(database_url, "enable", EMAIL).returncode == 0
        await log_in(SECOND)
        # A token from before stays ended.
        with pytest.raises(Unauthenticated):
            await tasks.create(database, author, TaskCreate(title="c"))


def test_a_password_is_asked_for_twice_and_never_shown(user: Ask, database_url: str) -> None:
    assert user(database_url, "create", EMAIL).returncode == 0
    code, seen = typed_at_a_terminal(database_url, "set-password", EMAIL, answers=[FIRST, FIRST])
    assert code == 0, seen
    assert FIRST not in seen
    code, seen = typed_at_a_terminal(database_url, "set-password", EMAIL, answers=[FIRST, SECOND])
    assert code == 2
    assert "not the same" in seen
    assert FIRST not in seen
    assert SECOND not in seen


@pytest.mark.parametrize("typed", ["", "\n", "short\n", "password123\n", "x" * 1025])
def test_a_password_that_may_not_be_is_refused_without_being_shown(
    user: Ask, database_url: str, typed: str
) -> None:
    refused = user(database_url, "create", EMAIL, "--password", typed=typed)
    assert refused.returncode == 2, refused.stderr
    assert "password" in refused.stderr
    assert not typed.strip() or typed.strip() not in refused.stdout + refused.stderr.replace("password:", "")


@pytest.mark.parametrize("command", ["set-password", "disable", "enable", "token"])
def test_a_user_who_is_not_there_is_said_so(user: Ask, database_url: str, command: str) -> None:
    refused = user(database_url, command, "nobody@example.com", typed=f"{FIRST}\n")
    assert refused.returncode == 1
    assert "There is no" in refused.stderr
