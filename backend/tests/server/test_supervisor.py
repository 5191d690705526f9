"""The process model, with real processes and real signals: start, serve, fall, renew, drain, stop.

The application is the tiny one of `serving.py`; the last tests put the embedded PostgreSQL behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import resource
import shlex
import shutil
import signal
import socket
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from processes import copy_program
from src.embedded.server import running_url
from supervised import SCRIPT, Service
from waiting import until

Make = Callable[..., Service]


# Starting


def test_the_banner_is_one_event_with_the_real_port_and_comes_once_it_answers(service: Make) -> None:
    one = service(workers=2).start().serving(workers=2)
    [event] = one.events("service.ready")
    assert event["service"] == f"http://127.0.0.1:{one.address[1]}"
    assert event["health"] == event["service"] + "/health"
    assert one.address[1] != 0
    one.signal(signal.SIGTERM)
    assert one.ended() == 0
    assert len(one.events("service.ready")) == 1


def test_a_worker_inherits_the_listeners_and_its_link_and_may_open_many_files(
    service: Make, tmp_path: Path
) -> None:
    canary = os.open(tmp_path / "canary", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(canary, True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    one = (
        service(workers=2)
        .start(
            close_fds=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard)),
        )
        .serving()
    )
    os.close(canary)
    facts = one.facts()
    assert [path for path in facts["descriptors"].values() if "canary" in path] == []
    assert facts["descriptor_limit"] == [65536 if hard == resource.RLIM_INFINITY else min(hard, 65536), hard]


def test_a_refused_database_ends_everything_with_3_and_one_line(service: Make) -> None:
    one = service(workers=2, environment={"TEST_START": "refused"}).start()
    assert one.ended() == 3
    events = [json.loads(line)["event"] for line in one.log.splitlines()]
    assert events == ["service.starting", "startup.refused", "service.draining", "service.stopped"]
    [event] = one.events("startup.refused")
    assert (event["reason"], event["worker"]) == ("authentication-failed", 0)


def test_a_bad_configuration_ends_everything_with_3_and_is_told_once(service: Make) -> None:
    one = service(workers=2, environment={"TEST_START": "configuration"}).start()
    assert one.ended() == 3
    [event] = one.events("startup.refused")
    assert all(json.loads(line) for line in one.log.splitlines())
    fault = {"variable": "DATABASE_URL", "problem": "is not set.", "remedy": "Set it."}
    assert (event["event"], event["faults"], event["severity"]) == ("startup.refused", [fault], "ERROR")


def test_exit_code_3_of_an_application_passes_through(service: Make) -> None:
    assert service(environment={"TEST_START": "exit"}).start().ended() == 3


def test_a_service_whose_log_is_not_read_serves_stops_and_reports_the_lost_lines(service: Make) -> None:
    """A pipe that nobody read froze the service after 289 requests, and its end too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reader, writer = os.pipe()
    environment = {
        "TEST_APP": "product",
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
        "LOG_LEVEL": "debug",
    }
    one = service(environment=environment, port=port).start(stdout=writer, stderr=writer)
    os.close(writer)

    def answered(count: int) -> int:
        """Responses to so many requests on one connection."""
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            request = b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Request-ID: " + b"x" * 128 + b"\r\n\r\n"
            found = 0
            for _ in range(count // 50):
                connection.sendall(request * 50)
                received = b""
                while received.count(b"HTTP/1.1 200") < 50 or not received.endswith(b"}"):
                    received += connection.recv(1 << 16)
                found += received.count(b"HTTP/1.1 200")
        return found

    def is_live() -> bool:
        with contextlib.suppress(OSError):
            return answered(50) == 50
        return False

    until(is_live)
    assert answered(15_000) == 15_000
    received = bytearray()

    def read() -> None:
        while data := os.read(reader, 1 << 16):
            received.extend(data)

    reading = threading.Thread(target=read)
    reading.start()
    until(lambda: b'"event":"log.dropped"' in received)
    one.signal(signal.SIGTERM)
    assert one.ended() == 0
    reading.join(60)
    os.close(reader)
    events = [json.loads(line) for line in received.splitlines()]
    lost = sum(event["count"] for event in events if event["event"] == "log.dropped")
    requests = sum(event["event"] == "request" for event in events)
    assert lost > 0
    assert requests + lost >= 15_050
    assert [event["event"] for event in events][-1] == "service.stopped"


def test_a_service_whose_log_is_never_read_ends_on_sigterm(service: Make) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x")
    os.set_blocking(writer, True)
    one = service(environment={"TEST_START": "ok"}).start(stdout=writer)
    until(one.workers)
    one.signal(signal.SIGTERM)
    assert one.ended() == 0
    os.close(writer)
    os.close(reader)


@pytest.mark.parametrize("how", ["broken", "kill"])
def test_a_start_that_keeps_failing_ends_with_1_after_a_few_attempts(service: Make, how: str) -> None:
    one = service(workers=2, environment={"TEST_START": how}).start()
    assert one.ended() == 1
    [event] = one.events("startup.failed")
    assert event["attempts"] == 3
    assert not one.events("service.ready")


def test_a_start_that_fails_once_is_repeated(service: Make, tmp_path: Path) -> None:
    (tmp_path / "start").write_text("kill once")
    one = service().start().serving()
    assert len(one.events("worker.start_failed")) == 1


def test_a_taken_port_is_said_in_one_line_and_ends_with_1(service: Make) -> None:
    first = service(workers=2).start().serving()
    for workers in (1, 2):
        second = service(port=first.address[1], workers=workers).start()
        assert second.ended() == 1
        [event] = map(json.loads, second.log.splitlines())
        assert event["event"] == "startup.refused"
        assert event["detail"].startswith(
            f"Cannot listen on 127.0.0.1:{first.address[1]} (HOST, PORT): another program"
        )


def test_an_address_of_another_machine_is_said_in_one_line_and_ends_with_1(service: Make) -> None:
    one = service(host="192.0.2.1").start()
    assert one.ended() == 1
    assert "HOST" in one.log
    assert len(one.log.splitlines()) == 1


def test_a_stop_during_the_start_ends_with_0(service: Make) -> None:
    one = service(environment={"TEST_START": "hang"}).start()
    until(lambda: "hanging" in one.log)
    one.signal(signal.SIGTERM)
    assert one.ended() == 0


# Serving


def test_answers_carry_a_date_and_no_server_name(service: Make) -> None:
    _, _, answer = service().start().serving().ask("/facts")
    assert answer.headers["date"]
    assert "server" not in answer.headers


def test_forwarded_headers_are_believed_only_from_trusted_proxies(service: Make) -> None:
    for proxies, expected in (((), "127.0.0.1"), (("127.0.0.1",), "203.0.113.9")):
        one = service(trusted_proxies=proxies).start().serving()
        connection = one.connect()
        connection.request("GET", "/facts", headers={"x-forwarded-for": "203.0.113.9"})
        assert json.loads(connection.getresponse().read())["client"] == expected
        connection.close()


def test_a_killed_supervisors_metrics_directory_is_taken_away_by_the_next(service: Make) -> None:
    first = service(workers=2).start().serving(workers=2)
    left = Path(first.facts()["environment"]["PROMETHEUS_MULTIPROC_DIR"])
    # Once it is dead, any supervisor that starts takes it away, also that of a test beside this one.
    assert left.is_dir()
    first.signal(signal.SIGKILL)
    first.ended()
    until(lambda: not first.children())
    service(workers=2).start().serving(workers=2)
    until(lambda: not left.exists())


def test_several_workers_share_a_fresh_metrics_directory_that_is_removed_at_the_end(service: Make) -> None:
    environment = {"PROMETHEUS_MULTIPROC_DIR": "/nowhere"}
    alone = service(environment=environment).start().serving()
    assert "PROMETHEUS_MULTIPROC_DIR" not in alone.facts()["environment"]
    one = service(workers=2, environment=environment).start().serving(workers=2)
    directory = Path(one.facts()["environment"]["PROMETHEUS_MULTIPROC_DIR"])
    assert directory.is_dir()
    fallen = one.workers()[0]
    for name in (f"gauge_livesum_{fallen}.db", f"counter_{fallen}.db"):
        (directory / name).touch()
    os.kill(fallen, signal.SIGKILL)
    until(lambda: not (directory / f"gauge_livesum_{fallen}.db").exists())
    assert (directory / f"counter_{fallen}.db").exists()
    one.signal(signal.SIGTERM)
    assert one.ended() == 0
    assert not directory.exists()


def test_connections_wait_in_one_queue_for_all_workers(service: Make) -> None:
    one = service(workers=2).start().serving(workers=2)
    workers = one.workers()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    until(lambda: all(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in workers))
    connections = [one.connect() for _ in range(64)]
    for connection in connections:
        connection.request("GET", "/facts")
    queues = waiting_at(one.address[1])
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    assert queues == [64]
    reached = [json.loads(connection.getresponse().read())["pid"] for connection in connections]
    assert set(reached) <= set(workers)


def test_idle_workers_do_not_wake_up_for_each_other(service: Make) -> None:
    """Voluntary context switches a second of each of 8 idle workers: a few heartbeats, whatever their number."""
    one = service(workers=8).start().serving()
    until(lambda: len(one.workers()) == 8)
    until(lambda: len({one.facts()["pid"] for _ in range(40)}) >= 4)
    workers = one.workers()
    time.sleep(1)
    before = [psutil.Process(pid).num_ctx_switches().voluntary for pid in workers]
    time.sleep(4)
    after = [psutil.Process(pid).num_ctx_switches().voluntary for pid in workers]
    switches = [(now - then) / 4 for then, now in zip(before, after, strict=True)]
    assert max(switches) < 15, switches


def waiting_at(port: int) -> list[int]:
    """How many connections wait in each queue of that port, as the kernel counts them."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [row for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"]
    return [int(row[4].partition(":")[2], 16) for row in listening]


# Falling


def test_a_killed_worker_is_replaced_and_the_other_goes_on(service: Make) -> None:
    one = service(workers=2).start().serving(workers=2)
    before = one.workers()
    os.kill(before[0], signal.SIGKILL)
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        assert one.ask("/readyz")[0] == 200
    until(lambda: len(set(one.workers()) - {before[0]}) == 2)
    assert before[1] in one.workers()
    until(lambda: len({one.facts()["pid"] for _ in range(20)}) == 2)
    assert one.events("worker.restarted")[0]["reason"] == "killed by SIGKILL"


def test_a_worker_that_falls_while_the_database_refuses_everybody_takes_nobody_along(
    service: Make, tmp_path: Path
) -> None:
    """A password is rotated, and a worker falls meanwhile: at a start that ends with 3, at run time it is an outage."""
    one = service(workers=2).start().serving(workers=2)
    fallen, other = one.workers()
    (tmp_path / "start").write_text("refused")
    os.kill(fallen, signal.SIGKILL)
    until(lambda: len(one.events("worker.start_failed")) >= 2, what=lambda: one.log)
    assert one.process.poll() is None
    assert one.ask("/readyz")[0] == 200
    assert other in one.workers()
    (tmp_path / "start").write_text("ok")
    until(lambda: len({one.facts()["pid"] for _ in range(20)}) == 2)


def test_a_stopped_workers_queue_is_served_by_the_other(service: Make) -> None:
    one = service(workers=2).start().serving(workers=2)
    frozen, working = one.workers()
    os.kill(frozen, signal.SIGSTOP)
    try:
        assert {one.facts()["pid"] for _ in range(20)} == {working}
    finally:
        os.kill(frozen, signal.SIGCONT)


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_of_the_supervisor_leaves_no_process_and_frees_the_port(service: Make, workers: int) -> None:
    one = service(workers=workers, drain_grace_seconds=60).start().serving(workers)
    connection = one.connect()
    connection.request("GET", "/facts?seconds=1")
    time.sleep(0.2)
    one.signal(signal.SIGKILL)
    one.ended()
    assert connection.getresponse().status == 200  # What was in flight is finished.
    until(lambda: not one.children())
    again = service(port=one.address[1]).start()
    again.serving()


@pytest.mark.parametrize(("how", "where"), [("ok", ""), ("stuck", "stuck"), ("hang", "hanging")])
def test_kill_9_during_the_start_leaves_no_process(service: Make, how: str, where: str) -> None:
    one = service(environment={"TEST_START": how}).start()
    until(lambda: one.workers() and where in one.log)
    one.signal(signal.SIGKILL)
    one.ended()
    until(lambda: not one.children())


# Draining


def test_sigterm_makes_it_not_ready_while_it_still_accepts_and_then_ends_with_0(service: Make) -> None:
    one = service(drain_grace_seconds=60).start().serving()
    kept = one.connect()
    kept.request("GET", "/readyz")
    assert kept.getresponse().read() == b'{"draining":false}'
    one.signal(signal.SIGTERM)
    until(lambda: one.ask("/readyz")[0] == 503)
    for _ in range(3):
        status, _, answer = one.ask("/facts")
        assert (status, answer.headers["connection"]) == (200, "close")
    # An idle connection brings its next request, and is told not to come again.
    kept.request("GET", "/facts")
    answer = kept.getresponse()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    # The grace is for load balancers: Ctrl-C does not wait for the rest of it.
    one.signal(signal.SIGINT)
    assert one.ended() == 0
    with pytest.raises(ConnectionRefusedError):
        one.ask("/facts")


def test_the_grace_before_a_drain_is_as_long_as_it_is_set(service: Make) -> None:
    one = service(drain_grace_seconds=2).start().serving()
    began = time.monotonic()
    one.signal(signal.SIGTERM)
    assert one.ended() == 0
    assert time.monotonic() - began >= 2


def test_requests_in_flight_at_sigterm_are_finished(service: Make) -> None:
    one = service(workers=2).start().serving()
    slow, streamed, begun = one.connect(), one.connect(), one.socket()
    slow.request("GET", "/facts?seconds=1")
    streamed.request("GET", "/stream")
    begun.sendall(b"GET /facts HTTP/1.1\r\nhost: x\r\n")  # Its headers are not yet complete.
    silent = one.socket()  # Connected, and nothing said.
    time.sleep(0.3)
    one.signal(signal.SIGTERM)
    until(lambda: refused(one))
    begun.sendall(b"\r\n")
    assert b"200 OK" in begun.recv(4096)
    assert slow.getresponse().status == 200
    assert streamed.getresponse().read().split() == [b"%d" % number for number in range(10)]
    assert silent.recv(1) == b""
    assert one.ended() == 0


def refused(one: Service) -> bool:
    """Whether nobody is let in any more."""
    try:
        one.socket()
    except ConnectionRefusedError:
        return True
    return False


def test_a_request_that_comes_during_a_drain_on_a_connection_from_before_is_answered_however_late_it_is_read(
    service: Make,
) -> None:
    one = service().start().serving()
    [worker] = one.workers()
    late = one.socket()
    one.signal(signal.SIGTERM)
    until(lambda: refused(one))
    os.kill(worker, signal.SIGSTOP)
    late.sendall(b"GET /facts HTTP/1.1\r\nhost: x\r\n\r\n")
    time.sleep(1)  # Longer than one may stay silent then.
    os.kill(worker, signal.SIGCONT)
    assert b"200 OK" in late.recv(4096)
    assert one.ended() == 0


def test_a_drain_that_overruns_cancels_the_request_and_closes_the_application(service: Make) -> None:
    one = service(shutdown_timeout_seconds=0.5).start().serving()
    connection = one.connect()
    connection.request("POST", "/stubborn")
    time.sleep(0.3)
    one.signal(signal.SIGTERM)
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (504, b"outcome unknown")
    assert one.ended() == 0
    assert one.events("worker.stopped")[0]["cancelled_requests"] == 1
    assert one.log.count("closed ") == 1
    assert "Traceback" not in one.log


def test_a_worker_that_does_not_leave_is_killed(service: Make) -> None:
    one = service(shutdown_timeout_seconds=0).start().serving()
    [worker] = one.workers()
    os.kill(worker, signal.SIGSTOP)
    one.signal(signal.SIGTERM)
    assert one.ended() == 0
    assert one.events("worker.shutdown_timeout")


class Load:
    """Clients on kept connections. A client may repeat once a request that met the end of a re-used connection."""

    def __init__(self, address: tuple[str, int], clients: int) -> None:
        self.address = address
        self.answered = 0
        self.repeated = 0
        self.refused = 0
        self.failures: list[str] = []
        self.stopped = False
        self._clients = clients

    async def run(self) -> None:
        await asyncio.gather(*(self._client() for _ in range(self._clients)))

    async def _client(self) -> None:
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while not self.stopped:
            reused = streams is not None
            if streams is None:
                try:
                    streams = await asyncio.open_connection(*self.address)
                except (ConnectionRefusedError, ConnectionResetError):
                    # Reset: the queue that it stood in ended in the moment in which it was made. Nothing was asked.
                    self.refused += 1
                    return
                except OSError as error:
                    # It was let in, and out again before it knew.
                    self.failures.append(repr(error))
                    continue
            try:
                keep = await asyncio.wait_for(self._ask(*streams), 60)
                self.answered += 1
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                keep = False
                if reused and not isinstance(error, TimeoutError):
                    self.repeated += 1
                else:
                    self.failures.append(repr(error))
            if not keep:
                streams[1].transport.abort()
                streams = None
        if streams is not None:
            streams[1].transport.abort()

    @staticmethod
    async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"GET /facts?seconds=0.005 HTTP/1.1\r\nhost: x\r\n\r\n")
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert head.startswith(b"http/1.1 200"), head
        length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
        await reader.readexactly(length)
        return b"connection: close" not in head


@pytest.mark.parametrize("grace", [0, 1])
async def test_sigterm_under_load_loses_no_request(service: Make, grace: int) -> None:
    # Between a queue that is found empty and its end there is a moment, long where the machine is busy, in which a
    # connection is made that nobody will accept. A service that empties no queue would lose requests each time.
    for _ in range(3):
        one = service(workers=2, drain_grace_seconds=grace).start().serving(workers=2)
        load = Load(one.address, clients=24)
        task = asyncio.create_task(load.run())
        await asyncio.sleep(0.5)
        await asyncio.to_thread(until, lambda load=load: load.answered > 100)
        one.signal(signal.SIGTERM)
        await asyncio.wait_for(task, 60)  # Every client ends by being refused.
        assert load.refused == 24
        assert await asyncio.to_thread(one.ended) == 0
        if not load.failures:
            break
    assert load.failures == []


@pytest.mark.parametrize("workers", [1, 2])
async def test_sighup_renews_every_worker_without_losing_a_request(service: Make, workers: int) -> None:
    one = service(workers=workers).start().serving(workers=workers)
    before = set(one.workers())
    load = Load(one.address, clients=16)
    task = asyncio.create_task(load.run())
    await asyncio.sleep(0.3)
    one.signal(signal.SIGHUP)
    renewed = lambda: len(one.workers()) == workers and not set(one.workers()) & before  # noqa: E731
    await asyncio.to_thread(until, renewed)
    await asyncio.sleep(0.3)
    load.stopped = True
    await asyncio.wait_for(task, 60)
    assert (load.failures, load.refused) == ([], 0)
    assert len(one.events("service.ready")) == 1


def test_a_renewal_that_does_not_start_leaves_the_old_workers(service: Make, tmp_path: Path) -> None:
    one = service(workers=2).start().serving(workers=2)
    before = set(one.workers())
    (tmp_path / "start").write_text("refused")
    one.signal(signal.SIGHUP)
    until(lambda: one.events("workers.renewal_failed"))
    assert set(one.workers()) == before
    assert one.ask("/readyz")[0] == 200
    (tmp_path / "start").write_text("ok")
    one.signal(signal.SIGHUP)
    until(lambda: len(one.workers()) == 2 and not set(one.workers()) & before)


# At a terminal


class Terminal:
    """A supervisor as the foreground job of a terminal of its own."""

    def __init__(self, one: Service, *, errors_too: bool = False) -> None:
        self.leader, follower = pty.openpty()
        one.start(
            stdin=follower,
            **({"stderr": follower} if errors_too else {}),
            preexec_fn=lambda: _take_terminal(follower),
            start_new_session=True,
        )
        os.close(follower)

    def ctrl_c(self) -> None:
        os.write(self.leader, b"\x03")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.leader)


def _take_terminal(follower: int) -> None:
    fcntl.ioctl(follower, termios.TIOCSCTTY, 0)


def test_ctrl_c_drains_and_a_second_one_hurries(service: Make) -> None:
    # The grace is for load balancers: who types Ctrl-C does not wait for it.
    one = service(workers=2, drain_grace_seconds=60, shutdown_timeout_seconds=60)
    terminal = Terminal(one)
    one.serving(workers=2)
    slow, stubborn = one.connect(), one.connect()
    slow.request("GET", "/facts?seconds=1")
    stubborn.request("POST", "/stubborn")
    time.sleep(0.3)
    one.children()
    terminal.ctrl_c()
    assert slow.getresponse().status == 200
    assert one.process.poll() is None
    terminal.ctrl_c()
    assert stubborn.getresponse().status == 504
    assert one.ended() == 0
    until(lambda: not one.children())
    assert one.log.count("closed ") == 2
    assert "Traceback" not in one.log
    terminal.close()


@pytest.mark.parametrize(("how", "where"), [("stuck", "stuck\n"), ("hang", "hanging\n")])
def test_ctrl_c_during_the_start_is_quiet(service: Make, how: str, where: str) -> None:
    one = service(workers=2, environment={"TEST_START": how})
    terminal = Terminal(one)
    until(lambda: where in one.log)
    one.children()
    terminal.ctrl_c()
    assert one.ended() == 0
    until(lambda: not one.children())
    lines = one.log.splitlines()
    assert [line for line in lines if not line.startswith("{")] == [where.strip()]
    events = [json.loads(line)["event"] for line in lines if line.startswith("{")]
    assert events == ["service.starting", "service.draining", "service.stopped"]
    terminal.close()


def test_ctrl_c_under_make_ends_both(service: Make, tmp_path: Path) -> None:
    make = shutil.which("make")
    assert make is not None
    one = service()
    (tmp_path / "Makefile").write_text(f"run:\n\t@{shlex.join(one.command)}\n")
    one.command = [make, "-C", str(tmp_path), "run"]
    terminal = Terminal(one)
    one.serving()
    one.children()
    terminal.ctrl_c()
    one.ended()
    until(lambda: not one.children())
    assert "Traceback" not in one.log
    terminal.close()


def test_a_terminal_that_closes_ends_the_service(service: Make) -> None:
    one = service(log_format="auto")
    terminal = Terminal(one, errors_too=True)
    said = b""
    while b"Ctrl-C stops it." not in said:
        said += os.read(terminal.leader, 4096)
    assert len(one.children()) == 1
    terminal.close()
    assert one.ended() == 0
    until(lambda: not one.children())


def test_the_banner_on_a_console_names_everything_and_uses_no_colour_in_a_file(service: Make) -> None:
    one = service(log_format="console").start()
    until(lambda: "Ctrl-C stops it." in one.log)
    for word in ("service", "docs", "health", "metrics", "try"):
        assert f"  {word}" in one.log
    assert "\x1b" not in one.log
    assert max(map(len, one.log.splitlines())) <= 100


# With reload


def test_a_changed_source_restarts_the_worker_and_a_broken_one_is_waited_out(
    service: Make, tmp_path: Path
) -> None:
    backend = tmp_path / "backend"
    copy_program(backend)
    (backend / "tests").mkdir()
    shutil.copy(SCRIPT, backend / "tests")
    one = service(script=backend / "tests" / "serving.py", reload=True).start().serving()
    first = one.facts()["pid"]
    version = backend / "src" / "config" / "version.py"

    def change(line: str) -> None:
        """At once and whole: a file that is seen half written has changed twice."""
        (tmp_path / "next").write_text(f"{version.read_text()}\n# {line}\n")
        (tmp_path / "next").replace(version)

    change("changed")
    until(lambda: one.facts()["pid"] != first)
    assert one.events("source.changed")
    (tmp_path / "start").write_text("broken")
    change("and again")
    until(lambda: one.events("worker.waiting_for_change"))
    (tmp_path / "start").write_text("ok")
    change("and mended")
    assert one.facts()["draining"] is False
    one.signal(signal.SIGTERM)
    assert one.ended() == 0


# With the embedded PostgreSQL


def test_the_embedded_postgres_serves_the_workers_and_stops_after_them(service: Make, tmp_path: Path) -> None:
    one = service(embedded=True, data_directory=str(tmp_path / "data")).start().serving()
    environment = one.facts()["environment"]
    assert environment["GROUNDWORK_EMBEDDED"] == "1"
    for variable in ("DATABASE_URL", "DATABASE_MIGRATION_URL"):
        assert environment[variable].split(":")[2].split("@")[0] not in one.log
    [event] = one.events("service.ready")
    assert event["database"].startswith("postgresql://app:***@/groundwork?host=/")
    assert event["data"].endswith("postgres")
    # Workers are bound by row-level security; what migrates owns the tables.
    assert running_url(tmp_path / "data", role="app") == environment["DATABASE_URL"]
    assert running_url(tmp_path / "data") == environment["DATABASE_MIGRATION_URL"]
    one.signal(signal.SIGTERM)
    assert one.ended() == 0
    assert not one.children()
    assert running_url(tmp_path / "data") is None


def test_kill_9_of_the_supervisor_leaves_no_postgres(service: Make, tmp_path: Path) -> None:
    one = service(embedded=True, data_directory=str(tmp_path / "data")).start().serving()
    until(lambda: len(one.children()) > 5)
    one.signal(signal.SIGKILL)
    one.ended()
    until(lambda: not one.children())


def test_a_postgres_that_is_killed_is_started_again_at_the_same_address(
    service: Make, tmp_path: Path
) -> None:
    one = service(embedded=True, data_directory=str(tmp_path / "data")).start().serving()
    before = running_url(tmp_path / "data")
    worker, postgres = one.facts()["pid"], json.loads((tmp_path / "data" / "server.json").read_text())["pid"]
    os.kill(postgres, signal.SIGKILL)
    until(lambda: one.events("postgres.restarted"))
    assert running_url(tmp_path / "data") == before
    assert one.facts()["pid"] == worker


def test_a_second_run_on_the_same_data_says_who_holds_it_and_ends_with_1(
    service: Make, tmp_path: Path
) -> None:
    first = service(embedded=True, data_directory=str(tmp_path / "data")).start().serving()
    second = service(embedded=True, data_directory=str(tmp_path / "data"), port=first.address[1]).start()
    assert second.ended() == 1
    assert f"is in use by process {first.supervisor_pid}" in second.log
    assert first.ask("/readyz")[0] == 200


def test_ctrl_c_in_the_terminal_reaches_postgres_only_after_the_requests(
    service: Make, tmp_path: Path
) -> None:
    one = service(embedded=True, data_directory=str(tmp_path / "data"), shutdown_timeout_seconds=60)
    terminal = Terminal(one)
    one.serving()
    slow, stubborn = one.connect(), one.connect()
    slow.request("GET", "/facts?seconds=2")
    stubborn.request("POST", "/stubborn")
    time.sleep(0.3)
    one.children()
    terminal.ctrl_c()
    assert slow.getresponse().status == 200
    # As long as one of them is under way.
    assert running_url(tmp_path / "data") is not None
    terminal.ctrl_c()
    assert stubborn.getresponse().status == 504
    assert one.ended() == 0
    assert not one.children()
    terminal.close()
