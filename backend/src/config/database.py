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

import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args
from urllib.parse import quote

import certifi
from pydantic import SecretStr

from ..errors import ConfigurationError, Fault
from .pasted import EXAMPLE, Host, Pasted, is_printable_key, read

__all__ = ["ConnectionSettings", "Host", "Pooler", "PoolerSetting", "Tls", "TlsMode", "parse"]

TlsMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
# "auto": the name does not tell; the database service finds out when it first connects.
Pooler = Literal["auto", "none", "transaction", "tracking"]
PoolerSetting = Literal["auto", "none", "transaction", "tracking"]

APPLICATION_NAME = "groundwork"
_SESSION_ATTRIBUTES = ("any", "primary", "standby", "prefer-standby", "read-write", "read-only")
_TLS_VERSIONS = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}
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
    "pool_timeout": "Set DATABASE_POOL_WAIT_SECONDS instead.",
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
    "require_auth": "asyncpg cannot promise it; a verified certificate stands in for it. Leave it out.",
    "timezone": "Leave it out: every session runs in UTC.",
}


@dataclass(frozen=True, slots=True)
class Tls:
    """How a connection is encrypted and the server verified.

    `root_certificate` is a file with authorities, or None for the system's own. `certificate` and `key` are files
    that prove who we are.
    """

    mode: TlsMode
    root_certificate: str | None = None
    certificate: str | None = None
    key: str | None = None
    key_password: SecretStr | None = None
    minimum_version: str = "TLSv1.2"
    maximum_version: str | None = None
    negotiation: Literal["postgres", "direct"] = "postgres"

    @property
    def verified(self) -> bool:
        return self.mode in {"verify-ca", "verify-full"}


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """Everything needed to reach one database, with nothing left for a driver to guess. Its repr hides the password."""

    hosts: tuple[Host, ...]
    user: str
    password: SecretStr | None
    database: str
    tls: Tls
    pooler: Pooler = "none"
    neon: bool = False
    server_settings: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    target_session_attrs: str = "any"
    connect_timeout_seconds: float | None = None
    application_name: str = APPLICATION_NAME
    warnings: tuple[str, ...] = ()
    variable: str = "DATABASE_URL"

    def asyncpg_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `asyncpg.connect` and `create_pool`: all that is needed to reach the server.

        Raises `ConfigurationError` when a certificate file cannot be used. Timeouts and caches are the caller's.
        """
        return {
            "host": [host.name for host in self.hosts],
            "port": [host.port for host in self.hosts],
            "user": self.user,
            # None would send asyncpg to PGPASSWORD, PGPASSFILE and ~/.pgpass.
            "password": self.password.get_secret_value() if self.password is not None else "",
            "database": self.database,
            "ssl": self._asyncpg_ssl(),
            "direct_tls": self.tls.negotiation == "direct",
            "server_settings": dict(self.server_settings),
            "target_session_attrs": self.target_session_attrs,
            "krbsrvname": "postgres",
            "gsslib": "gssapi",
        }

    def ssl_context(self) -> ssl.SSLContext | None:
        """The context for `require` and stronger; None for the modes that need none or may do without.

        Reads the certificate files; raises `ConfigurationError` naming the one that cannot be used.
        """
        tls = self.tls
        if tls.mode in {"disable", "allow", "prefer"}:
            return None
        context = self._authorities()
        if not tls.verified:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif tls.mode == "verify-ca":
            context.check_hostname = False
        context.minimum_version = _TLS_VERSIONS[tls.minimum_version]
        if tls.maximum_version is not None:
            context.maximum_version = _TLS_VERSIONS[tls.maximum_version]
        # PostgreSQL 17 and later insist on it when TLS starts at once; libpq always sends it.
        context.set_alpn_protocols(["postgresql"])
        if tls.certificate is not None:
            self._identify(context, tls.certificate)
        return context

    def direct(self) -> ConnectionSettings:
        """The same database without the pooler in front, where the host's name tells it (`-pooler.`)."""
        hosts = tuple(replace(host, name=_without_pooler(host.name)) for host in self.hosts)
        return replace(self, hosts=hosts, pooler="none") if hosts != self.hosts else self

    def with_database(self, name: str) -> ConnectionSettings:
        return replace(self, database=name)

    def redacted(self) -> str:
        """The address for people's eyes: as a URL, without the password."""
        user = quote(self.user, safe="") + (":***" if self.password is not None else "")
        shown = {
            "sslmode": self.tls.mode,
            "sslrootcert": self.tls.root_certificate,
            "sslcert": self.tls.certificate,
        }
        if self.target_session_attrs != "any":
            shown["target_session_attrs"] = self.target_session_attrs
        sockets = any(host.is_socket for host in self.hosts)
        hosts = ",".join(
            quote(host.name, safe="") + f":{host.port}" if host.is_socket else str(host)
            for host in self.hosts
        )
        if sockets and len(self.hosts) == 1:
            hosts, shown = "", {"host": self.hosts[0].name, "port": str(self.hosts[0].port), **shown}
        query = "&".join(
            f"{key}={quote(value, safe='/')}" for key, value in shown.items() if value is not None
        )
        return f"postgresql://{user}@{hosts}/{quote(self.database, safe='')}?{query}"

    def __str__(self) -> str:
        return self.redacted()

    def _asyncpg_ssl(self) -> ssl.SSLContext | str | bool:
        if self.tls.mode == "disable" or all(host.is_socket for host in self.hosts):
            return False
        if self.tls.mode in {"allow", "prefer"}:
            _refuse_drivers_own_files(self.tls.mode, self.variable)
            return self.tls.mode
        return cast(ssl.SSLContext, self.ssl_context())

    def _authorities(self) -> ssl.SSLContext:
        path = self.tls.root_certificate
        if path is None:
            context = ssl.create_default_context()
            if self.tls.verified and not _system_has_authorities(context):
                context.load_verify_locations(cafile=certifi.where())
            return context
        problem = None
        try:
            context = ssl.create_default_context(cafile=os.path.expanduser(path))
            # Since Python 3.13 the default refuses authorities that lack extensions which libpq never asks for.
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        except OSError as error:
            problem = _file_problem(error)
        if problem is not None:
            raise self._bad_file("sslrootcert", path, problem)
        return context

    def _identify(self, context: ssl.SSLContext, certificate: str) -> None:
        secret = self.tls.key_password.get_secret_value() if self.tls.key_password is not None else ""
        key = self.tls.key
        problem = None
        try:
            context.load_cert_chain(
                os.path.expanduser(certificate),
                keyfile=os.path.expanduser(key) if key is not None else None,
                # Without a callback OpenSSL would ask on the terminal and stop the start for ever.
                password=lambda: secret,
            )
        except OSError as error:
            problem = _file_problem(error)
        if problem is not None:
            raise self._bad_file("sslcert or sslkey", f"{certificate}, {key or 'no key'}", problem)

    def _bad_file(self, parameter: str, path: str, problem: str) -> ConfigurationError:
        return ConfigurationError(
            [
                Fault(
                    self.variable,
                    f"{parameter} ({path}) {problem}.",
                    "Give the path of a PEM file that can be read.",
                )
            ]
        )


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
        default: TlsMode = "disable" if local and not (root or negotiation == "direct") else "verify-full"
        mode: TlsMode = named or default
        if only_sockets:
            mode = "disable"
        elif mode == "disable":
            if binding == "require" or system or neon or negotiation == "direct":
                reason = "Neon" if neon else "channel_binding, sslnegotiation or sslrootcert"
                pasted.fault(
                    f"sslmode=disable contradicts {reason}.", "Use sslmode=verify-full, or leave sslmode out."
                )
        elif binding == "require" or root or neon or negotiation == "direct":
            # What was asked for beside the mode is only true when the server is verified.
            mode = "verify-ca" if mode == "verify-ca" and root and not system else "verify-full"
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
            minimum_version=self._one_of("ssl_min_protocol_version", tuple(_TLS_VERSIONS), "TLSv1.2"),
            maximum_version=self._maximum_version(),
            negotiation=cast(Literal["postgres", "direct"], negotiation),
        )

    def _maximum_version(self) -> str | None:
        if not self._get("ssl_max_protocol_version"):
            return None
        return self._one_of("ssl_max_protocol_version", tuple(_TLS_VERSIONS), "TLSv1.3")

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
                "sslmode=require encrypts, but does not verify who the server is: whoever can redirect the connection "
                "gets the password. Use sslmode=verify-full."
            )
        elif mode in {"allow", "prefer"} and not local:
            self.warnings.append(
                f"sslmode={mode} sends the password without encryption when the network says so. Use sslmode=verify-full."
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
        if any(_without_pooler(name) != name for name in names):
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
            elif word.startswith("--"):
                word = word[2:]
            elif word.startswith("-c"):
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


def _without_pooler(name: str) -> str:
    """`ep-x-pooler.region.aws.neon.tech` is the pooled name of `ep-x.region.aws.neon.tech`."""
    first, dot, rest = name.partition(".")
    return first.removesuffix("-pooler") + dot + rest if dot else name


# --- files and environment -----------------------------------------------------------------------------------------


def _system_has_authorities(context: ssl.SSLContext) -> bool:
    if context.cert_store_stats()["x509_ca"] > 0:
        return True
    # Authorities in a directory are loaded one by one when needed, so the store's count says nothing about them.
    directory = ssl.get_default_verify_paths().capath
    return directory is not None and any(Path(directory).glob("*.[0-9]"))


def _file_problem(error: OSError) -> str:
    """Why a PEM file was refused, without what was in it."""
    if isinstance(error, ssl.SSLError):
        return "is not a usable PEM file" if error.reason is None else f"is not usable ({error.reason})"
    return {FileNotFoundError: "does not exist", PermissionError: "may not be read"}.get(
        type(error), f"cannot be read ({error.strerror})"
    )


def _refuse_drivers_own_files(mode: str, variable: str) -> None:
    """With `allow` and `prefer` asyncpg builds its own TLS context and would take a client certificate from these."""
    names = ("PGSSLCERT", "PGSSLKEY", "PGSSLMINPROTOCOLVERSION", "PGSSLMAXPROTOCOLVERSION")
    found = [name for name in names if os.environ.get(name)]
    home = Path(os.path.expanduser("~")) / ".postgresql"
    found += [
        str(home / name) for name in ("postgresql.crt", "postgresql.key") if os.path.exists(home / name)
    ]
    if found:
        raise ConfigurationError(
            [
                Fault(
                    variable,
                    f"with sslmode={mode} the driver would also use {', '.join(found)}, which Groundwork does not.",
                    "Unset them, or use sslmode=verify-full (with sslcert and sslkey when needed), or disable.",
                )
            ]
        )
