"""The control channel: a socket pair between the supervisor and each worker, one byte a message.

Worker to supervisor: SERVING. Supervisor to worker: a `Shutdown`. The end of the channel is the other one's death.
"""

from __future__ import annotations

import enum
from typing import Final

EMBEDDED: Final = "GROUNDWORK_EMBEDDED"
"""Set for the workers when the supervisor runs their PostgreSQL."""
LISTENER_FDS: Final = "GROUNDWORK_LISTENER_FDS"
"""File descriptors of the listening sockets, the worker's own queue first."""
ADMIN_LISTENER_FDS: Final = "GROUNDWORK_ADMIN_LISTENER_FDS"
"""The same for ADMIN_PORT, which all workers share; not set without one."""
CONTROL_FD: Final = "GROUNDWORK_CONTROL_FD"
"""File descriptor of the worker's end of the control channel."""

SERVING: Final = b"+"
"""Sent by a worker once it accepts requests."""

CANCEL_SECONDS: Final = 2.0
"""How long cancelled requests may take to release what they hold."""
CLOSE_SECONDS: Final = 5.0
"""How long the application may take to close the database."""
LINGER_SECONDS: Final = 2.0
"""How long a worker that is replaced waits for the next request of its idle connections."""


class Shutdown(enum.IntEnum):
    """How a worker shuts down. Each member is more urgent than the one before; the most urgent one received counts.

    ROLLING: other workers serve, so accept nothing more, and close idle connections with their next response.
    GRACEFUL: fail readiness first, while still accepting; then finish the requests in progress.
    FAST: the same without DRAIN_GRACE_SECONDS (Ctrl-C, or the supervisor died).
    FORCED: cancel the requests in progress.
    """

    ROLLING = ord("r")
    GRACEFUL = ord("s")
    FAST = ord("t")
    FORCED = ord("u")
