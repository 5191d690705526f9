"""A pasted address becomes what asyncpg takes: hosts, TLS, pooler, timeouts.

Pure: nothing is opened, and no file is read before `ssl_context()` is called. asyncpg has fallbacks of its own
(PGPASSWORD, PGSSLMODE, ~/.pgpass, ~/.postgresql, service files); everything is handed over explicitly so that
none of them ever decides where a password goes.

TLS. Without `sslmode`, a host that is not this machine is verified (`verify-full`, the system's authorities). asyncpg
has no SCRAM channel binding, and its `require` gave the password to a server with a self-signed certificate, so
`require` is raised to `verify-full` for Neon, where `channel_binding=require` stands, and where an authority is
given. Weaker modes have to be asked for by name and leave a warning.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, cast, get_args

from pydantic import BaseModel, Field, SecretStr, ValidationInfo, field_validator

from ..errors import ConfigurationError, Fault
from . import BACKEND
from .connection import APPLICATION_NAME, ConnectionSettings, Pooler, without_pooler
from .dsn import EXAMPLE, Host, Pasted, is_printable_key, read
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
        if value is None or not value.get_secret_value().strip():
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


_SESSION_ATTRIBUTES = ("any", "primary", "standby", "prefer-standby", "read-write", "read-only")
_AUTHENTICATION_METHODS = frozenset({"password", "md5", "gss", "sspi", "scram-sha-256", "none"})
# What PgBouncer accepts while a connection starts; anything else it refuses with 08P01.
_POOLER_SETTINGS = {
    "application_name",
    "client_encoding",
    "datestyle",
    "timezone",
    "standard_conforming_strings",
}

# Parameters that change nothing here: asyncpg has no such knob, and its default is as good.
_IGNORED = {
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
    "sslcompression",
}
_READ = {
    "sslmode",
    "ssl",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "sslpassword",
    "sslnegotiation",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "sslsni",
    "channel_binding",
    "gssencmode",
    "options",
    "connect_timeout",
    "application_name",
    "fallback_application_name",
    "client_encoding",
    "target_session_attrs",
    "load_balance_hosts",
    "require_auth",
    "pgbouncer",
    "user",
    "password",
    "host",
    "port",
    "dbname",
    "database",
}
_KNOWN = _READ | _IGNORED
_ADVICE = {
    "connection_limit": "Set DATABASE_POOL_SIZE instead.",
    "pool_size": "Set DATABASE_POOL_SIZE instead.",
    "pool_timeout": "Set DATABASE_POOL_TIMEOUT_SECONDS instead.",
    "command_timeout": "Set DATABASE_COMMAND_TIMEOUT_SECONDS instead.",
    "statement_cache_size": "Set DATABASE_POOLER=transaction instead.",
    "prepared_statement_cache_size": "Set DATABASE_POOLER=transaction instead.",
    "schema": "Set the search_path by options=-c%20search_path%3Dname.",
    "search_path": "Write it as options=-c%20search_path%3Dname.",
    "statement_timeout": "Set DATABASE_STATEMENT_TIMEOUT_SECONDS instead.",
    "passfile": "Groundwork reads no password file: put the password into the address.",
    "service": "Groundwork reads no service file: give the whole address.",
    "servicefile": "Groundwork reads no service file: give the whole address.",
    "hostaddr": "Give one host; its name is looked up and its certificate checked against it.",
    "sslcrl": "Certificate revocation lists are not supported; leave it out.",
    "timezone": "Leave it out: every session runs in UTC.",
}


def parse(
    pasted: str, *, variable: str = "DATABASE_URL", pooler: PoolerSetting = "auto"
) -> ConnectionSettings:
    """What people paste, as what asyncpg takes. Raises `ConfigurationError` with every fault at once.

    `variable` is the name that faults are reported under. No message holds any part of the password.
    """
    parts = read(pasted, _KNOWN)
    translation = _Translation(parts, variable)
    settings = translation.settings(pooler) if not parts.problems else None
    if settings is None or parts.problems:
        raise ConfigurationError([Fault(variable, problem, remedy) for problem, remedy in parts.problems])
    return settings


class _Translation:
    """One pasted address on its way; faults gather in `pasted.problems`, so that all of them can be told at once."""

    def __init__(self, pasted: Pasted, variable: str) -> None:
        self.pasted = pasted
        self.variable = variable
        self.warnings: list[str] = []

    def settings(self, pooler: PoolerSetting) -> ConnectionSettings | None:
        pasted = self.pasted
        self._unknown_parameters()
        if not pasted.hosts:
            pasted.fault("it names no host.", f"Write {EXAMPLE}, or ?host=/run/postgresql for a Unix socket.")
        if not pasted.user:
            pasted.fault("it names no user.", f"Write {EXAMPLE}.")
        neon = any(_is_neon(host.name) for host in pasted.hosts)
        tls = self._tls(neon)
        chosen = self._pooler(pooler)
        server_settings = self._server_settings(chosen, neon)
        attributes = self._one_of("target_session_attrs", _SESSION_ATTRIBUTES, "any")
        self._one_of("load_balance_hosts", ("disable",), "disable")
        require_auth = self._require_auth()
        connect_timeout = self._connect_timeout()
        if pasted.problems:
            return None
        return ConnectionSettings(
            hosts=tuple(pasted.hosts),
            user=pasted.user or "",
            password=SecretStr(pasted.password) if pasted.password is not None else None,
            database=pasted.database or pasted.user or "",
            tls=tls,
            pooler=chosen,
            neon=neon,
            server_settings=MappingProxyType(server_settings),
            target_session_attrs=attributes,
            require_auth=require_auth,
            connect_timeout_seconds=connect_timeout,
            application_name=server_settings["application_name"],
            warnings=tuple(self.warnings),
            variable=self.variable,
        )

    def _get(self, key: str) -> str:
        return self.pasted.parameters.get(key, "").strip()

    def _one_of(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        value = self._get(key) or default
        if value not in allowed:
            self.pasted.fault(f"{key} has a value that is not known.", f"Use one of: {', '.join(allowed)}.")
        return value

    def _unknown_parameters(self) -> None:
        for key in self.pasted.parameters:
            if key in _KNOWN:
                continue
            if not is_printable_key(key):
                self.pasted.fault(
                    "it has a parameter whose name cannot be read.", "Check what follows the '?'."
                )
                continue
            remedy = _ADVICE.get(key.lower())
            if remedy is None:
                close = get_close_matches(key.lower(), sorted(_KNOWN), n=1, cutoff=0.75)
                remedy = f"Did you mean {close[0]}?" if close else "Leave it out."
            self.pasted.fault(f"the parameter {key} is not supported.", remedy)

    # --- TLS ---

    def _tls(self, neon: bool) -> Tls:
        pasted = self.pasted
        local = all(host.is_socket or _is_loopback(host.name) for host in pasted.hosts)
        only_sockets = all(host.is_socket for host in pasted.hosts)
        named = self._named_mode()
        binding = self._one_of("channel_binding", ("disable", "prefer", "require"), "prefer")
        root = self._get("sslrootcert") or None
        system = root == "system"
        negotiation = self._one_of("sslnegotiation", ("postgres", "direct"), "postgres")
        strict = binding == "require" or system or neon or negotiation == "direct"
        verifying = strict or root is not None
        mode: TlsMode = named or ("disable" if local and not verifying else "verify-full")
        if only_sockets:
            mode = "disable"
        elif mode == "disable":
            if verifying:
                reason = "Neon" if neon else "channel_binding, sslnegotiation or sslrootcert"
                pasted.fault(
                    f"sslmode=disable contradicts {reason}.", "Use sslmode=verify-full, or leave sslmode out."
                )
        elif verifying:
            # What was asked for beside the mode is only true when the server is verified.
            mode = "verify-ca" if mode == "verify-ca" and not strict else "verify-full"
        elif mode == "verify-ca":
            mode = "verify-full"  # any web site's certificate would pass the system's authorities
        certificate, key = self._get("sslcert") or None, self._get("sslkey") or None
        if key and not certificate:
            pasted.fault("sslkey is given without sslcert.", "Give both, or leave sslkey out.")
        if certificate and mode in {"disable", "allow", "prefer"} and not only_sockets:
            pasted.fault(f"sslcert needs TLS, and sslmode is {mode}.", "Use sslmode=verify-full.")
        self._one_of("gssencmode", ("disable", "prefer"), "disable")
        self._one_of("sslsni", ("1",), "1")
        self._warn_of_weak(mode, local=local)
        password = self._get("sslpassword")
        return Tls(
            mode=mode,
            root_certificate=None if system else root,
            certificate=certificate,
            key=key,
            key_password=SecretStr(password) if password else None,
            minimum_version=self._one_of("ssl_min_protocol_version", tuple(VERSIONS), "TLSv1.2"),
            maximum_version=self._maximum_version(),
            negotiation=cast(Literal["postgres", "direct"], negotiation),
        )

    def _maximum_version(self) -> str | None:
        if not self._get("ssl_max_protocol_version"):
            return None
        return self._one_of("ssl_max_protocol_version", tuple(VERSIONS), "TLSv1.3")

    def _named_mode(self) -> TlsMode | None:
        modes = get_args(TlsMode)
        value = self._get("sslmode").replace("_", "-")
        # SQLAlchemy with asyncpg, JDBC and Heroku say ssl=...
        short = self._get("ssl").lower()
        value = value or {"true": "require", "1": "require", "false": "disable", "0": "disable"}.get(
            short, short
        )
        if value and value not in modes:
            self.pasted.fault("sslmode has a value that is not known.", f"Use one of: {', '.join(modes)}.")
            return None
        return cast(TlsMode, value) if value else None

    def _warn_of_weak(self, mode: TlsMode, *, local: bool) -> None:
        if mode == "require":
            self.warnings.append(
                "sslmode=require encrypts, but does not verify who the server is: a machine in between can read and "
                "change everything. Use sslmode=verify-full."
            )
        elif mode in {"allow", "prefer"} and not local:
            self.warnings.append(
                f"sslmode={mode} sends everything without encryption when the network says so. "
                "Use sslmode=verify-full."
            )
        elif mode == "disable" and not local:
            self.warnings.append(
                "sslmode=disable sends everything without encryption over the network. Use sslmode=verify-full."
            )

    # --- pooler and server settings ---

    def _pooler(self, setting: PoolerSetting) -> Pooler:
        asked = self._one_of("pgbouncer", ("true", "false"), "false") == "true"
        if setting != "auto":
            return setting
        names = [host.name for host in self.pasted.hosts]
        if any(without_pooler(name) != name for name in names):
            return "tracking"
        supabase = any(
            host.name.endswith(".pooler.supabase.com") and host.port == 6543 for host in self.pasted.hosts
        )
        if asked or supabase:
            return "transaction"
        return "none" if any(_is_neon(name) for name in names) else "auto"

    def _server_settings(self, pooler: Pooler, neon: bool) -> dict[str, str]:
        given = self._options(neon)
        name = self._get("application_name") or given.pop("application_name", "")
        encoding = self._get("client_encoding").lower().replace("-", "").replace("_", "")
        if encoding not in {"", "auto", "utf8", "unicode"}:
            self.pasted.fault("client_encoding is not UTF8.", "Leave it out: asyncpg speaks UTF-8 only.")
        for key in list(given):
            if key.lower() in {"timezone", "client_encoding"}:
                self.warnings.append(
                    f"options sets {key}; it is left out, because every session runs in UTC and UTF-8."
                )
                del given[key]
            elif pooler not in {"none", "auto"} and key.lower() not in _POOLER_SETTINGS:
                self.pasted.fault(
                    f"options sets {key}, which a pooler refuses while a connection starts.",
                    f"Use the host without the pooler, or run: ALTER ROLE your_role SET {key} = ...",
                )
        # PostgreSQL cuts the name at 63 bytes and shows what is not ASCII as question marks or escapes.
        name = name or self._get("fallback_application_name") or APPLICATION_NAME
        return {"application_name": name, "timezone": "UTC", **given}

    def _options(self, neon: bool) -> dict[str, str]:
        """`-c a=b --c=d` as settings. Neon's `endpoint=...` is for clients without SNI; asyncpg always sends it."""
        text = re.sub(r"(^|\s)-c\+", r"\1-c ", self.pasted.parameters.get("options", "").strip())
        words = [re.sub(r"\\(.)", r"\1", word) for word in re.findall(r"(?:[^\s\\]|\\.)+", text)]
        given: dict[str, str] = {}
        position = 0
        while position < len(words):
            word = words[position]
            position += 1
            if re.match(r"(endpoint|project)=[\w.-]+\Z", word):
                if not neon:
                    self.warnings.append(
                        f"options={word.partition('=')[0]} is left out: only Neon's hosts know it."
                    )
                continue
            if word == "-c" and position < len(words):
                word = words[position]
                position += 1
            elif word.startswith(("--", "-c")):
                word = word[2:]
            else:
                word = ""
            key, equals, value = word.partition("=")
            key = key.replace("-", "_")
            if not equals or not is_printable_key(key):
                self.pasted.fault(
                    "options holds something other than -c name=value.", "Write options=-c%20name%3Dvalue."
                )
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
            self.pasted.fault(
                "require_auth has a value that is not known.",
                f"Use one or more of {', '.join(sorted(_AUTHENTICATION_METHODS))}, or all of them with !.",
            )
        return _AUTHENTICATION_METHODS - names if True in negated else names

    def _connect_timeout(self) -> float | None:
        value = self._get("connect_timeout")
        if not value:
            return None
        if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,6})?", value):
            self.pasted.fault(
                "connect_timeout is not a number of seconds.", "Write for example connect_timeout=10."
            )
            return None
        return float(value) or None  # libpq: 0 means no limit


# --- what a host's name tells --------------------------------------------------------------------------------------


def _is_neon(name: str) -> bool:
    return name.lower().rstrip(".").endswith(".neon.tech")


def _is_loopback(name: str) -> bool:
    if name.lower().rstrip(".") == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
