"""Checks of the way to the server: DNS and the port."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
import time
from typing import TYPE_CHECKING

from ..config.command_line import command
from .check import CheckContext, CheckResult, failed, passed, warned

if TYPE_CHECKING:
    from ..config.database import ConnectionSettings, Host


def is_loopback(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost"


def is_local(connection: ConnectionSettings) -> bool:
    """Whether every host is this machine."""
    return all(host.is_socket or is_loopback(host.name) for host in connection.hosts)


async def dns(context: CheckContext) -> CheckResult:
    """Resolve each host. Of several hosts one is enough, as it is for the driver."""
    found, missing = [], []
    for host in context.address.hosts:
        name = host.name
        if host.is_socket:
            context.ip_addresses[host] = ()
            found.append(f"{name} (a socket)")
            continue
        try:
            context.ip_addresses[host] = await _resolve(name, host.port)
        except socket.gaierror:
            missing.append(name)
        else:
            listed = ", ".join(context.ip_addresses[host])
            found.append(name if listed == name else f"{name} is {listed}")
    if not found:
        cause = f"No address is known for {', '.join(missing)}."
        return failed(
            "not found", cause, f"getent hosts {missing[0]}   # then correct the host in DATABASE_URL"
        )
    if missing:
        return warned(
            "; ".join(found),
            f"No address is known for {', '.join(missing)}.",
            f"getent hosts {missing[0]}   # or take that host out of DATABASE_URL",
        )
    return passed("; ".join(found))


async def _resolve(name: str, port: int) -> tuple[str, ...]:
    """The addresses of a host name.

    Runs in a daemon thread: the loop waits for its default executor when it ends, and a resolver whose servers
    are silent would hold the run past its timeout.
    """
    loop = asyncio.get_running_loop()
    resolved: asyncio.Future[tuple[str, ...]] = loop.create_future()

    def finish(addresses: tuple[str, ...], error: OSError | None) -> None:
        if resolved.done():
            return
        if error is None:
            resolved.set_result(addresses)
        else:
            resolved.set_exception(error)

    def resolve() -> None:
        addresses: tuple[str, ...] = ()
        failure: OSError | None = None
        try:
            rows = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
            addresses = tuple(dict.fromkeys(str(row[4][0]) for row in rows))
        except UnicodeError:
            failure = socket.gaierror(socket.EAI_NONAME, "not a host name")
        except OSError as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # The loop may have ended.
            loop.call_soon_threadsafe(finish, addresses, failure)

    threading.Thread(target=resolve, daemon=True, name="resolve").start()
    return await resolved


async def open_stream(context: CheckContext, host: Host) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare connection to the first of the host's addresses that accepts it."""
    if host.is_socket:
        return await asyncio.open_unix_connection(f"{host.name}/.s.PGSQL.{host.port}")
    seconds = context.connect_timeout_seconds
    last: OSError = ConnectionRefusedError()
    for address in context.ip_addresses.get(host, ()):
        try:
            return await asyncio.wait_for(asyncio.open_connection(address, host.port), seconds)
        except OSError as error:
            last = error
    raise last


async def network(context: CheckContext) -> CheckResult:
    faults: list[tuple[Host, OSError]] = []
    for host in context.address.hosts:
        if host not in context.ip_addresses:
            continue
        begun = time.monotonic()
        try:
            _, writer = await open_stream(context, host)
        except OSError as error:
            faults.append((host, error))
            continue
        writer.close()
        if not faults:
            context.reachable = host
            return passed(f"{host} answers in {1000 * (time.monotonic() - begun):.1f} ms")
        context.reachable = host
        return warned(
            f"{host} answers",
            f"{faults[0][0]} does not: {_network_cause(faults[0][1])}",
            "Start that server, or take it out of DATABASE_URL.",
        )
    host, fault = faults[0]
    if is_local(context.address):
        remedy = f"{command('serve --embedded')}   # or start the PostgreSQL that DATABASE_URL names"
    else:
        remedy = f"pg_isready -h {host.name} -p {host.port}   # then the firewall, the allow list, the port"
    return failed("not reached", f"{host}: {_network_cause(fault)}", remedy)


def _network_cause(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no response (a firewall may drop the packets)."
    if isinstance(error, ConnectionRefusedError):
        return "connection refused: nothing listens there."
    if isinstance(error, FileNotFoundError):
        return "the socket does not exist."
    return f"{error.strerror or type(error).__name__}."
