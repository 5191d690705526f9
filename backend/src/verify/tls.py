"""Check of TLS: encryption, and the server's certificate, before a password is sent."""

from __future__ import annotations

import ssl
import struct
import time
from typing import TYPE_CHECKING, Any

from ..services.faults import as_refusal, diagnose
from .check import CheckContext, CheckResult, failed, passed, warned
from .network import is_loopback, open_stream

if TYPE_CHECKING:
    from ..config.database import Host

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
_EXPIRY_WARNING_DAYS = 14


async def tls(context: CheckContext) -> CheckResult:
    """Send PostgreSQL's SSLRequest and judge the certificate before a password is sent."""
    host, settings = context.reachable, context.address.tls
    mode = settings.mode
    if host.is_socket:
        return passed("none: a Unix socket")
    if mode == "disable":
        if is_loopback(host.name):
            return passed("none: loopback")
        return warned(
            "none: sslmode=disable",
            "Passwords and rows can be read on the way to the server.",
            "Put sslmode=verify-full into DATABASE_URL (and sslrootcert=<file> for a private CA).",
        )
    ssl_context = context.address.ssl_context() or _unverified()
    try:
        reader, writer = await open_stream(context, host)
        try:
            if settings.negotiation == "postgres":
                writer.write(_SSL_REQUEST)
                response = await reader.read(1)
                if response != b"S":
                    return _without_tls(response, host, mode)
            await writer.start_tls(ssl_context, server_hostname=host.name)
            return _judge(writer.get_extra_info("ssl_object"), ssl_context, mode)
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


def _without_tls(response: bytes, host: Host, mode: str) -> CheckResult:
    if response != b"N":
        return failed(
            "failed",
            "The server at this address does not speak PostgreSQL's protocol.",
            "Check the host and the port in DATABASE_URL.",
        )
    if mode not in ("allow", "prefer"):
        return failed(
            "refused",
            "The server offers no TLS, so no password was sent.",
            "Turn on ssl in the server; or, on a network that is private, sslmode=disable.",
            exit_code=3,
        )
    summary = f"none: the server offers none, sslmode={mode}"
    if is_loopback(host.name):
        return passed(summary)
    return warned(
        summary,
        "Passwords and rows can be read on the way to the server.",
        "Turn on TLS in the server, and put sslmode=verify-full into DATABASE_URL.",
    )


def _judge(connection: ssl.SSLObject, context: ssl.SSLContext, mode: str) -> CheckResult:
    protocol = f"{connection.version()}, {(connection.cipher() or ('unknown cipher',))[0]}"
    certificate: dict[str, Any] = dict(connection.getpeercert() or {})
    if context.verify_mode != ssl.CERT_REQUIRED or not certificate:
        return warned(
            f"{protocol}, not verified: sslmode={mode}",
            "The connection is encrypted, but a machine in between can pose as the server.",
            "Put sslmode=verify-full into DATABASE_URL (and sslrootcert=<file> for a private CA).",
        )
    days = (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / 86400
    checked = "name and CA" if context.check_hostname else "CA only, not the name"
    summary = f"{protocol}, verified ({checked}), issued by {_issuer(certificate)}, {days:.0f} days left"
    if days < _EXPIRY_WARNING_DAYS:
        return warned(
            summary, "The server's certificate expires soon.", "Renew the certificate on the database server."
        )
    return passed(summary)


def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _issuer(certificate: dict[str, Any]) -> str:
    parts = {key: value for group in certificate.get("issuer", ()) for key, value in group}
    wanted = [parts.get("organizationName"), parts.get("commonName") or parts.get("organizationalUnitName")]
    return " ".join(part for part in wanted if part) or "an unnamed CA"
