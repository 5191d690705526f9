"""Own accounts: passwords and sessions, out of the service's reach but for the functions here; what ends a token.

Revision 0003. The functions of GATES run by the rights of the tables' owner, and find their tables by the schema
that the migration runs in. The role of revision 0002 may call them, and may no longer change rows of `users` itself.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ROLE_EXISTS = "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = 'groundwork_app')"

USERS = """
ALTER TABLE users
    ADD COLUMN token_epoch integer NOT NULL DEFAULT 0,
    ADD COLUMN disabled_at timestamptz,
    ADD CONSTRAINT ck_users_token_epoch_positive CHECK (token_epoch >= 0)
"""

CREDENTIALS = """
CREATE TABLE credentials (
    user_id     uuid NOT NULL,
    recipe      text COLLATE "C" NOT NULL,
    verifier    bytea NOT NULL,
    changed_at  timestamptz NOT NULL DEFAULT now(),

    CONSTRAINT pk_credentials PRIMARY KEY (user_id),
    CONSTRAINT fk_credentials_user_id FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE,
    CONSTRAINT ck_credentials_recipe_length CHECK (char_length(recipe) BETWEEN 1 AND 255),
    CONSTRAINT ck_credentials_verifier_length CHECK (octet_length(verifier) = 32)
)
"""

SESSIONS = """
CREATE TABLE sessions (
    id             uuid NOT NULL,
    user_id        uuid NOT NULL,
    current_hash   bytea NOT NULL,
    previous_hash  bytea,
    repeat_hash    bytea,
    opened_at      timestamptz NOT NULL DEFAULT now(),
    refreshed_at   timestamptz NOT NULL DEFAULT now(),
    expires_at     timestamptz NOT NULL,
    ends_at        timestamptz NOT NULL,

    CONSTRAINT pk_sessions PRIMARY KEY (id),
    CONSTRAINT fk_sessions_user_id FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE,
    CONSTRAINT ck_sessions_current_hash_length CHECK (octet_length(current_hash) = 32),
    CONSTRAINT ck_sessions_previous_hash_length CHECK (octet_length(previous_hash) = 32),
    CONSTRAINT ck_sessions_repeat_hash_length CHECK (octet_length(repeat_hash) = 32)
)
"""

INDEXES = (
    "CREATE INDEX ix_sessions_user_id_refreshed_at ON sessions (user_id, refreshed_at)",
    "CREATE INDEX ix_sessions_expires_at ON sessions (expires_at)",
)

SECURITY = (
    "ALTER TABLE credentials ENABLE ROW LEVEL SECURITY",
    "ALTER TABLE sessions ENABLE ROW LEVEL SECURITY",
)

FUNCTIONS = (
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
        SELECT o.id FROM sessions o WHERE o.user_id = account ORDER BY o.refreshed_at DESC, o.id OFFSET 99
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

GATES = (
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


def upgrade() -> None:
    op.execute(USERS)
    op.execute(CREDENTIALS)
    op.execute(SESSIONS)
    for statement in (*INDEXES, *SECURITY):
        op.execute(statement)
    bind = op.get_bind()
    schema = str(bind.exec_driver_sql("SELECT quote_ident(current_schema())").scalar())
    for function in FUNCTIONS:
        bind.exec_driver_sql(function.replace("{schema}", schema))
    for gate in GATES:
        op.execute(f"REVOKE ALL ON FUNCTION {gate} FROM PUBLIC")
    if bind.exec_driver_sql(ROLE_EXISTS).scalar():
        op.execute("REVOKE UPDATE ON users FROM groundwork_app")
        for gate in GATES:
            op.execute(f"GRANT EXECUTE ON FUNCTION {gate} TO groundwork_app")


def downgrade() -> None:
    if op.get_bind().exec_driver_sql(ROLE_EXISTS).scalar():
        op.execute("GRANT UPDATE ON users TO groundwork_app")
    for function in ("require_current(uuid, integer)", *GATES):
        op.execute(f"DROP FUNCTION {function}")
    op.execute("DROP TABLE sessions")
    op.execute("DROP TABLE credentials")
    op.execute("ALTER TABLE users DROP COLUMN disabled_at, DROP COLUMN token_epoch")
