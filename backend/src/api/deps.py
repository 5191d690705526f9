"""The words that endpoints are written in.

`SessionDep` commits before the response is sent: its scope is the endpoint function. With FastAPI's default
scope the commit would follow the response, and a commit that fails would have been answered 201.
"""

# FastAPI reads these annotations when the application is built, so they stay real types here.

from collections.abc import AsyncIterator
from typing import Annotated, cast

from fastapi import Depends, Request
from sqlmodel.ext.asyncio.session import AsyncSession

from ..config.settings import Settings
from ..errors import Unavailable
from ..services.database import Database
from ..services.metrics import Metrics


async def _database(request: Request) -> Database:
    database = cast(Database | None, request.app.state.database)
    if database is None:
        raise Unavailable("starting", "The service is starting.")
    return database


DatabaseDep = Annotated[Database, Depends(_database)]


async def _session(database: DatabaseDep) -> AsyncIterator[AsyncSession]:
    async with database.session() as session:
        yield session


SessionDep = Annotated[AsyncSession, Depends(_session, scope="function")]


async def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


SettingsDep = Annotated[Settings, Depends(_settings)]


async def _metrics(request: Request) -> Metrics:
    return cast(Metrics, request.app.state.metrics)


MetricsDep = Annotated[Metrics, Depends(_metrics)]


async def _draining(request: Request) -> bool:
    return bool(request.app.state.draining)


# True once the process has been told to stop: it still answers, but wants no new work.
DrainingDep = Annotated[bool, Depends(_draining)]


async def _accept(request: Request) -> str:
    return request.headers.get("accept", "")


AcceptDep = Annotated[str, Depends(_accept)]
