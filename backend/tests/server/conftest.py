"""Supervisors with workers of the tiny application in `serving.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from supervised import SCRIPT, Service


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """`service(workers=2)`: a supervisor with these settings, not yet started; `environment=` for the application."""
    made: list[Service] = []

    def make(environment: dict[str, str] | None = None, script: Path = SCRIPT, **settings: Any) -> Service:
        made.append(Service(tmp_path, settings, environment or {}, script))
        return made[-1]

    yield make
    for one in made:
        one.close()
