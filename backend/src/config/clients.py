"""What the operator says about clients: how long they may take, how many may come, and where insiders ask."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

# The types of the settings: their bounds, and the sentence about each.

HeaderTimeoutSeconds = Annotated[
    float,
    Field(
        gt=0,
        le=300,
        description="How long a client may take to send a request's headers, and to begin after it has connected.",
    ),
]
BodyTimeoutSeconds = Annotated[
    float,
    Field(
        gt=0,
        le=300,
        description=(
            "In each such time a body that is on its way has to bring as many seconds' worth of MIN_BYTES_PER_SECOND; "
            "a long import may take as long as it needs."
        ),
    ),
]
SendTimeoutSeconds = Annotated[
    float,
    Field(
        gt=0,
        le=3600,
        description="How long a client may leave what is answered untouched before its connection is cut.",
    ),
]
MinBytesPerSecond = Annotated[
    int,
    Field(
        ge=1,
        le=1 << 20,
        description="The least that a client sends of a body, or takes of a finished answer, in bytes a second.",
    ),
]
KeepAliveSeconds = Annotated[
    float,
    Field(
        gt=0,
        le=3600,
        description=(
            "How long a connection is kept for its next request. Behind a proxy or load balancer that keeps "
            "connections: longer than it does."
        ),
    ),
]
MaxConnections = Annotated[
    int,
    Field(
        ge=16,
        le=1_000_000,
        description=(
            "Connections of clients that a worker holds; with more, those that have waited longest for their next "
            "request are closed. Never more than its file descriptors allow."
        ),
    ),
]
MaxConcurrentRequests = Annotated[
    int,
    Field(
        ge=1,
        le=1_000_000,
        description="Requests that a worker works on at a time; more are told 503 at once. Probes do not count.",
    ),
]
AdminHost = Annotated[
    str, Field(min_length=1, max_length=255, description="The address that ADMIN_PORT is listened on.")
]
AdminPort = Annotated[
    int | None,
    Field(
        ge=0,
        le=65535,
        description=(
            "Another port for /metrics and the details of /health, which the public port then no longer shows; 0 "
            "takes a free one. Unset: there is none, and PORT answers both."
        ),
    ),
]
DrainGraceSeconds = Annotated[
    float,
    Field(
        ge=0,
        le=300,
        description="On SIGTERM: how long /readyz says not ready while requests are still accepted.",
    ),
]
ShutdownTimeoutSeconds = Annotated[
    float, Field(ge=0, le=3600, description="How long requests under way may take to finish when stopping.")
]
FastPath = Annotated[
    bool,
    Field(
        description=(
            "Whether operations on tasks and probes are answered without FastAPI's machinery around them. The answers "
            "are the same; `false` is for finding a fault."
        )
    ),
]
