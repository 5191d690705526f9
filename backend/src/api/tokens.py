"""Sessions over HTTP: logging in, going on, and logging out; and the keys that our tokens are verified with."""

# FastAPI reads these annotations when the application is built, so they stay real types here.

from typing import Any, Final

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from ..errors import (
    LogInFailed,
    NotFound,
    OutcomeUnknown,
    Overloaded,
    Refused,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
)
from ..models.account import TokenRead
from ..services.accounts import Granted
from . import examples, problems
from .contract import JSON, answers
from .deps import (
    AccountsDep,
    ClientDep,
    DatabaseDep,
    Entry,
    ExchangeDep,
    IdentityDep,
    PrincipalDep,
    SpentToken,
)

PREFIX: Final = "/v1/tokens"
# A key is published before it signs and stays for as long as its tokens live, so an older copy is right too.
_KEPT: Final = {"cache-control": "public, max-age=300"}
_UNKEPT: Final = {"cache-control": "no-store"}

router = APIRouter(
    prefix=PREFIX, tags=["accounts"], responses=problems.responses(Unavailable, Overloaded, Refused)
)
published = APIRouter(tags=["accounts"], responses=problems.responses(Unavailable))


@router.post(
    "",
    summary="Log in",
    response_model=TokenRead,
    responses={
        **answers(200, "A session: its first pair of tokens.", examples.TOKENS),
        **problems.responses(LogInFailed, TooManyRequests, OutcomeUnknown),
    },
)
async def log_in(accounts: AccountsDep, database: DatabaseDep, client: ClientDep, entry: Entry) -> Response:
    """The access token goes into `Authorization: Bearer`. 429 bounds guessing for this account from this address,
    and for this address over all accounts; nobody else's attempts lock you out.
    """
    return _given(await accounts.log_in(database, entry, client))


@router.post(
    "/refresh",
    summary="Exchange a refresh token",
    response_model=TokenRead,
    responses={
        **answers(200, "The next pair; the refresh token that was sent is used up.", examples.TOKENS),
        **problems.responses(Unauthenticated, TooManyRequests, OutcomeUnknown),
    },
)
async def refresh(
    accounts: AccountsDep, database: DatabaseDep, client: ClientDep, repeat: ExchangeDep, spent: SpentToken
) -> Response:
    """A token that was used before ends the session: somebody else has it too."""
    return _given(await accounts.refresh(database, spent.refresh_token, client, repeat=repeat.key))


@router.post(
    "/revoke",
    summary="Log out",
    status_code=204,
    responses={
        **answers(204, "The session of this refresh token is over, or there was none."),
        **problems.responses(TooManyRequests, OutcomeUnknown),
    },
)
async def log_out(
    accounts: AccountsDep, database: DatabaseDep, client: ClientDep, spent: SpentToken
) -> Response:
    """Ends one session (RFC 7009). Its access token lives on for the minutes that it has left."""
    await accounts.log_out(database, spent.refresh_token, client)
    return Response(status_code=204, headers=_UNKEPT)


@router.delete(
    "",
    summary="Log out everywhere",
    status_code=204,
    responses={
        **answers(204, "Every session is over, and every access token of ours for writing."),
        **problems.responses(Unauthenticated, NotFound, OutcomeUnknown),
    },
)
async def log_out_everywhere(
    principal: PrincipalDep, accounts: AccountsDep, database: DatabaseDep
) -> Response:
    """Reading ends with the access tokens, minutes later. Tokens of another issuer are not ours to end."""
    await accounts.log_out_everywhere(database, principal)
    return Response(status_code=204, headers=_UNKEPT)


@published.get(
    "/.well-known/jwks.json",
    summary="Read the keys of our tokens",
    response_model=dict[str, Any],
    responses=answers(200, "A JWK set (RFC 7517).", examples.JWKS),
)
async def jwks(identity: IdentityDep) -> Response:
    """For other services, which can verify our access tokens by it; `iss`, `aud` and `exp` are theirs to look at."""
    return JSONResponse(identity.signing.document(), headers=_KEPT)


def _given(granted: Granted) -> Response:
    shape = TokenRead(
        access_token=granted.access_token,
        expires_in=granted.expires_in,
        refresh_token=granted.refresh_token,
    )
    return Response(shape.model_dump_json(), media_type=JSON, headers=_UNKEPT)
