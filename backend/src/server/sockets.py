"""Listening sockets: bound once by the supervisor, inherited by the workers."""

from __future__ import annotations

import contextlib
import errno
import resource
import socket
from typing import Any, Final

from ..errors import GroundworkError

BACKLOG: Final = 4096
"""Connections that may wait to be accepted: as many as a worker holds, and as the kernel allows (`somaxconn`, 4,096
since Linux 5.4). One more would be dropped, and its client's kernel tries again a second later."""
_MAX_DESCRIPTORS: Final = 65536


class CannotListen(GroundworkError):
    """HOST and PORT cannot be bound. The message names the reason and a remedy. Exit code 1."""

    exit_code = 1


def bind(host: str, port: int, *, prefix: str = "") -> socket.socket:
    """A listening socket; port 0 takes any free one. `prefix` begins the names of the settings in messages.

    Raises CannotListen, also when another process listens on the port.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise CannotListen(
            f"{prefix}HOST={host} is not an address of this machine: {error.strerror}."
        ) from error
    # A name such as localhost has several addresses; people type the IPv4 one.
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise CannotListen(_why(error, host, port, where, prefix)) from error
    return listener


def check_activated(listener: socket.socket) -> socket.socket:
    """The socket of a service manager, if it is a listening TCP socket; otherwise raises CannotListen."""
    if (
        listener.family not in (socket.AF_INET, socket.AF_INET6)
        or listener.type != socket.SOCK_STREAM
        or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        raise CannotListen(
            "The socket passed by socket activation is not a listening TCP socket. "
            "Write ListenStream=ADDRESS:PORT and Accept=no into the .socket unit."
        )
    return listener


def _why(error: OSError, host: str, port: int, where: str, prefix: str) -> str:
    cannot = f"Cannot listen on {where} ({prefix}HOST, {prefix}PORT):"
    if error.errno == errno.EADDRINUSE:
        other = port + 1 if port < 65535 else port - 1
        return (
            f"{cannot} another program uses the port. Stop it, or choose another port: {prefix}PORT={other}."
        )
    if error.errno == errno.EACCES:
        return f"{cannot} ports below 1024 need root. Choose another, for example {prefix}PORT=8001."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{cannot} {host} is not an address of this machine. {prefix}HOST=127.0.0.1 is."
    return f"{cannot} {error.strerror}."


def url_of(address: tuple[Any, ...]) -> str:
    """The URL under which a program on this machine reaches the address; a wildcard becomes loopback."""
    host, port = str(address[0]), int(address[1])
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files, each connection being one, to the hard limit or 65,536."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < limit:
        # Not worth failing for; some systems refuse values below their own maximum.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
