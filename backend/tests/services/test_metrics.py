"""The numbers of several workers are one exposition."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

BACKEND = Path(__file__).parents[2]

WORKER = """
import sys
from datetime import UTC, datetime
from src.services.metrics import Metrics
from src.services.vitality import Observation, PoolObservation, SchemaObservation

metrics = Metrics("1.2.3")
assert metrics.multiprocess
ready = sys.argv[1] == "ready"
metrics.request("GET", "/livez", 200, 0.01)
metrics.wait(0.5)
metrics.error("connection-lost")
metrics.retry("tasks.read")
metrics.statement("tasks.read", 0.1, "ok")
metrics.observe(Observation(
    status="up" if ready else "down", ready=ready, reason=None, evidence=None, evidence_at=None,
    evidence_age_seconds=3.0 if ready else 7.0, mode="active",
    pool=PoolObservation(size=4, open=2, in_use=1, waiting=0),
    schema=SchemaObservation("current", "1", "1"), server_version=None, read_only=False,
))
print(metrics.render()[0].decode())
"""


def run_worker(directory: Path, kind: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, kind],
        cwd=BACKEND,
        env={"PATH": os.environ["PATH"], "PROMETHEUS_MULTIPROC_DIR": str(directory)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_counters_add_up_over_workers_and_gauges_combine_by_their_meaning(tmp_path: Path) -> None:
    run_worker(tmp_path, "ready")
    text = run_worker(tmp_path, "not ready")
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["http_requests_total", "/livez", "200", "GET"] == 2
    assert found["groundwork_pool_wait_seconds_count",] == 2
    assert found["groundwork_database_errors_total", "connection-lost"] == 2
    assert found["groundwork_database_retries_total", "tasks.read"] == 2
    assert found["groundwork_database_statement_seconds_count", "ok", "tasks.read"] == 2
    assert found["groundwork_pool_size",] == 8
    assert found["groundwork_pool_in_use",] == 2
    assert found["groundwork_health_state", "up"] == 1
    assert found["groundwork_health_state", "down"] == 1
    assert found["groundwork_ready",] == 0
    assert found["groundwork_health_evidence_age_seconds",] == 7
    assert all("pid" not in line for line in text.splitlines() if line.startswith(("groundwork", "http")))


def test_a_worker_that_has_only_just_made_its_file_hides_no_number(tmp_path: Path) -> None:
    (tmp_path / "counter_1.db").touch()
    (tmp_path / "gauge_livesum_1.db").touch()
    assert 'http_requests_total{method="GET",route="/livez",status="200"} 1.0' in run_worker(
        tmp_path, "ready"
    )
