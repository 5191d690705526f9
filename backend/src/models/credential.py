"""How an account of our own proves itself: its password and its sessions, and the only ways to either.

Nobody but the owner of the tables reads them. The service calls the functions below, which run by the owner's
rights (SECURITY DEFINER) and give away neither a password's verifier nor a token's hash: the proof of a password
comes in and is compared here (docs/decisions/0051-accounts.md). As in `isolation`, migrations say this in words of
their own.
"""

from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import CheckConstraint, Column, ForeignKey, Index, LargeBinary, Uuid, event, func
from sqlalchemy import Text as SqlText
from sqlalchemy.engine import Connection
from sqlmodel import Field

from .base import INSTANT, Base, metadata
from .isolation import ROLE

SESSIONS_MAX: Final = 100
"""Sessions of one user; the ones that are longest unused make room for a new one."""

_ASCII: Final[Any] = SqlText(collation="C")


class Credential(Base, table=True):
    """The table `credentials`: the password of a user who has one.

    `recipe` says how the proof is derived from a password (Argon2id, its cost, the salt); `verifier` is the
    SHA-256 of that proof.
    """

    __tablename__ = "credentials"
    __table_args__ = (
        CheckConstraint("char_length(recipe) BETWEEN 1 AND 255", name="recipe_length"),
        CheckConstraint("octet_length(verifier) = 32", name="verifier_length"),
    )

    user_id: UUID = Field(
        sa_column=Column(Uuid, ForeignKey("users.id", ondelete="CASCADE"), primary_key=True, nullable=False)
    )
    recipe: str = Field(sa_type=_ASCII, nullable=False)
    verifier: bytes = Field(sa_type=LargeBinary, nullable=False)
    changed_at: datetime = Field(
        default=None, sa_type=INSTANT, nullable=False, sa_column_kwargs={"server_default": func.now()}
    )


class Session(Base, table=True):
    """The table `sessions`: one row from a log-in to its end, with the hash of the one refresh token that is good.

    `previous_hash` is of the token before that, `repeat_hash` of the Idempotency-Key it was exchanged with. A
    session ends at `expires_at`, which each refresh puts off, and at `ends_at` in any case.
    """

    __tablename__ = "sessions"
    __table_args__ = (
        CheckConstraint("octet_length(current_hash) = 32", name="current_hash_length"),
        CheckConstraint("octet_length(previous_hash) = 32", name="previous_hash_length"),
        CheckConstraint("octet_length(repeat_hash) = 32", name="repeat_hash_length"),
        Index("ix_sessions_user_id_refreshed_at", "user_id", "refreshed_at"),
        Index("ix_sessions_expires_at", "expires_at"),
    )

    id: UUID = Field(primary_key=True, sa_type=Uuid)
    user_id: UUID = Field(sa_column=Column(Uuid, ForeignKey("users.id", ondelete="CASCADE"), nullable=False))
    current_hash: bytes = Field(sa_type=LargeBinary, nullable=False)
    previous_hash: bytes | None = Field(default=None, sa_type=LargeBinary, nullable=True)
    repeat_hash: bytes | None = Field(default=None, sa_type=LargeBinary, nullable=True)
    opened_at: datetime = Field(
        default=None, sa_type=INSTANT, nullable=False, sa_column_kwargs={"server_default": func.now()}
    )
    refreshed_at: datetime = Field(
        default=None, sa_type=INSTANT, nullable=False, sa_column_kwargs={"server_default": func.now()}
    )
    expires_at: datetime = Field(sa_type=INSTANT, nullable=False)
    ends_at: datetime = Field(sa_type=INSTANT, nullable=False)


SECRET_TABLES: Final = ("credentials", "sessions")
"""Under row-level security without a policy, and granted to nobody: for the owner of the tables alone."""

REQUIRE_CURRENT: Final = "require_current(uuid, integer)"
ADMIT: Final = "admit(uuid, integer, text)"
"""`groundwork_app` may call both by its own rights: they look at the caller's own row only, or make it."""

GATES: Final = (
    "sign_up(uuid, text, text, bytea)",
    "recipe_of_email(text)",
    "recipe_of_user(uuid)",
    "open_session(uuid, bytea, uuid, bytea, interval, interval)",
    "refresh_session(uuid, bytea, bytea, bytea, interval)",
    "close_session(uuid, bytea)",
    "end_sessions(uuid)",
    "renew_verifier(uuid, bytea, text, bytea)",
    "change_account(uuid, bytea, text, text, bytea)",
)
"""What `groundwork_app` may call by the rights of the tables' owner."""

# {schema} is where the tables are. Whoever changes two rows of one account holds its row in `users` first, so that
# none of them waits for another that waits for it; and looks again after that, because what a password was checked
# against may have been changed by whom it waited for.
FUNCTIONS: Final = (
    """
CREATE FUNCTION require_current(account uuid, epoch integer) RETURNS uuid
LANGUAGE plpgsql AS $$
DECLARE
    found_epoch integer;
    found_disabled timestamptz;
BEGIN
    SELECT token_epoch, disabled_at INTO found_epoch, found_disabled FROM users WHERE id = account;
    IF NOT FOUND THEN
        IF EXISTS (SELECT FROM deleted_users WHERE id = account) THEN
            RAISE EXCEPTION 'the account was deleted'
            USING ERRCODE = 'exclusion_violation', CONSTRAINT = 'ex_users_deleted', TABLE = 'users';
        END IF;
    ELSIF found_disabled IS NOT NULL THEN
        RAISE EXCEPTION 'the account is disabled'
        USING ERRCODE = 'exclusion_violation', CONSTRAINT = 'ex_users_disabled', TABLE = 'users';
    ELSIF found_epoch <> epoch THEN
        RAISE EXCEPTION 'the token was revoked'
        USING ERRCODE = 'exclusion_violation', CONSTRAINT = 'ex_users_revoked', TABLE = 'users';
    END IF;
    RETURN account;
END
$$
""",
    """
CREATE FUNCTION admit(account uuid, epoch integer, address text) RETURNS uuid
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM users
    WHERE id = account AND disabled_at IS NULL AND (epoch IS NULL OR token_epoch = epoch);
    IF NOT FOUND THEN
        -- Raises, unless there is no such user yet.
        PERFORM require_current(account, epoch);
        -- Without a target both unique rules count: another user's address, and our own other first write.
        INSERT INTO users (id, email) VALUES (account, address) ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN
            INSERT INTO users (id) VALUES (account) ON CONFLICT DO NOTHING;
        END IF;
    END IF;
    RETURN account;
END
$$
""",
    """
CREATE FUNCTION sign_up(new_id uuid, new_email text, new_recipe text, new_verifier bytea)
RETURNS TABLE (id uuid, email text, created_at timestamptz, updated_at timestamptz)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
    WITH made AS (
        -- No error for an address that is taken: the server's log would name it.
        INSERT INTO users (id, email) VALUES (new_id, new_email) ON CONFLICT (email) DO NOTHING
        RETURNING users.id, users.email, users.created_at, users.updated_at
    ), kept AS (
        INSERT INTO credentials (user_id, recipe, verifier)
        SELECT made.id, new_recipe, new_verifier FROM made
    )
    SELECT made.id, made.email, made.created_at, made.updated_at FROM made
$$
""",
    """
CREATE FUNCTION recipe_of_email(address text) RETURNS TABLE (user_id uuid, recipe text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
    SELECT users.id, credentials.recipe
    FROM users JOIN credentials ON credentials.user_id = users.id
    WHERE users.email = address
$$
""",
    """
CREATE FUNCTION recipe_of_user(account uuid) RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
    SELECT credentials.recipe FROM credentials WHERE credentials.user_id = account
$$
""",
    """
CREATE FUNCTION open_session(account uuid, proof bytea, new_id uuid, new_hash bytea, idle interval, longest interval)
RETURNS TABLE (email text, token_epoch integer)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
DECLARE
    found_email text;
    found_epoch integer;
    found_disabled timestamptz;
BEGIN
    -- A wrong proof holds and writes nothing, so it takes as long as an account that is not there.
    IF NOT EXISTS (SELECT FROM credentials c WHERE c.user_id = account AND c.verifier = sha256(proof)) THEN
        RETURN;
    END IF;
    SELECT u.email, u.token_epoch, u.disabled_at INTO found_email, found_epoch, found_disabled
    FROM users u WHERE u.id = account FOR NO KEY UPDATE;
    IF NOT FOUND OR found_disabled IS NOT NULL
        OR NOT EXISTS (SELECT FROM credentials c WHERE c.user_id = account AND c.verifier = sha256(proof)) THEN
        RETURN;
    END IF;
    DELETE FROM sessions s WHERE s.user_id = account AND (s.expires_at <= now() OR s.id IN (
        SELECT o.id FROM sessions o WHERE o.user_id = account ORDER BY o.refreshed_at DESC, o.id OFFSET {others}
    ));
    INSERT INTO sessions (id, user_id, current_hash, expires_at, ends_at)
    VALUES (new_id, account, new_hash, now() + least(idle, longest), now() + longest);
    RETURN QUERY SELECT found_email, found_epoch;
END
$$
""",
    """
CREATE FUNCTION refresh_session(session uuid, secret bytea, new_hash bytea, repeat bytea, idle interval)
RETURNS TABLE (outcome text, user_id uuid, email text, token_epoch integer)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
DECLARE
    given bytea := sha256(secret);
    account uuid;
    found_email text;
    found_epoch integer;
    found_disabled timestamptz;
    held_current bytea;
    held_previous bytea;
    held_repeat bytea;
    held_until timestamptz;
BEGIN
    SELECT s.user_id INTO account FROM sessions s WHERE s.id = session;
    IF FOUND THEN
        SELECT u.email, u.token_epoch, u.disabled_at INTO found_email, found_epoch, found_disabled
        FROM users u WHERE u.id = account FOR NO KEY UPDATE;
        SELECT s.current_hash, s.previous_hash, s.repeat_hash, s.expires_at
        INTO held_current, held_previous, held_repeat, held_until
        FROM sessions s WHERE s.id = session FOR UPDATE;
    END IF;
    IF held_current IS NULL OR held_until <= now() OR found_disabled IS NOT NULL THEN
        RETURN QUERY SELECT 'unknown', account, NULL::text, NULL::integer;
        RETURN;
    END IF;
    IF held_current = given THEN
        UPDATE sessions s
        SET current_hash = new_hash, previous_hash = given, repeat_hash = repeat, refreshed_at = now(),
            expires_at = least(now() + idle, s.ends_at)
        WHERE s.id = session;
    ELSIF held_previous = given AND held_repeat = repeat THEN
        -- The same request again, because its answer did not arrive: it is given the same token.
        UPDATE sessions s SET current_hash = new_hash WHERE s.id = session;
    ELSE
        DELETE FROM sessions s WHERE s.id = session;
        RETURN QUERY SELECT 'reused', account, NULL::text, NULL::integer;
        RETURN;
    END IF;
    RETURN QUERY SELECT 'refreshed', account, found_email, found_epoch;
END
$$
""",
    """
CREATE FUNCTION close_session(session uuid, secret bytea) RETURNS uuid
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
    DELETE FROM sessions
    WHERE sessions.id = session AND sha256(secret) IN (sessions.current_hash, sessions.previous_hash)
    RETURNING sessions.user_id
$$
""",
    """
CREATE FUNCTION end_sessions(account uuid) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
DECLARE
    new_epoch integer;
BEGIN
    UPDATE users u SET token_epoch = u.token_epoch + 1 WHERE u.id = account RETURNING u.token_epoch INTO new_epoch;
    DELETE FROM sessions s WHERE s.user_id = account;
    RETURN new_epoch;
END
$$
""",
    """
CREATE FUNCTION renew_verifier(account uuid, proof bytea, new_recipe text, new_verifier bytea) RETURNS boolean
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
    UPDATE credentials SET recipe = new_recipe, verifier = new_verifier
    WHERE credentials.user_id = account AND credentials.verifier = sha256(proof)
    RETURNING true
$$
""",
    """
CREATE FUNCTION change_account(account uuid, proof bytea, new_email text, new_recipe text, new_verifier bytea)
RETURNS TABLE (id uuid, email text, created_at timestamptz, updated_at timestamptz)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
BEGIN
    PERFORM FROM users u WHERE u.id = account FOR NO KEY UPDATE;
    IF NOT EXISTS (SELECT FROM credentials c WHERE c.user_id = account AND c.verifier = sha256(proof)) THEN
        RETURN;
    END IF;
    IF new_verifier IS NOT NULL THEN
        UPDATE credentials c SET recipe = new_recipe, verifier = new_verifier, changed_at = now()
        WHERE c.user_id = account;
        DELETE FROM sessions s WHERE s.user_id = account;
    END IF;
    RETURN QUERY
        UPDATE users u
        SET email = coalesce(new_email, u.email), updated_at = now(),
            token_epoch = u.token_epoch + (new_verifier IS NOT NULL)::integer
        WHERE u.id = account
        RETURNING u.id, u.email, u.created_at, u.updated_at;
EXCEPTION
    WHEN unique_violation THEN
        -- The same without its detail, which names the address in the server's log.
        RAISE EXCEPTION 'the address is taken'
        USING ERRCODE = 'unique_violation', CONSTRAINT = 'uq_users_email', TABLE = 'users';
END
$$
""",
)


def gates(role: str = ROLE) -> list[str]:
    """Who may call what, as the owner of the functions says it."""
    return [
        statement
        for gate in (*GATES, REQUIRE_CURRENT, ADMIT)
        for statement in (
            f"REVOKE ALL ON FUNCTION {gate} FROM PUBLIC",
            f"GRANT EXECUTE ON FUNCTION {gate} TO {role}",
        )
    ]


@event.listens_for(metadata, "after_create")
def _declare(_metadata: Any, connection: Connection, **_: Any) -> None:
    """After the listener of `isolation`, which makes the role."""
    for table in SECRET_TABLES:
        connection.exec_driver_sql(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    schema = connection.exec_driver_sql("SELECT quote_ident(current_schema())").scalar()
    for function in FUNCTIONS:
        # Not `format`: a function may have braces of its own.
        text = function.replace("{schema}", str(schema)).replace("{others}", str(SESSIONS_MAX - 1))
        connection.exec_driver_sql(text)
    for statement in gates():
        connection.exec_driver_sql(statement)
