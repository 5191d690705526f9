"""Accounts of our own, and whoever asks, over HTTP."""

# FastAPI reads these annotations when the application is built, so they stay real types here.

from typing import Final

from fastapi import APIRouter
from starlette.responses import Response

from ..errors import (
    Conflict,
    NotFound,
    OutcomeUnknown,
    Overloaded,
    Refused,
    SignUpClosed,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
    WrongPassword,
)
from ..models import UserRead
from ..services import users
from . import examples, problems
from .contract import JSON, answers, header
from .deps import AccountEdit, AccountsDep, ClientDep, DatabaseDep, NewAccount, PrincipalDep

PREFIX: Final = "/v1/users"

_UNKEPT: Final = {"cache-control": "no-store"}
_WRITTEN: Final = (Conflict, TooManyRequests, OutcomeUnknown)
_LOCATION: Final = header("Location", "Where the user reads and changes the account, with a token.")

router = APIRouter(
    prefix=PREFIX, tags=["accounts"], responses=problems.responses(Unavailable, Overloaded, Refused)
)


@router.post(
    "",
    summary="Sign up",
    status_code=201,
    response_model=UserRead,
    responses={
        **answers(201, "The new account. Log in with it next.", examples.USER, headers=[_LOCATION]),
        **problems.responses(SignUpClosed, *_WRITTEN),
    },
)
async def sign_up(
    accounts: AccountsDep, database: DatabaseDep, client: ClientDep, new: NewAccount
) -> Response:
    """409 says that the address is taken, as it has to; how often one may ask is bounded by address."""
    shown = await accounts.sign_up(database, new, client)
    return Response(shown, 201, media_type=JSON, headers={"location": f"{PREFIX}/me", **_UNKEPT})


@router.get(
    "/me",
    summary="Read your account",
    response_model=UserRead,
    responses={
        **answers(200, "You.", examples.USER),
        **problems.responses(Unauthenticated, NotFound),
    },
)
async def read_me(principal: PrincipalDep, database: DatabaseDep) -> Response:
    """404 for somebody of another issuer who has not written anything yet: the first write makes the account."""
    return _shown(await users.read(database, principal.user_id))


@router.patch(
    "/me",
    summary="Change your e-mail or password",
    response_model=UserRead,
    responses={
        **answers(200, "The account as it is now.", examples.USER),
        **problems.responses(Unauthenticated, WrongPassword, *_WRITTEN),
    },
)
async def update_me(
    principal: PrincipalDep,
    accounts: AccountsDep,
    database: DatabaseDep,
    client: ClientDep,
    change: AccountEdit,
) -> Response:
    """Asks for the current password. A new password ends every session, and every access token for writing, this
    one too: log in again.
    """
    return _shown(await accounts.change(database, principal, change, client))


@router.delete(
    "/me",
    summary="Delete your account",
    status_code=204,
    responses={
        **answers(204, "The account is gone, with all its tasks and sessions."),
        **problems.responses(Unauthenticated, NotFound, OutcomeUnknown),
    },
)
async def delete_me(principal: PrincipalDep, accounts: AccountsDep, database: DatabaseDep) -> Response:
    """For good. Tokens that are still about are refused for writing at once, and make no new account."""
    await accounts.delete(database, principal)
    return Response(status_code=204, headers=_UNKEPT)


def _shown(body: str) -> Response:
    return Response(body, media_type=JSON, headers=_UNKEPT)
