"""The network does to connections what it says, and nothing else; the wire notices each; the picture is one."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest

from tests.faults.history import Ended
from tests.faults.network import Network
from tests.faults.picture import draw
from tests.faults.report import text
from tests.faults.run import Result
from tests.faults.stage import Loop
from tests.faults.wire import Cut, Unsent, Wire

PATIENCE = 60.0


class Echo:
    """A server that says back what it hears, in an orderly thread of its own."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            while heard := connection.recv(65536):
                connection.sendall(heard)
        except OSError:
            pass
        finally:
            connection.close()

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    opened = Loop()
    yield opened
    opened.close()


@pytest.fixture
def network(loop: Loop) -> Iterator[Network]:
    echo = Echo()
    made = Network(loop.loop, echo.port, speaks_postgres=False)
    loop.run(made.open())
    yield made
    made.refuse()
    made.reset()
    echo.close()


def connected(network: Network) -> socket.socket:
    return socket.create_connection(("127.0.0.1", network.port), timeout=PATIENCE)


def say(connection: socket.socket, words: bytes) -> bytes:
    connection.sendall(words)
    return connection.recv(65536)


def test_what_is_sent_arrives_both_ways(network: Network) -> None:
    with connected(network) as one, connected(network) as other:
        assert say(one, b"hello") == b"hello"
        assert say(other, b"there") == b"there"
        assert network.connections == 2


def test_a_reset_ends_connections_and_lets_new_ones_in(network: Network) -> None:
    with connected(network) as one:
        assert say(one, b"a") == b"a"
        network.reset()
        with pytest.raises(ConnectionResetError):
            one.recv(1)
    with connected(network) as other:
        assert say(other, b"b") == b"b"


def test_what_waits_arrives_whole_and_in_order(network: Network) -> None:
    with connected(network) as one:
        assert say(one, b"a") == b"a"
        network.stall()
        for word in (b"b", b"c", b"d"):
            one.sendall(word)
        one.settimeout(0.2)
        with pytest.raises(TimeoutError):
            one.recv(1)
        network.heal()
        one.settimeout(PATIENCE)
        heard = b""
        while len(heard) < 3:
            heard += one.recv(10)
        assert heard == b"bcd"


def test_a_black_hole_swallows_and_is_reset_when_it_heals(network: Network) -> None:
    with connected(network) as one, connected(network) as untouched:
        assert say(one, b"a") == b"a"
        assert say(untouched, b"a") == b"a"
        network.swallow()
        one.sendall(b"b")
        one.settimeout(0.2)
        with pytest.raises(TimeoutError):
            one.recv(1)
        network.heal()
        one.settimeout(PATIENCE)
        with pytest.raises(ConnectionResetError):
            one.recv(1)
        assert say(untouched, b"c") == b"c"


def test_latency_is_added_each_way(network: Network) -> None:
    with connected(network) as one:
        network.delay(0.1)
        began = time.monotonic()
        assert say(one, b"a") == b"a"
        assert time.monotonic() - began >= 0.2


def test_a_lost_reply_resets_its_connection_after_the_server_has_heard(network: Network) -> None:
    with connected(network) as one, connected(network) as other:
        network.lose_replies(1)
        with pytest.raises(ConnectionResetError):
            say(one, b"a")
        assert say(other, b"b") == b"b"


def test_of_a_cut_reply_half_arrives(network: Network) -> None:
    with connected(network) as one:
        network.cut_replies(1)
        assert say(one, b"abcd") == b"ab"
        assert one.recv(1) == b""


def test_who_is_refused_is_refused_at_once(network: Network) -> None:
    network.refuse()
    with pytest.raises(ConnectionRefusedError):
        connected(network)
    network.heal()
    with connected(network) as one:
        assert say(one, b"a") == b"a"


def test_only_whole_answers_of_postgresql_are_lost(loop: Loop) -> None:
    network = Network(loop.loop, 1, speaks_postgres=True)
    assert network.is_answer(b"D...C...Z\x00\x00\x00\x05I")
    assert not network.is_answer(b"R\x00\x00\x00\x08\x00\x00\x00\x0a")


def test_the_wire_tells_what_was_sent_from_what_was_not(loop: Loop, network: Network) -> None:
    answer = b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\nX-Request-ID: r1\r\n\r\nok"
    wire = Wire("127.0.0.1", network.port, patience_seconds=PATIENCE)
    hasty = Wire("127.0.0.1", network.port, patience_seconds=0.5)

    # The echo answers with what it was asked, so a request that looks like an answer is one.
    heard = loop.run(wire.ask(answer))
    assert (heard.status, heard.headers["x-request-id"], heard.body) == (201, "r1", b"ok")
    network.lose_replies(1)
    with pytest.raises(Cut) as lost:
        loop.run(wire.ask(answer))
    assert not lost.value.idle
    network.cut_replies(1)
    with pytest.raises(Cut):
        loop.run(wire.ask(answer))
    network.swallow()
    with pytest.raises(Cut) as late:
        loop.run(hasty.ask(answer))
    assert late.value.late
    network.heal()
    with pytest.raises(Cut):
        loop.run(wire.ask(answer, hang_up_after=0.0))
    network.refuse()
    with pytest.raises(Unsent):
        loop.run(wire.ask(answer))


def test_a_report_has_its_figures_and_a_picture_that_parses() -> None:
    result = Result(seed=5, kinds=["pg-kill"], workers=2, clients=2, seconds=3.0)
    result.faults = [{"fault": "pg-kill", "began": 0.5, "ended": 1.0, "first": 0.1, "all": 0.2}]
    result.series.add(
        [Ended(0.1, 0.2, "create", "ok", 201, False), Ended(1.1, 1.2, "patch", "fail", 503, False)]
    )
    told = text(result)
    assert "1 acknowledged writes" in told
    assert "within 250 ms 1 times of 1" in told
    assert told.endswith("Nothing forbidden happened.")
    assert ElementTree.fromstring(draw(result)).tag.endswith("svg")
    result.findings.add("lost", "gone", "t1")
    assert text(result).endswith("Something forbidden happened.")
    assert asyncio.iscoroutinefunction(Wire.ask)
