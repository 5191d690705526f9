"""SIGHUP: a renewal of the workers never makes the service worse."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from src.services.signing import new_key
from supervised import Service
from waiting import until

Make = Callable[..., Service]


def test_renewal_whose_worker_is_not_ready_keeps_the_ready_workers(service: Make, tmp_path: Path) -> None:
    one = service(workers=2, environment={"TEST_RENEWAL_SECONDS": "20"}).start().serving(2)
    before = sorted(one.workers())
    (tmp_path / "start").write_text("unready")
    one.signal(signal.SIGHUP)
    until(lambda: one.events("workers.renewal_failed"), what=lambda: one.log)
    until(lambda: sorted(one.workers()) == before)
    assert "not ready within" in one.events("workers.renewal_failed")[0]["reason"]
    (tmp_path / "start").write_text("ok")
    one.signal(signal.SIGHUP)
    until(lambda: one.events("workers.renewed"), what=lambda: one.log)
    assert not set(one.workers()) & set(before)


def test_renewal_of_workers_that_are_not_ready_needs_no_readiness(service: Make, tmp_path: Path) -> None:
    (tmp_path / "start").write_text("unready")
    one = service().start().serving()
    before = one.workers()
    one.signal(signal.SIGHUP)
    until(lambda: one.events("workers.renewed"), what=lambda: one.log)
    assert not set(one.workers()) & set(before)


def test_sighup_during_a_renewal_is_done_afterwards(service: Make) -> None:
    one = service().start().serving()
    for _ in range(3):
        one.signal(signal.SIGHUP)
        until(lambda: one.events("workers.renewal_started"))
    until(lambda: len(one.events("workers.renewed")) == 2, what=lambda: one.log)
    assert len(one.events("workers.renewal_started")) == 2
    assert one.events("workers.renewal_queued")
    assert one.ask("/readyz")[0] == 200


def test_reload_with_a_wrong_database_port_keeps_the_workers_that_serve(
    service: Make, tmp_path: Path, app_database_url: str, database_url: str
) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "database_url").write_text(app_database_url)
    environment = {"TEST_APP": "product", "SECRETS_DIR": str(secrets), "TEST_RENEWAL_SECONDS": "25"}
    one = service(
        workers=2, environment=environment, database_migration_url=database_url, signing_keys=new_key()
    )
    one.start().serving()
    # Each worker has read the address and connected.
    until(lambda: len(one.events("database.up")) == 2, what=lambda: one.log)
    before = sorted(one.workers())
    port = app_database_url.rsplit(":", 1)[1].split("/")[0]
    (secrets / "database_url").write_text(app_database_url.replace(f":{port}/", ":1/"))
    one.signal(signal.SIGHUP)
    while not one.events("workers.renewal_failed"):
        assert one.ask("/readyz")[0] == 200, one.log
        assert one.process.poll() is None
    until(lambda: sorted(one.workers()) == before, what=lambda: one.log)
    assert {one.ask("/readyz")[0] for _ in range(20)} == {200}
