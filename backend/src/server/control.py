"""What the supervisor and its workers say to each other, and how long each waits for the other."""

from __future__ import annotations

import enum
from typing import Final

EMBEDDED: Final = "GROUNDWORK_EMBEDDED"
"""Set for the workers when the supervisor runs their PostgreSQL."""
LISTENERS: Final = "GROUNDWORK_LISTENERS"
"""File descriptors of the listening sockets, the worker's own queue first."""
ADMIN_LISTENERS: Final = "GROUNDWORK_ADMIN_LISTENERS"
"""The same for ADMIN_PORT, which all workers share; not set without one."""
LINK: Final = "GROUNDWORK_LINK"
"""File descriptor of the worker's end of the link."""
SERVING: Final = b"+"
"""What a worker writes into the link once it accepts requests."""

BACKLOG: Final = 4096
"""Connections that may wait to be taken: as many as a worker holds, and as the kernel allows (`somaxconn`, 4,096 since
Linux 5.4). One more would be dropped, and its client's kernel tries again only a second later."""
CANCEL_SECONDS: Final = 2.0
"""How long cancelled requests may take to give back what they hold."""
CLOSE_SECONDS: Final = 5.0
"""How long the application may take to close the database."""

LINGER_SECONDS: Final = 2.0
"""How long a worker that others stand in for waits for the next request of its idle connections."""


class Leave(enum.IntEnum):
    """How a worker is told to go, each more urgent than the one before; the most urgent one told counts.

    RETIRE: others serve, so accept nothing more, and close idle connections with their next answer.
    DRAIN: not ready first, while still accepting; then finish what is in flight.
    PROMPT: the same without the time for load balancers to notice (Ctrl-C, or the supervisor is gone).
    HURRY: cancel what is in flight.
    """

    RETIRE = ord("r")
    DRAIN = ord("s")
    PROMPT = ord("t")
    HURRY = ord("u")
