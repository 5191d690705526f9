"""Checks of what is stored and how: durability, schema, users and tasks, rights, clock, the running service.

What is written is written through `Database.session()`, as the service does it, and rolled back.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from sqlalchemy import delete, func
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import col, select

from ..config.command_line import command
from ..errors import GroundworkError
from ..models import Task, User
from ..models.credential import GATES
from ..models.isolation import CREATE_ROLE, GRANTS, OWNER_COLUMNS, ROLE, grants
from ..services import schema
from ..services.database import Database
from ..services.faults import diagnose
from .check import Examination, Finding, failed, not_run, passed, warned
from .connection import is_local

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlmodel.ext.asyncio.session import AsyncSession

_CLOCK_WARNING_SECONDS = 2.0
_DURABLE = ("fsync", "synchronous_commit", "full_page_writes")


async def durability(examination: Examination) -> Finding:
    rows = await examination.ask(
        "SELECT name, setting, source FROM pg_settings WHERE name = ANY($1::text[]) ORDER BY name",
        list(_DURABLE),
    )
    figure = ", ".join(f"{row['name']} {row['setting']}" for row in rows)
    off = {row["name"]: row["source"] for row in rows if row["setting"] == "off"}
    if examination.connection.neon:
        # Neon's computes keep no data: its safekeepers acknowledge the WAL of a commit, whatever these two say.
        for name in ("fsync", "full_page_writes"):
            if off.pop(name, None):
                figure = figure.replace(f"{name} off", f"{name} by Neon's storage")
    if not off:
        return passed(figure)
    where = ", ".join(f"{name} (set by {source})" for name, source in off.items())
    statements = " ".join(f"ALTER SYSTEM SET {name} = on;" for name in off)
    remedy = f'psql -c "{statements} SELECT pg_reload_conf();"'
    if "synchronous_commit" in off and off["synchronous_commit"] in ("user", "database", "database user"):
        remedy = "ALTER ROLE ... RESET synchronous_commit; ALTER DATABASE ... RESET synchronous_commit;"
    elif "synchronous_commit" in off and off["synchronous_commit"] == "client":
        remedy = "Take synchronous_commit=off out of DATABASE_URL."
    return failed(figure, f"A crash can lose committed tasks: {where} is off.", remedy)


async def revision(examination: Examination) -> Finding:
    async with examination.wire.transaction(readonly=True):
        found = await schema.revision_of(examination.wire)
    expected = schema.head()
    if found == expected:
        return passed(f"{found} (current)")
    if found is None:
        return failed("no schema", "The tables were never made in this database.", command("migrate up"))
    if found in schema.known_revisions():
        return failed(
            f"{found}, behind {expected}", "The schema is older than the code.", command("migrate up")
        )
    return warned(
        f"{found}, unknown here",
        f"A newer version of Groundwork made this schema; this one knows {expected}.",
        "Run the version of the code that belongs to the schema.",
    )


async def tables(examination: Examination) -> Finding:
    async with examination.wire.transaction(readonly=True):
        await examination.be_brief()
        differences = await schema.differences(examination.wire)
    if differences:
        return failed(
            f"{len(differences)} difference(s)",
            "\n".join(differences),
            f"{command('migrate check')}   # then mend these by hand, or restore a backup: no migration does it",
        )
    names = [f"'{name}'::regclass" for name in OWNER_COLUMNS]
    ours = f"({', '.join(names)})"
    (count,) = await examination.ask(
        "SELECT count(*) AS tables, "  # noqa: S608 - constants
        f"(SELECT count(*) FROM pg_constraint WHERE conrelid IN {ours}) AS rules, "
        f"(SELECT count(*) FROM pg_index WHERE indrelid IN {ours}) AS indexes, "
        f"(SELECT count(*) FROM pg_policy WHERE polrelid IN {ours}) AS policies "
        f"FROM pg_class WHERE oid IN {ours}"
    )
    return passed(
        f"{count['tables']} tables, {count['rules']} constraints, {count['indexes']} indexes, "
        f"{count['policies']} policies, as declared"
    )


@asynccontextmanager
async def _undone(examination: Examination, owner: UUID) -> AsyncIterator[AsyncSession]:
    """A session of `owner` whose transaction is rolled back, however the block ends."""
    if not hasattr(examination, "database"):
        settings = examination.settings.model_copy(update={"database_pool_size": 1})
        database = Database.from_settings(settings, examination.connection)
        await database.__aenter__()

        async def close() -> None:
            await database.__aexit__(None, None, None)

        examination.closers.append(close)
        examination.database = database
    async with examination.database.session(owner=owner) as session:
        try:
            yield session
        finally:
            await session.rollback()


def _stranger() -> User:
    return User(email=f"verify-{uuid4().hex}@example.com")


async def crud(examination: Examination) -> Finding:
    """A user and a task are made, read, changed and deleted; nothing of it is kept."""
    begun = time.perf_counter()
    user = _stranger()
    async with _undone(examination, user.id) as session:
        task = Task(user_id=user.id, title="Verify ✓", description=None)
        session.add(user)
        await session.flush()
        session.add(task)
        await session.flush()
        key = (task.user_id, task.id)

        task.title, task.is_completed = "Verified", True
        await session.flush()
        session.expunge_all()
        stored = await session.get(Task, key)
        if stored is None or (stored.title, stored.is_completed, stored.version) != ("Verified", True, 2):
            return failed(
                "read something else",
                "A task read back differs from what was written.",
                command("migrate check"),
            )

        await session.delete(stored)
        await session.flush()
        session.expunge_all()
        owner = await session.get(User, key[0])
        if await session.get(Task, key) is not None or owner is None:
            return failed("delete failed", "A deleted task was still there.", command("migrate check"))
        email = owner.email
        await session.delete(owner)
        await session.flush()
    elapsed = 1000 * (time.perf_counter() - begun)
    async with examination.wire.transaction(readonly=True):
        await examination.wire.execute("SELECT set_config('app.user_id', $1::text, true)", str(key[0]))
        left = await examination.wire.fetch("SELECT 1 FROM users WHERE id = $1", key[0])
    if left:
        return failed(
            "not rolled back",
            "A row survived its rollback.",
            f"{command('user delete')} {email}",
        )
    return passed(
        f"a user and a task written, read, changed and deleted in {elapsed:.0f} ms, all rolled back"
    )


async def cascade(examination: Examination) -> Finding:
    user = _stranger()
    async with _undone(examination, user.id) as session:
        session.add(user)
        await session.flush()
        session.add_all([Task(user_id=user.id, title=f"Task {number}") for number in (1, 2)])
        await session.flush()
        await session.exec(delete(User).where(col(User.id) == user.id))
        left = (
            await session.exec(select(func.count()).select_from(Task).where(Task.user_id == user.id))
        ).one()
    if left:
        return failed("tasks stay behind", "Deleting a user leaves tasks behind.", command("migrate check"))
    return passed("a deleted user's tasks go along")


async def uniqueness(examination: Examination) -> Finding:
    user = _stranger()
    async with _undone(examination, user.id) as session:
        session.add(user)
        await session.flush()
        try:
            async with session.begin_nested():
                other = User(email=user.email)
                await session.exec(select(func.set_config("app.user_id", str(other.id), True)))
                session.add(other)
                await session.flush()
        except (SQLAlchemyError, GroundworkError) as error:
            refusal = diagnose(error)
            if refusal.reason == "unique-violation" or getattr(error, "constraint", None):
                return passed(f"a second user of one e-mail is refused ({refusal.constraint or 'unique'})")
            raise
    return failed("not kept", "Two users can have one e-mail address.", command("migrate check"))


async def rights(examination: Examination) -> Finding:
    """Whether the role may do what the service does, and whether it may do much more."""
    (role,) = await examination.ask(
        "SELECT rolname::text AS name, rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolreplication "
        "FROM pg_roles WHERE rolname = current_user"
    )
    wanted = [(table, right) for table, rights in GRANTS.items() for right in rights.split(", ")]
    lacking = await examination.ask(
        "SELECT t.name || ' (' || string_agg(t.right, ', ') || ')' AS text "
        'FROM unnest($1::text[], $2::text[]) AS t(name, "right") '
        "WHERE to_regclass(t.name) IS NOT NULL AND NOT has_table_privilege(t.name, t.right) GROUP BY t.name",
        [table for table, _ in wanted],
        [right for _, right in wanted],
    )
    lacking += await examination.ask(
        "SELECT f.name AS text FROM unnest($1::text[]) AS f(name) "
        "WHERE to_regprocedure(f.name) IS NOT NULL AND NOT has_function_privilege(f.name, 'EXECUTE')",
        list(GATES),
    )
    name = f'role "{role["name"]}"'
    if lacking:
        first = (
            "" if await examination.ask("SELECT 1 FROM pg_roles WHERE rolname = $1", ROLE) else _role_itself()
        )
        return failed(
            f"{name} lacks rights",
            f"It may not do all that the service does: {'; '.join(row['text'] for row in lacking)}.",
            f'{first}GRANT {ROLE} TO "{role["name"]}";   -- as the owner of the tables',
        )
    powers = {
        "rolsuper": "superuser",
        "rolbypassrls": "passes by row-level security",
        "rolcreaterole": "makes roles",
        "rolcreatedb": "makes databases",
        "rolreplication": "replicates",
    }
    held = ["superuser"] if role["rolsuper"] else [text for right, text in powers.items() if role[right]]
    if not held:
        return passed(f"{name} has what it needs and no more")
    figure = f"{name}: {', '.join(held)}"
    if is_local(examination.connection) and examination.settings.environment != "production":
        return passed(f"{figure} (fine on one's own machine)")
    return warned(
        figure,
        "The service needs none of these; whoever takes it over has them too.",
        f"CREATE ROLE app LOGIN PASSWORD '<a long one>' IN ROLE {ROLE};   -- more at `isolation`",
    )


def _role_itself() -> str:
    """What makes the application's role where no migrator was allowed to."""
    return "".join(f"{statement}; " for statement in (CREATE_ROLE, *grants()))


async def clock(examination: Examination) -> Finding:
    async with examination.wire.transaction(readonly=True):
        before = time.time()
        theirs = await examination.wire.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
        after = time.time()
    # The answer was made at some moment in between.
    difference = theirs - (before + after) / 2
    uncertainty = (after - before) / 2
    figure = f"{1000 * difference:+.0f} ms from ours (give or take {1000 * uncertainty:.0f})"
    if abs(difference) - uncertainty > _CLOCK_WARNING_SECONDS:
        return warned(
            figure, "Timestamps and the expiry of tokens disagree.", "timedatectl status   # on both machines"
        )
    return passed(figure)


async def service(examination: Examination) -> Finding:
    host, port = examination.settings.host, examination.settings.port
    # What listens on every address is asked at the loopback.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104
    place = f"http://{f'[{host}]' if ':' in host else host}:{port}/health"
    try:
        status, body = await _get_health(host, port)
    except OSError:
        return not_run(f"nothing answers at {place}")
    try:
        document = json.loads(body)
        verdict = str(document["status"])
    except (ValueError, KeyError, TypeError):
        return warned(
            f"{place} answers {status}",
            "Something else than Groundwork listens there.",
            "Set HOST and PORT to where the service runs.",
        )
    if status == 200 and verdict == "pass":
        return passed(f"{place} says pass")
    if status == 200 and verdict == "warn":
        return warned(f"{place} says warn", _complaints(document), f"curl -s {place}")
    return failed(f"{place} says {verdict} ({status})", _complaints(document), f"curl -s {place}")


async def _get_health(host: str, port: int) -> tuple[int, bytes]:
    """The status and body of one GET, read to the end of the connection or a megabyte."""
    async with asyncio.timeout(3):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            name = f"[{host}]" if ":" in host else host
            request = f"GET /health HTTP/1.0\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n"
            writer.write(request.encode("ascii", "replace"))
            answer = bytearray()
            while len(answer) < 1_000_000 and (chunk := await reader.read(65536)):
                answer += chunk
        finally:
            writer.close()
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    status = int(words[1]) if head.startswith(b"HTTP/") and len(words) > 1 and words[1].isdigit() else 0
    return status, body


def _complaints(document: dict[str, Any]) -> str:
    """The checks of a health document that do not pass, each with what it says."""
    said = []
    checks = document.get("checks")
    for name, entries in (checks if isinstance(checks, dict) else {}).items():
        for entry in entries if isinstance(entries, list) else [entries]:
            if isinstance(entry, dict) and entry.get("status") not in (None, "pass"):
                said.append(f"{name}: {entry.get('output') or entry.get('status')}")
    return "; ".join(said) or "It does not say why."
