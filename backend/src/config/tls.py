"""TLS settings of a database connection, and the `ssl.SSLContext` for them."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import certifi
from pydantic import SecretStr

from ..errors import ConfigurationError, Fault

TlsMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
VERSIONS = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS settings of a database connection.

    `root_certificate` is a file of authorities, or None for the system's. `certificate` and `key` are the files of a
    client certificate.
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


def context_for(tls: Tls, variable: str) -> ssl.SSLContext | None:
    """The context for `require` and stronger, None for weaker modes. Reads files; faults name `variable`.

    The context is cached until a file changes: reading the system's authorities takes milliseconds, and a renewed
    certificate has to take effect with the next connection.
    """
    if tls.mode in {"disable", "allow", "prefer"}:
        return None
    store = (os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
    files = (tls.root_certificate, tls.certificate, tls.key, store[0])
    return _context(tls, variable, store, tuple(_version(path) for path in files))


def _version(path: str | None) -> tuple[int, ...] | None:
    """A value that changes when the file does; None if there is no file."""
    try:
        found = os.stat(os.path.expanduser(path)) if path is not None else None
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size) if found is not None else None


@lru_cache(maxsize=16)
def _context(tls: Tls, variable: str, _store: object, _files: object) -> ssl.SSLContext:
    context = _authorities(tls, variable)
    if not tls.verified:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif tls.mode == "verify-ca":
        context.check_hostname = False
    context.minimum_version = VERSIONS[tls.minimum_version]
    if tls.maximum_version is not None:
        context.maximum_version = VERSIONS[tls.maximum_version]
    # PostgreSQL 17 and later require it for direct TLS; libpq always sends it.
    context.set_alpn_protocols(["postgresql"])
    if tls.certificate is not None:
        _identify(context, tls, variable)
    return context


def system_context() -> ssl.SSLContext:
    """A context that verifies certificate and host name by the system's authorities, or certifi's. Reads files."""
    context = ssl.create_default_context()
    if not _system_has_authorities(context):
        context.load_verify_locations(cafile=certifi.where())
    return context


def _authorities(tls: Tls, variable: str) -> ssl.SSLContext:
    path = tls.root_certificate
    if path is None:
        return system_context() if tls.verified else ssl.create_default_context()
    problem = None
    try:
        context = ssl.create_default_context(cafile=os.path.expanduser(path))
        # Python 3.13 refuses authorities without extensions that libpq does not require.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    except OSError as error:
        problem = _file_problem(error)
    if problem is not None:
        raise _bad_file(variable, "sslrootcert", path, problem)
    return context


def _identify(context: ssl.SSLContext, tls: Tls, variable: str) -> None:
    certificate, key = tls.certificate or "", tls.key
    secret = tls.key_password.get_secret_value() if tls.key_password is not None else ""
    problem = None
    try:
        context.load_cert_chain(
            os.path.expanduser(certificate),
            keyfile=os.path.expanduser(key) if key is not None else None,
            # Without a callback OpenSSL prompts on the terminal and blocks.
            password=lambda: secret,
        )
    except OSError as error:
        problem = _file_problem(error)
    if problem is not None:
        raise _bad_file(variable, "sslcert or sslkey", f"{certificate}, {key or 'no key'}", problem)


def _bad_file(variable: str, parameter: str, path: str, problem: str) -> ConfigurationError:
    return ConfigurationError(
        [
            Fault(
                variable,
                f"The file of {parameter} ({path}) {problem}.",
                "Give the path of a readable PEM file.",
            )
        ]
    )


def _system_has_authorities(context: ssl.SSLContext) -> bool:
    if context.cert_store_stats()["x509_ca"] > 0:
        return True
    # Authorities in a directory are loaded when they are needed and not counted before.
    directory = ssl.get_default_verify_paths().capath
    return directory is not None and any(Path(directory).glob("*.[0-9]"))


def _file_problem(error: OSError) -> str:
    """Why a PEM file was refused, without its content."""
    if isinstance(error, ssl.SSLError):
        return "is not a usable PEM file" if error.reason is None else f"is not usable ({error.reason})"
    return {FileNotFoundError: "does not exist", PermissionError: "is not readable"}.get(
        type(error), f"cannot be read ({error.strerror})"
    )


def refuse_drivers_own_files(mode: str, variable: str) -> None:
    """Refuse files and variables from which asyncpg takes a client certificate with `allow` and `prefer`."""
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
                    f"With sslmode={mode} asyncpg would also use {', '.join(found)}.",
                    "Remove them, or use sslmode=verify-full (with sslcert and sslkey), or disable.",
                )
            ]
        )
