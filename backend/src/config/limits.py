"""Settings that bound what clients can hold: connections, requests, bytes and time."""

from __future__ import annotations

from pydantic import BaseModel, Field


class LimitSettings(BaseModel):
    """Limits for clients"""

    header_timeout_seconds: float = Field(
        default=5.0,
        gt=0,
        le=300,
        description="How long a client may take to send a request's headers, and to begin after it has connected.",
    )
    body_timeout_seconds: float = Field(
        default=5.0,
        gt=0,
        le=300,
        description=(
            "The period in which a request body must make progress: MIN_BYTES_PER_SECOND for each of its seconds. A "
            "large import may take longer in all."
        ),
    )
    send_timeout_seconds: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="How long a client may read nothing of a response before its connection is closed.",
    )
    min_bytes_per_second: int = Field(
        default=1024,
        ge=1,
        le=1 << 20,
        description="The lowest rate at which a client may send a body or read a finished response.",
    )
    keep_alive_seconds: float = Field(
        default=5.0,
        gt=0,
        le=3600,
        description=(
            "How long an idle connection is kept open for its next request. Behind a proxy or load balancer: longer "
            "than its own idle timeout."
        ),
    )
    max_connections: int = Field(
        default=4096,
        ge=16,
        le=1_000_000,
        description=(
            "Client connections per worker. Beyond it the connections that have been idle longest are closed. The "
            "limit on file descriptors may lower it."
        ),
    )
    max_concurrent_requests: int = Field(
        default=1024,
        ge=1,
        le=1_000_000,
        description="Requests in progress per worker; more get 503. Probes do not count.",
    )
    max_pending_requests_per_network: int = Field(
        default=256,
        ge=1,
        le=1_000_000,
        description=(
            "Requests per worker that one client network (an IPv4 address, an IPv6 /64) may have begun and not yet "
            "sent completely; beyond it the slowest get 429."
        ),
    )
    max_unsent_bytes: int = Field(
        default=64 << 20,
        ge=64 << 10,
        le=1 << 36,
        description=(
            "Response bytes per worker that clients have not read yet. Beyond it the connections with the slowest and "
            "largest responses are closed."
        ),
    )
    max_body_bytes: int = Field(
        default=64 << 10,
        ge=1024,
        le=1 << 30,
        description="The largest request body, in bytes; larger ones get 413.",
    )
    max_batch_bytes: int = Field(
        default=2 << 20, ge=1024, le=1 << 30, description="The largest body of a batch request, in bytes."
    )
    max_import_bytes: int = Field(
        default=64 << 20,
        ge=1024,
        le=1 << 40,
        description="The largest body of an import, in bytes. It is stored on disk while it is validated.",
    )
