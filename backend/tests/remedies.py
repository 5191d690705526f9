"""Runs the remedies of `verify` as they are printed, by the role that they name."""

from __future__ import annotations

import re
from collections.abc import Callable

import asyncpg

_ROLE = re.compile(r'^As role "(.+)":$')


async def run_statements(remedy: str | None, url_of: Callable[[str], str]) -> list[str]:
    """Execute each printed statement, in its own transaction as psql does; `url_of` gives a role's URL.

    Only a placeholder for a password is filled in. Returns the statements.
    """
    done: list[str] = []
    url = None
    for line in (remedy or "").splitlines():
        if named := _ROLE.match(line):
            url = url_of(named[1])
        elif line.endswith(";"):
            assert url is not None, f"{line!r} names no role"
            connection = await asyncpg.connect(url)
            try:
                await connection.execute(line.replace("<password>", "pw"))
            finally:
                await connection.close()
            done.append(line)
    assert done, f"no statement in {remedy!r}"
    return done
