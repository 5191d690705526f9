"""Which roles can do what, so that each remedy names one that can run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..models.isolation import ROLE

if TYPE_CHECKING:
    from .check import CheckContext

# The owner may create roles and grant membership in groundwork_app, or else a superuser has to.
_QUERY = """
SELECT current_user::text AS "current", s.name AS superuser, pg_get_userbyid(d.datdba)::text AS database_owner,
       coalesce(pg_get_userbyid(t.relowner)::text, pg_get_userbyid(d.datdba)::text) AS table_owner,
       CASE WHEN n.nspowner = 'pg_database_owner'::regrole THEN pg_get_userbyid(d.datdba)::text
            ELSE pg_get_userbyid(n.nspowner)::text END AS schema_owner,
       CASE WHEN o.rolsuper OR (o.rolcreaterole AND (
                current_setting('server_version_num')::int < 160000 OR g.oid IS NULL
                OR pg_has_role(o.oid, g.oid, 'MEMBER WITH ADMIN OPTION')))
            THEN o.rolname::text ELSE s.name END AS grantor,
       CASE WHEN a.oid IS NULL THEN 'app' ELSE 'app_' || substr(md5(random()::text), 1, 6) END AS login
FROM pg_database d
JOIN pg_namespace n ON n.nspname = current_schema()
LEFT JOIN pg_class t ON t.relnamespace = n.oid AND t.relname = 'tasks'
JOIN pg_roles o ON o.oid = coalesce(t.relowner, d.datdba)
LEFT JOIN pg_roles g ON g.rolname = $1
LEFT JOIN pg_roles a ON a.rolname = 'app'
CROSS JOIN (SELECT rolname::text AS name FROM pg_roles WHERE rolsuper
            ORDER BY rolname = current_user DESC, oid LIMIT 1) s
WHERE d.datname = current_database()
"""


@dataclass(frozen=True, slots=True)
class Roles:
    """`grantor` can make and grant roles and the rights on the tables; `login` is a free name for a new role."""

    current: str
    superuser: str
    database_owner: str
    schema_owner: str
    table_owner: str
    grantor: str
    login: str


async def roles(context: CheckContext) -> Roles:
    (row,) = await context.fetch(_QUERY, ROLE)
    return Roles(**dict(row))


def quoted(identifier: str) -> str:
    doubled = identifier.replace('"', '""')
    return f'"{doubled}"'
