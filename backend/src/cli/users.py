"""`python -m src user ...`: users, their passwords, and tokens that speak for them."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from ..errors import Conflict, NotFound
from . import output
from .tasks import Email, Limit, address_of, emit_row, emit_rows, owner_of, shaped, with_database

if TYPE_CHECKING:
    from ..services.accounts import Standing
    from ..services.database import Database
    from ..services.passwords import Passwords

LONGEST_MINUTES = 30 * 24 * 60

user = typer.Typer(help="Make, list, disable and delete users, and speak for them.", **output.PLAIN)


@user.command("create")
def user_create(
    email: Email,
    password: Annotated[
        bool, typer.Option("--password", help="Give them a password, which is asked for.")
    ] = False,
) -> None:
    """Make a user; prints the row as JSON. Without a password they cannot log in."""
    from ..models import UserCreate
    from ..services import accounts, users

    new = shaped(UserCreate, email=email)
    secret = _password() if password else None

    async def work(database: Database) -> str:
        row = await users.create(database, new)
        if secret is not None:
            async with _passwords() as passwords:
                await accounts.set_password(database, passwords, UUID(json.loads(row)["id"]), secret)
        return row

    try:
        row = with_database(work)
    except Conflict:
        raise Conflict(f"There is a user {new.email} already.") from None
    emit_row(row)


@user.command("set-password")
def user_set_password(email: Email) -> None:
    """Give a user a new password, and end their sessions.

    It is asked for on a terminal, and read from the first line of standard input elsewhere.
    """
    from ..services import accounts

    address, secret = address_of(email), _password()

    async def work(database: Database) -> None:
        found = await accounts.standing(database, address)
        async with _passwords() as passwords:
            await accounts.set_password(database, passwords, found.user_id, secret)

    with_database(work)
    output.say(f"{address} has a new password; every session is over.")


@user.command("disable")
def user_disable(email: Email) -> None:
    """End a user's sessions, and refuse every log-in and write until `enable`. Their rows stay."""
    from ..services import accounts

    address = address_of(email)

    async def work(database: Database) -> None:
        await accounts.disable(database, (await accounts.standing(database, address)).user_id)

    with_database(work)
    output.say(f"Disabled {address}.")


@user.command("enable")
def user_enable(email: Email) -> None:
    """Let a disabled user log in and write again."""
    from ..services import accounts

    address = address_of(email)

    async def work(database: Database) -> None:
        await accounts.enable(database, (await accounts.standing(database, address)).user_id)

    with_database(work)
    output.say(f"Enabled {address}.")


@user.command("list")
def user_list(limit: Limit = 50) -> None:
    """List users.

    A table on a terminal, else one JSON object a line.
    """
    from ..services import users

    emit_rows(
        with_database(lambda database: users.page(database, limit=limit)),
        ("id", "email", "created_at"),
        limit,
    )


@user.command("delete")
def user_delete(email: Email, yes: output.Yes = False) -> None:
    """Delete a user with all tasks."""
    from ..services import users

    address = address_of(email)
    output.confirm(f"Delete {address} and all their tasks?", yes)

    async def work(database: Database) -> None:
        await users.remove(database, await owner_of(database, address))

    with_database(work)
    output.say(f"Deleted {address}.")


@user.command("token")
def user_token(
    email: Email,
    create: Annotated[bool, typer.Option("--create", help="Make the user first if there is none.")] = False,
    minutes: Annotated[
        int, typer.Option(min=1, max=LONGEST_MINUTES, help="For how long it is accepted.")
    ] = 60,
) -> None:
    """Print an access token that speaks for a user.

    Send it as `Authorization: Bearer <token>`. Whoever has it is that user until it ends, or the user logs out
    everywhere, gets a new password, or is disabled.
    """
    from ..embedded import database_target
    from ..models import UserCreate
    from ..services import accounts, users
    from ..services.signing import SigningKeys

    address = address_of(email)
    # First, so that nobody is made when no token can be.
    keys = SigningKeys.from_settings(database_target.settings()[0])

    async def work(database: Database) -> Standing:
        if create:
            with suppress(Conflict):
                await users.create(database, UserCreate(email=address))
        return await accounts.standing(database, address)

    try:
        found = with_database(work)
    except NotFound:
        raise NotFound(f"There is no user {address}. Make one with --create.") from None
    if found.disabled:
        raise output.UsageError(f"{address} is disabled.")
    output.emit(keys.mint(found.user_id, address, minutes * 60, epoch=found.epoch))


def _password() -> str:
    """A new password, held to the rules for all; what is wrong with it is said without it."""
    from ..models.account import SignUp

    # The address is none of ours to look at here.
    given = shaped(SignUp, email="nobody@example.com", password=output.ask_password())
    return given.password.get_secret_value()


def _passwords() -> Passwords:
    from ..embedded import database_target
    from ..services.passwords import Passwords

    return Passwords.from_settings(database_target.settings()[0])
