"""The tools of the other tests do what they say: a fault that does not happen proves nothing."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest

from clusters import Authority, PgBouncer, Proxy, Thief, Traffic, at, postgres_15_binaries, resolving
from postgres_server import PostgresServer
from waiting import eventually


async def test_a_statement_is_one_round_trip_once_it_is_prepared(postgres: PostgresServer) -> None:
    with Proxy(postgres.port) as proxy:
        connection = await asyncpg.connect(proxy.through(postgres.url))
        await connection.fetchval("SELECT 1")
        with proxy.counting() as count:
            await connection.fetchval("SELECT 1")
            await connection.fetchval("SELECT 1")
        assert count().round_trips == 2
        assert count().connections == 0
        assert count().bytes_to_server > 0
        assert proxy.open_connections == 1
        with proxy.counting() as count:
            await asyncio.sleep(0.05)
        assert count() == Traffic()
        await connection.close()


async def test_a_frozen_proxy_keeps_what_is_sent_and_delivers_it_later(postgres: PostgresServer) -> None:
    with Proxy(postgres.port) as proxy:
        connection = await asyncpg.connect(proxy.through(postgres.url))
        proxy.freeze()
        waiting = asyncio.create_task(connection.fetchval("SELECT 7"))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        proxy.thaw()
        assert await asyncio.wait_for(waiting, 60) == 7
        await connection.close()


async def test_a_black_hole_swallows_and_its_connections_end_when_it_heals(
    postgres: PostgresServer,
) -> None:
    with Proxy(postgres.port) as proxy:
        url = proxy.through(postgres.url)
        connection = await asyncpg.connect(url)
        proxy.black_hole()
        lost = asyncio.create_task(connection.fetchval("SELECT 7"))
        with pytest.raises(TimeoutError):
            await asyncpg.connect(url, timeout=0.3)
        assert not lost.done()
        proxy.heal()
        with pytest.raises((OSError, asyncpg.PostgresConnectionError)):
            await asyncio.wait_for(lost, 60)
        connection = await asyncpg.connect(url)
        assert await connection.fetchval("SELECT 7") == 7
        await connection.close()


async def test_a_lost_reply_leaves_the_write_behind(
    postgres: PostgresServer, empty_database_url: str
) -> None:
    with Proxy(postgres.port) as proxy:
        url = proxy.through(empty_database_url)
        connection = await asyncpg.connect(url)
        await connection.execute("CREATE TABLE t (x int)")
        proxy.lose_replies()
        with pytest.raises((OSError, asyncpg.PostgresConnectionError)):
            await asyncio.wait_for(connection.execute("INSERT INTO t VALUES (1)"), 60)
        connection = await asyncpg.connect(url)
        assert await connection.fetchval("SELECT count(*) FROM t") == 1
        proxy.drop_replies()
        unanswered = asyncio.create_task(connection.execute("INSERT INTO t VALUES (2)"))
        beside = await asyncpg.connect(empty_database_url)

        async def it_was_done() -> bool:
            return bool(await beside.fetchval("SELECT count(*) = 2 FROM t"))

        await eventually(it_was_done)
        await asyncio.sleep(0.2)
        assert not unanswered.done()
        proxy.heal()
        with pytest.raises((OSError, asyncpg.PostgresConnectionError)):
            await asyncio.wait_for(unanswered, 60)
        await beside.close()


async def test_reset_refuse_accept_and_delay(postgres: PostgresServer) -> None:
    with Proxy(postgres.port) as proxy:
        url = proxy.through(postgres.url)
        connection = await asyncpg.connect(url)
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncpg.connect(url)
        assert await connection.fetchval("SELECT 7") == 7
        proxy.reset_all()
        with pytest.raises((OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
            await asyncio.wait_for(connection.fetchval("SELECT 7"), 60)
        proxy.accept()
        connection = await asyncpg.connect(url)
        await connection.fetchval("SELECT 7")
        proxy.delay_seconds = 0.1
        before = asyncio.get_running_loop().time()
        await connection.fetchval("SELECT 7")
        assert asyncio.get_running_loop().time() - before >= 0.2
        await connection.close()


async def test_tls_ends_at_the_proxy_and_is_verified_against_the_authority(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    context = ssl.create_default_context(cafile=authority.root_path)
    with Proxy(postgres.port, tls=authority.server_context("db.example.com")) as proxy:
        url = at(postgres.url, proxy.port, "db.example.com")
        with resolving({"db.example.com": "127.0.0.1"}):
            connection = await asyncpg.connect(url, ssl=context)
            assert await connection.fetchval("SELECT 7") == 7
            await connection.close()
            with pytest.raises(ssl.SSLCertVerificationError):
                await asyncpg.connect(url, ssl=ssl.create_default_context())
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncpg.connect(at(url, proxy.port, "localhost"), ssl=context)


async def test_a_thief_gets_the_password_of_whoever_does_not_verify(tmp_path: Path) -> None:
    with Thief() as thief:
        with pytest.raises((OSError, asyncpg.PostgresConnectionError)):
            await asyncpg.connect(f"postgresql://u:secret@127.0.0.1:{thief.port}/d", ssl="prefer")
        assert thief.passwords == ["secret"]
    authority = Authority(tmp_path)
    with Thief(authority.server_context("localhost")) as thief:
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncpg.connect(
                f"postgresql://u:secret@localhost:{thief.port}/d", ssl=ssl.create_default_context()
            )
        assert thief.heard == b""
        assert thief.connections == 1


@pytest.mark.debian
async def test_pgbouncer_hands_out_another_backend_for_each_transaction(postgres: PostgresServer) -> None:
    with PgBouncer(postgres, settings={"default_pool_size": "1"}) as bouncer:
        connections = [await asyncpg.connect(bouncer.url, statement_cache_size=0) for _ in range(3)]
        backends = [await connection.fetchval("SELECT pg_backend_pid()") for connection in connections]
        assert len(set(backends)) == 1
        for connection in connections:
            await connection.close()
        bouncer.kill()
        with pytest.raises(ConnectionRefusedError):
            await asyncpg.connect(bouncer.url)
        bouncer.start()
        connection = await asyncpg.connect(bouncer.url, statement_cache_size=0)
        assert await connection.fetchval("SELECT 7") == 7
        await connection.close()


@pytest.mark.debian
async def test_postgresql_15_serves_tls_with_a_certificate_of_the_authority(
    private_postgres: Callable[..., PostgresServer],
) -> None:
    from conftest import open_directory

    with open_directory() as directory:
        authority = Authority(directory)
        server = private_postgres(
            binaries=postgres_15_binaries(),
            prepare=lambda server: authority.server_options(server, "localhost"),
        )
        context = ssl.create_default_context(cafile=authority.root_path)
        connection = await asyncpg.connect(at(server.url, server.port, "localhost"), ssl=context)
        assert await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") is True
        assert (await connection.fetchval("SHOW server_version")).startswith("15.")
        await connection.close()
