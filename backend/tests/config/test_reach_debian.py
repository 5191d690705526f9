"""TLS as PostgreSQL itself speaks it: Debian's PostgreSQL 15 is built with it, the wheel's 18 is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from clusters import Authority, PgBouncer, postgres_15_binaries, resolving
from conftest import open_directory
from postgres_server import PostgresServer
from src.config.database import parse
from src.errors import GroundworkError
from ways import HASTY, WAYS

pytestmark = pytest.mark.debian

NAME = "ep-x-pooler.eu-central-1.aws.neon.tech"


@dataclass
class Real:
    server: PostgresServer
    authority: Authority
    stranger: Authority
    client: tuple[Path, Path]

    def address(self, query: str, host: str = "db.internal") -> str:
        query = query.replace("ROOT", str(self.authority.root_path))
        query = query.replace("STRANGER", str(self.stranger.root_path))
        query = query.replace("CERT", str(self.client[0])).replace("KEY", str(self.client[1]))
        return f"postgresql://groundwork:{self.server.password}@{host}:{self.server.port}/groundwork?{query}"


@pytest.fixture(scope="module")
def real() -> Iterator[Real]:
    with open_directory() as directory:
        (directory / "other").mkdir()
        authority, stranger = Authority(directory), Authority(directory / "other")
        server = PostgresServer(directory / "data", binaries=postgres_15_binaries())
        server.options.update(
            authority.server_options(server, "db.internal", "127.0.0.1", NAME, clients=True)
        )
        server.options.update({"fsync": "off"})
        with server:
            yield Real(server, authority, stranger, authority.issue("client"))


ENCRYPTED = [
    "sslmode=require",
    "sslmode=prefer",
    "sslmode=verify-full&sslrootcert=ROOT",
    "sslmode=verify-ca&sslrootcert=ROOT",
    "sslmode=require&channel_binding=require&sslrootcert=ROOT",
    "sslrootcert=ROOT&ssl_min_protocol_version=TLSv1.3",
    "sslrootcert=ROOT&sslcert=CERT&sslkey=KEY",
]
PLAIN = ["sslmode=disable", "sslmode=allow"]
REFUSED = [
    "",
    "sslmode=verify-full",
    "sslmode=require&sslrootcert=system",
    "sslmode=require&channel_binding=require",
    "sslmode=require&sslrootcert=STRANGER",
    "sslmode=verify-ca&sslrootcert=STRANGER",
]


@pytest.mark.parametrize("query", [*ENCRYPTED, *PLAIN])
async def test_postgresql_itself_says_whether_the_connection_is_encrypted(real: Real, query: str) -> None:
    settings = parse(real.address(query))
    with resolving({"db.internal": "127.0.0.1"}):
        connection = await asyncpg.connect(**settings.asyncpg_arguments())
        statement = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        assert await connection.fetchval(statement) is (query in ENCRYPTED)
        await connection.close()
        for way in WAYS:
            assert await way(settings) == "groundwork"


@pytest.mark.parametrize("query", REFUSED)
async def test_a_server_that_nobody_vouches_for_is_refused(real: Real, query: str) -> None:
    with resolving({"db.internal": "127.0.0.1"}):
        for way in WAYS:
            with pytest.raises(GroundworkError):
                await way(parse(real.address(query)), HASTY)


async def test_a_certificate_for_another_name_is_refused_unless_the_name_is_not_asked_for(real: Real) -> None:
    with resolving({"elsewhere.internal": "127.0.0.1"}):
        by_name = parse(real.address("sslmode=verify-full&sslrootcert=ROOT", "elsewhere.internal"))
        with pytest.raises(GroundworkError):
            await WAYS[0](by_name, HASTY)
        by_authority = parse(real.address("sslmode=verify-ca&sslrootcert=ROOT", "elsewhere.internal"))
        assert await WAYS[0](by_authority) == "groundwork"


async def test_a_pooled_address_as_neon_prints_it_works_through_pgbouncer_over_tls(real: Real) -> None:
    """Only the port and the authority are not Neon's; migrations leave the pooler out by the host's name."""
    with (
        # Whoever waits for its start asks without TLS.
        PgBouncer(
            real.server, tls=real.authority.issue(NAME), settings={"client_tls_sslmode": "allow"}
        ) as pooler,
        resolving({NAME: "127.0.0.1", NAME.replace("-pooler", ""): "127.0.0.1"}),
    ):
        query = f"sslmode=require&channel_binding=require&sslrootcert={real.authority.root_path}"
        pasted = f"postgresql://groundwork:{real.server.password}@{NAME}:{pooler.port}/groundwork?{query}"
        settings = parse(pasted, pooler="transaction")
        assert (settings.neon, settings.tls.mode) == (True, "verify-full")
        for way in WAYS[:2]:
            assert await way(settings) == "groundwork"
        refused = parse(pasted.replace(str(real.authority.root_path), "system"), pooler="transaction")
        for way in WAYS[:2]:
            with pytest.raises(GroundworkError):
                await way(refused, HASTY)
