"""Each pasted form reaches a real server, or is refused, through all three ways: pool, session and migration."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import os
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from clusters import Authority, Proxy, Thief, resolving
from conftest import FAST, open_directory
from postgres_server import PostgresServer
from src.config.database import parse
from src.errors import DatabaseRefused, GroundworkError
from src.services import hosts, schema, server_authentication
from src.services.server_authentication import AuthenticationMethodRefused
from ways import HASTY, WAYS, Way, by_pool

ODD = "p%@:/ é"


@dataclass
class Doors:
    """The ways into one server: plain TCP, a Unix socket, and TLS with good and bad certificates."""

    server: PostgresServer
    socket: Path
    root: Path
    client: tuple[Path, Path]
    ports: dict[str, int]
    ipv6: bool

    def fill(self, pasted: str) -> str:
        names = {
            "AUTH": f"groundwork:{self.server.password}",
            "PASSWORD": self.server.password,
            "ODD": quote(ODD, safe=""),
            "RAW": ODD,
            "SOCKET": str(self.socket),
            "QUOTED_SOCKET": quote(str(self.socket), safe=""),
            "ROOT": str(self.root),
            "CERT": str(self.client[0]),
            "KEY": str(self.client[1]),
            **{f"{name.upper()}_PORT": str(port) for name, port in self.ports.items()},
        }
        for name, value in names.items():
            pasted = pasted.replace(f"<{name}>", value)
        assert "<" not in pasted
        return pasted


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


@pytest.fixture(scope="module")
def doors() -> Iterator[Doors]:
    now = datetime.datetime.now(datetime.UTC)
    with open_directory() as directory:
        sockets = directory / "s"
        sockets.mkdir(mode=0o777)
        sockets.chmod(0o777)
        authority, other = Authority(directory), Authority(sockets)
        expired = authority.ca.issue_cert(
            "127.0.0.1", "localhost", not_after=now - datetime.timedelta(days=1)
        )
        expired_context = authority.server_context("127.0.0.1")
        expired.configure_cert(expired_context)
        options = FAST | {
            "unix_socket_directories": str(sockets),
            "listen_addresses": "127.0.0.1,::1" if has_ipv6() else "127.0.0.1",
        }
        with (
            PostgresServer(directory / "data", options=options) as server,
            closed_port() as closed,
        ):
            certificates = {
                "good": authority.server_context("127.0.0.1", "localhost", "db.internal", POOLED, DIRECT),
                "wrong": authority.server_context("db.example.com"),
                "expired": expired_context,
                "unknown": other.server_context("127.0.0.1", "localhost", "db.internal", POOLED, DIRECT),
                "mutual": authority.server_context("127.0.0.1", require_client=True),
            }
            proxies = {name: Proxy(server.port, tls=context) for name, context in certificates.items()}
            for proxy in proxies.values():
                proxy.__enter__()
            ports = {name: proxy.port for name, proxy in proxies.items()} | {
                "plain": server.port,
                "closed": closed,
            }
            yield Doors(server, sockets, authority.root_path, authority.issue("client"), ports, has_ipv6())
            for proxy in proxies.values():
                proxy.__exit__(None, None, None)


@contextmanager
def closed_port() -> Iterator[int]:
    """A port on which nobody listens, and nobody can for as long as it is used."""
    with socket.socket() as keeper:
        keeper.bind(("127.0.0.1", 0))
        yield keeper.getsockname()[1]


POOLED = "ep-x-pooler.eu-central-1.aws.neon.tech"
DIRECT = "ep-x.eu-central-1.aws.neon.tech"
# Names that this process resolves to 127.0.0.1, so that they are hosts elsewhere to everybody who judges by name.
ELSEWHERE = dict.fromkeys((POOLED, DIRECT, "db.internal"), "127.0.0.1")

REACHES = [
    # around and in front of the address
    "postgresql://<AUTH>@127.0.0.1:<PLAIN_PORT>/groundwork",
    "postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork",
    "'postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork'",
    "psql 'postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork'",
    "postgres://<AUTH>@localhost:<PLAIN_PORT>/groundwork",
    "postgresql+asyncpg://<AUTH>@localhost:<PLAIN_PORT>/groundwork",
    "postgresql://<AUTH>@localhost:<PLAIN_PORT>",
    "host=localhost port=<PLAIN_PORT> user=groundwork password='<PASSWORD>' dbname=groundwork",
    # TLS not wanted, or not insisted on
    "postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork?sslmode=disable",
    "postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork?sslmode=allow",
    "postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork?sslmode=prefer",
    "postgresql://<AUTH>@db.internal:<PLAIN_PORT>/groundwork?sslmode=disable",
    "postgresql://<AUTH>@db.internal:<PLAIN_PORT>/groundwork?sslmode=prefer",
    "postgresql://<AUTH>@localhost:<GOOD_PORT>/groundwork?sslmode=prefer",
    "postgresql://<AUTH>@localhost:<UNKNOWN_PORT>/groundwork?sslmode=prefer",
    "postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork?channel_binding=prefer&gssencmode=prefer",
    # TLS
    "postgresql://<AUTH>@localhost:<GOOD_PORT>/groundwork?sslmode=require",
    "postgresql://<AUTH>@localhost:<UNKNOWN_PORT>/groundwork?sslmode=require",
    "postgresql://<AUTH>@localhost:<EXPIRED_PORT>/groundwork?sslmode=require",
    "postgresql+asyncpg://<AUTH>@localhost:<GOOD_PORT>/groundwork?ssl=require",
    "postgresql://<AUTH>@localhost:<GOOD_PORT>/groundwork?sslmode=verify-full&sslrootcert=<ROOT>",
    "postgresql://<AUTH>@127.0.0.1:<GOOD_PORT>/groundwork?sslmode=verify-full&sslrootcert=<ROOT>",
    "postgresql://<AUTH>@db.internal:<GOOD_PORT>/groundwork?sslrootcert=<ROOT>",
    "postgresql://<AUTH>@localhost:<GOOD_PORT>/groundwork?sslmode=require&channel_binding=require&sslrootcert=<ROOT>",
    "postgresql://<AUTH>@localhost:<WRONG_PORT>/groundwork?sslmode=verify-ca&sslrootcert=<ROOT>",
    "postgresql://<AUTH>@127.0.0.1:<MUTUAL_PORT>/groundwork?sslmode=require&sslcert=<CERT>&sslkey=<KEY>",
    "postgresql://<AUTH>@127.0.0.1:<MUTUAL_PORT>/groundwork?sslrootcert=<ROOT>&sslcert=<CERT>&sslkey=<KEY>",
    f"postgresql://<AUTH>@{POOLED}:<GOOD_PORT>/groundwork?sslmode=require&channel_binding=require&sslrootcert=<ROOT>",
    f"postgresql://<AUTH>@{DIRECT}:<GOOD_PORT>/groundwork?options=endpoint%3Dep-x&sslrootcert=<ROOT>",
    # hosts
    "postgresql://<AUTH>@localhost:<CLOSED_PORT>,localhost:<PLAIN_PORT>/groundwork",
    "postgresql://<AUTH>@/groundwork?host=localhost,localhost&port=<CLOSED_PORT>,<PLAIN_PORT>",
    "postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork?target_session_attrs=read-write",
    "postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork?target_session_attrs=prefer-standby",
    "postgresql://<AUTH>@/groundwork?host=<SOCKET>&port=<PLAIN_PORT>",
    "postgresql://<AUTH>@/groundwork?host=<SOCKET>&port=<PLAIN_PORT>&sslmode=require",
    "postgresql://<AUTH>@<QUOTED_SOCKET>:<PLAIN_PORT>/groundwork",
    *(["postgresql://<AUTH>@[::1]:<PLAIN_PORT>/groundwork"] if has_ipv6() else []),
    # parameters
    "postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork?connect_timeout=3&application_name=me",
    "postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork?keepalives=1&keepalives_idle=30&options=endpoint%3Dep-x",
    "postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork?options=-c%20jit%3Doff%20-c%20work_mem%3D8MB",
    # passwords
    "postgresql://odd:<ODD>@localhost:<PLAIN_PORT>/groundwork",
    "postgresql://odd:<RAW>@localhost:<PLAIN_PORT>/groundwork",
    "host=localhost port=<PLAIN_PORT> user=odd password='<RAW>' dbname=groundwork",
]

REFUSALS = [
    # the server has no TLS
    "postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork?sslmode=require",
    "postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork?sslmode=verify-full&sslrootcert=<ROOT>",
    "postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork?channel_binding=require",
    "postgresql://<AUTH>@db.internal:<PLAIN_PORT>/groundwork",
    # nobody vouches for the certificate
    "postgresql://<AUTH>@db.internal:<GOOD_PORT>/groundwork",
    "postgresql://<AUTH>@localhost:<GOOD_PORT>/groundwork?sslmode=verify-full",
    "postgresql://<AUTH>@localhost:<GOOD_PORT>/groundwork?sslmode=verify-ca",
    "postgresql://<AUTH>@localhost:<GOOD_PORT>/groundwork?sslmode=require&sslrootcert=system",
    "postgresql://<AUTH>@localhost:<GOOD_PORT>/groundwork?sslmode=require&channel_binding=require",
    "postgresql://<AUTH>@localhost:<UNKNOWN_PORT>/groundwork?sslmode=verify-ca&sslrootcert=<ROOT>",
    "postgresql://<AUTH>@localhost:<UNKNOWN_PORT>/groundwork?sslmode=require&sslrootcert=<ROOT>",
    f"postgresql://<AUTH>@{POOLED}:<UNKNOWN_PORT>/groundwork?sslmode=require",
    f"postgresql://<AUTH>@{DIRECT}:<UNKNOWN_PORT>/groundwork?sslmode=prefer",
    # it is another host's, or too old
    "postgresql://<AUTH>@localhost:<WRONG_PORT>/groundwork?sslmode=verify-full&sslrootcert=<ROOT>",
    "postgresql://<AUTH>@localhost:<WRONG_PORT>/groundwork?sslmode=require&sslrootcert=<ROOT>",
    "postgresql://<AUTH>@localhost:<EXPIRED_PORT>/groundwork?sslmode=verify-ca&sslrootcert=<ROOT>",
    # the server does not know us
    "postgresql://<AUTH>@127.0.0.1:<MUTUAL_PORT>/groundwork?sslmode=require",
    "postgresql://groundwork:wrong@localhost:<PLAIN_PORT>/groundwork",
    "postgresql://groundwork@localhost:<PLAIN_PORT>/groundwork",
    # it is not the server that was asked for
    "postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork?target_session_attrs=standby",
]


@pytest.fixture(scope="module")
async def odd_role(doors: Doors) -> None:
    connection = await asyncpg.connect(doors.server.url)
    await connection.execute(f"CREATE ROLE odd SUPERUSER LOGIN PASSWORD '{ODD}'")
    await connection.execute("ALTER ROLE odd SET TimeZone = 'Asia/Tokyo'")
    await connection.close()
    await schema.create_tables(parse(doors.server.url))


@pytest.mark.usefixtures("odd_role")
@pytest.mark.parametrize("pasted", REACHES)
async def test_a_pasted_address_reaches_the_server_by_pool_session_and_migration(
    doors: Doors, pasted: str
) -> None:
    settings = parse(doors.fill(pasted))
    with resolving(ELSEWHERE):
        for way in WAYS:
            assert await way(settings) == settings.user, way.__name__


@pytest.mark.usefixtures("odd_role")
@pytest.mark.parametrize("pasted", REFUSALS)
async def test_an_address_that_promises_too_much_is_refused_by_pool_session_and_migration(
    doors: Doors, pasted: str
) -> None:
    settings = parse(doors.fill(pasted))
    with resolving(ELSEWHERE):
        for way in WAYS:
            with pytest.raises(GroundworkError) as refusal:
                await way(settings, HASTY)
            assert doors.server.password not in str(refusal.value)


@pytest.mark.usefixtures("odd_role")
async def test_the_systems_authorities_are_those_that_the_operator_gave_the_system(
    doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(doors.root))
    with resolving(ELSEWHERE):
        for pasted in (
            f"postgresql://<AUTH>@{POOLED}:<GOOD_PORT>/groundwork?sslmode=require&channel_binding=require",
            "postgresql://<AUTH>@db.internal:<GOOD_PORT>/groundwork?sslmode=verify-full&sslrootcert=system",
            "postgresql://<AUTH>@db.internal:<GOOD_PORT>/groundwork",
        ):
            for way in WAYS:
                assert await way(parse(doors.fill(pasted))) == "groundwork"


@pytest.mark.usefixtures("odd_role")
async def test_server_settings_arrive_and_every_session_runs_in_utc(doors: Doors) -> None:
    """Also where the role says otherwise, as `odd` does."""
    query = "application_name=me&options=-c%20work_mem%3D8MB%20-cTimeZone%3DAsia/Tokyo"
    pasted = f"postgresql://odd:<ODD>@localhost:<PLAIN_PORT>/groundwork?{query}"
    connection = await asyncpg.connect(**parse(doors.fill(pasted)).asyncpg_arguments())
    names = ("application_name", "work_mem", "TimeZone")
    found = [await connection.fetchval("SELECT current_setting($1)", name) for name in names]
    await connection.close()
    assert found == ["me", "8MB", "UTC"]


def hostile_surroundings(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Everything that asyncpg and libpq would pick up on their own, all of it wrong."""
    home = directory / "home"
    (home / ".postgresql").mkdir(parents=True)
    for name in ("root.crt", "root.crl", "postgresql.crt", "postgresql.key"):
        (home / ".postgresql" / name).write_text("not a certificate")
    passwords = home / ".pgpass"
    passwords.write_text("*:*:*:*:hostile-password\n")
    passwords.chmod(0o600)
    (home / ".pg_service.conf").write_text("[hostile]\nhost=192.0.2.1\nuser=hostile\n")
    monkeypatch.setenv("HOME", str(home))
    hostile = {
        "PGHOST": "192.0.2.1", "PGPORT": "1", "PGUSER": "hostile", "PGPASSWORD": "hostile-password",
        "PGPASSFILE": str(passwords), "PGDATABASE": "hostile", "PGSSLMODE": "disable", "PGSSLROOTCERT": "/nowhere",
        "PGSSLCRL": "/nowhere", "PGSSLCERT": "/nowhere", "PGSSLKEY": "/nowhere", "PGSSLNEGOTIATION": "direct",
        "PGSSLMINPROTOCOLVERSION": "SSLv3", "PGSSLMAXPROTOCOLVERSION": "SSLv3", "PGTARGETSESSIONATTRS": "standby",
        "PGKRBSRVNAME": "hostile", "PGGSSLIB": "hostile", "PGSERVICE": "hostile",
        "PGSERVICEFILE": str(home / ".pg_service.conf"), "PGOPTIONS": "-c work_mem=nonsense", "PGAPPNAME": "hostile",
        "PGCLIENTENCODING": "latin1", "PGTZ": "Asia/Tokyo", "PGCHANNELBINDING": "require", "PGREQUIREAUTH": "none",
    }  # fmt: skip
    for name, value in hostile.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("odd_role")
@pytest.mark.parametrize(
    "pasted",
    [
        "postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork",
        "postgresql://<AUTH>@localhost:<PLAIN_PORT>",
        "postgresql://<AUTH>@/groundwork?host=<SOCKET>&port=<PLAIN_PORT>",
        "postgresql://<AUTH>@localhost:<UNKNOWN_PORT>/groundwork?sslmode=require",
        "postgresql://<AUTH>@localhost:<GOOD_PORT>/groundwork?sslmode=verify-full&sslrootcert=<ROOT>",
    ],
)
async def test_no_variable_or_file_of_the_drivers_changes_where_a_connection_goes(
    doors: Doors, pasted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hostile_surroundings(monkeypatch, tmp_path)
    for way in WAYS:
        assert await way(parse(doors.fill(pasted))) == "groundwork"


@pytest.mark.usefixtures("odd_role")
async def test_prefer_refuses_by_name_the_client_certificate_that_the_driver_would_pick_up(
    doors: Doors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hostile_surroundings(monkeypatch, tmp_path)
    settings = parse(doors.fill("postgresql://<AUTH>@localhost:<PLAIN_PORT>/groundwork?sslmode=prefer"))
    with pytest.raises(GroundworkError, match=r"PGSSLCERT, .*postgresql\.crt"):
        settings.asyncpg_arguments()


async def test_a_password_of_the_surroundings_is_sent_to_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hostile_surroundings(monkeypatch, tmp_path)
    with Thief() as thief:
        for way in WAYS:
            with pytest.raises(GroundworkError):
                await way(parse(f"postgresql://u@127.0.0.1:{thief.port}/db?require_auth=password"), HASTY)
    assert thief.passwords
    assert set(thief.passwords) == {""}
    assert b"hostile" not in thief.heard


# N7: TLS stripped, self-signed, wrong host. Nothing but the request for TLS may leave.

VERIFYING = [
    "postgresql://u:canary@db.internal:PORT/db",
    "postgresql://u:canary@db.internal:PORT/db?sslmode=verify-full",
    "postgresql://u:canary@db.internal:PORT/db?sslmode=verify-ca&sslrootcert=ROOT",
    "postgresql://u:canary@db.internal:PORT/db?sslmode=require&sslrootcert=ROOT",
    "postgresql://u:canary@db.internal:PORT/db?sslmode=require&sslrootcert=system",
    "postgresql://u:canary@db.internal:PORT/db?sslmode=require&channel_binding=require",
    "postgresql://u:canary@127.0.0.1:PORT/db?channel_binding=require",
    f"postgresql://u:canary@{POOLED}:PORT/db?sslmode=require&channel_binding=require",
    f"postgresql://u:canary@{POOLED}:PORT/db?sslmode=require",
    f"postgresql://u:canary@{POOLED}:PORT/db?sslmode=prefer",
    f"postgresql://u:canary@{POOLED}:PORT/db",
]


NAMES = ("db.internal", "127.0.0.1", POOLED, DIRECT)
DISGUISES = ["no TLS", "unknown", "self-signed", "wrong host", "expired", "not yet valid", "a client's"]


def issued(authority: Authority, disguise: str) -> tuple[bytes, bytes]:
    """A certificate for the right names that is wrong in this one way, and its key, both as PEM."""
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "db.internal")])
    issuer = x509.load_pem_x509_certificate(authority.ca.cert_pem.bytes())
    signer = serialization.load_pem_private_key(authority.ca.private_key_pem.bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    if disguise == "self-signed":
        signer = key
    named = [
        x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() else x509.DNSName(name)
        for name in NAMES
    ]
    usage = ExtendedKeyUsageOID.CLIENT_AUTH if disguise == "a client's" else ExtendedKeyUsageOID.SERVER_AUTH
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if disguise == "self-signed" else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + day if disguise == "not yet valid" else now - 9 * day)
        .not_valid_after(now - day if disguise == "expired" else now + 9 * day)
        .add_extension(x509.SubjectAlternativeName(named), critical=False)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    return certificate.public_bytes(serialization.Encoding.PEM), secret


def wearing(authority: Authority, disguise: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate, key = authority.directory / "worn.crt", authority.directory / "worn.key"
    for path, content in zip((certificate, key), issued(authority, disguise), strict=True):
        path.write_bytes(content)
    context.load_cert_chain(certificate, key)
    return context


async def test_a_certificate_of_this_make_with_nothing_wrong_is_taken(doors: Doors, tmp_path: Path) -> None:
    """So that what the test below refuses is refused for the one thing that is wrong with it."""
    authority = Authority(tmp_path)
    with (
        Proxy(doors.server.port, tls=wearing(authority, "nothing")) as proxy,
        resolving(ELSEWHERE),
    ):
        pasted = f"postgresql://<AUTH>@{POOLED}:{proxy.port}/groundwork?sslrootcert={authority.root_path}"
        assert await by_pool(parse(doors.fill(pasted))) == "groundwork"


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("pasted", VERIFYING)
async def test_an_impostor_hears_nothing(
    pasted: str, disguise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = Authority(tmp_path), Authority(tmp_path)
    if disguise == "wrong host" and "verify-ca" in pasted:
        disguise = "unknown"  # verify-ca does not look at the name: that is its meaning
    contexts = {
        "no TLS": lambda: None,
        "unknown": lambda: theirs.server_context(*NAMES),
        "wrong host": lambda: ours.server_context("thief.example.com"),
    }
    # With our own authority known to the system, nothing but the disguise is wrong.
    monkeypatch.setenv("SSL_CERT_FILE", str(ours.root_path))
    context = contexts[disguise]() if disguise in contexts else wearing(ours, disguise)
    with Thief(context) as thief, resolving(ELSEWHERE):
        root = tmp_path / "ours.crt"
        ours.ca.cert_pem.write_to_path(str(root))
        settings = parse(pasted.replace("PORT", str(thief.port)).replace("ROOT", str(root)))
        for way in WAYS:
            with pytest.raises(GroundworkError) as refusal:
                await way(settings, HASTY)
            assert "canary" not in str(refusal.value)
        assert thief.connections >= len(WAYS)
    assert thief.passwords == []
    assert thief.heard == b""


@pytest.mark.parametrize(("mode", "tls"), [("prefer", False), ("disable", False), ("require", True)])
@pytest.mark.parametrize("way", WAYS)
async def test_weak_sslmode_and_cleartext_request_sends_no_password(
    mode: str, tls: bool, way: Way, tmp_path: Path
) -> None:
    context = Authority(tmp_path).server_context("db.internal") if tls else None
    with Thief(context) as thief, resolving(ELSEWHERE):
        settings = parse(f"postgresql://u:canary@db.internal:{thief.port}/db?sslmode={mode}")
        with pytest.raises(DatabaseRefused, match=r"no password was sent.*require_auth="):
            await way(settings, HASTY)
    assert settings.warnings
    assert thief.heard
    assert thief.passwords == []
    assert b"canary" not in thief.heard


@pytest.mark.parametrize("methods", ["password", "md5,password", "!scram-sha-256"])
async def test_require_auth_password_hands_the_password_over(methods: str) -> None:
    """The method has to be allowed by name; and the server of the test above does record what it receives."""
    with Thief() as thief:
        settings = parse(f"postgresql://u:canary@127.0.0.1:{thief.port}/db?require_auth={methods}")
        with pytest.raises(GroundworkError):
            await by_pool(settings, HASTY)
    assert "canary" in thief.passwords


class FakeServer:
    """Accepts every start-up packet and answers it with the given authentication messages, a byte at a time."""

    def __init__(self, *messages: bytes) -> None:
        self.messages = messages
        self.received = b""
        self.finished = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            (length,) = struct.unpack("!i", await reader.readexactly(4))
            await reader.readexactly(length - 4)
            for message in self.messages:
                for byte in message:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.001)
                if message != _ACCEPTED:
                    (length,) = struct.unpack("!xi", await reader.readexactly(5))
                    self.received += await reader.readexactly(length - 4)
            self.received += await reader.read(1024)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        self.finished.set()


def authentication(code: int, rest: bytes = b"") -> bytes:
    return b"R" + struct.pack("!ii", 8 + len(rest), code) + rest


_ACCEPTED = authentication(0)


@pytest.mark.parametrize(
    ("messages", "parameters", "asked"),
    [
        ([authentication(3)], "", "password"),
        ([authentication(5, b"salt")], "", "md5"),
        ([authentication(7)], "", "gss"),
        ([authentication(99)], "", "method 99"),
        ([authentication(10, b"SCRAM-SHA-256\0\0"), _ACCEPTED], "", "without a proof"),
        ([_ACCEPTED], "?require_auth=scram-sha-256", "none"),
        ([authentication(10, b"SCRAM-SHA-256\0\0")], "?require_auth=!scram-sha-256", "scram-sha-256"),
    ],
)
@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_server_asks_for_a_method_that_is_not_allowed_is_refused(
    messages: list[bytes],
    parameters: str,
    asked: str,
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def connect() -> bytes:
        fake = FakeServer(*messages)
        server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(AuthenticationMethodRefused, match=asked):
            await hosts.connect(parse(f"postgresql://u:canary@127.0.0.1:{port}/db{parameters}"), 5)
        server.close()
        await fake.finished.wait()
        return fake.received

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        assert b"canary" not in runner.run(connect())


async def test_connection_by_scram_keeps_nothing_of_the_check(doors: Doors) -> None:
    settings = parse(doors.fill("postgresql://<AUTH>@127.0.0.1:<PLAIN_PORT>/groundwork"))
    connection, _ = await hosts.connect(replace(settings, require_auth=frozenset({"scram-sha-256"})), 5)
    try:
        assert await connection.fetchval("SELECT repeat('x', 200000)") == "x" * 200_000
        assert "data_received" not in vars(connection._protocol)  # type: ignore[attr-defined]
    finally:
        await connection.close()


async def test_driver_that_makes_its_protocol_in_another_way_is_refused(
    doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade of asyncpg that goes round the check is noticed at the first connection."""
    monkeypatch.setattr(server_authentication, "_checking_protocol", lambda: asyncpg.protocol)
    with pytest.raises(AuthenticationMethodRefused, match="did not check"):
        await hosts.connect(parse(doors.fill("postgresql://<AUTH>@127.0.0.1:<PLAIN_PORT>/groundwork")), 5)


async def test_a_renewed_authority_counts_from_the_next_connection_on(doors: Doors, tmp_path: Path) -> None:
    root = tmp_path / "root.crt"
    settings = parse(
        doors.fill("postgresql://<AUTH>@localhost:<GOOD_PORT>/groundwork") + f"?sslrootcert={root}"
    )
    with pytest.raises(GroundworkError, match="does not exist"):
        settings.asyncpg_arguments()
    Authority(tmp_path / ".." / tmp_path.name).ca.cert_pem.write_to_path(str(root))
    with pytest.raises(GroundworkError):
        await by_pool(settings, HASTY)
    root.write_bytes(doors.root.read_bytes())
    os.utime(root, (1, 1))
    assert await by_pool(settings) == "groundwork"
    assert settings.ssl_context() is settings.ssl_context()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), ("", "not a usable|not usable"), ("nonsense", "not a usable|not usable")],
)
def test_a_certificate_file_that_cannot_be_used_is_named(
    tmp_path: Path, content: str | None, words: str
) -> None:
    path = tmp_path / "file.pem"
    if content is not None:
        path.write_text(content)
    for parameter in ("sslrootcert", "sslcert"):
        settings = parse(f"postgresql://u:canary@h/db?{parameter}={path}")
        with pytest.raises(GroundworkError, match=words) as refusal:
            settings.asyncpg_arguments()
        assert str(path) in str(refusal.value)
        assert parameter in str(refusal.value)
        assert refusal.value.__context__ is None


def test_certifi_stands_in_where_the_system_has_no_authorities(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("SSL_CERT_DIR", str(empty))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    context = parse("postgresql://u:p@h/db").ssl_context()
    assert context is not None
    assert context.cert_store_stats()["x509_ca"] > 50
