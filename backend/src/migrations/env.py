"""What alembic runs around every migration: one transaction, and no wait for a lock that could become an outage.

There is no alembic.ini. `services.schema` connects, and hands over the connection and what else is needed in
`config.attributes`, so that no password ever meets an ini file and its `%` interpolation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alembic import context
from sqlalchemy import text

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

# The role's own time-outs are made for requests. A migration may take longer; what it must not do is queue for
# a lock, because every request that comes after it then queues behind it.
_TIMEOUTS = text("""
    SELECT set_config(name, CASE name WHEN 'lock_timeout' THEN CAST(:lock_timeout AS text) ELSE '0' END, true)
    FROM pg_settings
    WHERE name IN ('lock_timeout', 'statement_timeout', 'transaction_timeout',
                   'idle_in_transaction_session_timeout')
""")


def run() -> None:
    """Every revision of this run in one transaction: all of it happens, or nothing."""
    given = context.config.attributes
    connection: Connection = given["connection"]
    context.configure(
        connection=connection,
        target_metadata=given["metadata"],
        # Pinned, or alembic would take the table of another application further down the search_path for ours.
        version_table_schema=given["schema"],
        transaction_per_migration=False,
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        connection.execute(_TIMEOUTS, {"lock_timeout": f"{given['lock_timeout_milliseconds']}ms"})
        context.run_migrations()


# Alembic loads this file under this name; whoever imports it as a module starts nothing.
if __name__ == "env_py":
    run()
