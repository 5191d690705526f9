"""The words that endpoints are written in: a session has committed before its response is sent."""

from __future__ import annotations

import ast
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import pytest
from fastapi import FastAPI

from src.api import deps
from src.api.deps import DatabaseDep, SessionDep, SettingsDep
from src.errors import NotFound
from src.models import User

if TYPE_CHECKING:
    from tests.api.conftest import MakeApp, Serve

API = Path(deps.__file__).parent
COUNT = "SELECT count(*) FROM users"


def with_routes(app: FastAPI) -> FastAPI:
    @app.post("/kept", status_code=201)
    async def keep(session: SessionDep) -> str:
        session.add(User(email="ada@example.com"))
        await session.flush()
        return "kept"

    @app.post("/missing", status_code=201)
    async def miss(session: SessionDep) -> str:
        session.add(User(email="ada@example.com"))
        await session.flush()
        raise NotFound

    @app.get("/environment")
    async def environment(settings: SettingsDep, database: DatabaseDep) -> str:
        return f"{settings.environment} {database.observe().status}"

    return app


@pytest.fixture
async def raw(database_url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def test_a_commit_that_fails_is_never_answered_2xx(
    make_app: MakeApp, serve: Serve, raw: asyncpg.Connection[asyncpg.Record]
) -> None:
    await raw.execute(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'secret-canary' USING ERRCODE = 'check_violation'; END $$;
        CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON users DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION refuse();
        """
    )
    async with serve(with_routes(make_app())) as client:
        answer = await client.post("/kept")
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid")
    assert answer.headers["content-type"] == "application/problem+json"
    assert "secret-canary" not in answer.text
    assert await raw.fetchval(COUNT) == 0


async def test_a_session_has_committed_when_the_answer_comes_and_has_not_after_an_error(
    make_app: MakeApp, serve: Serve, raw: asyncpg.Connection[asyncpg.Record]
) -> None:
    async with serve(with_routes(make_app())) as client:
        assert (await client.post("/missing")).status_code == 404
        assert await raw.fetchval(COUNT) == 0
        assert (await client.post("/kept")).status_code == 201
        assert await raw.fetchval(COUNT) == 1


async def test_settings_and_database_are_words(make_app: MakeApp, serve: Serve) -> None:
    async with serve(with_routes(make_app())) as client:
        assert (await client.get("/environment")).json() == "development up"


def test_endpoints_contain_no_depends_no_try_and_no_sql() -> None:
    routers = [path for path in API.glob("*.py") if "APIRouter(" in path.read_text(encoding="utf-8")]
    assert {"health.py", "tasks.py"} <= {path.name for path in routers}
    for path in routers:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Try), path.name
            assert not (isinstance(node, ast.Name) and node.id == "Depends"), path.name
            assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sqlalchemy"))
