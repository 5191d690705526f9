"""Imports at start-up: outside garbage collection, and without optional packages. `python -m benchmarks.startup`
measures both."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def for_good() -> Iterator[None]:
    """Freeze all objects made by the imports inside: they live as long as the process.

    Collecting them took a sixth of a worker's CPU at start, and each full collection later blocked every request for
    80 to 140 ms.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def without(name: str) -> Iterator[None]:
    """Hide an optional package from the imports inside, unless it is already loaded."""
    if name in sys.modules:
        yield
        return
    # The documented way to make an import fail.
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
