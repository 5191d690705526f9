"""Every exception that the driver, SQLAlchemy and the network can raise is mapped, and mapped on purpose."""

import inspect
import socket
import ssl

import asyncpg
import pytest
import sqlalchemy.exc
from asyncpg import exceptions as driver

from src.errors import (
    Conflict,
    InternalFault,
    Invalid,
    OutcomeUnknown,
    Overloaded,
    Refused,
    RequestError,
    Unavailable,
)
from src.services.faults import Repeat, as_refusal, as_request_error, diagnose, unwrap

DRIVER_EXCEPTIONS = sorted(
    (
        raised
        for _, raised in inspect.getmembers(driver, inspect.isclass)
        if issubclass(raised, Exception) and not issubclass(raised, Warning)
    ),
    key=lambda raised: raised.__name__,
)
# What no server of ours raises: warnings with an exception's class, cursors, PL/pgSQL, external routines.
OURS_TO_MEND = {"01", "02", "09", "0B", "0F", "0L", "0P", "0Z", "10", "20", "21", "24", "25", "27", "2B", "2D",
                "2F", "34", "38", "39", "3B", "44", "72", "P0"}  # fmt: skip


def test_the_driver_has_the_exceptions_that_the_walk_below_expects():
    assert len(DRIVER_EXCEPTIONS) > 200


@pytest.mark.parametrize("raised", DRIVER_EXCEPTIONS, ids=lambda raised: raised.__name__)
def test_no_exception_of_the_driver_is_left_unmapped(raised: type[Exception]):
    diagnosis = diagnose(raised.__new__(raised))
    assert diagnosis.reason != "unexpected"
    code = getattr(raised, "sqlstate", None)
    if diagnosis.becomes is InternalFault and code is not None:
        assert code[:2] in OURS_TO_MEND | {"42", "0A"}, f"{code} ends as a 500"
    if code is None and raised not in (
        driver.PostgresError,
        driver.FatalPostgresError,
        driver.UnknownPostgresError,
    ):
        assert issubclass(diagnosis.becomes, Unavailable | Invalid)


@pytest.mark.parametrize(
    ("error", "reason", "becomes", "repeat"),
    [
        (asyncpg.SerializationError(), "serialization-failure", Unavailable, Repeat.UNIT),
        (asyncpg.DeadlockDetectedError(), "deadlock", Unavailable, Repeat.UNIT),
        (asyncpg.QueryCanceledError(), "statement-timeout", Unavailable, Repeat.NEVER),
        (asyncpg.LockNotAvailableError(), "lock-timeout", Unavailable, Repeat.NEVER),
        (asyncpg.TooManyConnectionsError(), "too-many-connections", Unavailable, Repeat.ALWAYS),
        (asyncpg.CannotConnectNowError(), "server-starting", Unavailable, Repeat.ALWAYS),
        (asyncpg.AdminShutdownError(), "server-shut-down", Unavailable, Repeat.IF_REPEATABLE),
        (asyncpg.ReadOnlySQLTransactionError(), "read-only", Refused, Repeat.NEVER),
        (asyncpg.DiskFullError(), "disk-full", Refused, Repeat.NEVER),
        (asyncpg.InsufficientPrivilegeError(), "insufficient-privilege", Refused, Repeat.NEVER),
        (asyncpg.UniqueViolationError(), "unique-violation", Conflict, Repeat.NEVER),
        (asyncpg.CheckViolationError(), "check-violation", Invalid, Repeat.NEVER),
        (asyncpg.UndefinedTableError(), "schema-mismatch", Unavailable, Repeat.NEVER),
        (asyncpg.PostgresSyntaxError(), "statement-refused", InternalFault, Repeat.NEVER),
        (asyncpg.ConnectionDoesNotExistError(), "connection-lost", Unavailable, Repeat.IF_REPEATABLE),
        (asyncpg.InterfaceError("connection is closed"), "connection-broken", Unavailable, Repeat.IF_REPEATABLE),
        (asyncpg.InternalClientError("state 15"), "connection-broken", Unavailable, Repeat.IF_REPEATABLE),
        (asyncpg.DataError("value out of int64 range"), "invalid-input", Invalid, Repeat.NEVER),
        (ConnectionRefusedError(), "connection-refused", Unavailable, Repeat.ALWAYS),
        (ConnectionResetError(), "connection-lost", Unavailable, Repeat.IF_REPEATABLE),
        (socket.gaierror(socket.EAI_NONAME, "no such host"), "host-not-found", Unavailable, Repeat.ALWAYS),
        (TimeoutError(), "timeout", Unavailable, Repeat.IF_REPEATABLE),
        (OSError(24, "too many open files"), "out-of-file-descriptors", Unavailable, Repeat.ALWAYS),
        (sqlalchemy.exc.TimeoutError(), "pool-exhausted", Overloaded, Repeat.ALWAYS),
        (ValueError("ours"), "unexpected", InternalFault, Repeat.NEVER),
    ],
)  # fmt: skip
def test_each_fault_has_its_reason_its_family_and_its_rule_for_repeating(error, reason, becomes, repeat):
    diagnosis = diagnose(error)
    assert (diagnosis.reason, diagnosis.becomes, diagnosis.repeat) == (reason, becomes, repeat)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (asyncpg.InvalidPasswordError(), "authentication-failed"),
        (asyncpg.InvalidCatalogNameError(), "unknown-database"),
        (ssl.SSLCertVerificationError(), "certificate-rejected"),
        (ConnectionError("rejected SSL upgrade"), "tls-refused"),
    ],
)
def test_what_waiting_does_not_mend_is_fatal_and_says_what_to_do(error, reason):
    diagnosis = diagnose(error)
    assert diagnosis.fatal
    refusal = as_refusal(diagnosis)
    assert refusal.reason == reason
    assert refusal.exit_code == 3
    assert refusal.detail.endswith(".")
    assert refusal.remedy.endswith(".")


def test_sqlalchemys_wrapper_is_looked_through():
    original = asyncpg.UniqueViolationError()
    original.constraint_name = "uq_users_email"
    adapted = Exception("adapted")
    adapted.__cause__ = original
    wrapped = sqlalchemy.exc.IntegrityError("INSERT ...", {}, adapted)
    assert unwrap(wrapped) is original
    assert diagnose(wrapped).constraint == "uq_users_email"


def test_a_write_that_was_sent_and_lost_is_outcome_unknown_and_nothing_else_is():
    lost = diagnose(ConnectionResetError())
    assert isinstance(as_request_error(lost, sent=True, writing=True), OutcomeUnknown)
    assert isinstance(as_request_error(lost, sent=True, writing=False), Unavailable)
    assert isinstance(as_request_error(lost, sent=False, writing=True), Unavailable)
    rolled_back = diagnose(asyncpg.DeadlockDetectedError())
    assert isinstance(as_request_error(rolled_back, sent=True, writing=True), Unavailable)


def test_no_error_of_ours_quotes_the_drivers_words():
    error = asyncpg.UniqueViolationError("Key (email)=(ana@example.com) already exists.")
    told: RequestError = as_request_error(diagnose(error), sent=True, writing=True)
    assert "ana@example.com" not in f"{told!s}{told!r}{told.detail}{vars(told)}"
