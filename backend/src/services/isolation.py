"""Whether PostgreSQL itself keeps users apart for the role in use, and what to say to it when it does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..models.credential import ADMIT, GATES, REQUIRE_CURRENT
from ..models.isolation import CREATE_ROLE, GRANTS, OWNER_COLUMNS, ROLE, row_level_security
from ..models.kept_answer import SWEEP

if TYPE_CHECKING:
    import asyncpg

_LOOK = """
SELECT current_user::text AS name, current_schema()::text AS schema, r.rolsuper, r.rolbypassrls,
       EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
               WHERE n.nspname = current_schema() AND c.relname = ANY($1::text[]) AND c.relkind = 'r'
               AND pg_has_role(c.relowner, 'USAGE')) AS owns,
       EXISTS (SELECT FROM pg_roles WHERE rolname = $2::text) AS role_exists
FROM pg_roles r
WHERE r.rolname = current_user
"""


@dataclass(frozen=True, slots=True)
class Standing:
    """What the role in use may pass by: `unbound` says why no policy binds it, `owns` that it could lift them."""

    name: str
    schema: str
    unbound: str | None
    owns: bool
    role_exists: bool

    @property
    def weakness(self) -> str | None:
        """Why row-level security is no wall for this role; None when it is one."""
        if self.unbound is not None:
            return self.unbound
        return "owner of the tables" if self.owns else None


async def standing(connection: asyncpg.Connection[Any]) -> Standing:
    """What the role of `connection` is bound by. Reads the catalogue only."""
    row = await connection.fetchrow(_LOOK, list(OWNER_COLUMNS), ROLE)
    assert row is not None
    unbound = "superuser" if row["rolsuper"] else "BYPASSRLS" if row["rolbypassrls"] else None
    return Standing(row["name"], row["schema"], unbound, row["owns"], row["role_exists"])


def grants(found: Standing) -> list[str]:
    """Statements that create the role `groundwork_app` where it is missing, and grant it what the service needs."""
    statements = [] if found.role_exists else [CREATE_ROLE]
    if found.schema != "public":
        statements.append(f'GRANT USAGE ON SCHEMA "{found.schema}" TO {ROLE}')
    by_rights: dict[str, list[str]] = {}
    for table, rights in GRANTS.items():
        by_rights.setdefault(rights, []).append(table)
    statements += [f"GRANT {rights} ON {', '.join(tables)} TO {ROLE}" for rights, tables in by_rights.items()]
    statements.append(
        f"GRANT EXECUTE ON FUNCTION {', '.join((*GATES, REQUIRE_CURRENT, ADMIT, SWEEP))} TO {ROLE}"
    )
    return statements


def mending(tables: set[str]) -> list[str]:
    """What puts `tables` under row-level security again, whatever has become of it."""
    return [
        statement
        for table in sorted(tables & OWNER_COLUMNS.keys())
        for statement in (f"DROP POLICY IF EXISTS own_rows ON {table}", *row_level_security(table))
    ]
