"""Sources of settings: white space around values, names of other tools, old names and file permissions."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from src.config import settings as module
from src.config.settings import as_environment, load_settings, migration_connection, require_database
from src.config.settings_docs import understood
from src.config.sources import ACCEPTED, HINTED, RENAMED
from src.errors import ConfigurationError
from src.services.signing import new_key

KEY, SHARED = new_key(), secrets.token_urlsafe(32)
PADDINGS = ["\n", "\r\n", " ", "\t", "\u00a0", "\u200b", "\ufeff", "\u2060", "\u200e\n", " \r\n\r\n"]
NEON = "postgresql://u:canary@ep-x-pooler.eu.aws.neon.tech/db"
DIRECT = "postgresql://u:canary@ep-x.eu.aws.neon.tech/db"


@pytest.fixture
def env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "backend.env"
    monkeypatch.setattr(module, "ENV_FILE", path)
    return path


class Places:
    """Sets a setting in one of its sources."""

    def __init__(self, env_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.env_file, self.monkeypatch = env_file, monkeypatch
        self.directory = tmp_path / "secrets"
        self.directory.mkdir()

    def set(self, place: str, values: dict[str, str], line_end: str = "\n") -> None:
        if place == "environment":
            for name, value in values.items():
                self.monkeypatch.setenv(name, value)
        elif place == ".env":
            text = line_end.join(f"{name}='{value}'" for name, value in values.items())
            self.env_file.write_bytes(text.encode())
        else:
            for name, value in values.items():
                (self.directory / name).write_bytes(value.encode())
            self.monkeypatch.setenv("SECRETS_DIR", str(self.directory))


@pytest.fixture
def places(env_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    monkeypatch.delenv("SIGNING_KEYS", raising=False)
    return Places(env_file, tmp_path, monkeypatch)


EVERYWHERE = pytest.mark.parametrize("place", ["environment", ".env", "secrets"])


@EVERYWHERE
@pytest.mark.parametrize("padding", PADDINGS, ids=ascii)
def test_white_space_and_invisible_characters_around_a_value_are_removed(
    place: str, padding: str, places: Places
) -> None:
    given = {
        "AUTH_SHARED_SECRET": SHARED,
        "SIGNING_KEYS": KEY,
        "DATABASE_URL": NEON,
        "DATABASE_MIGRATION_URL": DIRECT,
        "AUTH_SHARED_ISSUER": "app",
        "PORT": "80",
        "HOST": "::",
    }
    places.set(place, {name: f"{padding}{value}{padding}" for name, value in given.items()})
    settings = load_settings()
    assert settings.auth_shared_secret is not None
    assert settings.auth_shared_secret.get_secret_value() == SHARED
    assert settings.signing_keys is not None
    assert settings.signing_keys.get_secret_value() == KEY
    assert (settings.auth_shared_issuer, settings.port, settings.host) == ("app", 80, "::")
    assert require_database(settings).database == migration_connection(settings).database == "db"


@EVERYWHERE
@pytest.mark.parametrize("padding", PADDINGS, ids=ascii)
def test_a_value_of_nothing_visible_counts_as_unset(place: str, padding: str, places: Places) -> None:
    places.set(place, {"DATABASE_URL": padding, "PORT": padding, "AUTH_SHARED_SECRET": padding})
    settings = load_settings()
    assert (settings.database_url, settings.port, settings.auth_shared_secret) == (None, 8000, None)
    assert settings.origin("port") == "default"


def test_overrides_are_cleaned_like_every_other_source() -> None:
    settings = load_settings(auth_shared_secret=SHARED + "\n", database_url="\ufeff" + NEON + "\u200b\r\n")
    assert settings.auth_shared_secret is not None
    assert settings.auth_shared_secret.get_secret_value() == SHARED
    assert require_database(settings).database == "db"


def test_an_env_file_from_windows_is_read(places: Places, env_file: Path) -> None:
    places.set(".env", {"DATABASE_URL": NEON, "PORT": "80", "AUTH_SHARED_SECRET": SHARED}, line_end="\r\n")
    env_file.write_bytes(b"\xef\xbb\xbf" + env_file.read_bytes())
    settings = load_settings()
    assert (require_database(settings).database, settings.port) == ("db", 80)
    env_file.write_bytes(f"PORT=81\r\nAUTH_SHARED_SECRET={SHARED}\r\n".encode())
    settings = load_settings()
    assert settings.auth_shared_secret is not None
    assert (settings.port, settings.auth_shared_secret.get_secret_value()) == (81, SHARED)


@pytest.mark.parametrize("inside", ["\n", "\r\n", "\x00", "\u200b", "\ufeff"], ids=ascii)
def test_a_shared_secret_of_several_lines_is_refused(inside: str) -> None:
    with pytest.raises(ConfigurationError, match="AUTH_SHARED_SECRET: Must be one line") as refused:
        load_settings(auth_shared_secret=SHARED[:20] + inside + SHARED[20:])
    assert SHARED[:20] not in str(refused.value)


@EVERYWHERE
@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_refused_with_the_new_one(place: str, old: str, new: str, places: Places) -> None:
    places.set(place, {old.upper(): "5"})
    with pytest.raises(ConfigurationError) as refused:
        load_settings()
    (fault,) = refused.value.faults
    assert (fault.variable, fault.problem) == (old.upper(), f"Renamed to {new.upper()}.")


def test_the_names_of_other_tools_are_those_of_no_setting() -> None:
    names = set(module.Settings.model_fields)
    assert not names & {*RENAMED, *ACCEPTED, *HINTED}
    assert {*RENAMED.values(), *ACCEPTED.values(), *HINTED.values()} <= names


@EVERYWHERE
def test_what_platforms_set_for_other_servers_is_accepted(place: str, places: Places) -> None:
    places.set(
        place,
        {
            "WEB_CONCURRENCY": "3",
            "DATABASE_URL": NEON,
            "DATABASE_URL_UNPOOLED": DIRECT + "?application_name=unpooled",
            "FORWARDED_ALLOW_IPS": "*",
            "POSTGRES_URL": NEON,
        },
    )
    settings = load_settings()
    assert (settings.workers, settings.origin("workers")) == (3, "WEB_CONCURRENCY")
    assert migration_connection(settings).application_name == "unpooled"
    assert settings.trusted_proxies == ()
    warning = ("FORWARDED_ALLOW_IPS", "FORWARDED_ALLOW_IPS is not used. Set TRUSTED_PROXIES.")
    assert warning in settings.warnings
    assert warning[1] in [row.value for row in understood(settings)]


def test_our_own_name_takes_precedence_over_that_of_another_tool(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    places.set(".env", {"WORKERS": "2", "TRUSTED_PROXIES": "10.0.0.1"})
    places.set("environment", {"WEB_CONCURRENCY": "3", "FORWARDED_ALLOW_IPS": "*"})
    settings = load_settings()
    assert (settings.workers, settings.origin("workers"), settings.warnings) == (2, ".env", [])


def test_a_wrong_value_is_reported_under_the_name_that_was_set(places: Places) -> None:
    places.set("environment", {"WEB_CONCURRENCY": "many"})
    with pytest.raises(ConfigurationError, match="WEB_CONCURRENCY: Must be an integer"):
        load_settings()


def test_migrations_never_reach_the_database_of_another_source(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A developer's DATABASE_URL beside the `.env` that a platform wrote for production."""
    places.set(".env", {"DATABASE_URL": NEON, "DATABASE_URL_UNPOOLED": DIRECT})
    places.set("environment", {"DATABASE_URL": "postgresql://u:x@localhost/test"})
    assert migration_connection(load_settings()).database == "test"
    places.set("environment", {"DATABASE_URL_UNPOOLED": DIRECT})
    given = load_settings(database_url="postgresql://u:x@localhost/embedded")
    assert migration_connection(given).database == "embedded"
    for name, value in as_environment(given).items():
        monkeypatch.setenv(name, value)
    assert migration_connection(load_settings()).database == "embedded"


@pytest.mark.parametrize("name", ["POSTGRES_URL", "POSTGRES_PRISMA_URL", "NETLIFY_DATABASE_URL"])
@EVERYWHERE
def test_another_name_for_the_address_is_hinted_at(name: str, place: str, places: Places) -> None:
    places.set(place if place != "secrets" else ".env", {name: NEON})
    with pytest.raises(ConfigurationError, match=f"{name} is set: did you mean DATABASE_URL"):
        require_database(load_settings())


def test_secrets_that_every_user_can_read_are_warned_about(places: Places, env_file: Path) -> None:
    places.set(".env", {"SIGNING_KEYS": KEY, "PORT": "80"})
    places.set("secrets", {"DATABASE_URL": NEON, "HOST": "::"})
    for file in (env_file, *places.directory.iterdir()):
        file.chmod(0o644)
    env, directory = load_settings().warnings
    assert (env[0], directory[0]) == (".env", "SECRETS_DIR")
    assert f"chmod 600 {env_file}" in env[1]
    assert "DATABASE_URL" in directory[1]
    assert "HOST" not in directory[1]
    for file in (env_file, *places.directory.iterdir()):
        file.chmod(0o640)
    assert load_settings().warnings == []


def test_an_env_file_without_secrets_may_be_readable(places: Places, env_file: Path) -> None:
    places.set(".env", {"PORT": "80", "SIGNING_KEYS": ""})
    env_file.chmod(0o644)
    assert load_settings().warnings == []
