"""Row-level security and the application's role; users without an e-mail; deleted users; idempotency keys.

Revision 0002. The role belongs to the whole cluster: it is made when it is not there, by whichever database
migrates first, and a downgrade leaves it where it is. A migrator that may not make roles goes on without; the
service then runs as the owner of the tables, and `python -m src verify` prints what is missing.
"""

from __future__ import annotations

import structlog
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

log = structlog.get_logger("groundwork.migrations")

# Another database of the cluster may be doing the same at this moment. Its uncommitted role is waited for,
# within lock_timeout, and then met as a violation of the unique name.
ROLE = """
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'groundwork_app') THEN
        CREATE ROLE groundwork_app
            NOLOGIN NOSUPERUSER NOBYPASSRLS NOCREATEROLE NOCREATEDB NOREPLICATION;
    END IF;
EXCEPTION
    WHEN duplicate_object OR unique_violation THEN NULL;
    WHEN insufficient_privilege THEN NULL;
END
$$
"""

ROLE_EXISTS = "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = 'groundwork_app')"

# Every statement reads its owner from a subselect, so the planner expects an average owner. Where a few have very
# many rows and most have a handful, it would rather read all of them than go by the key or in an order. This
# lets it expect a hundredth of the table, or as many rows as the owner of most has (docs/decisions/0030-pages.md).
STATISTICS = (
    "ALTER TABLE tasks ALTER COLUMN user_id SET (n_distinct = 100)",
    "ALTER TABLE idempotency_keys ALTER COLUMN user_id SET (n_distinct = 100)",
)

DELETED_USERS = """
CREATE TABLE deleted_users (
    id          uuid NOT NULL,
    deleted_at  timestamptz NOT NULL DEFAULT now(),

    CONSTRAINT pk_deleted_users PRIMARY KEY (id)
)
"""

IDEMPOTENCY_KEYS = """
CREATE TABLE idempotency_keys (
    user_id       uuid NOT NULL,
    key           text COLLATE "C" NOT NULL,
    request_hash  bytea NOT NULL,
    task_id       uuid,
    response      text,
    status        smallint,
    created_at    timestamptz NOT NULL DEFAULT now(),

    CONSTRAINT pk_idempotency_keys PRIMARY KEY (user_id, key),
    CONSTRAINT fk_idempotency_keys_user_id FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE,
    CONSTRAINT ck_idempotency_keys_key_length CHECK (char_length(key) BETWEEN 1 AND 255),
    CONSTRAINT ck_idempotency_keys_request_hash_length CHECK (octet_length(request_hash) = 32),
    CONSTRAINT ck_idempotency_keys_status_range CHECK (status BETWEEN 200 AND 599)
)
"""

INDEX = "CREATE INDEX ix_idempotency_keys_user_id_created_at ON idempotency_keys (user_id, created_at)"

REMEMBER = """
CREATE FUNCTION remember_deleted_user() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        EXECUTE format('INSERT INTO %1$I.deleted_users (id) SELECT id FROM %1$I.%2$I ON CONFLICT DO NOTHING',
                       TG_TABLE_SCHEMA, TG_TABLE_NAME);
    ELSE
        EXECUTE format('INSERT INTO %I.deleted_users (id) VALUES ($1) ON CONFLICT DO NOTHING', TG_TABLE_SCHEMA)
        USING OLD.id;
    END IF;
    RETURN NULL;
END
$$
"""

# After the row is in: whoever deleted the same user before has committed by then, and can be seen.
REFUSE = """
CREATE FUNCTION refuse_deleted_user() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    deleted boolean;
BEGIN
    EXECUTE format('SELECT EXISTS (SELECT FROM %I.deleted_users WHERE id = $1)', TG_TABLE_SCHEMA)
    INTO deleted USING NEW.id;
    IF deleted THEN
        RAISE EXCEPTION 'a deleted user is not made again'
        USING ERRCODE = 'exclusion_violation', CONSTRAINT = 'ex_users_deleted',
              TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA;
    END IF;
    RETURN NULL;
END
$$
"""

TRIGGERS = (
    "CREATE TRIGGER remember_deleted AFTER DELETE ON users"
    " FOR EACH ROW EXECUTE FUNCTION remember_deleted_user()",
    "CREATE TRIGGER remember_truncated BEFORE TRUNCATE ON users"
    " FOR EACH STATEMENT EXECUTE FUNCTION remember_deleted_user()",
    "CREATE TRIGGER refuse_deleted AFTER INSERT ON users FOR EACH ROW EXECUTE FUNCTION refuse_deleted_user()",
)

POLICIES = tuple(
    f"CREATE POLICY own_rows ON {table}"
    f" USING ({column} = (SELECT nullif(current_setting('app.user_id', true), '')::uuid))"
    f" WITH CHECK ({column} = (SELECT nullif(current_setting('app.user_id', true), '')::uuid))"
    for table, column in (
        ("users", "id"),
        ("deleted_users", "id"),
        ("tasks", "user_id"),
        ("idempotency_keys", "user_id"),
    )
)

SECURITY = (
    "ALTER TABLE users ENABLE ROW LEVEL SECURITY",
    "ALTER TABLE deleted_users ENABLE ROW LEVEL SECURITY",
    "ALTER TABLE tasks ENABLE ROW LEVEL SECURITY",
    "ALTER TABLE tasks FORCE ROW LEVEL SECURITY",
    "ALTER TABLE idempotency_keys ENABLE ROW LEVEL SECURITY",
    "ALTER TABLE idempotency_keys FORCE ROW LEVEL SECURITY",
)

GRANTS = (
    "GRANT SELECT, INSERT, UPDATE, DELETE ON users, tasks, idempotency_keys TO groundwork_app",
    "GRANT SELECT, INSERT ON deleted_users TO groundwork_app",
    # The service asks for the revision at every start.
    "GRANT SELECT ON alembic_version TO groundwork_app",
)

# Everybody may use the schema `public`; one of the operator's own may be closed. Only its owner can open it.
SCHEMA_USAGE = """
DO $$
BEGIN
    IF NOT has_schema_privilege('groundwork_app', current_schema(), 'USAGE') THEN
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO groundwork_app', current_schema());
    END IF;
END
$$
"""


def upgrade() -> None:
    op.execute(ROLE)
    op.execute("ALTER TABLE users ALTER COLUMN email DROP NOT NULL")
    op.execute(DELETED_USERS)
    op.execute(IDEMPOTENCY_KEYS)
    op.execute(INDEX)
    for statement in STATISTICS:
        op.execute(statement)
    op.execute(REMEMBER)
    op.execute(REFUSE)
    for statement in (*TRIGGERS, *POLICIES, *SECURITY):
        op.execute(statement)
    if op.get_bind().exec_driver_sql(ROLE_EXISTS).scalar():
        for grant in GRANTS:
            op.execute(grant)
        op.execute(SCHEMA_USAGE)
    else:
        log.warning("isolation.role-not-made", role="groundwork_app", remedy="python -m src verify")


def downgrade() -> None:
    if op.get_bind().exec_driver_sql(ROLE_EXISTS).scalar():
        op.execute("REVOKE ALL ON users, tasks, alembic_version FROM groundwork_app")
    for table in ("users", "tasks"):
        op.execute(f"DROP POLICY own_rows ON {table}")
        op.execute(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    for trigger in ("remember_deleted", "remember_truncated", "refuse_deleted"):
        op.execute(f"DROP TRIGGER {trigger} ON users")
    op.execute("DROP FUNCTION remember_deleted_user()")
    op.execute("DROP FUNCTION refuse_deleted_user()")
    op.execute("DROP TABLE idempotency_keys")
    op.execute("DROP TABLE deleted_users")
    op.execute("ALTER TABLE tasks ALTER COLUMN user_id RESET (n_distinct)")
    # Revision 0001 knows no user without an e-mail. Their rows stay, under an address that reaches nobody.
    op.execute("UPDATE users SET email = id || '@users.invalid' WHERE email IS NULL")
    op.execute("ALTER TABLE users ALTER COLUMN email SET NOT NULL")
