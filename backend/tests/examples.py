"""How many examples hypothesis makes for the tests that take seconds."""

from __future__ import annotations

import os
from typing import Final

IN_A_TEST_RUN: Final = 4
"""The part of them that one run makes. Each run has other ones, and `make fuzz` makes all, round after round."""


def examples(count: int) -> int:
    return count if os.environ.get("GROUNDWORK_FUZZ_ROUND") else count // IN_A_TEST_RUN
