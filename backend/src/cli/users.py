"""`python -m src user ...`: users, their passwords, and access tokens for them."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import UUID

import click

from ..errors import Conflict, NotFound
from . import output
from .tasks import address_of, emit_row, emit_rows, limit_option, owner_of, shaped, with_database

if TYPE_CHECKING:
    from ..services.accounts import Standing
    from ..services.database import Database
    from ..services.passwords import Passwords

MAX_TOKEN_MINUTES = 30 * 24 * 60


@click.group()
def user() -> None:
    """Create, list, disable and delete users, and print access tokens for them."""


@user.command("create")
@click.argument("email")
@click.option("--password", is_flag=True, help="Prompt for a password.")
def user_create(email: str, password: bool) -> None:
    """Create a user; prints the row as JSON. Without a password the user cannot log in."""
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
@click.argument("email")
def user_set_password(email: str) -> None:
    """Set a user's password, and end their sessions.

    It is prompted for on a terminal, and read from the first line of standard input elsewhere.
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
@click.argument("email")
def user_disable(email: str) -> None:
    """End a user's sessions, and refuse log-ins and writes until `enable`. Their rows are kept."""
    from ..services import accounts

    address = address_of(email)

    async def work(database: Database) -> None:
        await accounts.disable(database, (await accounts.standing(database, address)).user_id)

    with_database(work)
    output.say(f"Disabled {address}.")


@user.command("enable")
@click.argument("email")
def user_enable(email: str) -> None:
    """Allow a disabled user to log in and write again."""
    from ..services import accounts

    address = address_of(email)

    async def work(database: Database) -> None:
        await accounts.enable(database, (await accounts.standing(database, address)).user_id)

    with_database(work)
    output.say(f"Enabled {address}.")


@user.command("list")
@limit_option
def user_list(limit: int) -> None:
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
@click.argument("email")
@output.yes_option
def user_delete(email: str, yes: bool) -> None:
    """Delete a user with all tasks."""
    from ..services import users

    address = address_of(email)
    output.confirm(f"Delete {address} and all their tasks?", yes)

    async def work(database: Database) -> None:
        await users.remove(database, await owner_of(database, address))

    with_database(work)
    output.say(f"Deleted {address}.")


@user.command("token")
@click.argument("email")
@click.option("--create", is_flag=True, help="Create the user first if there is none.")
@click.option(
    "--minutes",
    type=click.IntRange(1, MAX_TOKEN_MINUTES),
    default=60,
    show_default=True,
    help="Lifetime of the token.",
)
def user_token(email: str, create: bool, minutes: int) -> None:
    """Print an access token for a user.

    Send it as `Authorization: Bearer <token>`. It is accepted until it expires, or until the user logs out
    everywhere, gets a new password, or is disabled.
    """
    from ..embedded import database_target
    from ..models import UserCreate
    from ..services import accounts, users
    from ..services.signing import SigningKeys

    address = address_of(email)
    # First: no user is created when no token can be signed.
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
    """A new password that fulfils the rules; UsageError does not quote it."""
    from ..models.account import SignUp

    # SignUp requires an address; only the password is validated here.
    given = shaped(SignUp, email="user@example.com", password=output.ask_password())
    return given.password.get_secret_value()


def _passwords() -> Passwords:
    from ..embedded import database_target
    from ..services.passwords import Passwords

    return Passwords.from_settings(database_target.settings()[0])
