"""The application as a process: `uvicorn src.main:app` starts, refuses and serves as promised."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from src.config.version import VERSION

BACKEND = Path(__file__).parents[1]
SECRET = "p%@:/ é"
FORMS = (SECRET, quote(SECRET, safe=""), quote(SECRET), base64.b64encode(SECRET.encode()).decode())


def environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    # The configured backend/.env must not reach the process, so every variable that matters is given here.
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONWARNINGS": "default", **variables}


def run(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=BACKEND,
        env=environment(tmp_path, **variables),
        capture_output=True,
        text=True,
        timeout=120,
    )


def serve_once(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(tmp_path, "-m", "uvicorn", "src.main:app", "--port", "0", **variables)


def with_password(url: str, password: str) -> str:
    return re.sub(r"//([^:]*):[^@]*@", lambda match: f"//{match[1]}:{quote(password, safe='')}@", url)


@asynccontextmanager
async def serving(
    tmp_path: Path, url: str, **variables: str
) -> AsyncIterator[tuple[httpx.AsyncClient, list[str]]]:
    """A real `uvicorn src.main:app` on a free port: a client for it, and the lines it has written."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", "src.main:app", "--port", "0"),
        cwd=BACKEND,
        env=environment(tmp_path, DATABASE_URL=url, LOG_FORMAT="json", **variables),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        async with asyncio.timeout(120):
            while not (match := re.search(r"running on (http://[\d.:]+)", lines[-1] if lines else "")):
                line = (await process.stdout.readline()).decode()
                assert line, lines
                lines.append(line)
        async with httpx.AsyncClient(base_url=match[1]) as client:
            yield client, lines
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(120):
            lines += (await process.stdout.read()).decode().splitlines()
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_importing_the_application_reads_and_starts_nothing(tmp_path: Path) -> None:
    code = (
        "import os, threading; os.environ.clear(); before = set(os.listdir('/proc/self/fd'));"
        "import src.main; assert 'app' not in vars(src.main);"
        "assert set(os.listdir('/proc/self/fd')) == before; assert threading.active_count() == 1"
    )
    done = run(tmp_path, "-c", code, DATABASE_URL="not a URL at all")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_bad_configuration_names_every_fault_and_ends_with_3(tmp_path: Path) -> None:
    url = f"postgresql://u:{quote(SECRET, safe='')}@h/d?sslmode=perhaps"
    done = serve_once(tmp_path, DATABASE_URL=url, DATABASE_POOL_SIZE="many", LOG_LEVEL="loud")
    assert done.returncode == 3
    [event] = [json.loads(line) for line in done.stdout.splitlines()]
    assert (event["event"], event["severity"], event["logger"]) == (
        "startup.refused",
        "ERROR",
        "groundwork.process",
    )
    assert [fault["variable"] for fault in event["faults"]] == [
        "DATABASE_URL",
        "DATABASE_POOL_SIZE",
        "LOG_LEVEL",
    ]
    assert done.stderr == ""
    for form in FORMS:
        assert form not in done.stdout + done.stderr


@pytest.fixture(params=["wrong password", "unknown database"])
def refused_url(request: pytest.FixtureRequest, database_url: str) -> Iterator[str]:
    if request.param == "wrong password":
        yield with_password(database_url, SECRET)
    else:
        yield re.sub(r"/[^/]*$", "/there_is_no_such_database", database_url)


def test_a_database_that_refuses_ends_the_start_with_3_and_a_sentence(
    tmp_path: Path, refused_url: str
) -> None:
    done = serve_once(tmp_path, DATABASE_URL=refused_url, LOG_FORMAT="json")
    assert done.returncode == 3
    said = [line for line in done.stdout.splitlines() if '"level":"error"' in line]
    assert len(said) == 2, said
    assert "DATABASE_URL" in said[0]
    assert "Application startup failed" in said[1]
    assert "Traceback" not in done.stdout
    assert done.stderr == ""
    password = re.sub(r".*//[^:]*:([^@]*)@.*", r"\1", refused_url)
    for form in (*FORMS, password):
        assert form not in done.stdout + done.stderr


async def test_it_serves_over_a_real_connection_and_leaves_when_told(
    tmp_path: Path, database_url: str
) -> None:
    async with serving(tmp_path, database_url, MAX_BODY_BYTES="2048") as (client, lines):
        ready = await client.get("/readyz")
        head = await client.head("/health")

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(10):
                yield b"x" * 1000

        announced = await client.post("/health", content=b"x" * 4096)
        chunked = await client.post("/health", content=chunks())
        after = await client.get("/livez")
    assert ready.json() == {"status": "ready", "database": "up", "reason": None}
    assert head.status_code == 200
    assert int(head.headers["content-length"]) > 0
    assert (announced.status_code, announced.headers["connection"]) == (413, "close")
    assert chunked.status_code == 405
    assert after.status_code == 200
    assert "Finished server process" in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((BACKEND / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == VERSION


def test_a_weak_sslmode_asked_for_by_name_is_warned_about_at_the_start(tmp_path: Path, database_url: str):
    # This server has no TLS, so the start is refused, after the warning.
    done = serve_once(tmp_path, DATABASE_URL=f"{database_url}?sslmode=require", LOG_FORMAT="json")
    assert done.returncode == 3
    assert "configuration.weak" in done.stdout
    assert "does not verify the server" in done.stdout
    assert "refused to speak TLS" in done.stdout


# fastapi-cli


def entry_point() -> str:
    """What `fastapi dev` and `fastapi run` start in backend/."""
    configured = tomllib.loads((BACKEND / "pyproject.toml").read_text())
    return str(configured["tool"]["fastapi"]["entrypoint"])


def test_the_entry_point_is_listed_and_not_created_by_looking(tmp_path: Path) -> None:
    module, _, name = entry_point().partition(":")
    looked = run(tmp_path, "-c", f"import {module} as m; print({name!r} in dir(m), {name!r} in vars(m))")
    assert (looked.stdout, looked.stderr) == ("True False\n", "")


def test_the_entry_point_without_settings_ends_with_the_exit_code_of_the_configuration(
    tmp_path: Path,
) -> None:
    """By `fastapi run` where fastapi-cli is installed, else by uvicorn, which it starts."""
    words = ("fastapi", "run") if find_spec("fastapi_cli") else ("uvicorn", entry_point())
    ended = run(tmp_path, "-m", *words, "--port", "0", DATABASE_URL="nonsense")
    assert ended.returncode == 3
    assert "DATABASE_URL" in ended.stdout
