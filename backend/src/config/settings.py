"""What the operator decides: every setting typed, bounded, described and frozen.

The environment beats `backend/.env`, which beats the files in `SECRETS_DIR`. An empty value counts as unset. A
setting's name in the environment is its attribute's name in capitals. `load_settings()` is the way in: it tells
every fault at once, and never a value.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dotenv import dotenv_values
from pydantic import Field, PrivateAttr, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
)

from ..errors import ConfigurationError, Fault
from . import accounts, clients
from .database import ConnectionSettings, PoolerSetting, parse
from .identity import (
    AuthIssuers,
    AuthLeeway,
    AuthOwnIssuer,
    AuthPassthroughIssuer,
    AuthSharedAudience,
    AuthSharedIssuer,
    AuthSharedSecretStr,
    SigningKeysSecretStr,
    faults_of,
)
from .requests import BatchBytes, BodyBytes, CorsOrigins, IdempotencyHours, ImportBytes, RequireIfMatch
from .validation_messages import TrustedProxies, as_text, explain, file_problem, missing_database

BACKEND = Path(__file__).resolve().parents[2]
ENV_FILE = BACKEND / ".env"


class Settings(BaseSettings):
    """The effective settings of one process. Durations are seconds, sizes bytes."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        env_ignore_empty=True,
        hide_input_in_errors=True,
        validate_default=False,
    )

    environment: Literal["development", "test", "production"] = Field(
        default="development",
        description="Where this runs. In production logs are JSON and details of health are hidden.",
    )
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        max_length=255,
        description="The address to listen on; 0.0.0.0 or :: to be reachable from other machines.",
    )
    port: int = Field(default=8000, ge=0, le=65535, description="The port to listen on; 0 takes a free one.")
    workers: int = Field(
        default=1,
        ge=1,
        le=256,
        description="Worker processes; each has its own pool of database connections.",
    )
    database_pooler: PoolerSetting = Field(
        default="auto",
        description=(
            "What stands in front of PostgreSQL: none, transaction (PgBouncer in transaction mode without prepared "
            "statements), tracking (PgBouncer >= 1.21 with max_prepared_statements, as Neon's); auto goes by the "
            "address."
        ),
    )
    database_url: SecretStr | None = Field(
        default=None,
        description=(
            "The PostgreSQL to use, as its provider prints it; verified TLS unless the address says otherwise. "
            "Without it, `make run` starts a private PostgreSQL."
        ),
    )
    database_migration_url: SecretStr | None = Field(
        default=None,
        description=(
            "Another role or host for migrations. Unset: DATABASE_URL, with -pooler taken off the host's name."
        ),
    )
    database_pool_size: int = Field(
        default=4,
        ge=1,
        le=200,
        description="Connections a worker may hold; about the database's cores divided by the workers is fastest.",
    )
    database_pool_timeout_seconds: float = Field(
        default=2.0,
        gt=0,
        le=60,
        description="How long a request waits for a free connection before it gets 503.",
    )
    database_connect_timeout_seconds: float = Field(
        default=5.0,
        gt=0,
        le=120,
        description="How long one attempt to connect may take; covers waking a sleeping Neon.",
    )
    database_command_timeout_seconds: float = Field(
        default=5.0,
        gt=0,
        le=3600,
        description="How long an answer from the database is waited for on our side.",
    )
    database_statement_timeout_seconds: float = Field(
        default=4.0, gt=0, le=3600, description="After how long PostgreSQL itself gives a statement up."
    )
    database_lock_timeout_seconds: float = Field(
        default=2.0, gt=0, le=3600, description="How long a statement waits for a lock held by another."
    )
    database_recovery_wait_seconds: float = Field(
        default=1.5,
        ge=0,
        le=60,
        description="How long the first requests that meet a lost database wait for its return before they get 503.",
    )
    migrate_on_start: bool = Field(
        default=True,
        description="Whether starting brings the schema to the newest revision; several at once are safe.",
    )
    data_directory: Path = Field(
        default=BACKEND / ".data",
        description="Where the private PostgreSQL of `serve --embedded` keeps its data; relative to backend/.",
    )
    health_details: bool | None = Field(
        default=None,
        description="Whether /health shows its checks in detail. Unset: yes, except in production.",
    )
    health_probes: Literal["auto", "passive", "active"] = Field(
        default="auto",
        description=(
            "Whether health asks the database (active) or only watches traffic and sockets (passive), which lets a "
            "scale-to-zero database sleep; auto is passive for Neon."
        ),
    )
    health_interval_seconds: float = Field(
        default=1.0,
        ge=0.1,
        le=3600,
        description="Active probing: at most one check of the database in this time.",
    )
    log_level: Literal["debug", "info", "warning", "error", "critical"] = Field(
        default="info", description="The least severe event that is logged."
    )
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto",
        description="console for people, json for machines; auto is console on a terminal, else json.",
    )
    trusted_proxies: TrustedProxies = ()
    max_body_bytes: BodyBytes = 64 << 10
    max_batch_bytes: BatchBytes = 2 << 20
    max_import_bytes: ImportBytes = 64 << 20
    cors_origins: CorsOrigins = ()
    require_if_match: RequireIfMatch = False
    idempotency_hours: IdempotencyHours = 24
    auth_issuers: AuthIssuers = ()
    auth_shared_secret: AuthSharedSecretStr = None
    auth_shared_issuer: AuthSharedIssuer = None
    auth_shared_audience: AuthSharedAudience = None
    auth_passthrough_issuer: AuthPassthroughIssuer = None
    auth_own_issuer: AuthOwnIssuer = "groundwork"
    auth_leeway_seconds: AuthLeeway = 30.0
    signing_keys: SigningKeysSecretStr = None
    sign_up: accounts.SignUp = "auto"
    access_token_seconds: accounts.AccessTokenSeconds = 300
    session_idle_days: accounts.SessionIdleDays = 30
    session_max_days: accounts.SessionMaxDays = 365
    password_hash_memory_kib: accounts.PasswordHashMemoryKib = 19456
    password_hash_time_cost: accounts.PasswordHashTimeCost = 2
    password_hash_threads: accounts.PasswordHashThreads = 1
    password_hash_queue: accounts.PasswordHashQueue = 64
    login_rate_limit: accounts.LoginRateLimit = "5/minute;30/hour"
    login_address_rate_limit: accounts.LoginAddressRateLimit = "60/minute;600/hour"
    sign_up_rate_limit: accounts.SignUpRateLimit = "30/hour;100/day"
    refresh_rate_limit: accounts.RefreshRateLimit = "600/minute"
    header_timeout_seconds: clients.HeaderTimeoutSeconds = 5.0
    body_timeout_seconds: clients.BodyTimeoutSeconds = 5.0
    send_timeout_seconds: clients.SendTimeoutSeconds = 30.0
    min_bytes_per_second: clients.MinBytesPerSecond = 1024
    keep_alive_seconds: clients.KeepAliveSeconds = 5.0
    max_connections: clients.MaxConnections = 4096
    max_concurrent_requests: clients.MaxConcurrentRequests = 1024
    fast_path: clients.FastPath = True
    admin_host: clients.AdminHost = "127.0.0.1"
    admin_port: clients.AdminPort = None
    drain_grace_seconds: clients.DrainGraceSeconds = 0.0
    shutdown_timeout_seconds: clients.ShutdownTimeoutSeconds = 10.0
    secrets_dir: Path | None = Field(
        default=None,
        description="A directory of files, each named like a setting and holding its value (as Docker secrets).",
    )

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator(
        "environment", "database_pooler", "health_probes", "log_level", "log_format", mode="before"
    )
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("data_directory", "secrets_dir")
    @classmethod
    def _placed(cls, value: Path | None) -> Path | None:
        # A service's working directory is an accident; backend/, where .env lies, is not.
        return None if value is None else BACKEND / value.expanduser()

    @field_validator("database_url", "database_migration_url")
    @classmethod
    def _address(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is None or not value.get_secret_value().strip():
            return None
        pooler: PoolerSetting = info.data.get("database_pooler", "auto")
        faults = _faults_of(value, str(info.field_name), pooler)
        if faults:
            # Pydantic's own error would hold the value; ours holds sentences about it.
            raise PydanticCustomError("address", "is not a usable address", {"faults": faults})
        return value

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


def _faults_of(value: SecretStr, field: str, pooler: PoolerSetting) -> list[Fault]:
    if field == "database_migration_url":
        pooler = "auto"
    try:
        parse(value.get_secret_value(), variable=field.upper(), pooler=pooler)
    except ConfigurationError as error:
        return error.faults
    return []


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
