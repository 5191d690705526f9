"""Settings of the server: where it listens, its processes, proxies in front of it, health and logs."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator

from ..errors import Fault
from . import BACKEND
from .validation_messages import LowerCase, refuse

if TYPE_CHECKING:
    from .settings import Settings

_EXAMPLE = "10.0.0.0/8,192.168.1.7"
_MAX_NETWORKS = 256


def parse_networks(value: object) -> tuple[str, ...]:
    """A comma-separated list of IP addresses and networks, each as a network."""
    members = value.split(",") if isinstance(value, str) else value
    networks = [_network(member) for member in members] if isinstance(members, list | tuple) else [None]
    if None in networks or len(networks) > _MAX_NETWORKS:
        refuse(
            "TRUSTED_PROXIES",
            f"Must be a comma-separated list of IP addresses or networks, {_MAX_NETWORKS} at most.",
            f"For example {_EXAMPLE}. Unset it to trust no proxy.",
        )
    return tuple(str(network) for network in networks if network != "")


def _network(text: object) -> IPv4Network | IPv6Network | str | None:
    """An IP network, an IPv4-mapped one as IPv4; empty for blanks, None for anything else."""
    if not isinstance(text, str) or not text.strip():
        return "" if isinstance(text, str) else None
    try:
        network = ip_network(text.strip(), strict=False)
    except ValueError:
        return None
    mapped = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
    if mapped is None or network.prefixlen < 96:
        return network
    return IPv4Network((mapped, network.prefixlen - 96))


def faults_of(settings: Settings) -> list[Fault]:
    """Contradictions between settings of the server."""
    networks = [ip_network(text) for text in settings.trusted_proxies]
    if settings.environment == "development" or not any(map(_holds_the_internet, networks)):
        return []
    problem = "Must not contain public networks this large: every client could then claim any address."
    return [Fault("TRUSTED_PROXIES", problem, f"List the addresses of your proxies, for example {_EXAMPLE}.")]


def _holds_the_internet(network: IPv4Network | IPv6Network) -> bool:
    """Whether a network is larger than every private one: 10.0.0.0/8, and fc00::/7."""
    return network.prefixlen < (8 if network.version == 4 else 7)


class ServerSettings(BaseModel):
    """Server and processes"""

    environment: Annotated[Literal["development", "test", "production"], LowerCase] = Field(
        default="development",
        description=(
            "Where the service runs. Outside development weak secrets are refused; in production logs are JSON and "
            "health details are hidden."
        ),
    )
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        max_length=255,
        description="The address to listen on. 0.0.0.0 or :: accepts connections from other machines.",
    )
    port: int = Field(default=8000, ge=0, le=65535, description="The port to listen on; 0 picks a free one.")
    admin_host: str = Field(
        default="127.0.0.1",
        min_length=1,
        max_length=255,
        description="The address that ADMIN_PORT listens on.",
    )
    admin_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description=(
            "A separate port for /metrics and health details, which PORT then no longer serves; 0 picks a free one. "
            "Unset: PORT serves both."
        ),
    )
    workers: int = Field(
        default=1,
        ge=1,
        le=256,
        description="The number of worker processes. Each has its own pool of database connections.",
    )
    worker_heartbeat_seconds: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="How long a worker may send no heartbeat before it is killed and replaced.",
    )
    trusted_proxies: Annotated[tuple[str, ...], BeforeValidator(parse_networks)] = Field(
        default=(),
        description=(
            "The proxies whose X-Forwarded-For and X-Forwarded-Proto headers are used: a comma-separated list of IP "
            f"addresses or networks, such as {_EXAMPLE}. Unset: none."
        ),
        json_schema_extra={"values": "networks"},
    )
    trusted_proxy_hops: int = Field(
        default=1,
        ge=1,
        le=16,
        description=(
            "How many proxies a request passes before it gets here. The client's address is this entry of "
            "X-Forwarded-For, counted from the right, or the next one to its left that is not in TRUSTED_PROXIES."
        ),
    )
    drain_grace_seconds: float = Field(
        default=0.0,
        ge=0,
        le=300,
        description="On SIGTERM: how long /readyz reports not ready while requests are still accepted.",
    )
    shutdown_timeout_seconds: float = Field(
        default=10.0,
        ge=0,
        le=3600,
        description="How long requests in progress may take to finish on shutdown.",
    )
    fast_path: bool = Field(
        default=True,
        description=(
            "Whether task operations and probes bypass FastAPI's routing. Responses are identical; false is for "
            "debugging."
        ),
    )
    secrets_dir: Path | None = Field(
        default=None,
        description="A directory of files, each named like a setting and holding its value, such as Docker secrets.",
    )

    @field_validator("secrets_dir")
    @classmethod
    def _absolute_secrets_dir(cls, value: Path | None) -> Path | None:
        return None if value is None else BACKEND / value.expanduser()


class HealthSettings(BaseModel):
    """Health"""

    health_details: bool | None = Field(
        default=None,
        description="Whether /health shows its checks in detail. Unset: yes, except in production.",
    )
    health_probes: Annotated[Literal["auto", "passive", "active"], LowerCase] = Field(
        default="auto",
        description=(
            "active: health queries the database. passive: it watches traffic and sockets only, so that a database "
            "that scales to zero can suspend. auto: passive for Neon, otherwise active."
        ),
    )
    health_interval_seconds: float = Field(
        default=1.0,
        ge=0.1,
        le=3600,
        description="With active probes: the shortest time between two queries of the database.",
    )


class LogSettings(BaseModel):
    """Logs"""

    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], LowerCase] = Field(
        default="info", description="The lowest level that is logged."
    )
    log_format: Annotated[Literal["auto", "console", "json"], LowerCase] = Field(
        default="auto",
        description="console is for people, json for machines. auto: console on a terminal, otherwise json.",
    )
    log_client_address: bool = Field(
        default=True, description="Whether request lines hold the client's IP address."
    )
