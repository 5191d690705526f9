"""The settings of a database connection."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, cast
from urllib.parse import quote

from pydantic import SecretStr

from .dsn import DEFAULT_PORT, Host
from .tls import Tls, context_for, refuse_drivers_own_files

# "auto": the database service detects the pooler when it first connects.
Pooler = Literal["auto", "none", "transaction", "tracking"]

APPLICATION_NAME = "groundwork"


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """All settings of a database connection, so that asyncpg uses no defaults. The repr hides the password."""

    hosts: tuple[Host, ...]
    user: str
    password: SecretStr | None
    database: str
    tls: Tls
    pooler: Pooler = "none"
    neon: bool = False
    server_settings: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    target_session_attrs: str = "any"
    require_auth: frozenset[str] | None = None
    connect_timeout_seconds: float | None = None
    application_name: str = APPLICATION_NAME
    warnings: tuple[str, ...] = ()
    variable: str = "DATABASE_URL"

    def asyncpg_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `asyncpg.connect`.

        Raises `ConfigurationError` when a certificate file cannot be used. Timeouts and caches are the caller's.
        """
        return {
            "host": [host.name for host in self.hosts],
            "port": [host.port for host in self.hosts],
            "user": self.user,
            # With None asyncpg reads PGPASSWORD, PGPASSFILE and ~/.pgpass.
            "password": self.password.get_secret_value() if self.password is not None else "",
            "database": self.database,
            "ssl": self._asyncpg_ssl(),
            "direct_tls": self.tls.negotiation == "direct",
            "server_settings": dict(self.server_settings),
            "target_session_attrs": self.target_session_attrs,
            "krbsrvname": "postgres",
            "gsslib": "gssapi",
        }

    @property
    def authentication_methods(self) -> frozenset[str] | None:
        """The methods that the server may ask for, by libpq's names; None for any.

        Without `require_auth`, a server that is not verified may ask for SCRAM, which proves the password without
        sending it, or for nothing. A Unix socket's directory says who may listen there.
        """
        if self.require_auth is not None:
            return self.require_auth
        trusted = self.tls.verified or all(host.is_socket for host in self.hosts)
        return None if trusted else frozenset({"scram-sha-256", "none"})

    def ssl_context(self) -> ssl.SSLContext | None:
        """The context for `require` and stronger; None for the modes that need none or may do without.

        Reads the certificate files; raises `ConfigurationError` naming the one that cannot be used.
        """
        return context_for(self.tls, self.variable)

    def direct(self) -> ConnectionSettings:
        """The same database without the pooler, if the host name shows one (`-pooler.`)."""
        hosts = tuple(replace(host, name=without_pooler(host.name)) for host in self.hosts)
        return replace(self, hosts=hosts, pooler="none") if hosts != self.hosts else self

    def with_database(self, name: str) -> ConnectionSettings:
        return replace(self, database=name)

    def redacted(self) -> str:
        """The address as a URL, without the password."""
        user = quote(self.user, safe="") + (":***" if self.password is not None else "")
        shown = {
            "sslmode": self.tls.mode,
            "sslrootcert": self.tls.root_certificate,
            "sslcert": self.tls.certificate,
        }
        if self.require_auth is not None:
            shown["require_auth"] = ",".join(sorted(self.require_auth))
        if self.target_session_attrs != "any":
            shown["target_session_attrs"] = self.target_session_attrs
        sockets = any(host.is_socket for host in self.hosts)
        hosts = ",".join(
            quote(host.name, safe="") + f":{host.port}" if host.is_socket else str(host)
            for host in self.hosts
        )
        if sockets and len(self.hosts) == 1:
            (host,) = self.hosts
            port = None if host.port == DEFAULT_PORT else str(host.port)
            hosts, shown = "", {**shown, "host": host.name, "port": port, "sslmode": None}
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
            refuse_drivers_own_files(self.tls.mode, self.variable)
            return self.tls.mode
        return cast(ssl.SSLContext, self.ssl_context())


def without_pooler(name: str) -> str:
    """The host name without Neon's `-pooler`: `ep-x.eu.aws.neon.tech` for `ep-x-pooler.eu.aws.neon.tech`."""
    first, dot, rest = name.partition(".")
    return first[: -len("-pooler")] + dot + rest if dot and first.lower().endswith("-pooler") else name
