"""Check of row-level security: flags, policies, the role in use, and attempts on another user's rows."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import asyncpg

from ..config.command_line import command
from ..models.isolation import OWNER_COLUMNS
from ..services import isolation, schema
from .check import CheckContext, CheckResult, failed, passed, statements_as, warned
from .privileges import service_role_remedy
from .roles import quoted, roles

_READ_USER = "read the user"
_ACT_AS = "SELECT set_config('app.user_id', $1::text, true)"


async def isolated(context: CheckContext) -> CheckResult:
    """Every attempt is rolled back."""
    connection = context.connection
    async with connection.transaction(readonly=True):
        await context.limit_lock_wait()
        found = await isolation.standing(connection)
        differences = [
            line for line in await schema.differences(connection) if line.startswith(("table ", "policy "))
        ]
    if differences:
        tables = {line.split(" ")[1].split(".")[0] for line in differences}
        return failed(
            f"{len(differences)} difference(s)", "\n".join(differences), await _restore(context, tables)
        )
    summary = f'role "{found.name}" is {"not bound: " if found.unbound else ""}{found.weakness}'
    if found.unbound is not None:
        return warned(
            summary,
            "No policy binds it: a statement without the owner's filter would return every user's tasks.",
            await service_role_remedy(context),
        )
    reached = await _attempts_that_succeed(context)
    if found.owns:
        # Operators find users by e-mail, so the owner of that table is not bound by its policy.
        reached = [attempt for attempt in reached if attempt != _READ_USER]
    if reached:
        return failed(
            f'role "{found.name}" reached another user\'s task: {", ".join(reached)}',
            "Row-level security is on and does not separate users for this role.",
            command("psql -c '\\drds' -c '\\dp'") + "   # settings of the role, and additional policies",
        )
    if found.owns:
        return warned(
            summary,
            "Other users' tasks are not reached, but the owner of a table can switch its policies off.",
            await service_role_remedy(context),
        )
    return passed(f'role "{found.name}" cannot read, change, delete or add another user\'s task')


async def _restore(context: CheckContext, tables: set[str]) -> str:
    """Statements that drop every policy of these tables and create the declared ones."""
    rows = await context.fetch(
        "SELECT tablename::text AS name, policyname::text AS policy FROM pg_policies"
        " WHERE schemaname = current_schema() AND tablename = ANY($1::text[]) AND policyname <> 'own_rows'",
        sorted(tables & OWNER_COLUMNS.keys()),
    )
    statements = [f"DROP POLICY {quoted(row['policy'])} ON {row['name']}" for row in rows]
    statements += isolation.mending(tables)
    if not statements:
        return command("migrate check")
    return statements_as((await roles(context)).table_owner, *statements)


async def _attempts_that_succeed(context: CheckContext) -> list[str]:
    """Which of the things that one user may not do to another user's task succeed."""
    connection = context.connection
    owner, other = uuid4(), uuid4()
    transaction = connection.transaction()
    await transaction.start()
    try:
        await context.limit_lock_wait()
        await connection.execute(_ACT_AS, str(owner))
        await connection.execute(
            "INSERT INTO users (id, email) VALUES ($1, $2)", owner, f"verify-{owner.hex}@example.com"
        )
        await connection.execute("INSERT INTO tasks (user_id, title) VALUES ($1, 'A task')", owner)
        if await connection.fetchval("SELECT count(*) FROM tasks WHERE user_id = $1", owner) != 1:
            return ["the owner's task was missing"]
        await connection.execute(_ACT_AS, str(other))
        succeeded = []
        for attempt, statement in (
            ("read", "SELECT FROM tasks WHERE user_id = $1"),
            (_READ_USER, "SELECT FROM users WHERE id = $1"),
            ("changed", "UPDATE tasks SET title = 'Changed' WHERE user_id = $1"),
            ("deleted", "DELETE FROM tasks WHERE user_id = $1"),
        ):
            if not (await connection.execute(statement, owner)).endswith(" 0"):
                succeeded.append(attempt)
        if await _can_add(connection, owner):
            succeeded.append("added")
        return succeeded
    finally:
        await transaction.rollback()


async def _can_add(connection: asyncpg.Connection[Any], owner: UUID) -> bool:
    try:
        async with connection.transaction():
            await connection.execute("INSERT INTO tasks (user_id, title) VALUES ($1, 'Added')", owner)
    except asyncpg.InsufficientPrivilegeError:
        return False
    return True
