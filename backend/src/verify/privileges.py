"""Checks of privileges: what the role lacks, what it has beyond its task, and who else reaches the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..models.credential import ADMIT, GATES, REQUIRE_CURRENT, SECRET_TABLES
from ..models.isolation import GRANTS, OWNER_COLUMNS, ROLE
from ..models.kept_answer import SWEEP
from ..services import isolation
from .check import CheckContext, CheckResult, failed, passed, statements_as, warned
from .network import is_local
from .roles import quoted, roles

if TYPE_CHECKING:
    from collections.abc import Sequence

_ATTRIBUTES = {
    "rolsuper": "superuser",
    "rolbypassrls": "BYPASSRLS",
    "rolcreaterole": "CREATEROLE",
    "rolcreatedb": "CREATEDB",
    "rolreplication": "REPLICATION",
}

# Grantees that are neither the owner nor groundwork_app; pg_roles knows no PUBLIC, whose oid is 0.
_GRANTEES = """
SELECT objects.kind, objects.name, coalesce(r.rolname::text, 'PUBLIC') AS grantee,
       string_agg(DISTINCT a.privilege_type, ', ' ORDER BY a.privilege_type) AS privileges
FROM (
    SELECT 'TABLE' AS kind, quote_ident(c.relname) AS name, c.relowner AS owner, c.relacl AS acl
    FROM pg_class c
    WHERE c.relnamespace = current_schema()::regnamespace AND c.relname = ANY($1::text[])
    UNION ALL
    SELECT 'FUNCTION', p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')', p.proowner,
           coalesce(p.proacl, acldefault('f', p.proowner))
    FROM pg_proc p WHERE p.oid IN (SELECT to_regprocedure(f) FROM unnest($2::text[]) f)
) objects
CROSS JOIN aclexplode(objects.acl) a
LEFT JOIN pg_roles r ON r.oid = a.grantee
WHERE a.grantee <> objects.owner AND r.rolname IS DISTINCT FROM $3
GROUP BY 1, 2, 3 ORDER BY 3, 1, 2
"""
# Default privileges of the tables' owner would give the next migration's tables to the same grantees.
_DEFAULTS = """
SELECT CASE d.defaclobjtype WHEN 'r' THEN 'TABLES' ELSE 'FUNCTIONS' END AS kind,
       coalesce(r.rolname::text, 'PUBLIC') AS grantee, d.defaclnamespace <> 0 AS in_schema
FROM pg_default_acl d
CROSS JOIN aclexplode(d.defaclacl) a
LEFT JOIN pg_roles r ON r.oid = a.grantee
WHERE pg_get_userbyid(d.defaclrole) = $1 AND d.defaclobjtype IN ('r', 'f')
  AND d.defaclnamespace IN (0, current_schema()::regnamespace)
  AND coalesce(r.rolname::text, 'PUBLIC') = ANY($2::text[])
GROUP BY 1, 2, 3 ORDER BY 1, 2
"""


async def privileges(context: CheckContext) -> CheckResult:
    """Whether the role may do what the service does, and whether it may do much more."""
    (role,) = await context.fetch(
        "SELECT rolname::text AS name, rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolreplication "
        "FROM pg_roles WHERE rolname = current_user"
    )
    name = f'role "{role["name"]}"'
    if missing := await _missing(context):
        found, able = await _standing(context), await roles(context)
        return failed(
            f"{name} lacks privileges",
            f"The service needs them: {'; '.join(missing)}.",
            statements_as(able.grantor, *isolation.grants(found), f"GRANT {ROLE} TO {quoted(role['name'])}"),
        )
    attributes = [text for column, text in _ATTRIBUTES.items() if role[column]]
    held = attributes[:1] if role["rolsuper"] else attributes
    if not held:
        return passed(f"{name} has what it needs and no more")
    summary = f"{name}: {', '.join(held)}"
    if is_local(context.address) and context.settings.environment != "production":
        return passed(f"{summary} (acceptable on a local machine)")
    return warned(
        summary,
        "The service needs none of these, and whoever takes over the service would have them.",
        await service_role_remedy(context),
    )


async def grantees(context: CheckContext) -> CheckResult:
    """Roles other than the owner and `groundwork_app` that have privileges on the tables and functions.

    Default privileges of the owner (Supabase's for `anon`, an analyst's) reach each new table and function.
    """
    rows = await context.fetch(_GRANTEES, [*OWNER_COLUMNS, *SECRET_TABLES], list(GATES), ROLE)
    if not rows:
        return passed(f"no role but the owner and {ROLE} has privileges on tables and functions")
    able = (await roles(context)).table_owner
    names = list(dict.fromkeys(row["grantee"] for row in rows))
    defaults = await context.fetch(_DEFAULTS, able, names)
    statements = [
        f"REVOKE ALL ON {row['kind']} {row['name']} FROM {_grantee(row['grantee'])}" for row in rows
    ]
    (schema,) = await context.fetch("SELECT quote_ident(current_schema()) AS name")
    statements += [
        f"ALTER DEFAULT PRIVILEGES{' IN SCHEMA ' + schema['name'] if row['in_schema'] else ''} "
        f"REVOKE ALL ON {row['kind']} FROM {_grantee(row['grantee'])}"
        for row in defaults
    ]
    cause = "\n".join(
        f"{row['grantee']}: {row['privileges']} on {row['kind'].lower()} {row['name']}" for row in rows
    )
    callable_ = any(row["kind"] == "FUNCTION" for row in rows)
    judge = failed if callable_ else warned
    return judge(
        f"privileges of {', '.join(names)}",
        f"{cause}\n"
        + (
            "These functions read and change credentials by the rights of their owner."
            if callable_
            else "Row-level security decides what they see."
        ),
        statements_as(able, *statements),
    )


async def service_role_remedy(context: CheckContext) -> str:
    """How to connect the service as a role that is bound by row-level security and owns nothing."""
    found, able = await _standing(context), await roles(context)
    return (
        statements_as(
            able.grantor,
            *isolation.grants(found),
            f"CREATE ROLE {quoted(able.login)} LOGIN PASSWORD '<password>' IN ROLE {ROLE}",
        )
        + f'\nThen name role "{able.login}" in DATABASE_URL, and "{able.table_owner}" in DATABASE_MIGRATION_URL.'
    )


async def _standing(context: CheckContext) -> isolation.Standing:
    async with context.connection.transaction(readonly=True):
        return await isolation.standing(context.connection)


async def _missing(context: CheckContext) -> Sequence[str]:
    wanted = [(table, right) for table, rights in GRANTS.items() for right in rights.split(", ")]
    rows = await context.fetch(
        "SELECT t.name || ' (' || string_agg(t.right, ', ') || ')' AS text "
        'FROM unnest($1::text[], $2::text[]) AS t(name, "right") '
        "WHERE to_regclass(t.name) IS NOT NULL AND NOT has_table_privilege(t.name, t.right) GROUP BY t.name",
        [table for table, _ in wanted],
        [right for _, right in wanted],
    )
    rows += await context.fetch(
        "SELECT f.name AS text FROM unnest($1::text[]) AS f(name) "
        "WHERE to_regprocedure(f.name) IS NOT NULL AND NOT has_function_privilege(f.name, 'EXECUTE')",
        [*GATES, REQUIRE_CURRENT, ADMIT, SWEEP],
    )
    return [row["text"] for row in rows]


def _grantee(name: str) -> str:
    return name if name == "PUBLIC" else quoted(name)
