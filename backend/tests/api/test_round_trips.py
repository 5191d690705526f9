"""Over HTTP each operation is one round trip to PostgreSQL, counted at a proxy in front of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from asking import TASKS, Caller, people
from clusters import Proxy
from postgres_server import PostgresServer

if TYPE_CHECKING:
    from tests.api.conftest import MakeApp, Serve

OPERATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "read": ("GET", "/{id}", {}),
    "list": ("GET", "", {}),
    "list, filtered": ("GET", "", {"params": {"is_completed": "false", "sort": "updated_at", "limit": 2}}),
    "create": ("POST", "", {"json": {"title": "new"}}),
    "create, idempotent": ("POST", "", {"json": {"title": "new"}, "headers": {"idempotency-key": "{key}"}}),
    "update": ("PATCH", "/{id}", {"json": {"title": "changed"}}),
    "update, matched": ("PATCH", "/{id}", {"json": {"title": "changed"}, "headers": {"if-match": "{etag}"}}),
    "replace": ("PUT", "/{id}", {"json": {"title": "replaced"}}),
    "put a new one": ("PUT", "/{new}", {"json": {"title": "put"}}),
    "delete": ("DELETE", "/{id}", {}),
}


async def ask(caller: Caller, name: str, proxy: Proxy) -> int:
    """Does the operation on a task of its own, and gives the round trips that the operation itself cost."""
    method, path, more = OPERATIONS[name]
    made = await caller("POST", json={"title": "made"}, expect=201)
    known = {"id": made.json()["id"], "etag": made.headers["etag"], "key": uuid4().hex, "new": str(uuid4())}
    given = dict(more)
    if "headers" in given:
        given["headers"] = {name: value.format(**known) for name, value in given["headers"].items()}
    with proxy.counting() as count:
        await caller(method, TASKS + path.format(**known), **given, expect=(200, 201, 204))
        return count().round_trips


@pytest.mark.parametrize("name", OPERATIONS)
async def test_an_operation_is_one_round_trip(
    name: str,
    postgres: PostgresServer,
    app_database_url: str,
    database_url: str,
    make_app: MakeApp,
    serve: Serve,
) -> None:
    with Proxy(postgres.port) as proxy:
        app = make_app(
            database_url=proxy.through(app_database_url),
            database_migration_url=database_url,
            database_pool_size=1,
        )
        async with people(serve, app) as (ana, _):
            await ask(ana, name, proxy)  # A connection's first use of a statement prepares it.
            assert await ask(ana, name, proxy) == 1


async def test_a_repeated_key_a_missing_task_and_a_lost_race_cost_one_round_trip_too(
    postgres: PostgresServer, app_database_url: str, database_url: str, make_app: MakeApp, serve: Serve
) -> None:
    with Proxy(postgres.port) as proxy:
        app = make_app(
            database_url=proxy.through(app_database_url),
            database_migration_url=database_url,
            database_pool_size=1,
        )
        async with people(serve, app) as (ana, _):
            task = await ana.create()
            asked: list[tuple[str, str, dict[str, Any], int]] = [
                ("POST", TASKS, {"json": {"title": "once"}, "headers": {"idempotency-key": "k"}}, 201),
                ("GET", f"{TASKS}/{uuid4()}", {}, 404),
                ("DELETE", f"{TASKS}/{uuid4()}", {}, 404),
                (
                    "PATCH",
                    f"{TASKS}/{task['id']}",
                    {"json": {"title": "x"}, "headers": {"if-match": '"no"'}},
                    412,
                ),
            ]
            for method, path, more, status in asked:
                await ana(method, path, **more, expect=status)
                with proxy.counting() as count:
                    await ana(method, path, **more, expect=status)
                assert count().round_trips == 1, (method, status)
