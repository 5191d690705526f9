"""Tokens and keys on the command line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing
from uuid import UUID

import jwt
import pytest

from conftest import open_directory
from installation import Installation, fetch
from src.config.settings import load_settings
from src.services.identity import Identity, Principal


@pytest.fixture(scope="module")
def installation() -> Iterator[Installation]:
    with open_directory() as directory, closing(Installation(directory)) as made:
        yield made


def believed(token: str, signing_keys: str) -> Principal:
    identity = Identity.from_settings(load_settings(signing_keys=signing_keys))
    return asyncio.run(identity.principal(f"Bearer {token}"))


def test_a_new_key_is_all_that_is_printed_and_signs_tokens(
    installation: Installation, database_url: str
) -> None:
    made = [installation.run("keys", "new") for _ in range(2)]
    assert [(each.returncode, each.stderr) for each in made] == [(0, "")] * 2
    one, two = (each.stdout.removesuffix("\n") for each in made)
    assert one != two
    assert one.startswith("gwk_")
    token = installation.run(
        "user",
        "token",
        "ana@example.com",
        "--create",
        url=database_url,
        ENVIRONMENT="production",
        SIGNING_KEYS=one,
    )
    assert believed(token.stdout.strip(), one).email == "ana@example.com"
    assert one not in token.stdout + token.stderr


def test_a_token_is_all_that_is_printed_and_speaks_for_the_user(
    installation: Installation, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SIGNING_KEYS")
    refused = installation.run("user", "token", "Ana@Example.com", url=database_url)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "--create" in refused.stderr
    assert fetch(database_url, "SELECT 1 FROM users") == []

    first = installation.run("user", "token", "Ana@Example.com", "--create", url=database_url)
    assert (first.returncode, first.stderr) == (0, "")
    (token,) = first.stdout.splitlines()
    again = installation.run(
        "user", "token", "ana@example.com", "--create", "--minutes", "5", url=database_url
    )
    [row] = fetch(database_url, "SELECT id, email FROM users")
    # In development the key is made beside the data, and stays.
    kept = (installation.backend / ".data" / "signing-key").read_text().strip()
    for printed in (token, again.stdout.strip()):
        found = believed(printed, kept)
        assert (found.user_id, found.email, found.own) == (UUID(str(row["id"])), "ana@example.com", True)
    ends = jwt.decode(again.stdout.strip(), options={"verify_signature": False})
    assert ends["exp"] - ends["iat"] == 300


@pytest.mark.parametrize("minutes", ["0", "-1", "43201", "x"])
def test_a_token_lasts_thirty_days_at_most(
    installation: Installation, database_url: str, minutes: str
) -> None:
    result = installation.run(
        "user", "token", "ana@example.com", "--create", "--minutes", minutes, url=database_url
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert fetch(database_url, "SELECT 1 FROM users") == []


@pytest.mark.parametrize("command", ["token", "serve"])
def test_production_without_a_key_of_its_own_ends_with_exit_code_3(
    installation: Installation, database_url: str, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.delenv("SIGNING_KEYS")
    arguments = (
        ("user", "token", "ana@example.com", "--create") if command == "token" else ("serve", "--port", "0")
    )
    result = installation.run(*arguments, url=database_url, ENVIRONMENT="production")
    assert result.returncode == 3
    # A command writes for people to standard error, the service events to standard output.
    said, other = (result.stderr, result.stdout) if command == "token" else (result.stdout, result.stderr)
    assert "SIGNING_KEYS" in said
    assert "Traceback" not in said
    assert other == ""
    assert fetch(database_url, "SELECT 1 FROM users") == []


def test_a_weak_shared_secret_ends_every_start_with_exit_code_3(
    installation: Installation, database_url: str
) -> None:
    weak = "changeme-changeme-changeme-changeme"
    result = installation.run(
        "serve", "--port", "0", url=database_url, ENVIRONMENT="production", AUTH_SHARED_SECRET=weak
    )
    assert result.returncode == 3
    assert "AUTH_SHARED_SECRET" in result.stdout
    assert weak not in result.stdout + result.stderr


def test_a_config_shows_that_a_key_is_set_and_not_which(installation: Installation) -> None:
    key = installation.run("keys", "new").stdout.strip()
    shown = installation.run("config", "--format", "json", SIGNING_KEYS=key)
    rows = {row["name"]: row for row in json.loads(shown.stdout)["settings"]}
    assert (rows["SIGNING_KEYS"]["value"], rows["SIGNING_KEYS"]["origin"]) == ("***", "environment")
    assert key not in shown.stdout
