"""A start loads what it runs, and nothing that it has no use for."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from src.config.loading import for_good, without

BACKEND = Path(__file__).resolve().parents[2]


def loaded_by(program: str) -> set[str]:
    """The packages that are there after it."""
    ending = "; import json, sys; print(json.dumps([*sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", program + ending], cwd=BACKEND, capture_output=True, check=True
    )
    return set(json.loads(done.stdout))


def test_a_worker_loads_nothing_that_serving_has_no_use_for() -> None:
    loaded = loaded_by("import src.server.worker, src.main")
    assert loaded >= {"fastapi", "uvicorn", "sqlmodel", "structlog", "src.api.tasks"}
    assert (
        loaded & {"alembic", "mako", "rich", "pygments", "src.embedded.server", "src.server.supervisor"}
        == set()
    )


def test_a_supervisor_loads_nothing_of_the_product() -> None:
    loaded = loaded_by("import src.server.supervisor")
    assert loaded >= {"structlog", "pydantic_settings", "src.config.settings"}
    assert (
        loaded & {"fastapi", "starlette", "uvicorn", "sqlalchemy", "sqlmodel", "asyncpg", "alembic", "rich"}
        == set()
    )


def test_what_is_loaded_for_good_is_not_searched_for_garbage() -> None:
    before = gc.get_freeze_count()
    try:
        with for_good():
            assert not gc.isenabled()
            kept = [[] for _ in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(kept)
    finally:
        gc.unfreeze()


def test_a_package_left_out_is_missing_inside_only_and_never_taken_from_who_has_it() -> None:
    with without("this"), pytest.raises(ImportError):
        import this  # noqa: F401
    assert "this" not in sys.modules
    with without("json"):
        import json as again
    assert again is json
