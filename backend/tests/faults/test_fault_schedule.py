"""The schedule is a pure function, and what is printed can be read back."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from tests.faults.schedule import KINDS, chosen, read, schedule


def test_a_schedule_follows_from_its_seed_and_its_kinds_alone() -> None:
    first = list(itertools.islice(schedule(7, list(KINDS)), 200))
    again = list(itertools.islice(schedule(7, reversed(list(KINDS))), 200))
    assert first == again
    assert first != list(itertools.islice(schedule(8, list(KINDS)), 200))


def test_every_round_has_every_kind_once() -> None:
    assert len(KINDS) >= 14
    one = list(itertools.islice(schedule(3, list(KINDS)), len(KINDS)))
    assert {fault.kind for fault in one} == set(KINDS)
    for fault in one:
        low, high = KINDS[fault.kind].hold
        assert low <= fault.hold <= high


def test_pairs_leave_the_rest_of_a_schedule_as_it_is() -> None:
    alone = list(itertools.islice(schedule(4, list(KINDS)), 100))
    paired = list(itertools.islice(schedule(4, list(KINDS), pairs=True), 100))
    assert [replace(fault, beside="") for fault in paired] == alone
    beside = [fault for fault in paired if fault.beside]
    assert len(beside) > 20
    assert all(KINDS[fault.kind].database and not KINDS[fault.beside].database for fault in beside)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_printed_schedule_is_read_back_as_it_was(pairs: bool) -> None:
    faults = list(itertools.islice(schedule(1, list(KINDS), pairs=pairs), 50))
    assert read("# seed 1\n\n" + "\n".join(map(str, faults))) == faults


def test_kinds_are_chosen_by_name_or_by_their_beginning() -> None:
    assert chosen([]) == list(KINDS)
    assert chosen(["pg-kill"]) == ["pg-kill", "pg-kill-backend"]
    assert {name.partition("-")[0] for name in chosen(["net", "db"])} == {"net", "db"}
    with pytest.raises(ValueError, match="no kinds of fault: nonsense"):
        chosen(["nonsense"])
