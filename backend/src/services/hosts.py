"""One connection to whichever host of an address is the wanted one, each host within its share of the time.

The driver goes through several hosts too, but its one bound is for all of them: a first host that is silent,
because its machine is gone and nothing refuses, uses it up, and the next one, who has taken over, is never asked.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import asyncpg

from ..errors import ConfigurationError
from . import server_authentication

if TYPE_CHECKING:
    from ..config.database import ConnectionSettings

    Connection = asyncpg.Connection[Any]

# To prefer a standby is to look at all hosts before one is taken: the driver does that.
_BY_THE_DRIVER = "prefer-standby"


async def connect(
    settings: ConnectionSettings, timeout_seconds: float, *, begin: int = 0, **more: Any
) -> tuple[Connection, int]:
    """The connection, and which of the hosts it is to. `begin` is the host that is asked first: the one that
    served last. Where any host will do, the address says which is to be preferred, and it is not heeded.

    Raises what the last host met; that none is of the wanted kind only where each has answered.
    """
    count = len(settings.hosts)
    if count == 1 or settings.target_session_attrs == _BY_THE_DRIVER:
        return await _connect(settings, timeout_seconds, more), 0
    first = 0 if settings.target_session_attrs == "any" else begin
    deadline = time.monotonic() + timeout_seconds
    met: list[Exception] = []
    for left, number in zip(range(count, 0, -1), range(first, first + count), strict=True):
        host = number % count
        share = max((deadline - time.monotonic()) / left, 0.001)
        try:
            return await _connect(replace(settings, hosts=(settings.hosts[host],)), share, more), host
        except ConfigurationError:
            raise
        except Exception as error:
            met.append(error)
    mismatch = asyncpg.exceptions.TargetServerAttributeNotMatched
    raise next((error for error in reversed(met) if not isinstance(error, mismatch)), met[-1])


async def _connect(settings: ConnectionSettings, timeout_seconds: float, more: dict[str, Any]) -> Connection:
    arguments = {**settings.asyncpg_arguments(), **more, "timeout": timeout_seconds}
    methods = settings.authentication_methods
    if methods is not None:
        return await server_authentication.connect(methods, **arguments)
    connection: Connection = await asyncpg.connect(**arguments)
    return connection
