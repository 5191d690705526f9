"""The three ways by which Groundwork reaches a database: pool, session and migration."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from sqlalchemy import func, select, text

from src.config.database import ConnectionSettings
from src.services import schema
from src.services.connections import Limits
from src.services.database import Database
from src.services.statements import Statement

PATIENT = Limits(connect_timeout_seconds=60, command_timeout_seconds=60, recovery_wait_seconds=0)
# A refusal that might pass is tried again until this is over.
HASTY = Limits(connect_timeout_seconds=1, recovery_wait_seconds=0)

whoami = Statement("whoami", lambda: select(func.current_user()), repeatable=True)


async def by_pool(settings: ConnectionSettings, limits: Limits = PATIENT) -> str:
    async with Database(settings, limits) as database:
        return str(await database.value(whoami))


async def by_session(settings: ConnectionSettings, limits: Limits = PATIENT) -> str:
    async with Database(settings, limits) as database, database.session() as session:
        return str(await session.scalar(text("SELECT current_user")))


async def by_migration(settings: ConnectionSettings, _limits: Limits = PATIENT) -> str:
    # Down first: where there is nothing to do, Alembic is never reached.
    await schema.downgrade(settings, "base")
    change = await schema.create_tables(settings)
    assert change.changed
    assert change.after == schema.head()
    return settings.user


Way = Callable[..., Awaitable[str]]
WAYS: tuple[Way, ...] = (by_pool, by_session, by_migration)
