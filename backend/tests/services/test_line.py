"""The line in front of the connections is fair, and tells at once whom it would tell too late."""

from __future__ import annotations

import asyncio
import time

import pytest

from src.services.line import Forsaken, Line, NoProspect


async def work(line: Line, seconds: float, done: list[int], number: int) -> None:
    await line.enter(60)
    try:
        await asyncio.sleep(seconds)
        done.append(number)
    finally:
        line.leave()


async def test_places_are_given_in_the_order_of_arrival() -> None:
    line, done = Line(1, 60), list[int]()
    await asyncio.gather(*(work(line, 0, done, number) for number in range(50)))
    assert done == list(range(50))
    assert (line.inside, line.waiting, line.full) == (0, 0, False)


async def test_who_would_not_get_in_before_his_patience_ends_is_told_so_at_once() -> None:
    """One leaves every tenth of a second, for longer than anybody is patient: few can have a prospect.

    Some two dozen have one. Only a machine that makes seconds of each tenth would leave none.
    """
    line, done = Line(1, 3.0), list[int]()
    until = asyncio.get_running_loop().time() + 3.5
    standing = []
    while asyncio.get_running_loop().time() < until:
        if line.waiting < 2:
            standing.append(asyncio.create_task(work(line, 0.1, done, 0)))
        await asyncio.sleep(0.01)
    waiting = [asyncio.create_task(work(line, 0.1, done, number)) for number in range(200)]
    await asyncio.sleep(0)
    turned_away = [task for task in waiting if task.done()]
    assert 100 < len(turned_away) < 200
    assert all(isinstance(task.exception(), NoProspect) for task in turned_away)
    await asyncio.gather(*standing, *waiting, return_exceptions=True)
    # Some of those that were let into the line got in; how many is the machine's affair.
    assert any(task.exception() is None for task in waiting if task not in turned_away)
    assert (line.inside, line.waiting) == (0, 0)


async def test_a_burst_is_not_judged_by_its_first_steps() -> None:
    line, done = Line(1, 60), list[int]()
    first = [asyncio.create_task(work(line, 0.3, done, number)) for number in range(3)]
    await asyncio.sleep(0.7)
    await asyncio.gather(*first, *(work(line, 0, done, number) for number in range(500)))
    assert len(done) == 503


async def test_a_burst_that_goes_through_quickly_is_let_in_as_a_whole() -> None:
    line, done = Line(4, 60), list[int]()
    await asyncio.gather(*(work(line, 0, done, number) for number in range(2000)))
    assert len(done) == 2000


async def test_what_was_slow_before_is_not_held_against_those_who_come_later() -> None:
    line, done = Line(1, 2.0), list[int]()
    await asyncio.gather(*(work(line, 0.8, done, number) for number in range(3)), return_exceptions=True)
    done.clear()
    await asyncio.gather(*(work(line, 0, done, number) for number in range(100)))
    assert len(done) == 100


async def test_one_pause_of_the_machine_turns_nobody_away() -> None:
    """What all of them met, between two that left, is no pace: the places would empty in a moment."""
    patience = 2.0
    line = Line(4, patience)
    for _ in range(4):
        await line.enter(60)
    waiting = [asyncio.create_task(line.enter(60)) for _ in range(6)]
    await asyncio.sleep(0)
    # The pace is judged only once the line has stood for as long as anybody is patient.
    until = time.monotonic() + 1.05 * patience
    while time.monotonic() < until:
        line.leave()
        waiting.append(asyncio.create_task(line.enter(60)))
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    line.leave()
    newcomer = asyncio.create_task(line.enter(60))
    await asyncio.sleep(0)
    assert not newcomer.done()
    while line.waiting:
        line.leave()
        await asyncio.sleep(0)
    await asyncio.gather(*waiting, newcomer)
    assert line.inside == 4


async def test_who_hangs_up_in_the_line_leaves_no_trace() -> None:
    line = Line(1, 60)
    await line.enter(60)
    waiting = [asyncio.create_task(line.enter(60)) for _ in range(20)]
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    line.leave()
    assert (line.inside, line.waiting, line.full) == (0, 0, False)


async def test_who_hangs_up_in_the_moment_of_his_turn_passes_it_on() -> None:
    line = Line(1, 60)
    await line.enter(60)
    first, second = (asyncio.create_task(line.enter(60)) for _ in range(2))
    await asyncio.sleep(0)
    line.leave()
    first.cancel()
    await asyncio.wait([first])
    await asyncio.wait_for(second, 60)
    line.leave()
    assert (line.inside, line.waiting, line.full) == (0, 0, False)


async def test_no_time_left_is_no_prospect() -> None:
    line = Line(1, 60)
    await line.enter(60)
    with pytest.raises(NoProspect):
        await line.enter(-1)


async def test_who_is_forsaken_in_the_line_goes_at_once_and_nobody_else_does() -> None:
    line = Line(1, 60)
    await line.enter(60)
    inside = asyncio.current_task()
    assert inside is not None
    first, forsaken, last = (asyncio.create_task(line.enter(60)) for _ in range(3))
    await asyncio.sleep(0)
    line.forsake(forsaken)
    line.forsake(forsaken)
    # Who is inside works, whoever waits for it or not.
    line.forsake(inside)
    with pytest.raises(Forsaken):
        await forsaken
    assert (line.inside, line.waiting) == (1, 2)
    for task in (first, last):
        line.leave()
        await task
    assert inside.cancelling() == 0
    line.leave()
    assert (line.inside, line.waiting, line.full) == (0, 0, False)


async def test_who_is_forsaken_just_when_his_turn_has_come_keeps_it_and_gives_it_on() -> None:
    line = Line(1, 60)
    await line.enter(60)
    forsaken, last = (asyncio.create_task(line.enter(60)) for _ in range(2))
    await asyncio.sleep(0)
    line.leave()
    line.forsake(forsaken)
    await forsaken
    line.leave()
    await last
    line.leave()
    assert (line.inside, line.waiting, line.full) == (0, 0, False)


async def test_whoever_keeps_others_back_is_told_once_that_somebody_has_left() -> None:
    line, told = Line(2, 60), list[int]()
    for _ in range(2):
        await line.enter(60)
    line.on_leaving = lambda: told.append(1)
    line.leave()
    line.leave()
    assert told == [1]
