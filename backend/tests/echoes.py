"""Statements that ask a database for nothing but an answer, or for time."""

from __future__ import annotations

import sqlalchemy as sa

from src.services.statements import Statement

ECHO = Statement(
    "test.echo", lambda: sa.select(sa.cast(sa.bindparam("x", type_=sa.Text), sa.Text)), repeatable=True
)
SLEEP = Statement(
    "test.sleep",
    lambda: sa.select(sa.func.pg_sleep(sa.bindparam("seconds", type_=sa.Float))),
    repeatable=True,
)
