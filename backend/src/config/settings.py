"""The settings: composed from one class per topic, read from the environment, `.env` and secret files.

The environment takes precedence over `backend/.env`, which takes precedence over the files in `SECRETS_DIR`. An empty
value counts as unset. A setting's environment variable is its attribute's name in capitals. `load_settings()` reads
and validates; it reports all faults at once, and never a value.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from pydantic import BaseModel, PrivateAttr, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
)

from ..errors import ConfigurationError, Fault
from . import BACKEND
from .accounts import AccountSettings
from .api import ApiSettings
from .auth import AuthSettings, faults_of
from .database import ConnectionSettings, DatabaseSettings, parse
from .limits import LimitSettings
from .server import HealthSettings, LogSettings, ServerSettings
from .validation_messages import as_text, explain, file_problem, missing_database

ENV_FILE = BACKEND / ".env"
TOPICS: tuple[type[BaseModel], ...] = (
    ServerSettings,
    DatabaseSettings,
    LimitSettings,
    ApiSettings,
    AuthSettings,
    AccountSettings,
    HealthSettings,
    LogSettings,
)


# The bases in the opposite order of `TOPICS`: Pydantic collects the fields of the last base first.
class Settings(
    LogSettings,
    HealthSettings,
    AccountSettings,
    AuthSettings,
    ApiSettings,
    LimitSettings,
    DatabaseSettings,
    ServerSettings,
    BaseSettings,
):
    """The effective settings of one process. Durations are seconds, sizes bytes."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        env_ignore_empty=True,
        hide_input_in_errors=True,
        validate_default=False,
    )

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings, _EnvFile(settings_cls, env_file=ENV_FILE), file_secret_settings)

    def origin(self, name: str) -> str:
        """Where a setting's value came from: `environment`, `.env`, `secrets`, `command` or `default`."""
        return self._origins.get(name, "default")


class _EnvFile(DotEnvSettingsSource):
    """`backend/.env` taken literally: `${...}` in a password is a part of the password."""

    def _read_env_file(self, file_path: Path) -> Mapping[str, str | None]:
        try:
            values = dotenv_values(file_path, encoding="utf-8", interpolate=False)
        except (OSError, UnicodeDecodeError):
            return {}  # `load_settings` tells it, together with all other faults
        return {name.lower(): value for name, value in values.items() if value}


def load_settings(**overrides: Any) -> Settings:
    """Read and check everything. Raises `ConfigurationError` with every fault, each with its remedy.

    `overrides` beat all sources; None among them means "not given".
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    unknown = sorted(set(given) - set(Settings.model_fields))
    if unknown:
        raise TypeError(f"not settings: {', '.join(unknown)}")
    faults = _env_file_faults()
    secrets_dir, secrets_faults = _secrets_dir(given)
    faults += secrets_faults
    settings = None
    try:
        settings = Settings(**given, _secrets_dir=secrets_dir)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_input=False):
            faults += explain(detail, Settings.model_fields)
    if settings is not None:
        faults += [*_certificate_faults(settings), *faults_of(settings)]
    if settings is None or faults:
        # Outside the handlers above, so that no exception with an input in it hangs on this one.
        raise ConfigurationError(faults)
    settings._origins.update(_origins(given, secrets_dir))
    return settings


def require_database(settings: Settings) -> ConnectionSettings:
    """The database to use. Raises `ConfigurationError` when none is given, with a hint at a name mistyped."""
    if settings.database_url is None:
        raise ConfigurationError([missing_database(_names(), ENV_FILE)])
    return parse(settings.database_url.get_secret_value(), pooler=settings.database_pooler)


def migration_connection(settings: Settings) -> ConnectionSettings:
    """Where migrations run: DATABASE_MIGRATION_URL as it stands, else DATABASE_URL without its pooler."""
    if settings.database_migration_url is None:
        return require_database(settings).direct()
    return parse(settings.database_migration_url.get_secret_value(), variable="DATABASE_MIGRATION_URL")


def as_environment(settings: Settings) -> dict[str, str]:
    """The settings as environment variables, secrets included, to hand them to a process of our own."""
    values = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if value is not None:
            values[name.upper()] = as_text(
                value.get_secret_value() if isinstance(value, SecretStr) else value
            )
    return values


# --- where things are, and what is wrong with them ------------------------------------------------------------


def _env_file_faults() -> list[Fault]:
    problem = file_problem(ENV_FILE) if ENV_FILE.exists() else None
    if problem is None:
        return []
    return [
        Fault(".env", f"{ENV_FILE} {problem}.", "Make it a UTF-8 text file that the service's user may read.")
    ]


def _secrets_dir(given: Mapping[str, Any]) -> tuple[Path | None, list[Fault]]:
    """The directory of secret files, where there is one and all of them can be read, and what is wrong otherwise."""
    sources: tuple[Mapping[str, Any], ...] = (
        given,
        EnvSettingsSource(Settings)(),
        _EnvFile(Settings, env_file=ENV_FILE)(),
    )
    path = next((source["secrets_dir"] for source in sources if source.get("secrets_dir")), None)
    if path is None:
        return None, []
    directory = BACKEND / Path(path).expanduser()
    if not (directory.is_dir() and os.access(directory, os.R_OK | os.X_OK)):
        remedy = "Give the path of a directory with one file for each setting."
        return None, [Fault("SECRETS_DIR", "is not a directory that can be read.", remedy)]
    faults = []
    for file in sorted(directory.iterdir()):
        if file.name.lower() in Settings.model_fields and (problem := file_problem(file)) is not None:
            remedy = "Make it a UTF-8 text file that the service's user may read."
            faults.append(Fault(file.name.upper(), f"its file in SECRETS_DIR {problem}.", remedy))
    return (None if faults else directory), faults


def _certificate_faults(settings: Settings) -> list[Fault]:
    """Whether the certificate files of the addresses can be loaded: said at the start, not at the first connect."""
    faults = []
    connections = [migration_connection(settings)] if settings.database_migration_url is not None else []
    connections += [require_database(settings)] if settings.database_url is not None else []
    for connection in connections:
        if connection.tls.root_certificate or connection.tls.certificate:
            try:
                connection.ssl_context()
            except ConfigurationError as error:
                faults += error.faults
    return faults


def _names() -> set[str]:
    """Every name that stands in the environment or `.env` and is no setting of ours."""
    there = set(dotenv_values(ENV_FILE, interpolate=False)) if ENV_FILE.is_file() else set()
    return (set(os.environ) | there) - {name.upper() for name in Settings.model_fields}


def _origins(given: Mapping[str, Any], secrets_dir: Path | None) -> dict[str, str]:
    found: dict[str, str] = {}
    sources: list[tuple[str, Mapping[str, Any]]] = [
        ("command", given),
        ("environment", EnvSettingsSource(Settings)()),
        (".env", _EnvFile(Settings, env_file=ENV_FILE)()),
    ]
    if secrets_dir is not None:
        sources.append(("secrets", SecretsSettingsSource(Settings, secrets_dir=secrets_dir)()))
    for origin, values in sources:
        for name in values:
            found.setdefault(name, origin)
    return found
