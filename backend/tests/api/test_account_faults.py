"""Rows A5 to A7 and R3 of the fault catalogue: guessing, listening at the door, and wearing it out."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
import pytest

from accounting import EMAIL, ME, OTHER, PASSWORD, TOKENS, USERS, Visitor, member, running
from asking import TASKS, problem
from src.config.database import parse
from src.embedded.roles import APPLICATION
from src.services import schema

if TYPE_CHECKING:
    from collections.abc import Callable

    from postgres_server import PostgresServer
    from tests.api.conftest import MakeApp

STRANGER = "198.51.100.7"


# A5: what a log-in reveals


def bare(answer: httpx.Response) -> tuple[int, dict[str, str], str]:
    """All of an answer but for its request id."""
    known = answer.headers["x-request-id"]
    headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
    return answer.status_code, headers, answer.text.replace(known, "ID")


async def test_a5_a_log_in_reveals_no_account_by_its_answer_or_by_the_work_done_for_it(
    private_postgres: Callable[..., PostgresServer], make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another password, no such account, an account without a password, and a disabled one with the right one."""
    server = private_postgres(options={"shared_preload_libraries": "pg_stat_statements", "fsync": "off"})
    await schema.create_tables(parse(server.url))
    counter = await asyncpg.connect(server.url)
    await counter.execute("CREATE EXTENSION pg_stat_statements")
    app = make_app(
        database_url=server.url_for(server.url.rsplit("/", 1)[1], role=APPLICATION),
        database_migration_url=server.url,
        database_pool_size=1,
        health_probes="passive",
        login_rate_limit="off",
    )
    derived: list[tuple[int, ...]] = []
    async with running(app):
        passwords = app.state.accounts._passwords
        derive = passwords.derive

        async def counting(password: str, recipe: str | None = None) -> Any:
            found = await derive(password, recipe)
            derived.append(tuple(len(part) for part in found.recipe.split("$")))
            return found

        # Nothing is replaced: what is asked of it is counted.
        monkeypatch.setattr(passwords, "derive", counting)
        await member(app)
        ben = await member(app, email="ben@example.com")
        await counter.execute("UPDATE users SET disabled_at = now() WHERE email = 'ben@example.com'")
        await counter.execute("INSERT INTO users (email) VALUES ('cy@example.com')")
        asked = {
            "wrong": (EMAIL, OTHER),
            "nobody": ("nobody@example.com", OTHER),
            "no password": ("cy@example.com", OTHER),
            "disabled, wrong": ("ben@example.com", OTHER),
        }
        seen = {}
        for _ in range(2):  # What a connection prepares at its first use is not the request's work.
            for name, (email, password) in asked.items():
                derived.clear()
                await counter.execute("SELECT pg_stat_statements_reset()")
                answer = await ben.log_in(401, password, email)
                rows = await counter.fetch(
                    "SELECT query, calls, wal_records FROM pg_stat_statements"
                    " WHERE userid = $1::regrole AND toplevel ORDER BY query",
                    APPLICATION,
                )
                seen[name] = (bare(answer), [tuple(row) for row in rows], list(derived))
        assert seen["wrong"] == seen["nobody"] == seen["no password"] == seen["disabled, wrong"]
        work = seen["wrong"]
        assert [calls for _, calls, _ in work[1]] == [1, 1]
        assert [written for _, _, written in work[1]] == [0, 0]
        assert len(work[2]) == 1
        # Who has the right password is told no more of why it opens nothing.
        assert bare(await ben.log_in(401, PASSWORD)) == work[0]
    await counter.close()


# A6: guessing


async def test_a6_guessing_is_429_with_a_time_to_wait_and_the_right_guess_is_not_even_looked_at(
    make_app: MakeApp, app_database_url: str
) -> None:
    async with running(make_app(database_url=app_database_url, login_rate_limit="5/minute")) as app:
        await member(app)
        stranger = Visitor(app, STRANGER)
        for _ in range(5):
            await stranger.log_in(401, OTHER)
        answer = await stranger.log_in(429)
        assert problem(answer) == "too-many-requests"
        assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_a6_a_burst_of_guesses_at_once_is_bounded_like_one_after_the_other(make_app: MakeApp) -> None:
    async with running(make_app(login_rate_limit="5/minute", password_hash_queue=100)) as app:
        await member(app)
        given = {"email": EMAIL, "password": OTHER}
        answers = await asyncio.gather(
            *(Visitor(app, STRANGER).ask("POST", TOKENS, token="", json=given) for _ in range(40))
        )
        assert sorted(answer.status_code for answer in answers) == [401] * 5 + [429] * 35


async def test_a6_a_stranger_locks_nobody_out_but_their_own_address(make_app: MakeApp) -> None:
    settings = {"login_rate_limit": "5/minute", "login_address_rate_limit": "20/minute"}
    async with running(make_app(**settings)) as app:
        ana = await member(app)
        stranger = Visitor(app, STRANGER)
        guess = {"email": EMAIL, "password": OTHER}
        for _ in range(10):
            await stranger.ask("POST", TOKENS, token="", json=guess)
        await stranger.log_in(429)
        await ana.log_in()
        # Over all accounts, too, a stranger's address has only so many tries, and hers is another.
        for number in range(15):
            await stranger.log_in(401, OTHER, f"{number}@example.com")
        await stranger.log_in(429, OTHER, "somebody.else@example.com")
        await Visitor(app, "192.0.2.1", "somebody.else@example.com").log_in(401, OTHER)


async def test_a6_who_mistypes_and_then_gets_it_right_begins_anew(make_app: MakeApp) -> None:
    async with running(make_app(login_rate_limit="5/minute")) as app:
        ana = await member(app)
        for _ in range(3):
            for _ in range(4):
                await ana.log_in(401, OTHER)
            await ana.log_in()


async def test_a6_the_current_password_is_not_for_guessing_either(make_app: MakeApp) -> None:
    async with running(make_app(login_rate_limit="5/minute")) as app:
        ana = await member(app)
        for _ in range(5):
            await ana.ask("PATCH", ME, 403, json={"current_password": OTHER, "email": "new@example.com"})
        await ana.ask("PATCH", ME, 429, json={"current_password": PASSWORD, "email": "new@example.com"})
        assert (await ana.ask("GET", ME, 200)).json()["email"] == EMAIL


async def test_a6_sign_ups_from_one_address_are_bounded(make_app: MakeApp) -> None:
    async with running(make_app(sign_up_rate_limit="3/hour")) as app:
        for number in range(3):
            await Visitor(app, STRANGER, f"{number}@example.com").sign_up()
        answer = await Visitor(app, STRANGER, "4@example.com").sign_up(429)
        assert int(answer.headers["retry-after"]) > 60
        await Visitor(app, "192.0.2.1", "5@example.com").sign_up()


# A7: what is too long


async def test_a7_a_password_of_ten_megabytes_is_422_and_is_never_hashed(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(make_app(max_body_bytes=16 << 20)) as app:
        ana = await member(app)
        hashed: list[int] = []
        derive = app.state.accounts._passwords.derive

        async def counting(password: str, recipe: str | None = None) -> Any:
            hashed.append(len(password))
            return await derive(password, recipe)

        monkeypatch.setattr(app.state.accounts._passwords, "derive", counting)
        long = "x" * (10 << 20)
        asked: list[tuple[str, str, dict[str, Any], str]] = [
            ("POST", TOKENS, {"email": EMAIL, "password": long}, "/password"),
            ("POST", USERS, {"email": "b@example.com", "password": long}, "/password"),
            ("PATCH", ME, {"current_password": long, "email": "b@example.com"}, "/current_password"),
            ("PATCH", ME, {"current_password": PASSWORD, "password": long}, "/password"),
        ]
        for method, path, given, pointer in asked:
            answer = await ana.ask(method, path, 422, json=given)
            assert [fault["pointer"] for fault in answer.json()["errors"]] == [pointer]
            assert "xxxx" not in answer.text
        assert hashed == []


async def test_a7_with_the_usual_limits_it_is_not_even_read(make_app: MakeApp) -> None:
    async with running(make_app()) as app:
        given = json.dumps({"email": EMAIL, "password": "x" * (10 << 20)}).encode()
        headers = {"content-type": "application/json"}
        await Visitor(app).ask("POST", TOKENS, 413, content=given, headers=headers)


# R3: wearing it out


async def test_r3_a_flood_of_log_ins_hashes_a_few_at_a_time_turns_the_rest_away_and_lets_reads_by(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many come: so many hashes run, so many wait, and nobody else waits for them."""
    settings = {
        "login_rate_limit": "off",
        "login_address_rate_limit": "off",
        "password_hash_threads": 1,
        "password_hash_queue": 8,
        # What is claimed is that reads go by, not how fast this machine is.
        "database_command_timeout_seconds": 60.0,
        "database_statement_timeout_seconds": 50.0,
        "database_pool_timeout_seconds": 60.0,
    }
    async with running(make_app(**settings)) as app:
        ana = await member(app)
        await ana.ask("POST", TASKS, 201, json={"title": "read me"})
        loop_thread = threading.get_ident()
        at_once = most = 0
        where: set[int] = set()
        lock = threading.Lock()
        from src.services import passwords

        work = passwords._proof

        def watched(*given: Any) -> bytes:
            nonlocal at_once, most
            with lock:
                at_once += 1
                most = max(most, at_once)
                where.add(threading.get_ident())
            try:
                return work(*given)
            finally:
                with lock:
                    at_once -= 1

        monkeypatch.setattr(passwords, "_proof", watched)
        given = {"email": EMAIL, "password": OTHER}
        flood = [
            asyncio.create_task(Visitor(app, f"198.51.100.{n}").ask("POST", TOKENS, token="", json=given))
            for n in range(100)
        ]
        reads = 0
        while not all(task.done() for task in flood):
            await ana.ask("GET", TASKS, 200)
            reads += 1
        answers = [task.result() for task in flood]
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {401, 429}
        # Ninety at the least find the queue full: they come while nine hashes are under way or wait.
        assert statuses.count(401) < 100
        assert most == 1
        assert loop_thread not in where
        assert reads > 0
        await ana.log_in()
