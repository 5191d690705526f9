"""Revoke all rights on tables and functions from roles other than the owner and the application's.

Revision 0005. `ALTER DEFAULT PRIVILEGES ... GRANT ... TO anon` (Supabase's standard) gives other roles rights on
whatever a migration makes, and `REVOKE ... FROM PUBLIC` does not take those back. Rights are taken from every grantee
that stands in the catalogue, PUBLIC included, and `groundwork_app` is given the three functions that it called as
PUBLIC. The code of revision 0004 goes on as it did, as the owner or as a member of that role.

Default privileges go on giving rights on what a later migration makes: it has to revoke them as this one does, and
`python -m src migrate check` names what it forgot.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

ROLE_EXISTS = "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = 'groundwork_app')"

# What the service calls by its own rights, and what only triggers call: those need no right of the user's.
CALLED = (
    "require_current(uuid, integer)",
    "admit(uuid, integer, text)",
    "sweep_answers(uuid, text, timestamptz)",
)
TRIGGERED = ("remember_deleted_user()", "refuse_deleted_user()")

# CASCADE, because a grantee with the grant option may have passed its rights on. The rights on columns go with those
# on their table.
REVOKE = """
DO $$
DECLARE
    command text;
BEGIN
    FOR command IN
        WITH rights AS (
            SELECT 'TABLE ' || c.oid::regclass AS object, c.relowner AS owner, a.grantee
            FROM pg_class c, aclexplode(c.relacl) a
            WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r'
              AND c.relname IN ('users', 'deleted_users', 'tasks', 'idempotency_keys', 'credentials', 'sessions',
                                'alembic_version')
            UNION
            SELECT 'TABLE ' || c.oid::regclass, c.relowner, a.grantee
            FROM pg_class c JOIN pg_attribute t ON t.attrelid = c.oid, aclexplode(t.attacl) a
            WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r'
              AND c.relname IN ('users', 'deleted_users', 'tasks', 'idempotency_keys', 'credentials', 'sessions',
                                'alembic_version')
            UNION
            SELECT 'FUNCTION ' || p.oid::regprocedure, p.proowner, a.grantee
            FROM pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
            WHERE p.pronamespace = current_schema()::regnamespace
              AND p.proname IN ('remember_deleted_user', 'refuse_deleted_user', 'require_current', 'sign_up',
                                'recipe_of_email', 'recipe_of_user', 'open_session', 'refresh_session',
                                'close_session', 'end_sessions', 'renew_verifier', 'change_account', 'admit',
                                'sweep_answers')
        )
        SELECT format('REVOKE ALL ON %s FROM %s CASCADE', object,
                      CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END)
        FROM rights
        WHERE grantee <> owner AND pg_get_userbyid(grantee) <> 'groundwork_app'
        ORDER BY 1
    LOOP
        EXECUTE command;
    END LOOP;
END
$$
"""


def upgrade() -> None:
    op.execute(REVOKE)
    if op.get_bind().exec_driver_sql(ROLE_EXISTS).scalar():
        for function in CALLED:
            op.execute(f"GRANT EXECUTE ON FUNCTION {function} TO groundwork_app")


def downgrade() -> None:
    """What default privileges had given is not given again."""
    if op.get_bind().exec_driver_sql(ROLE_EXISTS).scalar():
        for function in CALLED:
            op.execute(f"REVOKE EXECUTE ON FUNCTION {function} FROM groundwork_app")
    for function in (*CALLED, *TRIGGERED):
        op.execute(f"GRANT EXECUTE ON FUNCTION {function} TO PUBLIC")
