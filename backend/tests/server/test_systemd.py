"""sd_notify and socket activation, with a reader of NOTIFY_SOCKET in systemd's place."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from processes import BACKEND
from supervised import Service
from waiting import PATIENCE, until

Make = Callable[..., Service]
UNIT = BACKEND.parent / "docs" / "operations.md"


@pytest.fixture(params=["path", "abstract"])
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """NOTIFY_SOCKET's value and the socket that receives the datagrams."""
    name = str(tmp_path / "notify")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind("\0" + name if request.param == "abstract" else name)
    listening.settimeout(PATIENCE)
    yield ("@" + name if request.param == "abstract" else name), listening
    listening.close()


def received(listening: socket.socket, state: str) -> dict[str, str]:
    """The next datagram that holds this state, as its variables."""
    while True:
        lines = listening.recv(4096).decode().splitlines()
        if state in lines:
            return dict(line.split("=", 1) for line in lines)


def test_states_are_sent_to_the_notify_socket(service: Make, reader: tuple[str, socket.socket]) -> None:
    address, listening = reader
    one = service(environment={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"}).start()
    assert received(listening, "READY=1")["STATUS"].startswith("Serving on http://")
    assert one.serving().ask("/readyz")[0] == 200
    received(listening, "WATCHDOG=1")
    before = time.monotonic_ns() // 1000
    one.signal(signal.SIGHUP)
    assert int(received(listening, "RELOADING=1")["MONOTONIC_USEC"]) >= before
    received(listening, "READY=1")
    one.signal(signal.SIGTERM)
    received(listening, "STOPPING=1")
    assert one.ended() == 0


def test_worker_does_not_inherit_the_notify_socket(service: Make, tmp_path: Path) -> None:
    one = service(environment={"NOTIFY_SOCKET": str(tmp_path / "nobody"), "WATCHDOG_USEC": "1000000"})
    [worker] = one.start().serving().workers()
    assert b"NOTIFY_SOCKET" not in Path(f"/proc/{worker}/environ").read_bytes()


class Activation:
    """A listening socket held here, as systemd holds a .socket unit's, and passed on to one service after the other."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=4096)

    def start(self, one: Service, *program: str) -> Service:
        """`program` comes before the service's command and inherits the socket as descriptor 3."""
        script = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&"$FD"'
        command = ["/bin/bash", "-c", script, "bash", *program, *one.command]
        fd = self.socket.fileno()
        original, one.command = one.command, command
        one.environment["FD"] = str(fd)
        one.start(pass_fds=[fd])
        one.command = original
        return one


@pytest.fixture
def activation() -> Iterator[Activation]:
    made = Activation()
    yield made
    made.socket.close()


def test_restart_on_an_activated_socket_refuses_nobody(service: Make, activation: Activation) -> None:
    first = activation.start(service(workers=2)).serving()
    assert first.address == activation.socket.getsockname()
    assert first.ask("/facts")[0] == 200
    first.signal(signal.SIGTERM)
    assert first.ended() == 0
    waiting = first.connect()
    waiting.request("GET", "/facts")  # Nobody serves: it waits in the queue of the socket.
    activation.start(service())
    assert waiting.getresponse().status == 200


@pytest.mark.debian
def test_socket_activation_by_systemd_s_own_tool(service: Make, activation: Activation) -> None:
    tool = shutil.which("systemd-socket-activate")
    assert tool is not None
    one = service()
    names = [f"--setenv={name}" for name in ("PATH", "TEST_START_FILE")]
    activation.start(one, tool, *names)
    asked = socket.create_connection(activation.socket.getsockname(), timeout=PATIENCE)
    asked.sendall(b"GET /facts HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert b"200 OK" in asked.recv(4096)
    asked.close()
    one.signal(signal.SIGTERM)
    assert one.ended() == 0


NGINX = """
daemon off; worker_processes 1; pid {home}/nginx.pid; error_log {home}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {home}/a; proxy_temp_path {home}/b; fastcgi_temp_path {home}/c; uwsgi_temp_path {home}/d;
  scgi_temp_path {home}/e;
  upstream service {{ server 127.0.0.1:{upstream}; keepalive 16; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://service; proxy_http_version 1.1; proxy_set_header Connection ""; }}
  }}
}}
"""


@pytest.mark.debian
def test_restart_behind_nginx_with_keep_alive_loses_no_request(
    service: Make, activation: Activation, tmp_path: Path
) -> None:
    import http.client
    import threading

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "nginx.conf").write_text(
        NGINX.format(home=tmp_path, upstream=activation.socket.getsockname()[1], port=port)
    )
    tmp_path.chmod(0o755)
    nginx = subprocess.Popen(["/usr/sbin/nginx", "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path)])
    statuses: list[int] = []
    done = threading.Event()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        while not done.is_set():
            try:
                connection.request("GET", "/facts?seconds=0.002")
                response = connection.getresponse()
                response.read()
                statuses.append(response.status)
            except OSError:
                statuses.append(0)
                connection.close()
        connection.close()

    clients = [threading.Thread(target=client) for _ in range(8)]
    try:
        one = activation.start(service(workers=2)).serving()
        for thread in clients:
            thread.start()
        until(lambda: statuses.count(200) > 50)
        one.signal(signal.SIGTERM)
        assert one.ended() == 0
        answered = len(statuses)
        activation.start(service(workers=2)).serving()
        until(lambda: len(statuses) > answered + 100)
    finally:
        done.set()
        for thread in clients:
            with contextlib.suppress(RuntimeError):
                thread.join()
        nginx.terminate()
        nginx.wait(PATIENCE)
    assert set(statuses) == {200}


def test_several_workers_without_a_writable_temporary_directory_are_refused_with_a_remedy(
    service: Make, tmp_path: Path
) -> None:
    future = "from __future__ import annotations\n"
    code = f"import tempfile; tempfile._candidate_tempdir_list = lambda: [{str(tmp_path / 'none')!r}]\n"
    script = BACKEND / "tests" / "serving.py"
    copy = tmp_path / "serving.py"
    text = script.read_text().replace(future, future + code)
    copy.write_text(text.replace("Path(__file__).resolve().parents[1]", f"Path({str(BACKEND)!r})"))
    refused = service(script=copy, workers=2).start()
    assert refused.ended() == 1
    assert len(refused.log.splitlines()) == 1
    assert "TMPDIR" in refused.log
    service(script=copy).start().serving()


def test_activated_socket_that_does_not_listen_is_refused(service: Make) -> None:
    with socket.socket() as unbound:
        one = service()
        fake = Activation.__new__(Activation)
        fake.socket = unbound
        fake.start(one)
        assert one.ended() == 1
        assert "ListenStream" in one.log
        os.fstat(unbound.fileno())
