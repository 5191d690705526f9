"""R7: the wall clock steps by an hour under a running service, forward and back, and nothing but moments changes.

libfaketime stands between the service's processes and the clock; the monotonic clock it leaves alone, as a step does.
"""

from __future__ import annotations

import asyncio
import glob
import re
import time
from datetime import timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from asking import TASKS, Caller, served
from postgres_server import PostgresServer
from src.embedded.roles import APPLICATION
from src.services.signing import SigningKeys, new_key, seeds

pytestmark = pytest.mark.debian
KEY = new_key()


async def figures(client: httpx.AsyncClient) -> dict[str, float]:
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    return {
        f"{sample.name} {sample.labels.get('le', '')}": sample.value
        for family in families
        for sample in family.samples
        if sample.name.endswith(("_sum", "_age_seconds"))
    }


async def test_r7_clock_steps_of_an_hour_change_no_duration(
    postgres: PostgresServer, database_url: str, tmp_path: Path
) -> None:
    name = database_url.rsplit("/", 1)[1]
    (library,) = glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")
    clock = tmp_path / "clock"
    clock.write_text("+0\n")
    operator = await asyncpg.connect(database_url)
    backends = "SELECT array_agg(pid ORDER BY pid) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()"
    keys = SigningKeys(seeds(KEY))
    with served(
        database_url=postgres.url_for(name, role=APPLICATION),
        database_migration_url=database_url,
        signing_keys=KEY,
        keep_alive_seconds="120",
        header_timeout_seconds="120",
        ld_preload=library,
        faketime_timestamp_file=str(clock),
        faketime_no_cache="1",
        faketime_dont_fake_monotonic="1",
    ) as service:
        async with httpx.AsyncClient(base_url=service.address, timeout=60) as client:
            ana = Caller(client, keys)
            ana.headers = {"authorization": f"Bearer {keys.mint(ana.id, None, 4 * 3600)}"}
            path = f"{TASKS}/{(await ana.create())['id']}"
            host, _, port = service.address.removeprefix("http://").rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(
                f"GET {path} HTTP/1.1\r\nHost: a\r\n".encode()
            )  # A head that goes on after the steps.
            before = await operator.fetchval(backends, name)
            began = time.monotonic()

            async def offset() -> timedelta:
                said = parsedate_to_datetime((await client.get("/livez")).headers["date"])
                return said - parsedate_to_datetime(
                    time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime())
                )

            for step, hours in (("+3600", 1), ("-3600", -1), ("+0", 0)):
                clock.write_text(f"{step}\n")
                await asyncio.sleep(1.5)
                # It did step, for the service as for its Date header. A token is good for longer than the step here:
                # its expiry is a moment, and goes by this clock.
                assert abs(await offset() - timedelta(hours=hours)) < timedelta(minutes=2)
                for _ in range(20):
                    answer = await ana("GET", path)
                    assert answer.status_code == 200
                ready = await client.get("/readyz")
                assert (ready.status_code, ready.json()["reason"]) == (200, None)
                health: dict[str, Any] = (await client.get("/health")).json()
                passed = time.monotonic() - began + 60
                assert health["uptime_seconds"] < passed
                assert 0 <= health["checks"]["database:connectivity"][0]["evidence_age_seconds"] < passed
                assert 0 <= health["checks"]["event_loop:lag"][0]["observedValue"] < passed
                assert all(0 <= value < 100 * passed for value in (await figures(client)).values())
            writer.write(b"\r\n")
            assert b" 401 " in await asyncio.wait_for(reader.readline(), 60)
            writer.transport.abort()
            # No connection to the database was given up, and no statement thought late.
            assert await operator.fetchval(backends, name) == before
            durations = [float(found) for found in re.findall(r'"duration_ms":([-0-9.]+)', service.log)]
            assert len(durations) > 60
            assert all(0 <= milliseconds < 60_000 for milliseconds in durations)
            assert service.log.count("database.down") == 0
    await operator.close()
