"""The settings: composed from one class per topic, read from the environment, `.env` and secret files.

The environment takes precedence over `backend/.env`, which takes precedence over the files in `SECRETS_DIR`. An empty
value counts as unset. A setting's environment variable is its attribute's name in capitals. `load_settings()` reads
and validates; it reports all faults at once, and never a value.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import BaseModel, PrivateAttr, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from ..errors import ConfigurationError, Fault
from . import BACKEND, auth, server
from .accounts import AccountSettings
from .api import ApiSettings
from .auth import AuthSettings, weaknesses
from .database import ConnectionSettings, DatabaseSettings, parse
from .limits import LimitSettings
from .server import HealthSettings, LogSettings, ServerSettings
from .sources import ACCEPTED, Sources, read_sources
from .validation_messages import as_text, explain, missing_database

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
        hide_input_in_errors=True,
        validate_default=False,
    )

    _sources: Sources = PrivateAttr(default_factory=Sources)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # One reader for all three sources, because names and values are treated alike in all of them.
        sources = read_sources(init_settings(), ENV_FILE, cls.model_fields)
        values = {name: value for name, value in sources.values.items() if name in cls.model_fields}
        return (InitSettingsSource(settings_cls, values),)

    def origin(self, name: str) -> str:
        """The source of a setting: `environment`, `.env`, `secrets`, `command`, `default` or another variable."""
        return self._sources.origins.get(name, "default")

    @property
    def warnings(self) -> list[tuple[str, str]]:
        """What is accepted and should be changed: variables and sentences."""
        return [*self._sources.warnings, *((fault.variable, fault.problem) for fault in weaknesses(self))]


def load_settings(**overrides: Any) -> Settings:
    """Read and validate all settings. Raises `ConfigurationError` with every fault and its remedy.

    `overrides` take precedence over all sources, unless they are None.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    unknown = sorted(set(given) - set(Settings.model_fields))
    if unknown:
        raise TypeError(f"not settings: {', '.join(unknown)}")
    sources = read_sources(given, ENV_FILE, Settings.model_fields)
    faults = list(sources.faults)
    settings = None
    try:
        settings = Settings(**given)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_input=False):
            faults += explain(detail, Settings.model_fields)
    if settings is not None:
        faults += [*_certificate_faults(settings), *auth.faults_of(settings), *server.faults_of(settings)]
    if settings is None or faults:
        # Outside the handler above, so that this exception has no context with an input in it.
        raise ConfigurationError([replace(each, variable=sources.variable(each.variable)) for each in faults])
    settings._sources = sources
    return settings


class LogStart(LogSettings):
    """What the log needs to start."""

    environment: str = ServerSettings.model_fields["environment"].default


def log_settings() -> LogStart:
    """The settings of the log alone, with defaults in place of what is invalid: refused settings are logged too."""
    found = read_sources({}, ENV_FILE, Settings.model_fields).values
    given = {name: found[name] for name in LogStart.model_fields if name in found}
    try:
        return LogStart(**given)
    except ValidationError as error:
        invalid = {detail["loc"][0] for detail in error.errors(include_url=False, include_input=False)}
    return LogStart(**{name: value for name, value in given.items() if name not in invalid})


def require_database(settings: Settings) -> ConnectionSettings:
    """The database to use. Raises `ConfigurationError` without one, with a hint at a misspelt name."""
    if settings.database_url is None:
        raise ConfigurationError(
            [missing_database(read_sources({}, ENV_FILE, Settings.model_fields).values, ENV_FILE)]
        )
    return parse(settings.database_url.get_secret_value(), pooler=settings.database_pooler)


def migration_connection(settings: Settings) -> ConnectionSettings:
    """The database of migrations: DATABASE_MIGRATION_URL, otherwise DATABASE_URL without its pooler."""
    if settings.database_migration_url is None:
        return require_database(settings).direct()
    return parse(settings.database_migration_url.get_secret_value(), variable="DATABASE_MIGRATION_URL")


def as_environment(settings: Settings) -> dict[str, str]:
    """The settings as the environment variables of a child process, secrets included."""
    # Other names for the same settings are unset: they would name another database than DATABASE_URL then does.
    values = dict.fromkeys((name.upper() for name in ACCEPTED), "")
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if value is not None:
            values[name.upper()] = as_text(
                value.get_secret_value() if isinstance(value, SecretStr) else value
            )
    return values


def _certificate_faults(settings: Settings) -> list[Fault]:
    """Faults of the addresses' certificate files, so that they appear at start and not at the first connection."""
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
