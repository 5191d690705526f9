"""The description in OpenAPI is true: schemathesis asks a running service whatever the description allows, and forbids.

All of its checks, also along the links between operations, within a time box; the service is a process of its own,
on PostgreSQL, as the role that it connects as.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import httpx

from asking import served
from src.config.settings import load_settings
from src.services.signing import SigningKeys

SECONDS = int(os.environ.get("GROUNDWORK_FUZZ_SECONDS", "25"))
# One seed, so that a run that fails fails again; any other number is as good (`make fuzz SEED=…`).
SEED = int(os.environ.get("GROUNDWORK_FUZZ_SEED", "20261122"))
ACCEPTED = ["2xx", "3xx", "401", "404", "409", "412", "429"]
REJECTED = ["400", "401", "404", "405", "409", "412", "415", "422", "428", "429"]
# A condition that does not hold is no fault of the description's: 412 is right for a request that is as described, and
# comes before the body is read. Whether a batch, or lines, can be done depends on more than their schema says; so does
# what an address is, how many bytes a password has, and which are too common. Two operations would end the token that
# the others need.
ENDING = ("delete_me", "log_out_everywhere")
CONFIGURATION = f"""
hooks = "{Path(__file__).with_name("schemathesis_hooks.py")}"

[checks.positive_data_acceptance]
expected-statuses = {ACCEPTED}

[checks.negative_data_rejection]
expected-statuses = {REJECTED}

[[operations]]
include-operation-id = ["batch_tasks", "import_tasks"]
checks.positive_data_acceptance.expected-statuses = {[*ACCEPTED, "400", "422"]}

[[operations]]
include-operation-id = ["sign_up", "log_in", "update_me"]
checks.positive_data_acceptance.expected-statuses = {[*ACCEPTED, "403", "422"]}

[[operations]]
include-operation-id = {list(ENDING)}
enabled = false
"""


def told(output: str) -> str:
    """What it found, without the long texts that it found it with."""
    return "\n".join(line if len(line) < 400 else line[:300] + " …" for line in output.splitlines()[-200:])


def test_whatever_the_description_allows_or_forbids_the_service_keeps_to_it(
    app_database_url: str, database_url: str, tmp_path: Path
) -> None:
    token = SigningKeys.from_settings(load_settings()).mint(uuid4(), "ana@example.com", 3600)
    with served(database_url=app_database_url, database_migration_url=database_url) as service:
        (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("schemathesis")),
                "run",
                f"{service.address}/openapi.json",
                "--checks=all",
                "--phases=examples,coverage,fuzzing,stateful",
                f"--max-time={SECONDS}",
                "--continue-on-failure",
                "--request-timeout=60",
                "--no-color",
                f"--seed={SEED}",
            ],
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "HOME": os.environ["HOME"],
                "TERM": "dumb",
                "COLUMNS": "120",
                "GROUNDWORK_TOKEN": token,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS + 120,
        )
        assert done.returncode == 0, told(done.stdout) + done.stderr[-2_000:]
        # It is still alive, and nothing of what it was asked was a fault of its own.
        assert httpx.get(f"{service.address}/readyz").status_code == 200
        assert '"level":"error"' not in service.log
        # It was let in, and not turned away at every door. How far it gets is the machine's affair: that each
        # door keeps out who has no token is held by `test_contract.py`.
        let_in: set[tuple[str, str]] = set()
        for line in service.log.splitlines():
            if '"event":"request"' in line:
                event = json.loads(line)
                if event["status"] < 300:
                    let_in.add((event["method"], event["route"]))
        assert len(let_in) >= 6, let_in
