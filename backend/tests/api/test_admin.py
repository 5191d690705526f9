"""ADMIN_PORT: what only insiders should see is on a listener of its own, and gone from the public port."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from asking import served, well
from postgres_server import PostgresServer
from src.api.health import Health
from src.embedded.roles import APPLICATION
from waiting import eventually

if TYPE_CHECKING:
    from tests.api.conftest import MakeApp, Serve


def beside(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app.state.admin), base_url="http://inside")


@pytest.mark.parametrize("environment", ["development", "production"])
async def test_with_an_admin_port_the_public_one_shows_no_numbers_and_no_details(
    make_app: MakeApp, serve: Serve, environment: str
) -> None:
    app = make_app(admin_port=0, environment=environment, health_details=None)
    async with serve(app) as public, beside(app) as inside:
        assert (await public.get("/metrics")).status_code == 404
        assert (await well(public)).json() == {"status": "pass"}
        assert "/metrics" not in (await public.get("/openapi.json")).json()["paths"]
        for client in (public, inside):
            assert (await client.get("/livez")).status_code == 200
            assert (await client.get("/readyz")).json()["status"] == "ready"
        said = Health.model_validate((await inside.get("/health")).json())
        assert said.checks is not None
        numbers = (await inside.get("/metrics")).text
        assert 'http_requests_total{method="GET",route="/livez",status="200"} 2.0' in numbers
        assert (await inside.get("/v1/tasks")).status_code == 404


async def test_details_that_are_switched_off_are_off_everywhere(make_app: MakeApp, serve: Serve) -> None:
    app = make_app(admin_port=0, health_details=False)
    async with serve(app) as public, beside(app) as inside:
        assert (await well(public)).json() == (await well(inside)).json() == {"status": "pass"}


async def test_with_two_workers_the_admin_port_sums_both_and_drains_with_them(
    postgres: PostgresServer, database_url: str
) -> None:
    name = database_url.rsplit("/", 1)[1]
    with served(
        database_url=postgres.url_for(name, role=APPLICATION),
        database_migration_url=database_url,
        workers="2",
        admin_port="0",
        drain_grace_seconds="60",
    ) as service:
        (banner,) = [
            json.loads(line) for line in service.log.splitlines() if '"event":"service.ready"' in line
        ]
        inside = str(banner["metrics"]).removesuffix("/metrics")
        assert inside != service.address
        assert banner["health"] == f"{inside}/health"
        # Each request on a connection of its own, so that both workers are met.
        async with httpx.AsyncClient(limits=httpx.Limits(max_keepalive_connections=0), timeout=30) as client:

            async def counted() -> set[str]:
                text = (await client.get(f"{inside}/metrics")).text
                return {line for line in text.splitlines() if "openapi" not in line and '"unmatched"' in line}

            async def both_serve() -> bool:
                return "groundwork_pool_size 8.0" in (await client.get(f"{inside}/metrics")).text

            async def all_are_counted() -> bool:
                return expected in await counted()

            async def is_well() -> bool:
                # A loop that was held up on a busy machine is told for ten seconds.
                return (await client.get(f"{service.address}/health")).json() == {"status": "pass"}

            async def drains() -> bool:
                return (await client.get(f"{inside}/readyz")).json()["reason"] == "draining"

            await eventually(both_serve, lambda: service.log)
            assert (await client.get(f"{service.address}/metrics")).status_code == 404
            for _ in range(39):
                assert (await client.get(f"{service.address}/nowhere")).status_code == 404
            expected = 'http_requests_total{method="GET",route="unmatched",status="404"} 40.0'
            # Each counts what it has answered already.
            await eventually(all_are_counted)
            for _ in range(10):
                assert expected in await counted()
            assert (await client.get(f"{inside}/health")).json()["checks"]
            await eventually(is_well)
            os.kill(service.pid, signal.SIGTERM)
            await eventually(drains, lambda: service.log)
            os.kill(service.pid, signal.SIGINT)  # It need not wait for the rest of its grace.
