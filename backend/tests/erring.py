"""The service with defects built in, and a program that shows everything of it: for the search for secrets.

`python erring.py supervise` serves it; the supervisor starts `python erring.py work`. `python erring.py show`
prints reprs. Run in a copy of backend/, whose `src` is taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import gc
import logging
import os
import sys
import traceback
import warnings
from typing import Any

sys.path.insert(0, os.getcwd())

import asyncpg
from fastapi import FastAPI
from sqlalchemy import text

from src.api.deps import DatabaseDep, SessionDep, SettingsDep
from src.config.logging import configure, get_logger
from src.config.settings import Settings, load_settings, migration_connection, require_database
from src.main import create_app
from src.models import make_engine
from src.server import supervisor, worker
from src.services.database import Database

BUGS = ("session", "statement", "gone", "reprs", "address", "cut", "task", "log", "warning", "cause", "group")

log = get_logger("erring")


def make_app(settings: Settings) -> FastAPI:
    app = create_app(settings)
    assert settings.database_url is not None
    address = settings.database_url.get_secret_value()
    tasks: set[asyncio.Task[None]] = set()

    @app.get("/bug/session")
    async def session(session: SessionDep) -> None:
        await session.exec(text("SELECT 1"))
        raise RuntimeError("a bug, while a session is open")

    @app.get("/bug/statement")
    async def statement(session: SessionDep) -> None:
        await session.exec(text("SELECT there_is_no_such_column"))

    @app.get("/bug/gone")
    async def gone(session: SessionDep) -> None:
        await session.exec(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    @app.get("/bug/reprs")
    async def reprs(database: DatabaseDep, settings: SettingsDep) -> None:
        async with database.session() as session:
            raise ValueError(
                f"{database!r} {settings!r} {require_database(settings)!r} {session!r} {session.bind!r}"
            )

    @app.get("/bug/address")
    async def write_address() -> None:
        raise OSError(f"cannot reach {address}")

    @app.get("/bug/cut")
    async def cut_address() -> None:
        # A message that is cut within the password no longer looks like an address.
        raise OSError("x" * (300 - address.index("@") + 8) + address)

    @app.get("/bug/task")
    async def forgotten() -> None:
        async def fail() -> None:
            raise OSError(f"cannot reach {address}")

        tasks.add(task := asyncio.create_task(fail()))
        await asyncio.sleep(0)
        tasks.discard(task)

    @app.get("/bug/log")
    async def write_log(database: DatabaseDep, settings: SettingsDep) -> None:
        connection = require_database(settings)
        log.error(
            "bug", settings=settings, connection=connection, database=database, dsn=address, url=address
        )
        logging.getLogger("a.library").error("cannot reach %s with %r", address, settings)
        logging.getLogger("asyncio").debug("connecting to %s", address)

    @app.get("/bug/warning")
    async def warn(settings: SettingsDep) -> None:
        warnings.warn(f"{settings!r} {address}", stacklevel=1)

    @app.get("/bug/cause")
    async def cause(settings: SettingsDep) -> None:
        try:
            arguments = require_database(settings).asyncpg_arguments()
            await asyncpg.connect(**{**arguments, "database": "there_is_no_such_database"})
        except asyncpg.PostgresError as error:
            raise LookupError("a bug on the way") from error

    @app.get("/bug/group")
    async def group(settings: SettingsDep) -> None:
        raise ExceptionGroup("several", [ValueError(repr(settings)), OSError(f"cannot reach {address}")])

    return app


async def show() -> None:
    """Everything of ours that lives while a database is open, as text; and the errors of one that is not to be had."""
    settings = load_settings()
    # As every entry does: asyncio's debug mode logs the arguments of slow calls, the driver's among them.
    configure(settings.log_level, settings.log_format)
    connection = require_database(settings)
    shown: list[Any] = [
        settings,
        connection,
        migration_connection(settings),
        connection.direct(),
        connection.redacted(),
    ]
    shown += [connection.with_database("other"), copy.copy(settings), copy.copy(connection), connection.tls]
    shown += [settings.model_dump(), settings.model_dump_json(), dict(settings), vars(settings)]
    shown += [{field.name: getattr(connection, field.name) for field in dataclasses.fields(connection)}]
    engine = make_engine(lambda: asyncpg.connect(**connection.asyncpg_arguments()))
    shown += [engine, engine.url, engine.pool, engine.sync_engine, settings.model_json_schema()]
    database = Database.from_settings(settings, connection)
    shown.append(database)
    with contextlib.suppress(Exception):
        async with database, database.session() as session, engine.connect() as wire:
            shown += [
                database,
                session,
                session.bind,
                wire,
                await wire.get_raw_connection(),
                database.observe(),
            ]
            shown += [vars(database), *gc.get_objects()]
            _show(shown)
    _show(shown)
    for wrong in (
        {"database": "there_is_no_such_database"},
        {"port": 1},
        {"password": "other", "user": "nobody"},
    ):
        try:
            await asyncpg.connect(**{**connection.asyncpg_arguments(), **wrong})
        except (asyncpg.PostgresError, OSError):
            traceback.print_exc()
    await engine.dispose()


def _show(shown: list[Any]) -> None:
    for index, thing in enumerate(shown):
        kind = str(type(thing).__module__).partition(".")[0]
        # Of all that lives only what is ours; libraries' own objects as far as they are named above.
        if index < 40 or kind == "src":
            print(f"{type(thing).__name__}: {thing!r} {thing!s}")


def main() -> int:
    if sys.argv[1] == "work":
        return worker.main(make_app)
    if sys.argv[1] == "show":
        asyncio.run(show())
        return 0
    settings = load_settings(port=0)
    command = (sys.executable, __file__, "work")
    return supervisor.run(
        settings, embedded=False, reload=False, workers=settings.workers, worker_command=command
    )


if __name__ == "__main__":
    raise SystemExit(main())
