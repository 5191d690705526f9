"""Accounts of our own: signing up, logging in, and what keeps everybody else out.

A password never leaves the process that it came to, and its hash never leaves the database: the database gives the
recipe, we derive the proof, and the database compares (`models.credential`, docs/decisions/0051-accounts.md). A
session is known by its refresh token, which is good for one exchange; whoever brings one a second time ends the
session, because one of the two who had it is a thief. An access token lives for minutes and holds the user's epoch,
which is raised when everything that was issued before has to end.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID, uuid4

from ..config.accounts import may_sign_up
from ..config.logging import get_logger
from ..errors import (
    Conflict,
    LogInFailed,
    NotFound,
    RequestError,
    SignUpClosed,
    Unauthenticated,
    WrongPassword,
)
from ..models.base import new_id
from ..models.password import require_common_passwords
from . import users
from .account_rows import (
    CHANGE,
    CLOSE,
    DISABLE,
    ENABLE,
    END_ALL,
    END_THEIRS,
    EXPIRED,
    OPEN,
    RECIPE_BY_EMAIL,
    RECIPE_BY_ID,
    REFRESH,
    REFRESH_ONCE,
    RENEW,
    SET_PASSWORD,
    SIGN_UP,
    STANDING,
)
from .ownership import Author, revoked_is_unauthenticated
from .passwords import Derived, Passwords
from .throttle import Throttle

if TYPE_CHECKING:
    import asyncpg

    from ..config.settings import Settings
    from ..models.account import AccountChange, LogIn, SignUp
    from .connections import Connection
    from .database import Database
    from .signing import SigningKeys
    from .statements import Statement

PREFIX: Final = "gwr_"
"""Leads every refresh token, so that scanners for secrets can know it."""
_SECRET_BYTES: Final = 32
_NOT_ACCEPTED: Final = "The refresh token is not, or no longer, accepted. Log in again."

log = get_logger(__name__)


class Granted(NamedTuple):
    """What a client gets: both tokens, and for how many seconds the access token is accepted."""

    access_token: str
    expires_in: int
    refresh_token: str


@dataclass(frozen=True, slots=True)
class Terms:
    """How long what is granted lives."""

    access_seconds: int
    idle: timedelta
    longest: timedelta


@dataclass(frozen=True, slots=True, repr=False)
class _Ticket:
    """A refresh token: which session, and the secret that proves it. Only the secret's hash is stored."""

    session: UUID
    secret: bytes

    @classmethod
    def new(cls, session: UUID) -> _Ticket:
        return cls(session, secrets.token_bytes(_SECRET_BYTES))

    @classmethod
    def read(cls, text: str) -> _Ticket | None:
        try:
            data = base64.b64decode(text.removeprefix(PREFIX), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            return None
        if not text.startswith(PREFIX) or len(data) != 16 + _SECRET_BYTES:
            return None
        ticket = cls(UUID(bytes=data[:16]), data[16:])
        # One token, one spelling.
        return ticket if ticket.text == text else None

    def next(self, key: bytes, repeat: str) -> _Ticket:
        """The token after this one in the exchange named `repeat`: the same however often, and whoever comes late."""
        return _Ticket(self.session, hmac.digest(key, self.secret + repeat.encode(), "sha256"))

    @property
    def text(self) -> str:
        return PREFIX + base64.urlsafe_b64encode(self.session.bytes + self.secret).decode()

    @property
    def hash(self) -> bytes:
        return hashlib.sha256(self.secret).digest()


class Accounts:
    """Opened and closed with the service. Every method but the operators' counts attempts before it works for them."""

    def __init__(
        self,
        signing: SigningKeys,
        passwords: Passwords,
        throttle: Throttle,
        terms: Terms,
        *,
        sign_up_open: bool = True,
    ) -> None:
        self._signing = signing
        self._refresh_key = signing.derive(b"refresh")
        self._passwords = passwords
        self._throttle = throttle
        self._terms = terms
        self._sign_up_open = sign_up_open

    @classmethod
    def from_settings(cls, settings: Settings, signing: SigningKeys) -> Accounts:
        terms = Terms(
            settings.access_token_seconds,
            timedelta(days=settings.session_idle_days),
            timedelta(days=settings.session_max_days),
        )
        return cls(
            signing,
            Passwords.from_settings(settings),
            Throttle.from_settings(settings),
            terms,
            sign_up_open=may_sign_up(settings),
        )

    async def __aenter__(self) -> Accounts:
        require_common_passwords()
        await self._passwords.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._passwords.__aexit__(None, None, None)

    async def sign_up(self, db: Database, new: SignUp, client: str | None) -> str:
        """The JSON of the new user. Raises `SignUpClosed`, `Conflict` for an address that is taken, and
        `TooManyRequests`."""
        if not self._sign_up_open:
            raise SignUpClosed
        self._throttle.attempt("sign-up", client)
        derived = await self._passwords.derive(new.password.get_secret_value())
        account = new_id()
        shown: str | None = await db.value(
            SIGN_UP, account=account, email=new.email, recipe=derived.recipe, verifier=derived.verifier
        )
        if shown is None:
            raise Conflict(constraint="uq_users_email")
        log.info("account.signed-up", user_id=str(account))
        return shown

    async def log_in(self, db: Database, given: LogIn, client: str | None) -> Granted:
        """Opens a session. Raises `LogInFailed`, whatever is wrong, after the same work, and `TooManyRequests`."""
        self._throttle.attempt("log-in", client, given.email)
        found = await db.row(RECIPE_BY_EMAIL, email=given.email)
        # For an account that is not there the same is done, with an id that nobody has.
        account, recipe = (uuid4(), None) if found is None else (found[0], found[1])
        password = given.password.get_secret_value()
        derived = await self._derived(password, recipe, account)
        ticket = _Ticket.new(uuid4())
        opened = await db.row(
            OPEN,
            account=account,
            proof=derived.proof,
            session=ticket.session,
            fresh=ticket.hash,
            idle=self._terms.idle,
            longest=self._terms.longest,
        )
        if found is None or opened is None:
            known = {} if found is None else {"user_id": str(account)}
            log.warning("account.log-in-failed", **known)
            raise LogInFailed
        self._throttle.succeeded("log-in", client, given.email)
        log.info("account.logged-in", user_id=str(account))
        if self._passwords.outdated(derived.recipe):
            await self._renew(db, account, password, derived.proof)
        return self._granted(account, opened[0], opened[1], ticket)

    async def _derived(self, password: str, recipe: str | None, account: UUID) -> Derived:
        """What `recipe` makes of the password; what another one makes, and so no proof, where it cannot be used."""
        try:
            return await self._passwords.derive(password, recipe)
        except ValueError:
            log.error("account.recipe-unusable", user_id=str(account))  # noqa: TRY400 - the text has the recipe
        return await self._passwords.derive(password)

    async def _renew(self, db: Database, account: UUID, password: str, proof: bytes) -> None:
        """Keeps the password by today's cost. Where that fails the next log-in does it: this one has succeeded."""
        try:
            new = await self._passwords.derive(password)
            renewed = await db.value(
                RENEW, account=account, proof=proof, recipe=new.recipe, verifier=new.verifier
            )
        except RequestError as error:
            log.warning("account.verifier-not-renewed", user_id=str(account), problem=error.slug)
        else:
            if renewed:
                log.info("account.verifier-renewed", user_id=str(account))

    async def refresh(
        self, db: Database, token: str, client: str | None, *, repeat: str | None = None
    ) -> Granted:
        """Exchanges a refresh token for the next pair. With `repeat` (an Idempotency-Key) the same exchange may be
        asked for again until the new token is used, and gives the same refresh token; without, whoever brings a used
        token ends the session.

        Raises `Unauthenticated` and `TooManyRequests`.
        """
        self._throttle.attempt("refresh", client)
        given = _Ticket.read(token)
        if given is None:
            raise Unauthenticated("refresh-malformed", _NOT_ACCEPTED)
        fresh = _Ticket.new(given.session) if repeat is None else given.next(self._refresh_key, repeat)
        row = await db.row(
            # With a key the same exchange twice is one: a lost answer is asked for again.
            REFRESH if repeat is None else REFRESH_ONCE,
            session=given.session,
            secret=given.secret,
            fresh=fresh.hash,
            repeat=None if repeat is None else hashlib.sha256(repeat.encode()).digest(),
            idle=self._terms.idle,
        )
        assert row is not None
        outcome, account, email, epoch = row
        if outcome == "reused":
            log.warning("session.reused", user_id=str(account))
            raise Unauthenticated("refresh-reused", _NOT_ACCEPTED)
        if outcome != "refreshed":
            raise Unauthenticated("refresh-unknown", _NOT_ACCEPTED)
        log.info("session.refreshed", user_id=str(account))
        return self._granted(account, email, epoch, fresh)

    async def log_out(self, db: Database, token: str, client: str | None) -> None:
        """Ends the session of this refresh token; one that is none, or of none, ends nothing."""
        self._throttle.attempt("refresh", client)
        given = _Ticket.read(token)
        if given is None:
            return
        account = await db.value(CLOSE, session=given.session, secret=given.secret)
        if account is not None:
            log.info("session.closed", user_id=str(account))

    async def log_out_everywhere(self, db: Database, author: Author) -> None:
        """Ends every session of the author's, and every access token of ours for writing."""
        with revoked_is_unauthenticated():
            ended = await db.value(END_ALL, owner=author.user_id, epoch=author.epoch)
        if ended is None:
            raise NotFound("There is no such user.")
        log.info("session.all-ended", user_id=str(author.user_id))

    async def delete(self, db: Database, author: Author) -> None:
        """The account is gone with all that it owns, and never comes back. Raises `NotFound`."""
        await users.delete(db, author)
        log.info("account.deleted", user_id=str(author.user_id))

    async def change(self, db: Database, author: Author, change: AccountChange, client: str | None) -> str:
        """The JSON of the user as it is now. A new password ends what `log_out_everywhere` ends.

        Raises `WrongPassword` for a wrong current password (also where there is none), `Conflict`, `TooManyRequests`.
        """
        self._throttle.attempt("log-in", client, str(author.user_id))
        recipe = await db.value(RECIPE_BY_ID, account=author.user_id)
        derived = await self._derived(change.current_password.get_secret_value(), recipe, author.user_id)
        password = change.new_password
        new = None if password is None else await self._passwords.derive(password.get_secret_value())
        with revoked_is_unauthenticated():
            shown: str | None = await db.value(
                CHANGE,
                owner=author.user_id,
                epoch=author.epoch,
                proof=derived.proof,
                email=change.new_email,
                recipe=None if new is None else new.recipe,
                verifier=None if new is None else new.verifier,
            )
        if shown is None:
            log.warning("account.change-refused", user_id=str(author.user_id))
            raise WrongPassword
        self._throttle.succeeded("log-in", client, str(author.user_id))
        log.info(
            "account.changed",
            user_id=str(author.user_id),
            email=change.new_email is not None,
            password=new is not None,
        )
        return shown

    def _granted(self, account: UUID, email: str | None, epoch: int, ticket: _Ticket) -> Granted:
        seconds = self._terms.access_seconds
        return Granted(self._signing.mint(account, email, seconds, epoch=epoch), seconds, ticket.text)


# What operators do, connected as the owner of the tables


class Standing(NamedTuple):
    user_id: UUID
    epoch: int
    disabled: bool


async def standing(db: Database, email: str) -> Standing:
    """The user with this address, as it is stored. Raises `NotFound`."""
    row = await db.row(STANDING, email=email)
    if row is None:
        raise NotFound("There is no such user.")
    return Standing(row[0], row[1], row[2] is not None)


async def set_password(db: Database, passwords: Passwords, user_id: UUID, password: str) -> None:
    """Gives a user this password in place of any other, and ends their sessions and tokens. Raises `NotFound`."""
    derived = await passwords.derive(password)
    password_of = {"account": user_id, "recipe": derived.recipe, "verifier": derived.verifier}
    _there(await _ending_sessions(db, SET_PASSWORD, password_of))


async def disable(db: Database, user_id: UUID) -> None:
    """Ends a user's sessions, and refuses every log-in and write until `enable`. Raises `NotFound`."""
    _there(await _ending_sessions(db, DISABLE, {"account": user_id}))


async def enable(db: Database, user_id: UUID) -> None:
    """Raises `NotFound`."""
    _there(await db.value(ENABLE, account=user_id))


async def sweep(connection: asyncpg.Connection[Any]) -> int:
    """Deletes the sessions that have ended, and says how many. A log-in takes those of its own user along."""
    count: int = await connection.fetchval(EXPIRED.sql, *EXPIRED.arguments({}))
    return count


async def _ending_sessions(db: Database, deed: Statement, values: dict[str, Any]) -> object:
    """Does the deed, and then ends the user's sessions: in two statements, because one would look for them before it
    waits for a log-in that is under way, and leave its session."""

    async def work(connection: Connection) -> object:
        done: object = await connection.fetchval(deed.sql, *deed.arguments(values))
        await connection.execute(END_THEIRS.sql, *END_THEIRS.arguments(values))
        return done

    return await db.atomically(work, name=deed.name)


def _there(found: object) -> None:
    if found is None:
        raise NotFound("There is no such user.")
