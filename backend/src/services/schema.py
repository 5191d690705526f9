"""The schema's life: create the tables, move between revisions, and say what differs from the declaration.

`create_tables` is what start-up, `migrate up` and the tests call. Two migrators at once are safe: one runs, the
other waits and finds the work done. A run that fails half-way leaves nothing behind.
"""

from __future__ import annotations

import ast
import asyncio
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import asyncpg
from sqlalchemy.exc import SQLAlchemyError

from .. import migrations
from ..config.database import ConnectionSettings
from ..errors import DatabaseRefused, GroundworkError, RequestError, Unavailable
from ..migrations import catalogue
from ..models import make_engine, metadata
from ..models.isolation import OWNER_COLUMNS
from . import faults, hosts

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

_DIRECTORY = Path(migrations.__file__).parent
_IDENTIFIER = re.compile(r"^(revision|down_revision)(?::[^=]+)? = (.+)$", re.MULTILINE)
_CONNECT_SECONDS = 60.0

_SCHEMA_OF_ITS_OWN = (
    "Use an empty database, or a schema of its own: add ?options=-c%20search_path%3Dgroundwork to the URL "
    "after CREATE SCHEMA groundwork."
)

# Alembic keeps the run under way in module globals (`alembic.context`, `alembic.op`), so one loop runs one at
# a time, whatever the database.
_gates: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class SchemaChange:
    """What a run did: the revision before and after (None: no tables), and the revisions it went through."""

    before: str | None
    after: str | None
    steps: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        return bool(self.steps)


def head() -> str:
    """The revision this code was written for."""
    return known_revisions()[-1]


@cache
def known_revisions() -> tuple[str, ...]:
    """Every revision this code knows, the first one first.

    Read from the files' own words: alembic would be a twentieth of every start, and nearly none has to migrate.
    """
    after: dict[str | None, str] = {}
    for file in (_DIRECTORY / "versions").glob("*.py"):
        words = dict(_IDENTIFIER.findall(file.read_text(encoding="utf-8")))
        after[ast.literal_eval(words["down_revision"])] = ast.literal_eval(words["revision"])
    found: list[str] = []
    while following := after.get(found[-1] if found else None):
        found.append(following)
    return tuple(found)


async def revision_of(connection: asyncpg.Connection[Any]) -> str | None:
    """The revision of the tables in the search_path's first schema; None where there are none."""
    # Not to_regclass(), whose answer inside a transaction may come from a cache older than another's commit.
    table = await connection.fetchval(
        "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = current_schema() AND c.relname = 'alembic_version' AND c.relkind = 'r'"
    )
    if table is None:
        return None
    # The name comes quoted from the server itself.
    revision: str | None = await connection.fetchval(f"SELECT version_num::text FROM {table}")  # noqa: S608
    return revision


async def is_foreign(connection: asyncpg.Connection[Any], revision: str | None) -> bool:
    """Whether `alembic_version` with this revision belongs to another program: the tables are not there.

    Every schema from the first migration on has `users` and `tasks`, and the code's own and newer ones have all.
    """
    if revision is None:
        return False
    older = revision in known_revisions()[:-1]
    expected = ("users", "tasks") if older else tuple(OWNER_COLUMNS)
    tables: int = await connection.fetchval(
        "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = current_schema() AND c.relname = ANY($1::text[]) AND c.relkind IN ('r', 'p')",
        expected,
    )
    return tables < len(expected)


async def create_tables(
    connection: ConnectionSettings,
    *,
    on_wait: Callable[[], object] | None = None,
    lock_timeout_seconds: float = 5.0,
    wait_seconds: float = 120.0,
) -> SchemaChange:
    """Upgrade to head. A schema that this code does not know, because it is newer, is left alone.

    `on_wait` is called once if another migrator is at work; after `wait_seconds` of waiting for it, or
    `lock_timeout_seconds` of waiting for a table that others use, this raises `Unavailable` and nothing has
    changed. `DatabaseRefused` when the server turns us away for good.
    """
    return await _migrate(
        connection,
        head(),
        on_wait=on_wait,
        lock_timeout_seconds=lock_timeout_seconds,
        wait_seconds=wait_seconds,
    )


async def downgrade(
    connection: ConnectionSettings,
    revision: str,
    *,
    on_wait: Callable[[], object] | None = None,
    lock_timeout_seconds: float = 5.0,
    wait_seconds: float = 120.0,
) -> SchemaChange:
    """Go back to `revision` (`base` removes the tables **and their rows**). Raises as `create_tables` does."""
    return await _migrate(
        connection,
        revision,
        back=True,
        on_wait=on_wait,
        lock_timeout_seconds=lock_timeout_seconds,
        wait_seconds=wait_seconds,
    )


async def differences(connection: ConnectionSettings | asyncpg.Connection[Any]) -> list[str]:
    """One sentence for each way in which the tables differ from what the models declare; `[]` when in none.

    Reads the catalogue only: nothing is written, and no right beyond connecting is needed.
    """
    async with _family():
        if isinstance(connection, ConnectionSettings):
            async with _connected(connection) as opened:
                found = await catalogue.observed(opened)
        else:
            found = await catalogue.observed(connection)
    return catalogue.compare(found, catalogue.expected())


async def _migrate(
    settings: ConnectionSettings,
    target: str,
    *,
    back: bool = False,
    on_wait: Callable[[], object] | None,
    lock_timeout_seconds: float,
    wait_seconds: float,
) -> SchemaChange:
    async with _family(), _connected(settings) as keeper:
        # Nearly every start finds its work done: then one connection and two small reads are all it takes.
        found = await revision_of(keeper)
        if await is_foreign(keeper, found):
            raise DatabaseRefused(
                "schema-occupied",
                f"The migrations of another program made this schema: its alembic_version holds {found!r},"
                " and the tables of Groundwork are not there.",
                _SCHEMA_OF_ITS_OWN,
            )
        if (settled := _settled(found, target, back)) is not None:
            return settled
        schema = await keeper.fetchval("SELECT current_schema()")
        if schema is None:
            raise Unavailable("schema-missing", "The search_path names no schema that exists.")
        async with _gate(), _exclusive(keeper, on_wait, wait_seconds):
            before = await revision_of(keeper)
            if (settled := _settled(before, target, back)) is not None:
                return settled
            # The driver leaves the portal of its last statement open, and a snapshot with it, for which a
            # CREATE INDEX CONCURRENTLY in the migration would wait for ever. A simple query replaces it.
            await keeper.execute("SELECT 1")
            steps = await _run(settings, target, back, schema, int(lock_timeout_seconds * 1000))
            return SchemaChange(before, await revision_of(keeper), steps)


def _settled(found: str | None, target: str, back: bool) -> SchemaChange | None:
    """The answer when there is nothing to do."""
    unknown = found is not None and found not in known_revisions()
    if found == target or (back and found is None) or (unknown and not back):
        return SchemaChange(found, found)
    return None


async def _run(
    settings: ConnectionSettings, target: str, back: bool, schema: str, lock_timeout_milliseconds: int
) -> tuple[str, ...]:
    """Run alembic on a connection of its own; the revisions gone through, in their order."""
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    steps: list[str] = []
    script = ScriptDirectory(str(_DIRECTORY))

    def plan(revision: Any, _context: Any) -> Any:
        chosen = script._downgrade_revs(target, revision) if back else script._upgrade_revs(target, revision)
        steps.extend(step.revision.revision for step in chosen)
        return chosen

    def run(connection: Connection) -> None:
        config = Config()
        config.attributes.update(
            connection=connection,
            metadata=metadata,
            schema=schema,
            lock_timeout_milliseconds=lock_timeout_milliseconds,
        )
        with EnvironmentContext(config, script, fn=plan, destination_rev=target):
            script.run_env()

    engine = make_engine(lambda: _connect(settings))
    try:
        async with engine.connect() as connection:
            await connection.run_sync(run)
    finally:
        await engine.dispose()
    return tuple(steps)


@asynccontextmanager
async def _exclusive(
    keeper: asyncpg.Connection[Any], on_wait: Callable[[], object] | None, wait_seconds: float
) -> AsyncIterator[None]:
    """Hold the migrators' lock for this database and schema.

    The lock belongs to a transaction, because a session's would stick to a pooled connection for ever, and to a
    connection that does nothing else: a migrator blocked inside pg_advisory_lock() holds a snapshot, for which
    CREATE INDEX CONCURRENTLY of the one at work would wait. Hence polling.
    """
    deadline = asyncio.get_running_loop().time() + wait_seconds
    told = False
    while True:
        transaction = keeper.transaction()
        await transaction.start()
        try:
            # It idles in this transaction as long as the migration takes: no time-out may end it.
            await keeper.execute(
                "SELECT set_config(name, '0', true) FROM pg_settings"
                " WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout')"
            )
            if await keeper.fetchval(
                "SELECT pg_try_advisory_xact_lock(hashtextextended('groundwork.schema.' || current_schema(), 0))"
            ):
                yield
                return
        finally:
            await transaction.rollback()
        if asyncio.get_running_loop().time() > deadline:
            raise Unavailable(
                "migration-under-way", "Another process has been changing the schema for too long."
            )
        if not told and on_wait is not None:
            on_wait()
        told = True
        await asyncio.sleep(random.uniform(0.05, 0.2))  # noqa: S311


def _gate() -> asyncio.Lock:
    return _gates.setdefault(asyncio.get_running_loop(), asyncio.Lock())


async def _connect(settings: ConnectionSettings) -> asyncpg.Connection[Any]:
    # Nothing here runs often, and without named statements it is right behind any pooler, should that be all
    # there is.
    connection, _ = await hosts.connect(settings, _CONNECT_SECONDS, statement_cache_size=0)
    return connection


@asynccontextmanager
async def _connected(settings: ConnectionSettings) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await _connect(settings)
    try:
        yield connection
    finally:
        await connection.close(timeout=5)


@asynccontextmanager
async def _family() -> AsyncIterator[None]:
    """What the driver and the network raise, in our family."""
    try:
        yield
    except GroundworkError:
        raise
    except (
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
        OSError,
        SQLAlchemyError,
    ) as error:
        if isinstance(faults.unwrap(error), asyncpg.DuplicateTableError):
            raise DatabaseRefused(
                "schema-occupied",
                "The database holds a table named like one of ours that our migrations did not make.",
                _SCHEMA_OF_ITS_OWN,
            ) from error
        diagnosis = faults.diagnose(error)
        if diagnosis.fatal:
            raise faults.as_refusal(diagnosis) from error
        failure: RequestError = faults.as_request_error(diagnosis, sent=True, writing=True)
        raise failure from error
