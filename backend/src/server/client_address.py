"""The client's address: the peer of the connection, or what trusted proxies report in `X-Forwarded-For`."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

Address = tuple[str, int]

_MAPPED: Final = "::ffff:"
_LONGEST_ADDRESS: Final = 45


def unmapped(host: str) -> str:
    """The IPv4 address of a client that a dual-stack socket reports as `::ffff:192.0.2.1`."""
    if host.startswith(_MAPPED) and "." in host:
        return host[len(_MAPPED) :]
    return host


@lru_cache(maxsize=4096)
def networks_of(host: str) -> tuple[tuple[str, int], ...]:
    """The networks that a client's unfinished requests count for, each with the multiple of the limit it may have.

    An IPv4 address counts for itself. A site with IPv6 commonly has a /64 for each link and a /48 for all of them.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ()
    if address.version == 4:
        return ((host, 1),)
    return tuple(
        (str(ipaddress.ip_network((address, prefix), strict=False)), multiple)
        for prefix, multiple in ((64, 1), (48, 4))
    )


class ClientAddresses:
    """Resolves `X-Forwarded-For` of trusted proxies.

    `hops` is the number of proxies that a request passes; each appends the address of its own client.
    """

    def __init__(self, trusted: Sequence[str] = (), hops: int = 1) -> None:
        self._networks = [ipaddress.ip_network(one, strict=False) for one in trusted]
        self._hops = hops
        self.is_trusted = lru_cache(maxsize=4096)(self._is_trusted)

    def _is_trusted(self, host: str) -> bool:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in self._networks)

    def resolve(self, peer: Address, values: Iterable[bytes]) -> Address:
        """The client of a trusted `peer`: entry number `hops` from the right, or the next that is not a proxy's.

        An entry that is no address ends the search, because nothing vouches for those on its left.
        """
        entries = b",".join(values).decode("latin-1").split(",")
        client = peer
        for hop, entry in enumerate(reversed(entries)):
            if hop >= self._hops and not self.is_trusted(client[0]):
                break
            found = _parse(entry.strip())
            if found is None:
                break
            client = found
        return client


def _parse(entry: str) -> Address | None:
    """An address as proxies write it: bare, `192.0.2.1:1234` or `[2001:db8::1]:1234`. None for anything else."""
    host, port = entry, "0"
    if entry.startswith("["):
        host, _, rest = entry[1:].partition("]")
        port = rest.removeprefix(":") or "0"
    elif entry.count(":") == 1:
        host, _, port = entry.partition(":")
    host = unmapped(host)
    if len(host) > _LONGEST_ADDRESS:
        return None
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return None
    return host, int(port) if port.isascii() and port.isdigit() and len(port) < 6 else 0
