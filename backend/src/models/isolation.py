"""The second wall: what PostgreSQL itself refuses, whatever a statement of ours says or forgets.

Every table with rows of users is under row-level security: a role that is bound by it sees, changes and adds
only rows of the user named by the setting `app.user_id`, and no row while nobody is named. The service connects
as a member of `groundwork_app`, which owns nothing (docs/decisions/0017-two-walls.md).

Migrations say this in words of their own; what stands here is what `migrations.catalogue` holds them to.
"""

from typing import Any, Final

from sqlalchemy import event
from sqlalchemy.engine import Connection

from .base import metadata

ROLE: Final = "groundwork_app"
SETTING: Final = "app.user_id"

OWNER_COLUMNS: Final = {
    "users": "id",
    "deleted_users": "id",
    "tasks": "user_id",
    "idempotency_keys": "user_id",
}
"""The column of each table that names whose the row is."""

FORCED: Final = frozenset({"tasks", "idempotency_keys"})
"""Where even the owner of the table is bound. Operators look for users by e-mail, as the owner."""

GRANTS: Final = {
    "users": "SELECT, INSERT, DELETE",
    "deleted_users": "SELECT, INSERT",
    "tasks": "SELECT, INSERT, UPDATE, DELETE",
    "idempotency_keys": "SELECT, INSERT, UPDATE, DELETE",
    "alembic_version": "SELECT",
}
"""All that the role may do; without a member's own password it cannot even log in."""

# A scalar subselect is evaluated once a statement, where a filter would evaluate it for each row. After its
# first use in a session the setting reverts to '', which is no uuid.
_ME: Final = f"(SELECT nullif(current_setting('{SETTING}', true), '')::uuid)"

CREATE_ROLE: Final = (
    f"CREATE ROLE {ROLE} NOLOGIN NOSUPERUSER NOBYPASSRLS NOCREATEROLE NOCREATEDB NOREPLICATION"
)

# Only triggers call them, for which the user needs no right.
# The functions find their table by the trigger's own schema, never by the caller's search_path.
_FUNCTIONS: Final = (
    """
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
""",
    """
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
""",
)

_TRIGGERS: Final = (
    "CREATE TRIGGER remember_deleted AFTER DELETE ON users"
    " FOR EACH ROW EXECUTE FUNCTION remember_deleted_user()",
    "CREATE TRIGGER remember_truncated BEFORE TRUNCATE ON users"
    " FOR EACH STATEMENT EXECUTE FUNCTION remember_deleted_user()",
    "CREATE TRIGGER refuse_deleted AFTER INSERT ON users FOR EACH ROW EXECUTE FUNCTION refuse_deleted_user()",
)


def row_level_security(table: str) -> list[str]:
    """What puts `table` under row-level security."""
    policy = f"{OWNER_COLUMNS[table]} = {_ME}"
    forced = [f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY"] if table in FORCED else []
    return [
        f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
        *forced,
        f"CREATE POLICY own_rows ON {table} USING ({policy}) WITH CHECK ({policy})",
    ]


def grants() -> list[str]:
    """What the role is given, as the owner of the tables says it."""
    return [f"GRANT {rights} ON {table} TO {ROLE}" for table, rights in GRANTS.items()]


@event.listens_for(metadata, "after_create")
def _declare(_metadata: Any, connection: Connection, **_: Any) -> None:
    """The same when the tables are made from the models, as `migrations.catalogue` does to look at them."""
    exists = connection.exec_driver_sql(f"SELECT 1 FROM pg_roles WHERE rolname = '{ROLE}'").scalar()  # noqa: S608
    if not exists:
        connection.exec_driver_sql(CREATE_ROLE)
    for statement in (*_FUNCTIONS, *_TRIGGERS):
        connection.exec_driver_sql(statement)
    for function in ("remember_deleted_user()", "refuse_deleted_user()"):
        connection.exec_driver_sql(f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC")
    for table, rights in GRANTS.items():
        if table in OWNER_COLUMNS:
            for statement in row_level_security(table):
                connection.exec_driver_sql(statement)
            connection.exec_driver_sql(f"GRANT {rights} ON {table} TO {ROLE}")
