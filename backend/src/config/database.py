"""Settings of the database, and the translation of an address to what asyncpg takes: hosts, TLS, pooler, timeouts.

Nothing is opened, and no file is read before `ssl_context()` is called. asyncpg has fallbacks of its own (PGPASSWORD,
PGSSLMODE, ~/.pgpass, ~/.postgresql, service files); every argument is passed explicitly so that none of them decides
where a password goes.

TLS: without `sslmode` the server is verified (`verify-full`, the system's authorities) unless it is on this machine.
asyncpg has no SCRAM channel binding, and its `require` accepts a self-signed certificate. Therefore `require` means
`verify-full` for Neon, with `channel_binding=require`, and with an authority. Weaker modes are used if they are named,
with a warning.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, cast, get_args

from pydantic import BaseModel, Field, SecretStr, ValidationInfo, field_validator

from ..errors import ConfigurationError, Fault
from . import BACKEND
from .connection import APPLICATION_NAME, ConnectionSettings, Pooler, without_pooler
from .dsn import EXAMPLE, Dsn, Host, is_printable_key, parse_dsn
from .tls import VERSIONS, Tls, TlsMode
from .validation_messages import LowerCase, raise_faults

__all__ = [
    "ConnectionSettings",
    "DatabaseSettings",
    "Host",
    "Pooler",
    "PoolerSetting",
    "Tls",
    "TlsMode",
    "parse",
]

PoolerSetting = Pooler


class DatabaseSettings(BaseModel):
    """Database"""

    # Before the addresses, whose validation depends on it.
    database_pooler: Annotated[PoolerSetting, LowerCase] = Field(
        default="auto",
        description=(
            "The connection pooler in front of PostgreSQL. transaction: PgBouncer in transaction mode without prepared "
            "statements. tracking: PgBouncer 1.21 or later with max_prepared_statements, such as Neon's. auto: by the "
            "address."
        ),
    )
    database_url: SecretStr | None = Field(
        default=None,
        max_length=8192,
        description=(
            "The PostgreSQL database, as its provider prints the URL. TLS is verified unless the URL says otherwise. "
            "Unset: `make run` starts a private PostgreSQL."
        ),
    )
    database_migration_url: SecretStr | None = Field(
        default=None,
        max_length=8192,
        description=(
            "The database with the role or host to use for migrations. Unset: DATABASE_URL, with -pooler removed from "
            "the host name."
        ),
    )
    database_pool_size: int = Field(
        default=4,
        ge=1,
        le=200,
        description=(
            "Database connections per worker. The fastest size is about the database's cores divided by the workers."
        ),
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
        description="The timeout of one connection attempt. It includes the time in which a suspended Neon resumes.",
    )
    database_command_timeout_seconds: float = Field(
        default=5.0,
        gt=0,
        le=3600,
        description="How long the service waits for the result of a statement.",
    )
    database_statement_timeout_seconds: float = Field(
        default=4.0, gt=0, le=3600, description="PostgreSQL's statement_timeout."
    )
    database_lock_timeout_seconds: float = Field(
        default=2.0,
        gt=0,
        le=3600,
        description="PostgreSQL's lock_timeout: how long a statement waits for a lock.",
    )
    database_recovery_wait_seconds: float = Field(
        default=1.5,
        ge=0,
        le=60,
        description="How long requests wait for a lost database to return before they get 503.",
    )
    migrate_on_start: bool = Field(
        default=True,
        description=(
            "Whether the service migrates the schema to the newest revision when it starts. Several instances may "
            "start at the same time."
        ),
    )
    data_directory: Path = Field(
        default=BACKEND / ".data",
        description=(
            "Where `serve --embedded` keeps its private PostgreSQL, and development its signing key; relative to "
            "backend/."
        ),
    )

    @field_validator("data_directory")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        # Relative to backend/, which holds .env, and not to the working directory of a service.
        return BACKEND / value.expanduser()

    @field_validator("database_url", "database_migration_url")
    @classmethod
    def _address(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is None:
            return None
        field = str(info.field_name)
        pooler: PoolerSetting = (
            info.data.get("database_pooler", "auto") if field == "database_url" else "auto"
        )
        faults: list[Fault] = []
        try:
            parse(value.get_secret_value(), variable=field.upper(), pooler=pooler)
        except ConfigurationError as error:
            faults = error.faults
        if faults:
            raise_faults(faults)
        return value


_AUTHENTICATION_METHODS: Final = frozenset({"password", "md5", "gss", "sspi", "scram-sha-256", "none"})
# PgBouncer refuses every other startup parameter with 08P01.
_POOLER_SETTINGS: Final = {
    "application_name", "client_encoding", "datestyle", "timezone", "standard_conforming_strings",
}  # fmt: skip

# The values that a parameter may have, its default first.
_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "channel_binding": ("prefer", "disable", "require"),
    "sslnegotiation": ("postgres", "direct"),
    "ssl_min_protocol_version": tuple(VERSIONS),
    "ssl_max_protocol_version": tuple(reversed(VERSIONS)),
    "sslsni": ("1",),
    "sslaccept": ("strict",),
    "gssencmode": ("disable", "prefer"),
    "target_session_attrs": ("any", "primary", "standby", "prefer-standby", "read-write", "read-only"),
    "load_balance_hosts": ("disable",),
    "pgbouncer": ("false", "true"),
    "schema": ("public",),
}
_KNOWN: Final = {
    *_CHOICES,
    "sslmode", "ssl", "sslrootcert", "sslcert", "sslkey", "sslpassword", "require_auth", "options", "connect_timeout",
    "application_name", "fallback_application_name", "client_encoding",
    "user", "password", "host", "port", "dbname", "database",
    # Without effect: asyncpg has no such option, and its behaviour is what they usually ask for.
    "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout", "sslcompression",
    # Routing and compatibility of other drivers: Supabase, Vercel, node-postgres.
    "supa", "workaround", "uselibpqcompat",
}  # fmt: skip
_REMEDIES: Final = {
    "connection_limit": "Set DATABASE_POOL_SIZE instead.",
    "pool_size": "Set DATABASE_POOL_SIZE instead.",
    "pool_timeout": "Set DATABASE_POOL_TIMEOUT_SECONDS instead.",
    "command_timeout": "Set DATABASE_COMMAND_TIMEOUT_SECONDS instead.",
    "socket_timeout": "Set DATABASE_COMMAND_TIMEOUT_SECONDS instead.",
    "statement_timeout": "Set DATABASE_STATEMENT_TIMEOUT_SECONDS instead.",
    "statement_cache_size": "Set DATABASE_POOLER=transaction instead.",
    "prepared_statement_cache_size": "Set DATABASE_POOLER=transaction instead.",
    "schema": "Set the search_path with options=-c%20search_path%3Dname.",
    "search_path": "Write it as options=-c%20search_path%3Dname.",
    "sslaccept": "Use sslmode=verify-full, with sslrootcert for a certificate authority of your own.",
    "passfile": "Put the password into the address: password files are not read.",
    "service": "Give the whole address: service files are not read.",
    "servicefile": "Give the whole address: service files are not read.",
    "hostaddr": "Give the host's name: its certificate is checked against it.",
    "sslcrl": "Remove it: certificate revocation lists are not supported.",
    "timezone": "Remove it: all sessions use UTC.",
}
_WEAK: Final = {
    "require": "encrypts, but does not verify the server: a machine in between can read and change all data",
    "allow": "leaves encryption to the server, or to a machine in between",
    "prefer": "leaves encryption to the server, or to a machine in between",
    "disable": "sends all data unencrypted",
}


def parse(
    pasted: str, *, variable: str = "DATABASE_URL", pooler: PoolerSetting = "auto"
) -> ConnectionSettings:
    """Translate an address. Raises `ConfigurationError` with all its faults, reported under `variable`.

    No message holds any part of the password.
    """
    dsn = parse_dsn(pasted, _KNOWN)
    settings = _Translator(dsn, variable).settings(pooler) if not dsn.problems else None
    if settings is None or dsn.problems:
        raise ConfigurationError([Fault(variable, problem, remedy) for problem, remedy in dsn.problems])
    return settings


class _Translator:
    """The translation of one address. Faults collect in `dsn.problems`."""

    def __init__(self, dsn: Dsn, variable: str) -> None:
        self.dsn = dsn
        self.variable = variable
        self.warnings: list[str] = []

    def settings(self, pooler: PoolerSetting) -> ConnectionSettings:
        dsn = self.dsn
        for key in dsn.parameters:
            if key not in _KNOWN:
                self._refuse_unknown(key)
        if not dsn.hosts:
            dsn.fault("Has no host.", f"For example {EXAMPLE}, or ?host=/run/postgresql for a Unix socket.")
        if not dsn.user:
            dsn.fault("Has no user.", f"For example {EXAMPLE}.")
        choices = {key: self._choice(key) for key in _CHOICES}
        neon = any(_is_neon(host.name) for host in dsn.hosts)
        if pooler == "auto":
            pooler = self._detect_pooler(choices["pgbouncer"], neon=neon)
        server_settings = self._server_settings(pooler, neon=neon)
        return ConnectionSettings(
            hosts=tuple(dsn.hosts),
            user=dsn.user or "",
            password=SecretStr(dsn.password) if dsn.password is not None else None,
            database=dsn.database or dsn.user or "",
            tls=self._tls(choices, neon=neon),
            pooler=pooler,
            neon=neon,
            server_settings=MappingProxyType(server_settings),
            target_session_attrs=choices["target_session_attrs"],
            require_auth=self._require_auth(),
            connect_timeout_seconds=self._connect_timeout(),
            application_name=server_settings["application_name"],
            warnings=tuple(self.warnings),
            variable=self.variable,
        )

    def _get(self, key: str) -> str:
        return self.dsn.parameters.get(key, "").strip()

    def _choice(self, key: str) -> str:
        value = self._get(key) or _CHOICES[key][0]
        if value not in _CHOICES[key]:
            remedy = _REMEDIES.get(key, f"Use one of: {', '.join(_CHOICES[key])}.")
            self.dsn.fault(f"The value of {key} is not supported.", remedy)
        return value

    def _refuse_unknown(self, key: str) -> None:
        if not is_printable_key(key):
            self.dsn.fault("Has a parameter without a valid name.", "Check the part after '?'.")
            return
        close = get_close_matches(key.lower(), sorted(_KNOWN), n=1, cutoff=0.75)
        remedy = _REMEDIES.get(key.lower()) or (f"Did you mean {close[0]}?" if close else "Remove it.")
        self.dsn.fault(f"The parameter {key} is not supported.", remedy)

    # --- TLS ---

    def _tls(self, choices: dict[str, str], *, neon: bool) -> Tls:
        hosts = self.dsn.hosts
        sockets = all(host.is_socket for host in hosts)
        local = all(host.is_socket or _is_loopback(host.name) for host in hosts)
        root, certificate, key = (self._get(name) or None for name in ("sslrootcert", "sslcert", "sslkey"))
        direct = choices["sslnegotiation"] == "direct"
        strict = neon or direct or root == "system" or choices["channel_binding"] == "require"
        verified = strict or root is not None
        mode: TlsMode = self._sslmode() or ("disable" if local and not verified else "verify-full")
        if sockets:
            mode = "disable"
        elif mode == "disable":
            if verified:
                reason = "Neon" if neon else "channel_binding, sslnegotiation or sslrootcert"
                self.dsn.fault(
                    f"sslmode=disable contradicts {reason}.",
                    "Use sslmode=verify-full, or remove sslmode.",
                )
        elif verified or mode == "verify-ca":
            # verify-ca by the system's authorities would accept the certificate of any web site.
            mode = "verify-ca" if mode == "verify-ca" and root is not None and not strict else "verify-full"
        if key and not certificate:
            self.dsn.fault("Has sslkey without sslcert.", "Give both, or remove sslkey.")
        if certificate and mode in {"disable", "allow", "prefer"} and not sockets:
            self.dsn.fault(f"sslcert needs TLS, but sslmode is {mode}.", "Use sslmode=verify-full.")
        if mode in _WEAK and not (local and mode != "require"):
            self.warnings.append(f"sslmode={mode} {_WEAK[mode]}. Use sslmode=verify-full.")
        password = self._get("sslpassword")
        return Tls(
            mode=mode,
            root_certificate=None if root == "system" else root,
            certificate=certificate,
            key=key,
            key_password=SecretStr(password) if password else None,
            minimum_version=choices["ssl_min_protocol_version"],
            maximum_version=self._get("ssl_max_protocol_version") or None,
            negotiation="direct" if direct else "postgres",
        )

    def _sslmode(self) -> TlsMode | None:
        value = self._get("sslmode").replace("_", "-")
        if not value:  # SQLAlchemy with asyncpg, JDBC and Heroku write ssl=...
            value = self._get("ssl").lower()
            value = {"true": "require", "1": "require", "false": "disable", "0": "disable"}.get(value, value)
        modes = get_args(TlsMode)
        if value and value not in modes:
            remedy = f"Use one of: {', '.join(modes)}."
            if value == "no-verify":
                remedy = "Use sslmode=verify-full, or sslmode=require for node-postgres's no-verify."
            self.dsn.fault("The value of sslmode is not supported.", remedy)
            return None
        return cast(TlsMode, value) if value else None

    # --- pooler, server settings, the rest ---

    def _detect_pooler(self, pgbouncer: str, *, neon: bool) -> Pooler:
        hosts = self.dsn.hosts
        if any(without_pooler(host.name) != host.name for host in hosts):
            return "tracking"
        supabase = any(
            host.name.lower().endswith(".pooler.supabase.com") and host.port == 6543 for host in hosts
        )
        if pgbouncer == "true" or supabase:
            return "transaction"
        return "none" if neon else "auto"

    def _server_settings(self, pooler: Pooler, *, neon: bool) -> dict[str, str]:
        given = self._options(neon=neon)
        name = self._get("application_name") or given.pop("application_name", "")
        encoding = self._get("client_encoding").lower().replace("-", "").replace("_", "")
        if encoding not in {"", "auto", "utf8", "unicode"}:
            self.dsn.fault("Has a client_encoding other than UTF8.", "Remove it: asyncpg uses UTF-8 only.")
        for key in list(given):
            if key.lower() in {"timezone", "client_encoding"}:
                self.warnings.append(f"{key} in options is ignored: all sessions use UTC and UTF-8.")
                del given[key]
            elif pooler not in {"none", "auto"} and key.lower() not in _POOLER_SETTINGS:
                self.dsn.fault(
                    f"Sets {key} in options, which a pooler refuses when a connection starts.",
                    f"Use the host without the pooler, or run: ALTER ROLE your_role SET {key} = ...",
                )
        name = name or self._get("fallback_application_name") or APPLICATION_NAME
        return {"application_name": name, "timezone": "UTC", **given}

    def _options(self, *, neon: bool) -> dict[str, str]:
        """`-c a=b --c=d` as settings, without Neon's `endpoint=...` for clients that send no SNI: asyncpg does."""
        text = re.sub(r"(^|\s)-c[+\s]", r"\1-c", self._get("options"))
        given: dict[str, str] = {}
        for word in re.findall(r"(?:[^\s\\]|\\.)+", text):
            if re.match(r"(endpoint|project)=[\w.-]+\Z", word):
                if not neon:
                    name = word.partition("=")[0]
                    self.warnings.append(f"{name} in options is ignored: only Neon has it.")
                continue
            setting = re.sub(r"\\(.)", r"\1", word[2:] if word.startswith(("-c", "--")) else "")
            key, equals, value = setting.partition("=")
            key = key.replace("-", "_")
            if not equals or not is_printable_key(key):
                remedy = "Write options=-c%20name%3Dvalue."
                self.dsn.fault("Has something other than -c name=value in options.", remedy)
                return {}
            given[key] = value
        return given

    def _require_auth(self) -> frozenset[str] | None:
        """The methods allowed: those listed, or all but those listed with an exclamation mark, as in libpq."""
        words = [word.strip() for word in self._get("require_auth").split(",") if word.strip()]
        names = frozenset(word.removeprefix("!") for word in words)
        negated = {word.startswith("!") for word in words}
        if not words:
            return None
        if not names <= _AUTHENTICATION_METHODS or len(negated) > 1:
            self.dsn.fault(
                "The value of require_auth is not supported.",
                f"Use one or more of {', '.join(sorted(_AUTHENTICATION_METHODS))}, or all of them with !.",
            )
        return _AUTHENTICATION_METHODS - names if True in negated else names

    def _connect_timeout(self) -> float | None:
        value = self._get("connect_timeout")
        if value and not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,6})?", value):
            self.dsn.fault("Has a connect_timeout that is not a number.", "For example connect_timeout=10.")
            return None
        return float(value or 0) or None  # 0 means no limit, as in libpq.


def _is_neon(name: str) -> bool:
    return name.lower().endswith(".neon.tech")


def _is_loopback(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"
