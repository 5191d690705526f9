"""What the tables look like to PostgreSQL itself: columns, constraints, indexes, policies, rights, in its own words.

`expected()` is the frozen answer for the head revision, kept in `catalogue.json`; `observed()` asks a server.
`python -m src.migrations.catalogue` prints that file anew from the models, with DATABASE_URL naming any server.
Comparing the two needs no right but to read the catalogue and writes nothing, not even a temporary table.
Tests hold the file to `SQLModel.metadata` and to the migrations, on the oldest and the newest server
(docs/decisions/0015-catalogue.md).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import asyncpg
from sqlalchemy import text

from ..config.database import parse
from ..models import credential, isolation, kept_answer, make_engine, metadata

FILE: Final = Path(__file__).with_name("catalogue.json")
TABLES: Final = (*isolation.OWNER_COLUMNS, *credential.SECRET_TABLES)
FUNCTIONS: Final = tuple(
    sorted(
        name.partition("(")[0]
        for name in (credential.REQUIRE_CURRENT, credential.ADMIT, kept_answer.SWEEP, *credential.GATES)
    )
)

# Only what lies in the search_path's first schema, where the migrations made it. `contype = 'n'` is left out
# because PostgreSQL 18 lists NOT NULL there and 15 does not; the column's line says it for both.
_QUERY = r"""
WITH ours AS (
    SELECT c.oid, c.relname, c.relkind, c.relpersistence, c.relrowsecurity, c.relforcerowsecurity
    FROM pg_class c
    JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = current_schema() AND c.relname = ANY($1::text[]) AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
)
SELECT 'table ' || ours.relname AS what,
       CASE relkind WHEN 'r' THEN 'table' WHEN 'p' THEN 'partitioned table' ELSE 'not a table' END
       || CASE relpersistence WHEN 'u' THEN ', unlogged' ELSE '' END
       || CASE WHEN relrowsecurity THEN ', row-level security' ELSE '' END
       || CASE WHEN relforcerowsecurity THEN ', forced on its owner' ELSE '' END AS definition
FROM ours
UNION ALL
SELECT 'column ' || ours.relname || '.' || a.attname,
       format_type(a.atttypid, a.atttypmod)
       || CASE WHEN a.attcollation <> t.typcollation THEN ' COLLATE ' || quote_ident(l.collname) ELSE '' END
       || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
       || CASE WHEN a.attidentity <> '' THEN ' IDENTITY' ELSE '' END
       || CASE WHEN d.adbin IS NULL THEN ''
               WHEN a.attgenerated <> '' THEN ' GENERATED (' || pg_get_expr(d.adbin, d.adrelid) || ')'
               ELSE ' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid) END
FROM ours
JOIN pg_attribute a ON a.attrelid = ours.oid AND a.attnum > 0 AND NOT a.attisdropped
JOIN pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_collation l ON l.oid = a.attcollation
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
UNION ALL
SELECT 'constraint ' || ours.relname || '.' || k.conname, pg_get_constraintdef(k.oid)
FROM ours
JOIN pg_constraint k ON k.conrelid = ours.oid AND k.contype IN ('p', 'u', 'c', 'f', 'x')
UNION ALL
SELECT 'index ' || ours.relname || '.' || i.relname,
       CASE WHEN x.indisunique THEN 'UNIQUE ' ELSE '' END
       || substring(pg_get_indexdef(x.indexrelid) FROM ' (USING .*)$')
       || CASE WHEN x.indisvalid AND x.indisready THEN '' ELSE ' INVALID' END
FROM ours
JOIN pg_index x ON x.indrelid = ours.oid
JOIN pg_class i ON i.oid = x.indexrelid
UNION ALL
SELECT 'trigger ' || ours.relname || '.' || g.tgname, pg_get_triggerdef(g.oid, true)
FROM ours
JOIN pg_trigger g ON g.tgrelid = ours.oid AND NOT g.tgisinternal
UNION ALL
-- A foreign key is kept by internal triggers, and ALTER TABLE ... DISABLE TRIGGER ALL switches it off silently.
SELECT DISTINCT 'triggers of ' || ours.relname, 'some are disabled'
FROM ours
JOIN pg_trigger g ON g.tgrelid = ours.oid AND g.tgenabled <> 'O'
UNION ALL
-- What our triggers run: the text, by whose rights, and with which settings.
SELECT DISTINCT 'function ' || ours.relname || '.' || p.proname,
       p.prosrc || CASE WHEN p.prosecdef THEN ' SECURITY DEFINER' ELSE '' END
       || coalesce(' SET ' || array_to_string(p.proconfig, ' SET '), '')
FROM ours
JOIN pg_trigger g ON g.tgrelid = ours.oid AND NOT g.tgisinternal
JOIN pg_proc p ON p.oid = g.tgfoid
UNION ALL
-- What the service calls; a function finds its tables by the schema it was made in.
SELECT 'function ' || p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')',
       pg_get_function_result(p.oid) || ' ' || p.provolatile::text || p.prosrc
       || CASE WHEN p.prosecdef THEN ' SECURITY DEFINER' ELSE '' END
       || coalesce(' SET ' || replace(array_to_string(p.proconfig, ' SET '),
                                      '=' || quote_ident(current_schema()) || ',', '=ours,'), '')
       || CASE WHEN p.proowner = (SELECT c.relowner FROM pg_class c JOIN ours USING (oid) WHERE ours.relname = 'users')
               THEN '' ELSE ' owned by somebody else' END
FROM pg_proc p
WHERE p.pronamespace = current_schema()::regnamespace AND p.proname = ANY($3::text[])
UNION ALL
SELECT 'execute on ' || p.proname || ' by ' || coalesce(r.rolname, 'everybody'), a.privilege_type
FROM pg_proc p
CROSS JOIN aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
LEFT JOIN pg_roles r ON r.oid = a.grantee
WHERE p.pronamespace = current_schema()::regnamespace AND a.grantee <> p.proowner
  AND (p.proname = ANY($3::text[]) OR p.oid IN (SELECT g.tgfoid FROM pg_trigger g JOIN ours ON ours.oid = g.tgrelid))
UNION ALL
SELECT 'policy ' || ours.relname || '.' || p.polname,
       CASE WHEN p.polpermissive THEN '' ELSE 'restrictive ' END
       || CASE p.polcmd WHEN '*' THEN 'all' ELSE p.polcmd::text END
       || CASE WHEN p.polroles = '{0}' THEN '' ELSE ' for some roles' END
       || coalesce(' USING ' || regexp_replace(pg_get_expr(p.polqual, p.polrelid), '\s+', ' ', 'g'), '')
       || coalesce(' WITH CHECK ' || regexp_replace(pg_get_expr(p.polwithcheck, p.polrelid), '\s+', ' ', 'g'), '')
FROM ours
JOIN pg_policy p ON p.polrelid = ours.oid
UNION ALL
-- A migrator that may not make roles leaves this one and its rights out.
SELECT 'role ' || rolname, CASE WHEN rolsuper OR rolbypassrls THEN 'not ' ELSE '' END || 'bound by policies'
FROM pg_roles
WHERE rolname = $2
UNION ALL
SELECT 'grant on ' || ours.relname || ' to ' || coalesce(r.rolname, 'everybody'),
       string_agg(DISTINCT a.privilege_type || a.part, ', ')
FROM ours
JOIN pg_class c ON c.oid = ours.oid
CROSS JOIN LATERAL (
    SELECT grantee, privilege_type, '' AS part FROM aclexplode(c.relacl)
    UNION ALL
    SELECT x.grantee, x.privilege_type, '(' || t.attname || ')'
    FROM pg_attribute t CROSS JOIN aclexplode(t.attacl) x WHERE t.attrelid = c.oid
) a
LEFT JOIN pg_roles r ON r.oid = a.grantee
WHERE a.grantee <> c.relowner
GROUP BY ours.relname, r.rolname
"""


async def declared(connect: Callable[[], Awaitable[asyncpg.Connection[Any]]]) -> dict[str, str]:
    """What `SQLModel.metadata` would make: made in a schema of its own, looked at, and rolled back."""
    engine = make_engine(connect)
    async with engine.connect() as connection:
        await connection.execute(text("CREATE SCHEMA groundwork_declared"))
        await connection.execute(text("SET LOCAL search_path = groundwork_declared"))
        await connection.run_sync(metadata.create_all, checkfirst=False)
        driver: Any = (await connection.get_raw_connection()).driver_connection
        found = await observed(driver)
        await connection.rollback()
    return found


async def observed(connection: asyncpg.Connection[Any]) -> dict[str, str]:
    """Name to definition of everything on our tables, in the first schema of the connection's search_path."""
    async with connection.transaction():
        # Otherwise it says "user_id" where the file says user_id, and a moment as the session would.
        await connection.execute(
            "SET LOCAL quote_all_identifiers = off; SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO'"
        )
        rows = await connection.fetch(_QUERY, list(TABLES), isolation.ROLE, list(FUNCTIONS))
    return {row["what"]: row["definition"] for row in rows}


def expected() -> dict[str, str]:
    """The same for the head revision, as frozen in the file."""
    found: dict[str, str] = json.loads(FILE.read_text(encoding="ascii"))
    return found


def render(catalogue: dict[str, str]) -> str:
    """The file's text: sorted, one line for each thing, control characters escaped."""
    return json.dumps(catalogue, indent=1, sort_keys=True) + "\n"


def compare(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """One sentence for each difference, in a stable order; empty when there is none.

    What lies on a table that is missing altogether is not listed one by one. Neither is the application's role
    where a migrator could not make it: the service works without, and `verify` says what to do.
    """
    if f"role {isolation.ROLE}" not in found:
        wanted = {what: text for what, text in wanted.items() if not what.endswith(isolation.ROLE)}
    missing_tables = {
        what.removeprefix("table ") for what in wanted.keys() - found.keys() if what[:6] == "table "
    }
    sentences = []
    for what in sorted(wanted.keys() | found.keys()):
        if what not in found:
            if what.startswith("table ") or _table_of(what) not in missing_tables:
                sentences.append(f"{what} is missing")
        elif what not in wanted:
            sentences.append(f"{what} is not declared: {found[what]!r}")
        elif found[what] != wanted[what]:
            sentences.append(f"{what} is {found[what]!r}, declared as {wanted[what]!r}")
    return sentences


def _table_of(what: str) -> str:
    """`tasks` of `column tasks.title` and of `grant on tasks to groundwork_app`.

    The functions that the service calls came with `credentials`.
    """
    if what.startswith("execute on ") or (what.startswith("function ") and "(" in what):
        return "credentials"
    words = what.split(" ")
    return words[2 if words[0] == "grant" else 1].split(".", 1)[0]


async def _main(url: str) -> None:
    settings = parse(url)
    sys.stdout.write(render(await declared(lambda: asyncpg.connect(**settings.asyncpg_arguments()))))


if __name__ == "__main__":
    asyncio.run(_main(os.environ["DATABASE_URL"]))
