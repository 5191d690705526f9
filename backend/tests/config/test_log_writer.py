"""The writer thread on real descriptors: pipes that are not read, closed ones, full disks, processes that end."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from src.config import log_writer
from src.config.log_writer import LogWriter, dropped_lines
from waiting import PATIENCE, until

BACKEND = Path(__file__).resolve().parents[2]
LINE = json.dumps({"event": "x" * 480})

Make = Callable[[int], LogWriter]


@pytest.fixture
def writer() -> Iterator[Make]:
    """`writer(descriptor)`: closed at the end; its reports are `dropped COUNT`."""
    made: list[LogWriter] = []

    def make(descriptor: int) -> LogWriter:
        made.append(LogWriter(descriptor, "utf-8", "dropped {}".format))
        return made[-1]

    yield make
    for one in made:
        one.close(0.0)


class Pipe:
    """A pipe of the smallest size, read when a test says so."""

    def __init__(self, flags: int = 0) -> None:
        self.reader, self.writer = os.pipe2(flags)
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, 4096)

    def start_reading(self) -> None:
        self.received = bytearray()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while data := os.read(self.reader, 65536):
            self.received += data

    def lines(self) -> list[str]:
        return self.received.decode().splitlines()

    def finish(self) -> list[str]:
        """Close the writing end; everything that was read."""
        os.close(self.writer)
        self._thread.join(PATIENCE)
        return self.lines()


def fill(one: LogWriter) -> int:
    """Write lines until some are dropped; how many were written."""
    before, count = dropped_lines(), 0
    while dropped_lines() < before + 100:
        one.write(LINE)
        count += 1
        assert count < 100_000
    return count


def test_batched_lines_are_written_together_and_in_whole_lines_that_a_pipe_keeps_together(
    writer: Make,
) -> None:
    pipe = os.pipe2(os.O_DIRECT)  # Each write is read by itself.
    one = writer(pipe[1])
    sent = [f"{number} {LINE}" for number in range(100)]
    for line in sent:
        one.write(line, batched=True)
    assert one.flush(PATIENCE)
    os.set_blocking(pipe[0], False)
    pieces: list[bytes] = []
    with pytest.raises(BlockingIOError):
        while True:
            pieces.append(os.read(pipe[0], 65536))
    assert 10 < len(pieces) < 20
    assert all(piece.endswith(b"\n") and len(piece) <= 4096 for piece in pieces)
    assert b"".join(pieces).decode().splitlines() == sent
    os.close(pipe[0])
    os.close(pipe[1])


def test_a_batched_line_is_written_without_another_line_or_a_flush(writer: Make) -> None:
    pipe = Pipe()
    pipe.start_reading()
    one = writer(pipe.writer)
    for number in range(3):
        one.write(str(number), batched=True)
        until(lambda number=number: len(pipe.lines()) == number + 1)
    one.close()
    assert pipe.finish() == ["0", "1", "2"]


def test_any_other_line_follows_the_batched_ones_at_once(
    writer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_writer, "BATCH_SECONDS", 3600.0)
    pipe = Pipe()
    pipe.start_reading()
    one = writer(pipe.writer)
    one.write("batched", batched=True)
    one.write("urgent")
    until(lambda: pipe.lines() == ["batched", "urgent"])
    one.close()
    pipe.finish()


def test_a_pipe_that_is_not_read_blocks_no_caller_and_every_lost_line_is_reported_once_it_is_read(
    writer: Make,
) -> None:
    pipe = Pipe()
    one = writer(pipe.writer)
    before = dropped_lines()
    written = fill(one)
    assert not one.flush(0.05)
    pipe.start_reading()
    assert one.flush(PATIENCE)
    one.write("afterwards")
    one.close(PATIENCE)
    lines = pipe.finish()
    assert lines[-1] == "afterwards"
    reports = [line for line in lines if line.startswith("dropped")]
    lost = sum(int(line.split()[1]) for line in reports)
    assert lost == dropped_lines() - before >= 100
    assert lines.count(LINE) + lost == written


def test_batched_lines_leave_room_for_others_in_the_queue(writer: Make) -> None:
    pipe = Pipe()
    one = writer(pipe.writer)
    before = dropped_lines()
    while dropped_lines() == before:
        one.write(LINE, batched=True)
    dropped = dropped_lines()
    one.write("an error")
    assert dropped_lines() == dropped
    pipe.start_reading()
    one.close(PATIENCE)
    lines = pipe.finish()
    assert "an error" in lines
    assert lines[-1] == f"dropped {dropped - before}"


def test_close_gives_up_on_a_pipe_that_is_not_read(writer: Make) -> None:
    pipe = Pipe()
    one = writer(pipe.writer)
    fill(one)
    one.close(0.05)
    one.write("and so does a line after it")
    os.close(pipe.reader)  # Ends the thread.
    one.close(PATIENCE)


def test_a_line_after_close_is_written_all_the_same(writer: Make, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        one = writer(log.fileno())
        one.write("before")
        one.close(PATIENCE)
        one.write("after")
    assert (tmp_path / "log").read_text() == "before\nafter\n"


@pytest.mark.parametrize("sink", ["closed pipe", "full disk"])
def test_a_sink_that_refuses_loses_lines_counts_them_and_stops_nothing(writer: Make, sink: str) -> None:
    if sink == "full disk":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    one = writer(descriptor)
    os.close(descriptor)
    before = dropped_lines()
    for _ in range(100):
        one.write(LINE)
    assert one.flush(PATIENCE)
    assert dropped_lines() == before + 100
    one.close(PATIENCE)


def test_after_a_disk_was_full_lines_are_whole_again_and_the_lost_ones_reported(tmp_path: Path) -> None:
    code = """
import json, os, resource
from src.config.log_writer import LogWriter, dropped_lines
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (250, unlimited[1]))
writer = LogWriter(1, "utf-8", "dropped {}".format)
for number in range(5):
    writer.write(f"{number:099}")
    writer.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
writer.write("whole")
"""
    log = tmp_path / "log"
    with log.open("w") as stream:
        subprocess.run([sys.executable, "-c", code], cwd=BACKEND, stdout=stream, check=True, timeout=120)
    lines = log.read_text().splitlines()
    assert lines[:2] == ["0" * 99, f"{1:099}"]
    assert f"{2:099}".startswith(lines[2])
    assert lines[3:] == ["whole", "dropped 3"]


def test_a_descriptor_keeps_its_flags_and_one_that_does_not_block_loses_nothing(writer: Make) -> None:
    for blocking in (True, False):
        pipe = Pipe()
        os.set_blocking(pipe.writer, blocking)
        one = writer(pipe.writer)
        for _ in range(1000):
            one.write(LINE)
        assert not one.flush(0.05)
        assert os.get_blocking(pipe.writer) is blocking
        pipe.start_reading()
        one.close(PATIENCE)
        assert pipe.finish() == [LINE] * 1000


def run(code: str, **more: Any) -> subprocess.CompletedProcess[str]:
    start = "from src.config.logging import RequestLog, configure, get_logger\nconfigure('info', 'json')\n"
    start += "log, requests = get_logger('x'), RequestLog('x')\n"
    return subprocess.run(
        [sys.executable, "-c", start + code],
        cwd=BACKEND,
        **{"capture_output": True, "text": True, "timeout": 120, "check": False, **more},
    )


@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), ("raise SystemExit(3)", 3), ("raise KeyError", 1), ("import sys; sys.exit()", 0)],
)
def test_a_process_that_ends_writes_its_last_lines(end: str, code: int) -> None:
    done = run(
        "for number in range(1000): requests.write(f'{number}', 'GET', '/', 200, 1.0)\n"
        f"log.error('process.failed')\n{end}"
    )
    assert done.returncode == code
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["request"] * 1000 + ["process.failed"]


def test_a_line_that_is_logged_while_the_interpreter_ends_is_written() -> None:
    done = run(
        "import atexit\natexit.register(lambda: log.info('process.ended'))\nlog.info('process.started')\n"
    )
    events = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert events == ["process.started", "process.ended"]


def test_a_process_whose_log_is_not_read_ends_all_the_same() -> None:
    reader, writer_end = os.pipe()
    done = run("for _ in range(20000): log.error('x' * 500)\n", capture_output=False, stdout=writer_end)
    assert done.returncode == 0
    os.close(reader)
    os.close(writer_end)


def test_a_forked_child_writes_its_own_lines_and_its_parents_are_not_doubled() -> None:
    done = run(
        "import os, signal\n"
        "requests.write('parent', 'GET', '/', 200, 1.0)\n"
        "child = os.fork()\n"
        "if child == 0:\n    log.info('child.started')\n    raise SystemExit\n"
        "os.waitpid(child, 0)\n"
        "log.info('child.ended')\n"
    )
    events = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert sorted(events) == ["child.ended", "child.started", "request"]


def test_a_process_that_is_killed_after_an_error_has_written_it() -> None:
    script = (
        "import os, signal, time\n"
        "for number in range(100): log.error('process.failed', number=number)\n"
        "import src.config.logging as logging\n"
        "logging.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = run(script)
    assert done.returncode == -signal.SIGKILL
    assert len(done.stdout.splitlines()) == 100
