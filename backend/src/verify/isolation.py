"""The check of the second wall: flags, policies, the role in use, and a foreign row that is really tried for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import asyncpg

from ..config.command_line import command
from ..services import isolation, schema
from .check import Examination, Finding, failed, passed, warned

if TYPE_CHECKING:
    from ..services.isolation import Standing

_USER = "read the user"
_ACT_AS = "SELECT set_config('app.user_id', $1::text, true)"


async def isolated(examination: Examination) -> Finding:
    """Nothing of what it tries is kept."""
    wire = examination.wire
    async with wire.transaction(readonly=True):
        await examination.be_brief()
        found = await isolation.standing(wire)
        told = [line for line in await schema.differences(wire) if line.startswith(("table ", "policy "))]
    if told:
        tables = {line.split(" ")[1].split(".")[0] for line in told}
        return failed(
            f"{len(told)} difference(s)",
            "\n".join(told),
            "\n".join(f"{statement};" for statement in isolation.mending(tables)) or command("migrate check"),
        )
    if found.unbound is not None:
        return _weak(
            found, "No policy binds it: one statement that forgets its owner would show everybody's tasks."
        )
    reached = await _try_for_a_foreign_row(examination)
    if found.owns:
        # Operators look for users by their e-mail, so its owner is not bound on that table.
        reached = [verb for verb in reached if verb != _USER]
    if reached:
        return failed(
            f'role "{found.name}" reached a foreign task: {", ".join(reached)}',
            "Row-level security is on and yet does not keep users apart for this role.",
            "psql -c '\\drds' -c '\\dp'   # settings of the role, and policies that were added",
        )
    if found.owns:
        return _weak(found, "A foreign task is not reached, but whoever takes this role over can lift that.")
    return passed(f'role "{found.name}": a foreign task is not seen, changed, deleted or added')


def _weak(found: Standing, cause: str) -> Finding:
    return warned(
        f'role "{found.name}" is {"not bound: " if found.unbound else ""}{found.weakness}',
        cause,
        "As the owner of the tables:\n"
        + "\n".join(f"{statement};" for statement in isolation.making_the_role(found))
        + "\nThen put that role into DATABASE_URL, and the present one into DATABASE_MIGRATION_URL.",
    )


async def _try_for_a_foreign_row(examination: Examination) -> list[str]:
    """What succeeded of all that one user may not do to another's task."""
    wire = examination.wire
    theirs, mine = uuid4(), uuid4()
    attempt = wire.transaction()
    await attempt.start()
    try:
        await examination.be_brief()
        await wire.execute(_ACT_AS, str(theirs))
        await wire.execute(
            "INSERT INTO users (id, email) VALUES ($1, $2)", theirs, f"verify-{theirs.hex}@example.com"
        )
        await wire.execute("INSERT INTO tasks (user_id, title) VALUES ($1, 'Theirs')", theirs)
        if await wire.fetchval("SELECT count(*) FROM tasks WHERE user_id = $1", theirs) != 1:
            return ["its own task was not there"]
        await wire.execute(_ACT_AS, str(mine))
        reached = []
        for verb, statement in (
            ("read", "SELECT FROM tasks WHERE user_id = $1"),
            (_USER, "SELECT FROM users WHERE id = $1"),
            ("changed", "UPDATE tasks SET title = 'Mine' WHERE user_id = $1"),
            ("deleted", "DELETE FROM tasks WHERE user_id = $1"),
        ):
            if not (await wire.execute(statement, theirs)).endswith(" 0"):
                reached.append(verb)
        if await _can_add(wire, theirs):
            reached.append("added")
        return reached
    finally:
        await attempt.rollback()


async def _can_add(wire: asyncpg.Connection[Any], theirs: UUID) -> bool:
    try:
        async with wire.transaction():
            await wire.execute("INSERT INTO tasks (user_id, title) VALUES ($1, 'Mine')", theirs)
    except asyncpg.InsufficientPrivilegeError:
        return False
    return True
