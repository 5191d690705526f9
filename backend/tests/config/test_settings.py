"""Settings: where they come from, what is refused, and how it is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from src.config import settings as module
from src.config.settings import (
    BACKEND,
    Settings,
    as_environment,
    load_settings,
    migration_connection,
    require_database,
)
from src.config.settings_docs import effective, understood
from src.errors import ConfigurationError

URL = "postgresql://u:canary@localhost/db"
NUMBERS = {bool, int, float, Path, bool | None, int | None}


@pytest.fixture
def env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "backend.env"
    monkeypatch.setattr(module, "ENV_FILE", path)
    return path


def refusal(**overrides: Any) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(**overrides)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    return caught.value


def test_nothing_has_to_be_set() -> None:
    settings = load_settings()
    assert (settings.environment, settings.host, settings.port, settings.workers) == (
        "development",
        "127.0.0.1",
        8000,
        1,
    )
    assert settings.database_url is None
    assert settings.data_directory == BACKEND / ".data"
    assert settings.health_details is None
    assert settings.trusted_proxies == ()


def test_the_environment_beats_the_file_and_the_file_beats_the_secrets(
    env_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    for name, value in (("PORT", "1"), ("WORKERS", "2"), ("database_url", URL + "\n"), ("HOST", "::")):
        (secrets / name).write_text(value)
    env_file.write_text(f"SECRETS_DIR={secrets}\nPORT=3\nWORKERS=4\n")
    monkeypatch.setenv("PORT", "5")
    settings = load_settings(host="0.0.0.0")
    assert (settings.host, settings.port, settings.workers) == ("0.0.0.0", 5, 4)
    assert require_database(settings).user == "u"
    origins = [settings.origin(name) for name in ("host", "port", "workers", "database_url", "log_level")]
    assert origins == ["command", "environment", ".env", "secrets", "default"]


def test_an_empty_value_counts_as_unset_everywhere(
    env_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "DATABASE_MIGRATION_URL").write_text("\n")
    env_file.write_text("LOG_LEVEL=\nDATABASE_URL=''\n")
    monkeypatch.setenv("PORT", "")
    monkeypatch.setenv("SECRETS_DIR", str(tmp_path))
    settings = load_settings(workers=None)
    assert (settings.port, settings.log_level, settings.workers) == (8000, "info", 1)
    assert settings.database_url is None
    assert settings.database_migration_url is None


@pytest.mark.parametrize(
    "line",
    [
        "DATABASE_URL='postgresql://u:a${HOME}b%20#c@localhost/db'",
        'DATABASE_URL="postgresql://u:a${HOME}b%20#c@localhost/db"',
        "DATABASE_URL=postgresql://u:a${HOME}b%20#c@localhost/db",
        "export DATABASE_URL='postgresql://u:a${HOME}b%20#c@localhost/db'",
    ],
)
def test_the_file_is_taken_literally(env_file: Path, line: str) -> None:
    env_file.write_text(line + "\nSOMETHING_ELSE=1\n")
    password = require_database(load_settings()).password
    assert password is not None
    assert password.get_secret_value() == "a${HOME}b #c"


def test_all_bad_variables_are_named_in_one_message_with_a_remedy_and_no_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = {
        "ENVIRONMENT": "canary", "PORT": "99999", "WORKERS": "canary", "DATABASE_POOL_SIZE": "0",
        "DATABASE_URL": "postgresql://u:canary@h/db?sslmod=canary", "DATABASE_MIGRATION_URL": "canary",
        "DATABASE_COMMAND_TIMEOUT_SECONDS": "nan", "HEALTH_DETAILS": "canary", "MIGRATE_ON_START": "canary",
        "LOG_LEVEL": "canary", "LOG_FORMAT": "canary", "TRUSTED_PROXIES": "canary", "MAX_BODY_BYTES": "1.5",
        "SECRETS_DIR": "/canary",
    }  # fmt: skip
    for name, value in bad.items():
        monkeypatch.setenv(name, value)
    error = refusal()
    assert {fault.variable for fault in error.faults} == set(bad)
    assert all(fault.problem.endswith(".") and fault.remedy.endswith((".", "?")) for fault in error.faults)
    assert "canary" not in str(error)
    assert error.exit_code == 3


@pytest.mark.parametrize("name", ["DATABSE_URL", "DATABASE_UR", "POSTGRES_URL", "database_uri"])
def test_a_missing_address_hints_at_a_name_mistyped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, URL)
    with pytest.raises(ConfigurationError) as caught:
        require_database(load_settings())
    assert f"{name} is set: did you mean DATABASE_URL?" in str(caught.value) or name == "database_uri"
    assert "canary" not in str(caught.value)


def test_a_missing_address_without_a_similar_name_gives_no_hint() -> None:
    with pytest.raises(ConfigurationError) as caught:
        require_database(load_settings())
    assert "did you mean" not in str(caught.value)
    assert "make run" in str(caught.value)


def test_migrations_take_the_direct_host_unless_another_address_is_given() -> None:
    pooled = "postgresql://u:canary@ep-x-pooler.eu.aws.neon.tech/db"
    settings = load_settings(database_url=pooled)
    assert migration_connection(settings).hosts[0].name == "ep-x.eu.aws.neon.tech"
    other = load_settings(
        database_url=pooled, database_migration_url="postgresql://owner:x@ep-y.neon.tech/db"
    )
    assert (migration_connection(other).user, migration_connection(other).hosts[0].name) == (
        "owner",
        "ep-y.neon.tech",
    )
    wrong = refusal(database_url=URL, database_migration_url="postgresql://h/db")
    assert {fault.variable for fault in wrong.faults} == {"DATABASE_MIGRATION_URL"}


def test_a_certificate_file_that_is_missing_is_told_at_the_start() -> None:
    error = refusal(database_url=URL + "?sslrootcert=/no/such/ca.pem", port=-1)
    assert {fault.variable for fault in error.faults} == {"PORT"}
    error = refusal(database_url=URL + "?sslrootcert=/no/such/ca.pem")
    assert "/no/such/ca.pem) does not exist" in str(error)


def test_the_pooler_setting_reaches_the_connection() -> None:
    assert (
        require_database(load_settings(database_url=URL, database_pooler="transaction")).pooler
        == "transaction"
    )
    assert "pooler" in str(refusal(database_url=URL + "?options=-c%20jit%3Doff", database_pooler="tracking"))


def test_settings_are_frozen_and_know_no_other_names() -> None:
    settings = load_settings(database_url=URL)
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
    with pytest.raises(TypeError, match="prt"):
        load_settings(prt=1)


def test_every_setting_has_a_sentence_a_bound_and_its_unit_in_its_name() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        if field.annotation is float:
            assert name.endswith("_seconds"), name
        if field.annotation in {int, float}:
            kinds = {type(bound).__name__ for bound in field.metadata}
            assert "Le" in kinds, name
            assert kinds & {"Ge", "Gt"}, name


@pytest.mark.parametrize(
    "name", [name for name, field in Settings.model_fields.items() if field.annotation not in NUMBERS]
)
def test_a_text_of_any_length_is_refused_without_being_repeated(name: str) -> None:
    error = refusal(**{name: "canary" * 20_000})
    (fault,) = error.faults
    assert fault.variable == name.upper()
    assert "canary" not in str(error)


def test_settings_survive_the_way_to_a_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(
        database_url=URL + "?application_name=a%20b", trusted_proxies="10.0.0.1, ::/0", health_details=False,
        database_pool_timeout_seconds=0.123456, data_directory=Path("elsewhere"), log_level="DEBUG",
    )  # fmt: skip
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    again = load_settings()
    assert again.model_dump() == settings.model_dump()
    assert again.trusted_proxies == ("10.0.0.1/32", "::/0")
    assert again.data_directory == BACKEND / "elsewhere"


def test_a_file_that_cannot_be_read_is_named(
    env_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env_file.write_bytes(b"DATABASE_URL=caf\xe9\n")
    (tmp_path / "PORT").write_bytes(b"\xe9")
    (tmp_path / "workers").mkdir()
    (tmp_path / "unrelated").mkdir()
    monkeypatch.setenv("SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("DATABASE_POOL_SIZE", "x")
    error = refusal()
    assert [fault.variable for fault in error.faults] == [".env", "PORT", "WORKERS", "DATABASE_POOL_SIZE"]
    assert "is not UTF-8 text" in str(error)
    assert "cannot be read" in str(error)


def test_what_is_in_effect_is_shown_without_the_password() -> None:
    settings = load_settings(
        database_url="postgresql://u:canary@ep-x-pooler.eu.aws.neon.tech/db?sslmode=require",
        database_migration_url="postgresql://owner:canary@h/db?sslmode=require",
    )
    rows = {row.name: row for row in effective(settings)}
    assert set(rows) == {name.upper() for name in Settings.model_fields}
    shown = "postgresql://u:***@ep-x-pooler.eu.aws.neon.tech:5432/db?sslmode=verify-full"
    assert (rows["DATABASE_URL"].value, rows["DATABASE_URL"].origin) == (shown, "command")
    assert (rows["PORT"].value, rows["PORT"].origin) == ("8000", "default")
    facts = {row.name: row.value for row in understood(settings)}
    assert facts["pooler"] == "tracking"
    assert facts["tls"] == "verify-full, authorities in the system"
    assert facts["migrations"].startswith("postgresql://owner:***@h:5432/db")
    assert "canary" not in repr((rows, facts, settings))


def test_importing_reads_nothing_and_starts_nothing(tmp_path: Path) -> None:
    """With an environment full of nonsense, importing every module of config works and says nothing."""
    names = ("settings", "database", "logging", "settings_docs", "redaction", "tls", "dsn", "connection")
    program = "import threading, logging\n" + "".join(f"import src.config.{name}\n" for name in names)
    program += "assert threading.active_count() == 1 and not logging.getLogger().handlers"
    environment = dict(os.environ) | {"PORT": "x", "DATABASE_URL": "x", "SECRETS_DIR": "/x", "LOG_LEVEL": "x"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=BACKEND, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
