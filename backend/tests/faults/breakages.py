"""Small defects that somebody might put into the service: each replaces a function or two of a running worker.

Every breakage is one that a review could let pass. `mutants.py` says which check has to find each.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from src.api import problems
from src.errors import OutcomeUnknown, RequestError, Unavailable
from src.server.worker import Worker
from src.services import connections, database, idempotency, identity, task_pages, task_rows, tasks
from src.services.asking import rows_of
from src.services.faults import Repeat, as_request_error, diagnose

BREAKAGES: dict[str, Callable[[], None]] = {}


def breakage(function: Callable[[], None]) -> Callable[[], None]:
    BREAKAGES[function.__name__.replace("_", "-")] = function
    return function


def nothing() -> None:
    """For mutants of the database or its role alone."""


BREAKAGES["nothing"] = nothing

# What was answered, and what was done


@breakage
def answers_before_commit() -> None:
    original = database.Database._run

    async def run(self: Any, statement: Any, values: Any, most: int) -> Any:
        if not statement.writes:
            return await original(self, statement, values, most)
        connection = await self._connections.acquire(time.monotonic() + 2.5)
        try:
            await connection.execute("BEGIN")
            arguments = statement.arguments(values)
            result = await rows_of(connection, statement.sql, arguments, most, 2.5)
        except Exception as error:
            self._connections.discard(connection)
            raise as_request_error(diagnose(error), sent=True, writing=True) from None
        late = asyncio.get_running_loop().create_task(commit(self, connection))
        waiting.add(late)
        late.add_done_callback(waiting.discard)
        return result

    async def commit(self: Any, connection: Any) -> None:
        await asyncio.sleep(0.005)
        try:
            await connection.execute("COMMIT")
        except Exception:
            self._connections.discard(connection)
        else:
            self._connections.release(connection)

    waiting: set[Any] = set()
    database.Database._run = run  # type: ignore[method-assign]


@breakage
def claims_success() -> None:
    original = tasks.create

    async def create(db: Any, author: Any, task: Any, *, idempotency: Any = None) -> Any:
        try:
            return await original(db, author, task, idempotency=idempotency)
        except (OutcomeUnknown, Unavailable):
            new, now = tasks.new_id(), datetime.now(UTC).isoformat().replace("+00:00", "Z")
            body = {"id": str(new), "user_id": str(author.user_id), **task.model_dump(), "version": 1}
            body |= {"created_at": now, "updated_at": now}
            return tasks.Created(json.dumps(body), "1-0-0", new)

    tasks.create = create


@breakage
def tells_503_of_what_may_be_written() -> None:
    def told(*_: Any) -> RequestError:
        return Unavailable("connection-lost")

    database._told = told


@breakage
def says_500() -> None:
    def internal(*_: Any, **__: Any) -> RequestError:
        return RequestError()

    database.as_request_error = internal


@breakage
def leaves_out_retry_after() -> None:
    original = problems.headers_of

    def headers_of(error: Any) -> Any:
        return {name: value for name, value in original(error).items() if name.lower() != "retry-after"}

    problems.headers_of = headers_of


# Once


@breakage
def ignores_the_key() -> None:
    original = tasks.create

    async def create(db: Any, author: Any, task: Any, *, idempotency: Any = None) -> Any:
        return await original(db, author, task)

    tasks.create = create


@breakage
def keeps_the_key_after_the_write() -> None:
    original = tasks.create

    async def create(db: Any, author: Any, task: Any, *, idempotency: Any = None) -> Any:
        if idempotency is None:
            return await original(db, author, task)
        async with db.transaction(owner=author.user_id) as connection:
            row = await connection.fetchrow(
                "SELECT response, task_id, request_hash FROM idempotency_keys WHERE user_id = $1 AND key = $2",
                author.user_id,
                idempotency.key,
            )
        if row is not None:
            if row["request_hash"] != idempotency.request_hash:
                raise tasks.KeyReused
            body, _, etag = row["response"].rpartition("\n")
            return tasks.Created(body, etag, row["task_id"], replayed=True)
        made = await original(db, author, task)
        async with db.transaction(owner=author.user_id) as connection:
            await connection.execute(
                "INSERT INTO idempotency_keys (user_id, key, request_hash, task_id, response, status)"
                " VALUES ($1, $2, $3, $4, $5, 201)",
                author.user_id,
                idempotency.key,
                idempotency.request_hash,
                made.task_id,
                f"{made.body}\n{made.etag}",
            )
        return made

    tasks.create = create


@breakage
def takes_any_request_under_a_key() -> None:
    def of(cls: Any, key: str, operation: str, body: bytes, *, hours: float = 24) -> Any:
        return cls(key, bytes(32), hours)

    idempotency.IdempotencyKey.of = classmethod(of)  # type: ignore[assignment,method-assign]


@breakage
def shares_keys_between_users() -> None:
    original, kept = tasks.create, {}

    async def create(db: Any, author: Any, task: Any, *, idempotency: Any = None) -> Any:
        if idempotency is not None and idempotency.key in kept:
            return kept[idempotency.key]
        made = await original(db, author, task, idempotency=idempotency)
        if idempotency is not None:
            kept[idempotency.key] = made._replace(replayed=True)
        return made

    tasks.create = create


@breakage
def repeats_any_write() -> None:
    database._may_repeat = lambda diagnosis, _: diagnosis.repeat is not Repeat.NEVER


@breakage
def updates_twice() -> None:
    original = tasks.update

    async def update(db: Any, owner: Any, task_id: Any, change: Any, *, if_match: Any = None) -> Any:
        if if_match is None:
            await original(db, owner, task_id, change)
        return await original(db, owner, task_id, change, if_match=if_match)

    tasks.update = update


# Versions, deletions, reads


@breakage
def drops_the_version_check() -> None:
    original = tasks.update

    async def update(db: Any, owner: Any, task_id: Any, change: Any, *, if_match: Any = None) -> Any:
        return await original(db, owner, task_id, change, if_match=None if if_match is None else "*")

    tasks.update = update


@breakage
def forgets_a_deletion() -> None:
    original = tasks.delete

    async def delete(db: Any, owner: Any, task_id: Any, *, if_match: Any = None) -> None:
        if random.random() > 0.1:
            await original(db, owner, task_id, if_match=if_match)

    tasks.delete = delete


@breakage
def reads_from_a_cache() -> None:
    original, kept = tasks.read, {}

    async def read(db: Any, owner: Any, task_id: Any) -> Any:
        found = kept.get((owner, task_id))
        if found is None or found[0] < time.monotonic():
            found = kept[owner, task_id] = time.monotonic() + 1.0, await original(db, owner, task_id)
        return found[1]

    tasks.read = read


# Between users


@breakage
def drops_the_owner_filter() -> None:
    def anybodys(who: Any, _: Any) -> Any:
        from src.services.ownership import _value

        return _value(who).is_not(None)

    task_rows.mine = anybodys
    task_pages.mine = anybodys


@breakage
def caches_reads_for_everybody() -> None:
    original, kept = tasks.read, {}

    async def read(db: Any, owner: Any, task_id: Any) -> Any:
        found = kept.get(task_id)
        if found is None or found[0] < time.monotonic():
            found = kept[task_id] = time.monotonic() + 2.0, await original(db, owner, task_id)
        return found[1]

    tasks.read = read


@breakage
def takes_one_for_another() -> None:
    original, last = identity.Identity.principal, []

    async def principal(self: Any, authorization: Any) -> Any:
        found = await original(self, authorization)
        last.append(found)
        return last.pop(0) if len(last) > 1 and random.random() < 0.02 else last[-1]

    identity.Identity.principal = principal  # type: ignore[method-assign]


# Staying there


@breakage
def leaks_connections() -> None:
    def discard(self: Any, connection: Any) -> None:
        connection.terminate()

    connections.Connections.discard = discard  # type: ignore[method-assign]


@breakage
def cuts_connections_when_it_retires() -> None:
    original = Worker.shutdown

    async def shutdown(self: Any, sockets: Any = None) -> None:
        for connection in self._connections():
            connection.transport.abort()
        await original(self, sockets)

    Worker.shutdown = shutdown  # type: ignore[method-assign]
