"""The control channel: a socket pair between the supervisor and each worker, one byte a message.

A worker sends a heartbeat from its event loop about once a second: READY once it accepts requests and its database
answers, else NOT_READY. The supervisor sends a `Shutdown`. The end of the channel is the death of the other process.
"""

from __future__ import annotations

import enum
from typing import Final

EMBEDDED: Final = "GROUNDWORK_EMBEDDED"
"""Set for the workers when the supervisor runs their PostgreSQL."""
LISTENER_FD: Final = "GROUNDWORK_LISTENER_FD"
"""File descriptor of the listening socket, which all workers share."""
ADMIN_LISTENER_FD: Final = "GROUNDWORK_ADMIN_LISTENER_FD"
"""The same for ADMIN_PORT; not set without one."""
CONTROL_FD: Final = "GROUNDWORK_CONTROL_FD"
"""File descriptor of the worker's end of the control channel."""

ACCEPT_WHEN_READY: Final = "GROUNDWORK_ACCEPT_WHEN_READY"
"""Set for a worker that replaces a ready one: it accepts no connection before it is ready itself."""

READY: Final = b"+"
NOT_READY: Final = b"-"
HEARTBEAT_SECONDS: Final = 1.0
"""Between two heartbeats; less where WORKER_HEARTBEAT_SECONDS is small."""

CANCEL_SECONDS: Final = 2.0
"""How long cancelled requests may take to release what they hold."""
CLOSE_SECONDS: Final = 5.0
"""How long the application may take to close the database."""
LINGER_SECONDS: Final = 2.0
"""How long a worker that is replaced waits for the next request of its idle connections."""
KILL_MARGIN_SECONDS: Final = 1.0
"""How much longer than all its timeouts a worker may take to shut down before it is killed."""


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
