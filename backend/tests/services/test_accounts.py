"""What the database gives of accounts to the service's own role, and what it never gives."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from structlog.testing import capture_logs

from src.config.settings import load_settings
from src.errors import Conflict, LogInFailed, NotFound, Unauthenticated
from src.models import CreateOperation, DeleteOperation, TaskCreate, UserCreate
from src.models.account import LogIn, SignUp
from src.models.credential import GATES, REQUIRE_CURRENT, SECRET_TABLES
from src.services import accounts, tasks, users
from src.services.accounts import Accounts
from src.services.database import Database
from src.services.passwords import Passwords
from src.services.signing import SigningKeys
from waiting import PATIENT, eventually

PASSWORD = "seven small boats at noon"
HERE = "192.0.2.1"
IDLE = timedelta(days=1)


@pytest.fixture
async def door() -> AsyncIterator[Accounts]:
    settings = load_settings()
    async with Accounts.from_settings(settings, SigningKeys.from_settings(settings)) as opened:
        yield opened


async def sign_up(door: Accounts, db: Database, email: str = "ana@example.com") -> UUID:
    return UUID(json.loads(await door.sign_up(db, SignUp(email=email, password=PASSWORD), HERE))["id"])


def entry(password: str = PASSWORD, email: str = "ana@example.com") -> LogIn:
    return LogIn(email=email, password=password)


async def test_no_gate_gives_away_a_verifier_or_a_hash(
    door: Accounts, app_database: Database, app: asyncpg.Connection[Any], owner: asyncpg.Connection[Any]
) -> None:
    """Every function, called by the service's role with all that it could know, and with what it could not."""
    ana = await sign_up(door, app_database)
    await door.log_in(app_database, entry(), HERE)
    kept = await owner.fetchrow("SELECT verifier, recipe FROM credentials")
    session = await owner.fetchrow("SELECT id, current_hash FROM sessions")
    assert kept is not None
    assert session is not None
    secrets = [kept["verifier"], session["current_hash"]]
    calls: dict[str, tuple[Any, ...]] = {
        "sign_up(uuid, text, text, bytea)": (uuid4(), "b@example.com", "recipe", bytes(32)),
        "recipe_of_email(text)": ("ana@example.com",),
        "recipe_of_user(uuid)": (ana,),
        "open_session(uuid, bytea, uuid, bytea, interval, interval)": (
            ana, kept["verifier"], uuid4(), bytes(32), IDLE, IDLE,
        ),
        "refresh_session(uuid, bytea, bytea, bytea, interval)": (
            session["id"], session["current_hash"], bytes(32), None, IDLE,
        ),
        "close_session(uuid, bytea)": (session["id"], session["current_hash"]),
        "end_sessions(uuid)": (ana,),
        "renew_verifier(uuid, bytea, text, bytea)": (ana, kept["verifier"], "recipe", bytes(32)),
        "change_account(uuid, bytea, text, text, bytea)": (ana, kept["verifier"], None, "recipe", bytes(32)),
    }  # fmt: skip
    assert set(calls) == set(GATES)
    for gate, arguments in calls.items():
        name = gate.partition("(")[0]
        numbers = ", ".join(f"${number}" for number in range(1, len(arguments) + 1))
        async with app.transaction():
            for row in await app.fetch(f"SELECT t.* FROM {name}({numbers}) AS t", *arguments):
                for value in row.values():
                    assert value not in secrets
                    assert not any(secret.hex() in str(value) for secret in secrets)
            # Knowing the verifier, or the hash of a token, opens nothing either.
            if name in ("open_session", "renew_verifier", "change_account", "close_session"):
                opened = f"SELECT t.* FROM {name}({numbers}) AS t WHERE t IS NOT NULL"
                assert not await app.fetch(opened, *arguments)
            if name == "refresh_session":
                outcome = f"SELECT outcome FROM {name}({numbers})"
                assert await app.fetchval(outcome, *arguments) != "refreshed"
            await app.execute("ROLLBACK AND CHAIN")


async def test_the_tables_of_secrets_are_open_to_nobody_but_their_owner(
    app: asyncpg.Connection[Any], owner: asyncpg.Connection[Any]
) -> None:
    for table in SECRET_TABLES:
        for right in ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"):
            assert not await app.fetchval("SELECT has_table_privilege($1, $2)", table, right)
        assert not await app.fetchval("SELECT has_any_column_privilege($1, 'SELECT')", table)
    stranger = await owner.fetchval("SELECT 'stranger_' || substr(md5(random()::text), 1, 8)")
    await owner.execute(f"CREATE ROLE {stranger}")
    try:
        for gate in GATES:
            assert not await owner.fetchval(
                "SELECT has_function_privilege($1::name, $2, 'EXECUTE')", stranger, gate
            )
            assert await app.fetchval("SELECT has_function_privilege($1, 'EXECUTE')", gate)
    finally:
        await owner.execute(f"DROP ROLE {stranger}")


async def test_every_gate_finds_its_tables_by_its_own_path_and_only_gates_run_by_the_owners_rights(
    owner: asyncpg.Connection[Any],
) -> None:
    rows = await owner.fetch(
        "SELECT oid::regprocedure::text AS name, prosecdef, proconfig FROM pg_proc"
        " WHERE pronamespace = current_schema()::regnamespace"
    )
    definer = {row["name"] for row in rows if row["prosecdef"]}
    assert definer == {gate.replace(", ", ",") for gate in GATES}
    assert all(row["proconfig"] == ["search_path=public, pg_temp"] for row in rows if row["prosecdef"])
    assert REQUIRE_CURRENT.partition("(")[0] in {
        row["name"].partition("(")[0] for row in rows if not row["prosecdef"]
    }


async def test_a_table_of_the_callers_own_is_not_taken_for_ours(
    door: Accounts, app_database: Database, app: asyncpg.Connection[Any]
) -> None:
    ana = await sign_up(door, app_database)
    await app.execute("CREATE TEMPORARY TABLE credentials (user_id uuid, recipe text, verifier bytea)")
    await app.execute("INSERT INTO pg_temp.credentials VALUES ($1, 'mine', sha256('x'))", ana)
    await app.execute("SET search_path = pg_temp, public")
    assert (await app.fetchval("SELECT recipe_of_user($1)", ana)).startswith("$argon2id$")
    opened = "SELECT count(*) FROM open_session($1, 'x', gen_random_uuid(), sha256('y'), '1 day', '1 day')"
    assert await app.fetchval(opened, ana) == 0


async def test_what_is_stored_is_not_what_proves(
    door: Accounts, app_database: Database, owner: asyncpg.Connection[Any]
) -> None:
    await sign_up(door, app_database)
    granted = await door.log_in(app_database, entry(), HERE)
    rows = await owner.fetch("SELECT c::text || s::text AS text FROM credentials c, sessions s")
    text = rows[0]["text"]
    ticket = accounts._Ticket.read(granted.refresh_token)
    assert ticket is not None
    assert hashlib.sha256(ticket.secret).hexdigest() in text
    assert ticket.secret.hex() not in text
    assert PASSWORD not in text
    assert granted.refresh_token not in text


async def test_a_log_in_raises_an_older_cost_to_todays_and_the_password_goes_on_working(
    door: Accounts, app_database: Database, owner: asyncpg.Connection[Any]
) -> None:
    await sign_up(door, app_database)
    before = await owner.fetchval("SELECT recipe FROM credentials")
    settings = load_settings(password_hash_time_cost=3)
    async with Accounts.from_settings(settings, SigningKeys.from_settings(settings)) as dearer:
        with pytest.raises(LogInFailed):
            await dearer.log_in(app_database, entry("not this one at all"), HERE)
        assert await owner.fetchval("SELECT recipe FROM credentials") == before
        for _ in range(2):
            await dearer.log_in(app_database, entry(), HERE)
            after = await owner.fetchval("SELECT recipe FROM credentials")
            assert after != before
            assert ",t=3," in after
    await door.log_in(app_database, entry(), HERE)


async def test_a_recipe_that_somebody_has_changed_opens_nothing_and_costs_no_more_than_others(
    door: Accounts, app_database: Database, owner: asyncpg.Connection[Any]
) -> None:
    await sign_up(door, app_database)
    before = await owner.fetchval("SELECT recipe FROM credentials")
    with capture_logs() as logs:
        for recipe in (before.replace("m=19456", "m=99999999"), "md5", "x" * 255):
            await owner.execute("UPDATE credentials SET recipe = $1", recipe)
            with pytest.raises(LogInFailed):
                await door.log_in(app_database, entry(), HERE)
    said = [line for line in logs if line["event"] == "account.recipe-unusable"]
    assert len(said) == 3
    assert not any("argon2id" in str(line) for line in said)


async def test_an_address_that_is_taken_is_not_named_to_the_servers_log(
    door: Accounts, app_database: Database, app: asyncpg.Connection[Any], owner: asyncpg.Connection[Any]
) -> None:
    """PostgreSQL writes an error's detail into its log, and the detail of a duplicate key is the key."""
    ana = await sign_up(door, app_database)
    await sign_up(door, app_database, "ben@example.com")
    assert (
        await app.fetch("SELECT * FROM sign_up($1, 'ben@example.com', 'recipe', $2)", uuid4(), bytes(32))
        == []
    )
    with pytest.raises(Conflict) as met:
        await door.sign_up(app_database, SignUp(email="ben@example.com", password=PASSWORD), HERE)
    assert met.value.constraint == "uq_users_email"
    derived = await door._passwords.derive(
        PASSWORD, await owner.fetchval("SELECT recipe FROM credentials LIMIT 1")
    )
    await owner.execute("UPDATE credentials SET verifier = $1 WHERE user_id = $2", derived.verifier, ana)
    with pytest.raises(asyncpg.UniqueViolationError) as refused:
        await app.fetch(
            "SELECT * FROM change_account($1, $2, 'ben@example.com', NULL, NULL)", ana, derived.proof
        )
    assert refused.value.constraint_name == "uq_users_email"
    assert refused.value.detail is None
    assert "ben" not in str(refused.value)


# Operators


@pytest.fixture
async def passwords() -> AsyncIterator[Passwords]:
    async with Passwords.from_settings(load_settings()) as opened:
        yield opened


async def test_an_operator_gives_a_password_to_whoever_has_none_and_ends_what_was(
    door: Accounts, database: Database, app_database: Database, passwords: Passwords
) -> None:
    made = UUID(json.loads(await users.create(database, UserCreate(email="ana@example.com")))["id"])
    with pytest.raises(LogInFailed):
        await door.log_in(app_database, entry(), HERE)
    await accounts.set_password(database, passwords, made, PASSWORD)
    first = await door.log_in(app_database, entry(), HERE)
    await accounts.set_password(database, passwords, made, "another password of hers")
    with pytest.raises(Unauthenticated):
        await door.refresh(app_database, first.refresh_token, HERE)
    with pytest.raises(LogInFailed):
        await door.log_in(app_database, entry(), HERE)
    await door.log_in(app_database, entry("another password of hers"), HERE)
    assert (await accounts.standing(database, "ana@example.com")).epoch == 2
    with pytest.raises(NotFound):
        await accounts.set_password(database, passwords, uuid4(), PASSWORD)


async def test_a_disabled_user_comes_in_by_no_door_until_enabled(
    door: Accounts, database: Database, app_database: Database
) -> None:
    ana = await sign_up(door, app_database)
    granted = await door.log_in(app_database, entry(), HERE)
    await accounts.disable(database, ana)
    await accounts.disable(database, ana)
    assert (await accounts.standing(database, "ana@example.com")).disabled
    with pytest.raises(LogInFailed):
        await door.log_in(app_database, entry(), HERE)
    with pytest.raises(Unauthenticated):
        await door.refresh(app_database, granted.refresh_token, HERE)
    # Also with a token of another issuer, which has no epoch.
    with pytest.raises(Unauthenticated) as refused:
        await tasks.create(app_database, tasks.Known(ana), TaskCreate(title="a"))
    assert refused.value.reason == "account-disabled"
    await accounts.enable(database, ana)
    await door.log_in(app_database, entry(), HERE)
    await tasks.create(app_database, tasks.Known(ana), TaskCreate(title="a"))
    for deed in (accounts.disable, accounts.enable):
        with pytest.raises(NotFound):
            await deed(database, uuid4())
    await accounts.disable(database, ana)
    await users.remove(database, ana)


async def test_an_operators_deeds_are_not_for_the_services_role(
    app_database: Database, passwords: Passwords
) -> None:
    from src.errors import Refused

    for deed in (
        accounts.disable(app_database, uuid4()),
        accounts.set_password(app_database, passwords, uuid4(), "x"),
    ):
        with pytest.raises(Refused):
            await deed
    with pytest.raises(NotFound):
        await accounts.standing(app_database, "ana@example.com")


# At once


async def test_log_ins_log_outs_changes_and_a_deletion_at_once_wait_for_each_other_and_never_deadlock(
    door: Accounts, app_database_url: str, app_database: Database, owner: asyncpg.Connection[Any]
) -> None:
    from src.config.database import parse

    ana = await sign_up(door, app_database)
    recipe = await owner.fetchval("SELECT recipe FROM credentials")
    derived = await door._passwords.derive(PASSWORD, recipe)
    async with Database(parse(app_database_url), replace(PATIENT, pool_size=12)) as crowd:

        async def open_one() -> None:
            values: dict[str, Any] = {
                "account": ana, "proof": derived.proof, "session": uuid4(), "fresh": bytes(32),
                "idle": IDLE, "longest": IDLE,
            }  # fmt: skip
            await crowd.row(accounts.OPEN, **values)

        async def end_all() -> None:
            await crowd.value(accounts.END_ALL, owner=ana, epoch=None)

        async def change() -> None:
            values: dict[str, Any] = {
                "owner": ana, "epoch": None, "proof": derived.proof, "email": None,
                "recipe": derived.recipe, "verifier": derived.verifier,
            }  # fmt: skip
            await crowd.value(accounts.CHANGE, **values)

        async def write() -> None:
            await tasks.create(crowd, tasks.Known(ana), TaskCreate(title="a"))

        deeds = [deed for deed in (open_one, end_all, change, write) for _ in range(25)]
        random.Random(7).shuffle(deeds)
        found = await asyncio.gather(*(deed() for deed in deeds), return_exceptions=True)
        assert [error for error in found if error is not None] == []
        assert await owner.fetchval("SELECT token_epoch FROM users") == 50
        assert await owner.fetchval("SELECT count(*) FROM tasks") == 25
        await users.delete(crowd, tasks.Known(ana))
    for table in SECRET_TABLES:
        assert await owner.fetchval(f"SELECT count(*) FROM {table}") == 0


async def test_two_sign_ups_of_one_address_leave_one_account_with_its_own_password(
    door: Accounts, app_database: Database, owner: asyncpg.Connection[Any]
) -> None:
    new = [SignUp(email="ana@example.com", password=f"{PASSWORD} {number}") for number in range(4)]
    found = await asyncio.gather(
        *(door.sign_up(app_database, each, HERE) for each in new), return_exceptions=True
    )
    won = [number for number, result in enumerate(found) if isinstance(result, str)]
    assert len(won) == 1
    assert all(isinstance(result, str | Conflict) for result in found)
    await door.log_in(app_database, entry(f"{PASSWORD} {won[0]}"), HERE)
    assert await owner.fetchval("SELECT count(*) FROM credentials") == 1


async def until_one_waits(owner: asyncpg.Connection[Any]) -> None:
    """Until somebody in this database waits for a lock that another holds."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    await eventually(lambda: owner.fetchval(waiting))


async def _set_password(database: Database, passwords: Passwords, user_id: UUID) -> None:
    await accounts.set_password(database, passwords, user_id, "another password of hers")


async def _disable(database: Database, _: Passwords, user_id: UUID) -> None:
    await accounts.disable(database, user_id)


@pytest.mark.parametrize("deed", [_set_password, _disable])
async def test_a_session_that_is_being_opened_does_not_outlive_an_operators_deed_that_waits_for_it(
    door: Accounts, database: Database, app_database: Database, passwords: Passwords,
    app: asyncpg.Connection[Any], owner: asyncpg.Connection[Any],
    deed: Callable[[Database, Passwords, UUID], Awaitable[None]],
) -> None:  # fmt: skip
    ana = await sign_up(door, app_database)
    derived = await door._passwords.derive(PASSWORD, await owner.fetchval("SELECT recipe FROM credentials"))
    opening = "SELECT count(*) FROM open_session($1, $2, $3, $4, $5, $5)"
    async with app.transaction():
        assert await app.fetchval(opening, ana, derived.proof, uuid4(), bytes(32), IDLE) == 1
        doing = asyncio.ensure_future(deed(database, passwords, ana))
        await until_one_waits(owner)
    await doing
    assert await owner.fetchval("SELECT count(*) FROM sessions") == 0


async def test_an_import_that_is_under_way_does_not_outlive_a_log_out_everywhere(
    door: Accounts, app_database: Database, app: asyncpg.Connection[Any], owner: asyncpg.Connection[Any]
) -> None:
    ana, met = await sign_up(door, app_database), uuid4()
    lines = [json.dumps({"title": "a"} | ({} if number else {"id": str(met)})) for number in range(1500)]
    file = io.BytesIO("\n".join(lines).encode())
    held = app.transaction()
    await held.start()
    await app.execute("SELECT set_config('app.user_id', $1, true)", str(ana))
    await app.execute("INSERT INTO tasks (user_id, id, title) VALUES ($1, $2, 'in the way')", ana, met)
    loading = asyncio.ensure_future(tasks.load(app_database, tasks.Known(ana, epoch=0), file))
    await until_one_waits(owner)
    await owner.fetchval("SELECT end_sessions($1)", ana)
    await held.rollback()
    with pytest.raises(Unauthenticated) as refused:
        await loading
    assert refused.value.reason == "token-revoked"
    assert await owner.fetchval("SELECT count(*) FROM tasks") == 0


async def test_a_batch_that_waits_for_a_task_does_not_outlive_a_log_out_everywhere(
    door: Accounts, app_database: Database, app: asyncpg.Connection[Any], owner: asyncpg.Connection[Any]
) -> None:
    ana = await sign_up(door, app_database)
    me = tasks.Known(ana, epoch=0)
    made = await tasks.create(app_database, me, TaskCreate(title="a"))
    operations = [
        DeleteOperation(op="delete", id=made.task_id), CreateOperation(op="create", task=TaskCreate(title="b"))
    ]  # fmt: skip
    held = app.transaction()
    await held.start()
    await app.execute("SELECT set_config('app.user_id', $1, true)", str(ana))
    await app.execute("SELECT FROM tasks WHERE user_id = $1 FOR UPDATE", ana)
    doing = asyncio.ensure_future(tasks.batch(app_database, me, operations))
    await until_one_waits(owner)
    await owner.fetchval("SELECT end_sessions($1)", ana)
    await held.rollback()
    with pytest.raises(Unauthenticated) as refused:
        await doing
    assert refused.value.reason == "token-revoked"
    assert await tasks.read(app_database, ana, made.task_id)
