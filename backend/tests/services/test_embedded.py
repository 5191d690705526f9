"""The private PostgreSQL: started by us, gone with us, and careful with what is not ours."""

from __future__ import annotations

import asyncpg

from src.services.embedded import EmbeddedPostgres


async def test_a_fresh_database_is_empty_and_utf8(empty_database_url: str) -> None:
    connection = await asyncpg.connect(empty_database_url)
    try:
        assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
        assert await connection.fetchval("SHOW server_encoding") == "UTF8"
        assert await connection.fetchval("SELECT upper('é')") == "É"
    finally:
        await connection.close()


def test_the_sessions_server_answers(postgres: EmbeddedPostgres) -> None:
    assert postgres.running
