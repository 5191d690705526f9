"""The words that endpoints are written in.

`SessionDep` commits before the response is sent: its scope is the endpoint function. With FastAPI's default
scope the commit would follow the response, and a commit that fails would have been answered 201.
"""

# FastAPI reads these annotations when the application is built, so they stay real types here.

from collections.abc import AsyncIterator
from typing import Annotated, BinaryIO, cast

from fastapi import Depends, Request
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from sqlmodel.ext.asyncio.session import AsyncSession

from ..config.settings import Settings
from ..errors import Unauthenticated, Unavailable
from ..models import TaskBatch, TaskCreate, TaskPut, TaskUpdate
from ..models.account import AccountChange, LogIn, Refresh, SignUp
from ..services.accounts import Accounts
from ..services.database import Database
from ..services.identity import Identity, Principal
from ..services.metrics import Metrics
from . import examples
from .bodies import Strict
from .conditions import EXCHANGE, Condition, IdempotencyHeader, IfMatch, IfNoneMatch, Repeat, Tags
from .headers import sent_as
from .middleware import USER_ID
from .pages import Asked, Asking, Listing
from .transfers import Spooled


async def _database(request: Request) -> Database:
    database: Database | None = request.scope["app"].state.database
    if database is None:
        raise Unavailable("starting", "The service is starting.")
    return database


DatabaseDep = Annotated[Database, Depends(_database)]


async def _session(database: DatabaseDep) -> AsyncIterator[AsyncSession]:
    async with database.session() as session:
        yield session


SessionDep = Annotated[AsyncSession, Depends(_session, scope="function")]


async def _identity(request: Request) -> Identity:
    identity = cast(Identity | None, request.app.state.identity)
    if identity is None:
        raise Unavailable("starting", "The service is starting.")
    return identity


IdentityDep = Annotated[Identity, Depends(_identity)]


async def _accounts(request: Request) -> Accounts:
    accounts = cast(Accounts | None, request.app.state.accounts)
    if accounts is None:
        raise Unavailable("starting", "The service is starting.")
    return accounts


AccountsDep = Annotated[Accounts, Depends(_accounts)]


async def _client(request: Request) -> str | None:
    # None: a Unix socket, or a proxy that is trusted and says nothing.
    return request.client.host if request.client is not None else None


# The address that a request came from, by which guessing is bounded: see TRUSTED_PROXIES.
ClientDep = Annotated[str | None, Depends(_client)]


class _Bearer(SecurityBase):
    """Tells OpenAPI of the scheme and finds the principal in one step: FastAPI's own class would cost another."""

    def __init__(self) -> None:
        self.model = HTTPBearer(
            bearerFormat="JWT",
            description="An access token of ours, from `POST /v1/tokens`, or of a trusted issuer.",
        )
        self.scheme_name = "bearer"

    async def __call__(self, request: Request) -> Principal:
        sent = sent_as(request, b"authorization")
        if len(sent) > 1:
            # Whoever stands between might believe another one than we.
            raise Unauthenticated("malformed")
        identity = request.scope["app"].state.identity or await _identity(request)
        principal: Principal = await identity.principal(sent[0] if sent else None)
        request.scope["state"][USER_ID] = str(principal.user_id)
        return principal


# Who asks. Without a valid token the request ends here with 401, before any connection is taken.
PrincipalDep = Annotated[Principal, Depends(_Bearer())]


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


# What came in, in the order in which an endpoint names it: nothing is read for a caller who is not known.

NewTask = Annotated[TaskCreate, Depends(Strict(TaskCreate, examples.NEW))]
WholeTask = Annotated[TaskPut, Depends(Strict(TaskPut, examples.WHOLE))]
TaskChange = Annotated[TaskUpdate, Depends(Strict(TaskUpdate, examples.CHANGE))]
NewAccount = Annotated[SignUp, Depends(Strict(SignUp, examples.SIGN_UP))]
Entry = Annotated[LogIn, Depends(Strict(LogIn, examples.LOG_IN))]
SpentToken = Annotated[Refresh, Depends(Strict(Refresh, examples.REFRESH))]
AccountEdit = Annotated[AccountChange, Depends(Strict(AccountChange, examples.ACCOUNT_CHANGE))]
Batch = Annotated[TaskBatch, Depends(Strict(TaskBatch, examples.BATCH))]
Lines = Annotated[BinaryIO, Depends(Spooled(examples.LINES), scope="function")]

HasDep = Annotated[Tags, Depends(IfNoneMatch())]
ConditionDep = Annotated[Condition, Depends(IfMatch())]
PutConditionDep = Annotated[Condition, Depends(IfMatch(creates=True))]
RepeatDep = Annotated[Repeat, Depends(IdempotencyHeader())]
ExchangeDep = Annotated[Repeat, Depends(IdempotencyHeader(EXCHANGE))]


async def _listing(
    request: Request, principal: PrincipalDep, asking: Annotated[Asking, Depends(Asked())]
) -> Listing:
    path = cast(str, request.scope["path"])
    return Listing(asking, path, principal.user_id, request.app.state.cursors)


ListingDep = Annotated[Listing, Depends(_listing)]
