"""Hung workers are noticed by their missing heartbeats, killed and replaced. Real processes and real signals."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

import pytest

from supervised import Service
from waiting import until

Make = Callable[..., Service]
HEARTBEAT_SECONDS = 3.0


def test_stopped_only_worker_is_killed_and_replaced(service: Make) -> None:
    one = service(worker_heartbeat_seconds=HEARTBEAT_SECONDS).start().serving()
    [hung] = one.workers()
    os.kill(hung, signal.SIGSTOP)
    assert one.ask("/readyz")[0] == 200  # By its successor.
    assert hung not in one.workers()
    [event] = one.events("worker.heartbeat_timeout")
    assert event["worker_pid"] == hung
    assert one.events("worker.restarted")[0]["reason"] == "no heartbeat"


def test_worker_with_blocked_loop_is_killed_and_replaced(service: Make) -> None:
    one = service(worker_heartbeat_seconds=HEARTBEAT_SECONDS).start().serving()
    [hung] = one.workers()
    blocked = one.connect()
    blocked.request("POST", "/block?seconds=600")
    with contextlib.suppress(OSError):
        blocked.getresponse()  # Ends with the process.
    assert one.ask("/readyz")[0] == 200
    assert hung not in one.workers()


def test_worker_blocked_for_less_than_the_timeout_is_kept(service: Make) -> None:
    one = service(worker_heartbeat_seconds=30).start().serving()
    before = one.workers()
    blocked = one.connect()
    blocked.request("POST", "/block?seconds=3")
    assert blocked.getresponse().status == 200
    assert one.workers() == before
    assert not one.events("worker.heartbeat_timeout")


@pytest.mark.parametrize("first", ["supervisor", "worker"])
def test_stop_of_the_whole_service_restarts_no_worker(service: Make, first: str) -> None:
    one = service(worker_heartbeat_seconds=HEARTBEAT_SECONDS, workers=2).start().serving(workers=2)
    before = sorted(one.workers())
    processes = [one.supervisor_pid, *before]
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2 * HEARTBEAT_SECONDS)
    for pid in processes if first == "supervisor" else reversed(processes):
        os.kill(pid, signal.SIGCONT)
    until(lambda: one.ask("/readyz")[0] == 200)
    time.sleep(HEARTBEAT_SECONDS)
    assert sorted(one.workers()) == before
    assert not one.events("worker.heartbeat_timeout")


def test_kill_9_of_the_supervisor_ends_a_worker_whose_loop_is_blocked(service: Make) -> None:
    one = service(shutdown_timeout_seconds=0).start().serving()
    one.children()
    blocked = one.connect()
    blocked.request("POST", "/block?seconds=600")
    time.sleep(0.5)
    one.signal(signal.SIGKILL)
    one.ended()
    until(lambda: not one.children())
