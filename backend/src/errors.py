"""Everything that can go wrong, as one family.

    GroundworkError
    ├── ConfigurationError          the operator's settings are wrong; exit code 3, never an answer
    ├── DatabaseRefused             the server turned us away for good: password, database, certificate
    └── RequestError                what an answer can say
        ├── Unauthenticated         401
        │   └── LogInFailed         401, e-mail and password do not belong together
        ├── WrongPassword           403, the current password that a change asks for
        ├── SignUpClosed            403
        ├── NotFound                404
        ├── Conflict                409
        ├── PreconditionFailed      412, the version in If-Match is not the one that is stored
        ├── Invalid                 422
        │   ├── KeyReused           422, an Idempotency-Key came again with another request
        │   └── BatchRefused        422, some operations of a batch cannot be done, so none was
        ├── PreconditionRequired    428
        ├── TooManyRequests         429
        ├── Unavailable             503, nothing was written
        │   ├── Overloaded          503, more is asked than can be done
        │   └── Refused             503, the database forbids it: rights, disk full, read-only
        ├── OutcomeUnknown          504, a write was sent and not answered
        └── InternalFault           500, ours

Status and problem type sit on the class; facts sit on the instance. `services.faults` maps what
drivers and the network raise into this family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class GroundworkError(Exception):
    """The root: nothing of ours raises anything else on purpose."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One wrong setting: which variable, what is wrong with it, what to do. Never holds a secret's value."""

    variable: str
    problem: str
    remedy: str


class ConfigurationError(GroundworkError):
    """The settings cannot be used. Carries every fault at once."""

    exit_code: ClassVar[int] = 3

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__(self.message())

    def message(self) -> str:
        lines = [f"Groundwork cannot start: {len(self.faults)} setting(s) need attention."]
        for fault in self.faults:
            lines += [f"  {fault.variable}: {fault.problem}", f"      {fault.remedy}"]
        return "\n".join(lines)


class DatabaseRefused(GroundworkError):
    """The server, or our own TLS verification, said no in a way that waiting does not mend.

    `reason` is a slug (`authentication-failed`, `unknown-database`, `certificate-rejected`, ...); `detail` is
    one sentence without credentials. At start-up this ends the process with exit code 3.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, reason: str, detail: str, remedy: str) -> None:
        self.reason = reason
        self.detail = detail
        self.remedy = remedy
        super().__init__(f"{detail} {remedy}")


class RequestError(GroundworkError):
    """An error that an answer can carry as application/problem+json.

    `detail` is written by us for the client: it never quotes the input, a statement, a table or a credential.
    """

    status: ClassVar[int] = 500
    slug: ClassVar[str] = "internal"
    title: ClassVar[str] = "Something went wrong on our side"
    meaning: ClassVar[str] = (
        "The service met a fault that it did not expect; it was logged with the request id."
    )

    def __init__(self, detail: str | None = None, *, retry_after_seconds: int | None = None) -> None:
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds
        super().__init__(detail or self.title)


@dataclass(frozen=True, slots=True)
class InputFault:
    """One thing wrong with the input: where (an RFC 6901 pointer, or a parameter's name) and what."""

    pointer: str
    detail: str


class Invalid(RequestError):
    status = 422
    slug = "invalid"
    title = "The input is not valid"
    meaning = "A field is missing, unknown, of the wrong type or out of bounds; `errors` points at each."

    def __init__(self, detail: str | None = None, *, faults: list[InputFault] | None = None) -> None:
        super().__init__(detail)
        self.faults = faults or []


class KeyReused(Invalid):
    slug = "idempotency-key-reused"
    title = "The Idempotency-Key was used for another request"
    meaning = "The key belongs to an earlier request with another body or operation. Take a new key."


class BatchRefused(Invalid):
    """`faults` point at each operation that cannot be done, by its index in the batch."""

    slug = "batch-refused"
    title = "Some operations cannot be done, so none was"
    meaning = (
        "`errors` points at each: there is no such task, there is one of that id already, or it is of another "
        "version than `if_match` names. Nothing was written."
    )


class Unauthenticated(RequestError):
    """`reason` is a slug for logs: `no-token`, `expired`, `account-deleted`, ... Nothing was written.

    The two facts a client may learn are whether a token came at all and the sentence in `detail`.
    """

    status = 401
    slug = "unauthenticated"
    title = "A valid access token is needed"
    meaning = "The Authorization header has no bearer token, or one that is not (or no longer) accepted."

    def __init__(self, reason: str = "no-token", detail: str | None = None) -> None:
        super().__init__(detail)
        self.reason = reason


class LogInFailed(Unauthenticated):
    """Says the same whether there is no such account, its password is another, or it is disabled."""

    slug = "log-in-failed"
    title = "E-mail and password do not belong together"
    meaning = (
        "There is no account with this e-mail, its password is another, or it is disabled: the three are answered "
        "alike."
    )

    def __init__(self) -> None:
        super().__init__("log-in-failed")


class WrongPassword(RequestError):
    status = 403
    slug = "wrong-password"
    title = "The current password is not right"
    meaning = (
        "Changing an account asks for its current password, and this is not it; an account whose tokens come from "
        "elsewhere has none. Nothing was written."
    )


class SignUpClosed(RequestError):
    status = 403
    slug = "sign-up-closed"
    title = "Signing up is not open here"
    meaning = (
        "The operator makes the accounts (SIGN_UP), or another identity provider does. Nothing was written."
    )


class NotFound(RequestError):
    status = 404
    slug = "not-found"
    title = "There is no such thing"
    meaning = "Nothing is there, or it belongs to somebody else: the two are answered alike."


class Conflict(RequestError):
    status = 409
    slug = "conflict"
    title = "It conflicts with what is stored"
    meaning = "A uniqueness rule or another constraint refuses the write; `constraint` names it."

    def __init__(self, detail: str | None = None, *, constraint: str | None = None) -> None:
        super().__init__(detail)
        self.constraint = constraint


class PreconditionFailed(RequestError):
    status = 412
    slug = "precondition-failed"
    title = "It has changed since"
    meaning = "The ETag in `If-Match` is not the current one. Nothing was written. Read again, then decide."


class PreconditionRequired(RequestError):
    status = 428
    slug = "precondition-required"
    title = "Say which version you mean"
    meaning = "This service asks for `If-Match` with the ETag last read, so that no change is lost unseen."


class TooManyRequests(RequestError):
    """Nothing was written. `reason` is a slug for logs and metrics, such as `bulk-busy`."""

    status = 429
    slug = "too-many-requests"
    title = "Too many at once"
    meaning = (
        "More of this kind than is taken at a time. Nothing was written. Repeat after `Retry-After` seconds."
    )

    def __init__(self, reason: str, detail: str | None = None, *, retry_after_seconds: int = 1) -> None:
        super().__init__(detail, retry_after_seconds=retry_after_seconds)
        self.reason = reason


class Unavailable(RequestError):
    """Nothing was written. `reason` is a slug for logs and metrics, such as `connection-refused`."""

    status = 503
    slug = "unavailable"
    title = "The database cannot be reached just now"
    meaning = "Nothing was written. Repeat the request after `Retry-After` seconds."

    def __init__(self, reason: str, detail: str | None = None, *, retry_after_seconds: int = 1) -> None:
        super().__init__(detail, retry_after_seconds=retry_after_seconds)
        self.reason = reason


class Overloaded(Unavailable):
    slug = "overloaded"
    title = "More is asked than can be done"
    meaning = (
        "No connection comes free in time, or too many requests are under way. Nothing was written. Repeat after "
        "`Retry-After` seconds."
    )


class Refused(Unavailable):
    slug = "refused"
    title = "The database does not allow this just now"
    meaning = "A missing right, a full disk or a read-only server. Nothing was written."


class OutcomeUnknown(RequestError):
    """A write was sent and its answer was lost: it may or may not be stored.

    `retry_after_seconds` is given only where an Idempotency-Key makes the repeat safe.
    """

    status = 504
    slug = "outcome-unknown"
    title = "The write was sent, but its outcome is unknown"
    meaning = (
        "The connection was lost between sending the write and its answer. Read before you repeat it; with an "
        "Idempotency-Key, repeat it as it was after `Retry-After` seconds."
    )

    def __init__(
        self, reason: str, detail: str | None = None, *, retry_after_seconds: int | None = None
    ) -> None:
        super().__init__(detail, retry_after_seconds=retry_after_seconds)
        self.reason = reason


class InternalFault(RequestError):
    """A defect of ours, met as a database error that no request should be able to cause."""

    def __init__(self, reason: str, detail: str | None = None) -> None:
        super().__init__(detail)
        self.reason = reason


class NestedAcquisition(GroundworkError):
    """Code that holds a connection asked for another one: on a full pool that waits for itself."""
