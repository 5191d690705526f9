"""What drivers and the network raise, mapped into our family by class and SQLSTATE, never by message text.

`diagnose` says what an exception means: its reason, the error it becomes, whether the connection is lost with
it, and when the work may be repeated. The table of SQLSTATEs follows PostgreSQL's Appendix A.
"""

from __future__ import annotations

import errno
import socket
import ssl
import traceback
from dataclasses import dataclass, replace
from enum import Enum

import asyncpg
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as SQLAlchemyPoolTimeout
from sqlalchemy.orm.exc import StaleDataError

from ..errors import (
    ConfigurationError,
    Conflict,
    DatabaseRefused,
    InternalFault,
    Invalid,
    OutcomeUnknown,
    Overloaded,
    Refused,
    RequestError,
    Unavailable,
)
from .server_authentication import AuthenticationMethodRefused


class Repeat(Enum):
    """When the work that met a fault may be run again."""

    ALWAYS = "nothing was sent: it never reached the database"
    UNIT = "the database rolled the whole unit back"
    IF_REPEATABLE = "it was sent and may have been done: only what is harmless twice"
    NEVER = "running it again gives the same answer"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`reason` is a slug for logs and metrics; `lost` says that the connection is gone or not to be trusted;
    `fatal` says that waiting will not mend it (a wrong password, an unknown database, a bad certificate)."""

    reason: str
    becomes: type[RequestError]
    repeat: Repeat = Repeat.NEVER
    lost: bool = False
    fatal: bool = False
    constraint: str | None = None


_LOST = Diagnosis("connection-lost", Unavailable, Repeat.IF_REPEATABLE, lost=True)
_INTERNAL = Diagnosis("unexpected-sqlstate", InternalFault)

# An exact code first, then its class of two characters.
_BY_SQLSTATE: dict[str, Diagnosis] = {
    "03": Diagnosis("statement-not-complete", Unavailable),
    "08": _LOST,
    "08P01": Diagnosis("protocol-violation", Unavailable, Repeat.IF_REPEATABLE, lost=True),
    # asyncpg drops its cache and prepares anew; what reaches us met the change inside a transaction.
    "0A000": Diagnosis("feature-not-supported", InternalFault),
    "22": Diagnosis("invalid-input", Invalid),
    "23": Diagnosis("constraint-violation", Conflict),
    "23001": Diagnosis("restrict-violation", Conflict),
    "23502": Diagnosis("not-null-violation", Invalid),
    "23503": Diagnosis("foreign-key-violation", Conflict),
    "23505": Diagnosis("unique-violation", Conflict),
    "23514": Diagnosis("check-violation", Invalid),
    "23P01": Diagnosis("exclusion-violation", Conflict),
    "25006": Diagnosis("read-only", Refused),
    "25P03": Diagnosis("idle-in-transaction-timeout", Unavailable, Repeat.UNIT, lost=True),
    "25P04": Diagnosis("transaction-timeout", Unavailable, lost=True),
    # Behind a pooler that does not track prepared statements, ours may not exist on this backend.
    "26": Diagnosis("statement-unknown-to-backend", Unavailable, Repeat.UNIT, lost=True),
    "28": Diagnosis("authentication-failed", Unavailable, Repeat.NEVER, lost=True, fatal=True),
    "3D": Diagnosis("unknown-database", Unavailable, Repeat.NEVER, lost=True, fatal=True),
    "40": Diagnosis("transaction-rolled-back", Unavailable, Repeat.UNIT),
    "40001": Diagnosis("serialization-failure", Unavailable, Repeat.UNIT),
    "40002": Diagnosis("constraint-violation", Conflict),
    "40003": Diagnosis("completion-unknown", Unavailable, Repeat.IF_REPEATABLE, lost=True),
    "40P01": Diagnosis("deadlock", Unavailable, Repeat.UNIT),
    "42": Diagnosis("statement-refused", InternalFault),
    "42501": Diagnosis("insufficient-privilege", Refused),
    # The code and the schema disagree: a migration has not run, or has run too far.
    "42703": Diagnosis("schema-mismatch", Unavailable),
    "42704": Diagnosis("schema-mismatch", Unavailable),
    "42883": Diagnosis("schema-mismatch", Unavailable),
    "42P01": Diagnosis("schema-mismatch", Unavailable),
    "42P05": Diagnosis("statement-known-to-backend", Unavailable, Repeat.UNIT, lost=True),
    "3F": Diagnosis("schema-mismatch", Unavailable),
    "53": Diagnosis("out-of-resources", Unavailable),
    "53100": Diagnosis("disk-full", Refused),
    "53200": Diagnosis("out-of-memory", Unavailable),
    "53300": Diagnosis("too-many-connections", Unavailable, Repeat.ALWAYS, lost=True),
    "54": Diagnosis("limit-exceeded", Invalid),
    "55": Diagnosis("object-not-available", Unavailable),
    "55P03": Diagnosis("lock-timeout", Unavailable),
    "57": Diagnosis("operator-intervention", Unavailable, Repeat.IF_REPEATABLE, lost=True),
    "57014": Diagnosis("statement-timeout", Unavailable),
    "57P01": Diagnosis("server-shut-down", Unavailable, Repeat.IF_REPEATABLE, lost=True),
    "57P02": Diagnosis("server-crashed", Unavailable, Repeat.IF_REPEATABLE, lost=True),
    "57P03": Diagnosis("server-starting", Unavailable, Repeat.ALWAYS, lost=True),
    "58": Diagnosis("server-io-error", Unavailable),
    "F0": Diagnosis("server-misconfigured", Unavailable),
    "HV": Diagnosis("foreign-data-error", Unavailable),
    "XX": Diagnosis("server-internal-error", Unavailable),
}

# The certificate, the password or the name is wrong: what to do about each.
_REMEDIES = {
    "authentication-failed": "Check the user name and the password in DATABASE_URL.",
    "authentication-method-refused": (
        "Let the server use scram-sha-256 (password_encryption, pg_hba.conf), verify it by sslmode=verify-full, or "
        "allow its method by name: require_auth=md5 or require_auth=password in DATABASE_URL."
    ),
    "unknown-database": "Check the database's name at the end of DATABASE_URL, or create that database.",
    "certificate-rejected": "Name its CA by sslrootcert=, and use the host name that the certificate carries.",
    "tls-refused": "The server offers no TLS. Reach it another way, or ask for sslmode=disable by name.",
    "tls-misconfigured": "Check the files named by sslrootcert=, sslcert= and sslkey= in DATABASE_URL.",
    "unsupported-by-driver": "Use scram-sha-256, md5 or password authentication for this role.",
    "wrong-kind-of-server": "No server in DATABASE_URL has the wanted target_session_attrs.",
}
_DETAILS = {
    "authentication-failed": "The database refused the credentials.",
    "authentication-method-refused": (
        "The database server is not verified and asked for another authentication than SCRAM, so no password was sent."
    ),
    "unknown-database": "The database server knows no database of that name.",
    "certificate-rejected": "The database server's certificate was not accepted, so no password was sent.",
    "tls-refused": "The database server refused to speak TLS, so no password was sent.",
    "tls-misconfigured": "The TLS files for the database connection cannot be used.",
    "unsupported-by-driver": "The database server asks for an authentication that is not supported.",
    "wrong-kind-of-server": "No database server of the wanted kind was found.",
}


def unwrap(error: BaseException) -> BaseException:
    """The driver's exception inside SQLAlchemy's wrapper, or `error` itself."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        return error.orig.__cause__ or error.orig
    return error


_DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, SQLAlchemyError)


def concerns_database(error: BaseException) -> bool:
    """Whether the database or the way to it is at fault, and not the code that uses a connection.

    A timeout or another error of the network has the same class whoever raises it: the driver's went through it.
    """
    if isinstance(error, _DRIVER_ERRORS):
        return True
    frames = traceback.walk_tb(error.__traceback__) if isinstance(error, OSError) else ()
    return any(frame.f_globals.get("__name__", "").startswith("asyncpg.") for frame, _ in frames)


def diagnose(error: BaseException) -> Diagnosis:
    """What `error` means. Anything unknown is an `InternalFault` named `unexpected`."""
    error = unwrap(error)
    if isinstance(error, asyncpg.PostgresError):
        return _diagnose_sqlstate(error)
    if isinstance(error, asyncpg.exceptions.UnsupportedClientFeatureError):
        return Diagnosis("unencodable-value", Invalid)
    if isinstance(error, ConfigurationError | asyncpg.exceptions.ClientConfigurationError):
        return Diagnosis("tls-misconfigured", Unavailable, lost=True, fatal=True)
    if isinstance(error, asyncpg.exceptions.UnsupportedServerFeatureError):
        return Diagnosis("unsupported-by-driver", Unavailable, lost=True, fatal=True)
    if isinstance(error, asyncpg.exceptions.TargetServerAttributeNotMatched):
        # During a failover there is no primary for a while: this mends itself.
        return Diagnosis("wrong-kind-of-server", Unavailable, Repeat.ALWAYS, lost=True)
    if isinstance(error, asyncpg.exceptions.OutdatedSchemaCacheError):
        return Diagnosis("schema-cache-outdated", Unavailable, Repeat.IF_REPEATABLE, lost=True)
    if isinstance(error, AuthenticationMethodRefused):
        return Diagnosis("authentication-method-refused", Unavailable, lost=True, fatal=True)
    if isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError):
        return replace(_LOST, reason="connection-broken")
    if isinstance(error, ssl.SSLCertVerificationError):
        return Diagnosis("certificate-rejected", Unavailable, lost=True, fatal=True)
    if isinstance(error, OSError):
        return _diagnose_network(error)
    if isinstance(error, SQLAlchemyPoolTimeout):
        return Diagnosis("pool-exhausted", Overloaded, Repeat.ALWAYS)
    if isinstance(error, StaleDataError):
        return Diagnosis("changed-meanwhile", Conflict)
    if isinstance(error, SQLAlchemyError):
        return Diagnosis("unexpected-orm-error", InternalFault)
    return Diagnosis("unexpected", InternalFault)


def _diagnose_sqlstate(error: asyncpg.PostgresError) -> Diagnosis:
    if isinstance(error, asyncpg.InvalidCachedStatementError):
        return Diagnosis("cached-plan-outdated", Unavailable, Repeat.UNIT)
    code = error.sqlstate or ""
    found = _BY_SQLSTATE.get(code) or _BY_SQLSTATE.get(code[:2]) or _INTERNAL
    constraint = getattr(error, "constraint_name", None)
    return replace(found, constraint=constraint) if constraint else found


def _diagnose_network(error: OSError) -> Diagnosis:
    if isinstance(error, TimeoutError):
        return Diagnosis("timeout", Unavailable, Repeat.IF_REPEATABLE, lost=True)
    if isinstance(error, socket.gaierror):
        return Diagnosis("host-not-found", Unavailable, Repeat.ALWAYS, lost=True)
    if isinstance(error, ConnectionRefusedError):
        return Diagnosis("connection-refused", Unavailable, Repeat.ALWAYS, lost=True)
    if isinstance(error, ssl.SSLError):
        return Diagnosis("tls-failed", Unavailable, Repeat.IF_REPEATABLE, lost=True)
    if type(error) is ConnectionError:
        # asyncpg raises the bare class for one thing only: the server answered "no TLS".
        return Diagnosis("tls-refused", Unavailable, lost=True, fatal=True)
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        # A Unix socket that is not there (yet), or one we may not use.
        return Diagnosis("connection-refused", Unavailable, Repeat.ALWAYS, lost=True)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return Diagnosis("out-of-file-descriptors", Unavailable, Repeat.ALWAYS, lost=True)
    return _LOST


def as_refusal(diagnosis: Diagnosis) -> DatabaseRefused:
    """The start-up error for a fatal diagnosis."""
    return DatabaseRefused(
        diagnosis.reason,
        _DETAILS.get(diagnosis.reason, "The database refused the connection."),
        _REMEDIES.get(diagnosis.reason, "Check DATABASE_URL."),
    )


def as_request_error(diagnosis: Diagnosis, *, sent: bool, writing: bool) -> RequestError:
    """The error an answer carries.

    `sent`: the statement (or the COMMIT) had left for the database; `writing`: it may change something. A
    write that was sent and lost its answer is `OutcomeUnknown`; everything else that failed wrote nothing.
    """
    if sent and writing and diagnosis.repeat is Repeat.IF_REPEATABLE:
        return OutcomeUnknown(diagnosis.reason)
    family = diagnosis.becomes
    if issubclass(family, Unavailable):
        return family(diagnosis.reason)
    if issubclass(family, InternalFault):
        return family(diagnosis.reason)
    if issubclass(family, Conflict):
        return family(constraint=diagnosis.constraint)
    return family()
