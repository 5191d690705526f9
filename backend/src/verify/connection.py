"""Checks on the way to the server: from the settings to the first answered statement."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import secrets
import socket
import ssl
import statistics
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import asyncpg

from ..config.command_line import command
from ..config.settings import require_database
from ..errors import ConfigurationError
from ..services import hosts
from ..services.faults import as_refusal, diagnose
from .check import Examination, Finding, failed, not_run, passed, warned

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..config.database import ConnectionSettings, Host

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
_OLDEST, _NEWEST = 15, 18
_SLOW_ROUND_TRIP_MS = 20.0
_EXPIRY_WARNING_DAYS = 14


async def configuration(examination: Examination) -> Finding:
    try:
        examination.settings = examination.load()
        examination.connection = require_database(examination.settings)
    except ConfigurationError as error:
        cause = "\n".join(f"{fault.variable}: {fault.problem} {fault.remedy}" for fault in error.faults)
        return failed(
            f"{len(error.faults)} to mend",
            cause,
            f"Mend the environment or backend/.env, then: {command('verify')}",
            exit_code=error.exit_code,
        )
    figure = f"{examination.connection.redacted()}, from {examination.source}"
    if examination.connection.warnings:
        return warned(figure, " ".join(examination.connection.warnings), command("config"))
    return passed(figure)


def is_loopback(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost"


def is_local(connection: ConnectionSettings) -> bool:
    """Whether every host is this machine."""
    return all(host.is_socket or is_loopback(host.name) for host in connection.hosts)


async def names(examination: Examination) -> Finding:
    """Each host's addresses. With several hosts one is enough, as it is for the driver."""
    found, missing = [], []
    for host in examination.connection.hosts:
        name = host.name
        if host.is_socket:
            examination.addresses[host] = ()
            found.append(f"{name} (a socket)")
            continue
        try:
            examination.addresses[host] = await _resolve(name, host.port)
        except socket.gaierror:
            missing.append(name)
        else:
            listed = ", ".join(examination.addresses[host])
            found.append(name if listed == name else f"{name} is {listed}")
    if not found:
        cause = f"No address is known for {', '.join(missing)}."
        return failed("not found", cause, f"getent hosts {missing[0]}   # then mend the host in DATABASE_URL")
    if missing:
        return warned(
            "; ".join(found),
            f"No address is known for {', '.join(missing)}.",
            f"getent hosts {missing[0]}   # or take that host out of DATABASE_URL",
        )
    return passed("; ".join(found))


async def _resolve(name: str, port: int) -> tuple[str, ...]:
    """The addresses of a host name.

    In a daemon thread: the default executor is waited for when the loop ends, and a resolver whose servers
    do not answer would hold the whole run past its bound.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[tuple[str, ...]] = loop.create_future()

    def settle(addresses: tuple[str, ...], error: OSError | None) -> None:
        if not answer.done():
            if error is None:
                answer.set_result(addresses)
            else:
                answer.set_exception(error)

    def look_up() -> None:
        addresses: tuple[str, ...] = ()
        fault: OSError | None = None
        try:
            rows = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
            addresses = tuple(dict.fromkeys(str(row[4][0]) for row in rows))
        except UnicodeError:
            fault = socket.gaierror(socket.EAI_NONAME, "not a host name")
        except OSError as error:
            fault = error
        with contextlib.suppress(RuntimeError):  # The loop may have ended without us.
            loop.call_soon_threadsafe(settle, addresses, fault)

    threading.Thread(target=look_up, daemon=True, name="resolve").start()
    return await answer


async def _open(examination: Examination, host: Host) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare connection to the first of the host's addresses that takes it."""
    if host.is_socket:
        return await asyncio.open_unix_connection(f"{host.name}/.s.PGSQL.{host.port}")
    seconds = examination.connect_seconds
    last: OSError = ConnectionRefusedError()
    for address in examination.addresses.get(host, ()):
        try:
            return await asyncio.wait_for(asyncio.open_connection(address, host.port), seconds)
        except OSError as error:
            last = error
    raise last


async def network(examination: Examination) -> Finding:
    faults: list[tuple[Host, OSError]] = []
    for host in examination.connection.hosts:
        if host not in examination.addresses:
            continue
        begun = time.monotonic()
        try:
            _, writer = await _open(examination, host)
        except OSError as error:
            faults.append((host, error))
            continue
        writer.close()
        if not faults:
            examination.reachable = host
            return passed(f"{host} answers in {1000 * (time.monotonic() - begun):.1f} ms")
        examination.reachable = host
        return warned(
            f"{host} answers",
            f"{faults[0][0]} does not: {_network_cause(faults[0][1])}",
            "Start that server, or take it out of DATABASE_URL.",
        )
    host, fault = faults[0]
    if is_local(examination.connection):
        remedy = f"{command('serve --embedded')}   # or start the PostgreSQL that DATABASE_URL names"
    else:
        remedy = f"pg_isready -h {host.name} -p {host.port}   # then the firewall, the allow list, the port"
    return failed("not reached", f"{host}: {_network_cause(fault)}", remedy)


def _network_cause(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "nothing answers there (packets vanish, as behind a firewall)."
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there (connection refused)."
    if isinstance(error, FileNotFoundError):
        return "there is no such socket."
    return f"{error.strerror or type(error).__name__}."


async def tls(examination: Examination) -> Finding:
    """Speaks PostgreSQL's TLS request itself, so that a certificate is judged before a password exists."""
    host, settings = examination.reachable, examination.connection.tls
    mode = settings.mode
    if host.is_socket:
        return passed("none: a Unix socket")
    if mode == "disable":
        if is_loopback(host.name):
            return passed("none: loopback")
        return warned(
            "none: sslmode=disable",
            "Passwords and rows can be read on the way to the server.",
            "Put sslmode=verify-full into DATABASE_URL (and sslrootcert=<file> for a CA of one's own).",
        )
    context = examination.connection.ssl_context() or _unverified()
    try:
        reader, writer = await _open(examination, host)
        try:
            if settings.negotiation == "postgres":
                writer.write(_SSL_REQUEST)
                answer = await reader.read(1)
                if answer != b"S":
                    return _without_tls(answer, host, mode)
            await writer.start_tls(context, server_hostname=host.name)
            return _judge(writer.get_extra_info("ssl_object"), context, mode)
        finally:
            writer.close()
    except ssl.SSLCertVerificationError as error:
        refusal = as_refusal(diagnose(error))
        cause = f"{refusal.detail} ({error.verify_message.rstrip('.')}.)"
        return failed("refused", cause, refusal.remedy, exit_code=refusal.exit_code)
    except ssl.SSLError as error:
        return failed(
            "failed",
            f"The TLS handshake failed ({(error.reason or 'no reason given').lower().replace('_', ' ')}).",
            f"openssl s_client -starttls postgres -connect {host}",
        )


def _without_tls(answer: bytes, host: Host, mode: str) -> Finding:
    if answer != b"N":
        return failed(
            "failed",
            "What answers there does not speak PostgreSQL's protocol.",
            "Check the host and the port in DATABASE_URL.",
        )
    if mode not in ("allow", "prefer"):
        return failed(
            "refused",
            "The server offers no TLS, so no password was sent.",
            "Turn on ssl in the server; or, where nobody can listen in between, sslmode=disable.",
            exit_code=3,
        )
    figure = f"none: the server offers none, sslmode={mode}"
    if is_loopback(host.name):
        return passed(figure)
    return warned(
        figure,
        "Passwords and rows can be read on the way to the server.",
        "Turn on TLS in the server, and put sslmode=verify-full into DATABASE_URL.",
    )


def _judge(wire: ssl.SSLObject, context: ssl.SSLContext, mode: str) -> Finding:
    protocol = f"{wire.version()}, {(wire.cipher() or ('unknown cipher',))[0]}"
    certificate: dict[str, Any] = dict(wire.getpeercert() or {})
    if context.verify_mode != ssl.CERT_REQUIRED or not certificate:
        return warned(
            f"{protocol}, not verified: sslmode={mode}",
            "The line is encrypted, but anybody in between can pose as the server.",
            "Put sslmode=verify-full into DATABASE_URL (and sslrootcert=<file> for a CA of one's own).",
        )
    days = (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / 86400
    checked = "name and CA" if context.check_hostname else "CA only, not the name"
    figure = f"{protocol}, verified ({checked}), issued by {_issuer(certificate)}, {days:.0f} days left"
    if days < _EXPIRY_WARNING_DAYS:
        return warned(
            figure, "The server's certificate expires soon.", "Renew the certificate on the database server."
        )
    return passed(figure)


def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _issuer(certificate: dict[str, Any]) -> str:
    parts = {key: value for group in certificate.get("issuer", ()) for key, value in group}
    wanted = [parts.get("organizationName"), parts.get("commonName") or parts.get("organizationalUnitName")]
    return " ".join(part for part in wanted if part) or "an unnamed CA"


async def _connect(examination: Examination) -> asyncpg.Connection[Any]:
    wire, _ = await hosts.connect(
        examination.connection,
        examination.connect_seconds,
        command_timeout=examination.settings.database_command_timeout_seconds,
        statement_cache_size=0,
    )
    return wire


async def _close(wire: asyncpg.Connection[Any]) -> None:
    try:
        await wire.close(timeout=1.0)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        wire.terminate()


async def credentials(examination: Examination) -> Finding:
    examination.wire = wire = await _connect(examination)
    examination.closers.append(lambda: _close(wire))
    (row,) = await examination.ask("SELECT current_user::text AS role, current_database()::text AS name")
    return passed(f'role "{row["role"]}" on database "{row["name"]}"')


async def version(examination: Examination) -> Finding:
    (row,) = await examination.ask(
        "SELECT current_setting('server_version') AS text, "
        "current_setting('server_version_num')::int / 10000 AS major"
    )
    figure = f"PostgreSQL {row['text']}"
    if row["major"] < _OLDEST:
        return failed(
            figure,
            f"Groundwork needs PostgreSQL {_OLDEST} or newer.",
            f"Upgrade the server; {_OLDEST} to {_NEWEST} are supported.",
        )
    if row["major"] > _NEWEST:
        return warned(
            figure, f"Newer than {_NEWEST}, the newest that is tested.", "Run `make test` against it first."
        )
    return passed(figure)


async def pooler(examination: Examination) -> Finding:
    """Told by what the server does, then compared with what the configuration believes.

    The key data of the start-up names a backend. A pooler makes that up; when two connections which are open
    at once meet the same backend, or one meets two, transactions are shared out and sessions are not kept.
    """
    configured = str(examination.connection.pooler)
    (first,) = await examination.ask("SELECT pg_backend_pid() AS pid")
    if first["pid"] == examination.wire.get_server_pid():
        if configured in ("transaction", "tracking"):
            return warned(
                f"none, configured as {configured}",
                "The server answers directly; caring for a pooler costs speed.",
                "Set DATABASE_POOLER=auto.",
            )
        return passed("none")
    shared = await _shares_backends(examination, first["pid"])
    if shared is None:
        return not_run(
            f"something stands between; no second connection was free to tell what (configured: {configured})"
        )
    if not shared:
        return passed("a proxy that keeps sessions")
    found = "tracking" if await _tracks_statements(examination) else "transaction"
    figure = f"transaction mode, prepared statements {'followed' if found == 'tracking' else 'not followed'}"
    if configured == "none":
        return failed(
            figure,
            "DATABASE_POOLER=none, yet connections are shared out: statements will meet foreign backends.",
            f"Set DATABASE_POOLER={found} (or auto).",
        )
    if configured == "tracking" and found == "transaction":
        return failed(
            figure,
            "The pooler does not follow prepared statements, and the configuration says that it does.",
            "Set DATABASE_POOLER=transaction, or max_prepared_statements=1000 in PgBouncer 1.21 or newer.",
        )
    return passed(f"{figure} (configured: {configured})")


async def _shares_backends(examination: Examination, first: int) -> bool | None:
    """Whether two connections met one backend, or one met two. None: no second connection could be had."""
    try:
        other = await _connect(examination)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return None
    try:
        async with other.transaction(readonly=True):
            theirs = await other.fetchval("SELECT pg_backend_pid()")
            (ours,) = await examination.ask("SELECT pg_backend_pid() AS pid")
            return bool(theirs == first or ours["pid"] != first)
    finally:
        await _close(other)


async def _tracks_statements(examination: Examination) -> bool:
    """Whether the pooler gives prepared statements names of its own, which is how PgBouncer follows them."""
    name = f"groundwork_{secrets.token_hex(6)}"
    async with examination.wire.transaction(readonly=True):
        query = f"SELECT count(*)::int FROM pg_prepared_statements WHERE name = '{name}'"  # noqa: S608
        statement = await examination.wire.prepare(query, name=name)
        kept = await statement.fetchval()
        await examination.wire.execute(f"DEALLOCATE {name}" if kept else "SELECT 1")
    return not kept


async def latency(examination: Examination) -> Finding:
    samples = [await _timed(lambda: examination.wire.execute("SELECT 1")) for _ in range(9)]
    median = 1000 * statistics.median(samples)
    figure = f"{median:.2f} ms a round trip (median of {len(samples)})"
    if median > _SLOW_ROUND_TRIP_MS:
        return warned(
            figure,
            "Every request waits for at least one round trip.",
            "Run the service in the database's region.",
        )
    return passed(figure)


async def _timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    await work()
    return time.perf_counter() - begun
