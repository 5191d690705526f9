"""How a process of ours loads what it runs: what stays for good is not searched for garbage, and what nobody uses
stays out. What each is worth is measured by `python -m benchmarks.startup`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def for_good() -> Iterator[None]:
    """Around imports: all that they make lives as long as the process, so the garbage collector leaves it alone.

    Searching it in vain took a sixth of a worker's CPU until it served, and each full search of a running worker
    held up every request for 80 to 140 ms.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def without(name: str) -> Iterator[None]:
    """Inside, a package that a library imports only if it is there is not there, unless somebody has loaded it."""
    if name in sys.modules:
        yield
        return
    # What the import system documents for "not to be found".
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
