"""Whoever makes things go wrong: carries out a schedule, one fault after the other, and notes when each was.

A fault is a context manager: what is before its `yield` begins it, what is after ends it. It runs in the main thread,
because processes that are started there end with us.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

import asyncpg

from src.embedded.roles import APPLICATION
from src.models.isolation import GRANTS, ROLE
from tests.postgres_server import postgres_answers

from .journal import Clock, Journal
from .schedule import KINDS, Fault
from .stage import MAX_CONNECTIONS, OURS, Stage

RECOVERY_SECONDS: Final = 20.0
"""So long a recovery is waited for; one that takes longer has failed."""

RENEWAL_SECONDS: Final = 120.0
"""The same of a renewal: two workers start one after the other, beside a load that takes all that the machine has."""

_WRITING: Final = "INSERT, UPDATE, DELETE"
_SERVICES: Final = f"backend_type = 'client backend' AND application_name <> '{OURS}'"


class Witness(Protocol):
    """Tells when the service writes again after a moment: the first connection, and all."""

    def __call__(self, since: float, seconds: float) -> tuple[float | None, float | None]: ...


class Nemesis:
    """`strike` carries out one fault; `faults` is what it has noted so far."""

    def __init__(self, stage: Stage, journal: Journal, clock: Clock, witness: Witness) -> None:
        self.stage = stage
        self.faults: list[dict[str, Any]] = []
        self.misdeeds: list[str] = []
        self._journal = journal
        self._clock = clock
        self._witness = witness
        self._loop = asyncio.new_event_loop()
        self._turn = 0
        self._ways: dict[str, Callable[[Fault], AbstractContextManager[None]]] = {
            kind: getattr(self, f"_{kind.replace('-', '_')}") for kind in KINDS
        }

    def close(self) -> None:
        self._loop.close()

    def strike(self, fault: Fault) -> None:
        """One fault from its beginning to the service's recovery."""
        self._turn += 1
        began = self._clock()
        beside = self._ways[fault.beside](fault.other) if fault.beside else contextlib.nullcontext()
        with self._ways[fault.kind](fault), beside:
            time.sleep(fault.hold)
        ended = self._clock()
        first, whole = self._witness(ended, RECOVERY_SECONDS)
        noted = {
            "fault": fault.kind,
            **({"beside": fault.beside} if fault.beside else {}),
            "began": round(began, 4),
            "ended": round(ended, 4),
            "first": None if first is None else round(first, 4),
            "all": None if whole is None else round(whole, 4),
        }
        self.faults.append(noted)
        self._journal.note("fault", **noted)
        if not self.stage.service_lives():
            self.misdeeds.append(f"the supervisor ended by itself after {fault.kind}")
            self.stage.start_service()

    # Between service and database

    @contextlib.contextmanager
    def _db_reset(self, fault: Fault) -> Iterator[None]:
        self.stage.database.reset()
        yield

    @contextlib.contextmanager
    def _db_black_hole(self, fault: Fault) -> Iterator[None]:
        self.stage.database.swallow()
        yield
        self.stage.database.heal()

    @contextlib.contextmanager
    def _db_stall(self, fault: Fault) -> Iterator[None]:
        self.stage.database.stall()
        yield
        self.stage.database.heal()

    @contextlib.contextmanager
    def _db_latency(self, fault: Fault) -> Iterator[None]:
        self.stage.database.delay(fault.amount / 1000)
        yield
        self.stage.database.heal()

    @contextlib.contextmanager
    def _db_refuse(self, fault: Fault) -> Iterator[None]:
        self.stage.database.refuse()
        self.stage.database.reset()
        yield
        self.stage.database.heal()

    @contextlib.contextmanager
    def _db_reply_lost(self, fault: Fault) -> Iterator[None]:
        self.stage.database.lose_replies(fault.amount)
        yield
        self.stage.database.heal()

    # PostgreSQL

    @contextlib.contextmanager
    def _pg_restart(self, fault: Fault) -> Iterator[None]:
        # With the server gone its port refuses; so does the network that stands for it.
        self.stage.postgres.stop("immediate")
        self.stage.database.refuse()
        yield
        self.stage.postgres.start()
        self.stage.database.heal()

    @contextlib.contextmanager
    def _pg_kill(self, fault: Fault) -> Iterator[None]:
        self.stage.postgres.kill()
        self.stage.database.refuse()
        yield
        self.stage.postgres.start()
        self.stage.database.heal()

    @contextlib.contextmanager
    def _pg_kill_backend(self, fault: Fault) -> Iterator[None]:
        found = self._run(self._backends())
        if found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found[self._turn % len(found)], signal.SIGKILL)
            time.sleep(0.02)
        while not postgres_answers(self.stage.postgres.port):
            time.sleep(0.005)
        yield

    @contextlib.contextmanager
    def _pg_freeze(self, fault: Fault) -> Iterator[None]:
        self.stage.postgres.freeze()
        yield
        self.stage.postgres.thaw()

    @contextlib.contextmanager
    def _pg_terminate(self, fault: Fault) -> Iterator[None]:
        self.stage.sql(_on_service("pg_terminate_backend"))
        yield

    @contextlib.contextmanager
    def _pg_cancel(self, fault: Fault) -> Iterator[None]:
        for _ in range(fault.amount):
            self.stage.sql(_on_service("pg_cancel_backend"))
        yield

    @contextlib.contextmanager
    def _pg_lock(self, fault: Fault) -> Iterator[None]:
        connection = self._run(self.stage.connect(statement_timeout="5000"))
        try:
            self._run(connection.execute("BEGIN; LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE"))
            yield
        finally:
            connection.terminate()
            self._run(asyncio.sleep(0))

    @contextlib.contextmanager
    def _pg_read_only(self, fault: Fault) -> Iterator[None]:
        self.stage.sql("ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
        yield
        self.stage.sql("ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")

    @contextlib.contextmanager
    def _pg_crowded(self, fault: Fault) -> Iterator[None]:
        crowd: list[asyncpg.Connection[asyncpg.Record]] = []
        self._run(self._crowd_in(crowd))
        self.stage.sql(_on_service("pg_terminate_backend"))
        self._run(self._crowd_in(crowd))
        yield
        for connection in crowd:
            connection.terminate()
        self._run(asyncio.sleep(0))

    @contextlib.contextmanager
    def _pg_password(self, fault: Fault) -> Iterator[None]:
        right = self.stage.postgres.password_of(APPLICATION)
        self.stage.sql(
            f"ALTER ROLE {APPLICATION} PASSWORD 'another-{self._turn}'", _on_service("pg_terminate_backend")
        )
        yield
        self.stage.sql(f"ALTER ROLE {APPLICATION} PASSWORD '{right}'")

    @contextlib.contextmanager
    def _pg_revoke(self, fault: Fault) -> Iterator[None]:
        self.stage.sql(f"REVOKE {_WRITING} ON tasks FROM {ROLE}")
        yield
        self.stage.sql(f"GRANT {GRANTS['tasks']} ON tasks TO {ROLE}")

    @contextlib.contextmanager
    def _pg_alter(self, fault: Fault) -> Iterator[None]:
        self.stage.sql(
            "ALTER TABLE tasks ADD COLUMN priority integer NOT NULL DEFAULT 7",
            "ALTER TABLE tasks ALTER COLUMN description TYPE varchar(10000)",
        )
        yield
        self.stage.sql(
            "ALTER TABLE tasks ALTER COLUMN description TYPE text", "ALTER TABLE tasks DROP COLUMN priority"
        )

    @contextlib.contextmanager
    def _pg_slow(self, fault: Fault) -> Iterator[None]:
        self.stage.sql(
            _function("faults_slow", f"PERFORM pg_sleep({fault.amount / 1000}); RETURN NEW;"),
            "CREATE TRIGGER faults_slow BEFORE INSERT OR UPDATE ON tasks"
            " FOR EACH ROW EXECUTE FUNCTION faults_slow()",
        )
        yield
        self.stage.sql("DROP TRIGGER faults_slow ON tasks", "DROP FUNCTION faults_slow()")

    @contextlib.contextmanager
    def _pg_commit_fails(self, fault: Fault) -> Iterator[None]:
        body = (
            f"IF random() < 1.0 / {fault.amount} THEN RAISE EXCEPTION 'not today' USING ERRCODE ="
            " CASE WHEN random() < 0.5 THEN 'serialization_failure' ELSE 'disk_full' END; END IF; RETURN NULL;"
        )
        self.stage.sql(
            _function("faults_commit", body),
            "CREATE CONSTRAINT TRIGGER faults_commit AFTER INSERT OR UPDATE OR DELETE ON tasks"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION faults_commit()",
        )
        yield
        self.stage.sql("DROP TRIGGER faults_commit ON tasks", "DROP FUNCTION faults_commit()")

    # The service

    @contextlib.contextmanager
    def _worker_kill(self, fault: Fault) -> Iterator[None]:
        found = self.stage.worker_pids()
        if found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found[self._turn % len(found)], signal.SIGKILL)
        yield

    @contextlib.contextmanager
    def _worker_freeze(self, fault: Fault) -> Iterator[None]:
        found = self.stage.worker_pids()
        pid = found[self._turn % len(found)] if found else 0
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        yield
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def _workers_renew(self, fault: Fault) -> Iterator[None]:
        old = self._all_workers()
        self.stage.signal_service(signal.SIGHUP)
        until = time.monotonic() + RENEWAL_SECONDS
        while set(self.stage.worker_pids()) & old or len(self.stage.worker_pids()) < self.stage.workers:
            if time.monotonic() > until:
                self.misdeeds.append("the workers were not renewed in time")
                break
            time.sleep(0.05)
        yield

    @contextlib.contextmanager
    def _service_restart(self, fault: Fault) -> Iterator[None]:
        # Where nobody listens any more connections are refused, and so does the network that stands for it.
        code = self.stage.stop_service(then=self.stage.clients.refuse)
        if code != 0:
            self.misdeeds.append(f"the service ended with {code} when told to stop")
        yield
        self.stage.start_service()
        self.stage.clients.heal()

    # Between clients and service

    @contextlib.contextmanager
    def _net_reset(self, fault: Fault) -> Iterator[None]:
        self.stage.clients.reset()
        yield

    @contextlib.contextmanager
    def _net_stall(self, fault: Fault) -> Iterator[None]:
        self.stage.clients.stall()
        yield
        self.stage.clients.heal()

    @contextlib.contextmanager
    def _net_latency(self, fault: Fault) -> Iterator[None]:
        self.stage.clients.delay(fault.amount / 1000)
        yield
        self.stage.clients.heal()

    @contextlib.contextmanager
    def _net_reply_lost(self, fault: Fault) -> Iterator[None]:
        self.stage.clients.lose_replies(fault.amount)
        yield
        self.stage.clients.heal()

    @contextlib.contextmanager
    def _net_reply_cut(self, fault: Fault) -> Iterator[None]:
        self.stage.clients.cut_replies(fault.amount)
        yield
        self.stage.clients.heal()

    # How

    def _run(self, coroutine: Any) -> Any:
        return self._loop.run_until_complete(coroutine)

    async def _backends(self) -> list[int]:
        connection = await self.stage.connect()
        try:
            rows = await connection.fetch(f"SELECT pid FROM pg_stat_activity WHERE {_SERVICES} ORDER BY pid")
        finally:
            connection.terminate()
        return [row["pid"] for row in rows]

    async def _crowd_in(self, crowd: list[asyncpg.Connection[asyncpg.Record]]) -> None:
        with contextlib.suppress(asyncpg.TooManyConnectionsError):
            for _ in range(MAX_CONNECTIONS):
                crowd.append(await self.stage.connect(APPLICATION))

    def _all_workers(self) -> set[int]:
        """The workers, once a fallen one has been replaced."""
        until = time.monotonic() + 60
        while len(self.stage.worker_pids()) < self.stage.workers and time.monotonic() < until:
            time.sleep(0.05)
        return set(self.stage.worker_pids())


def _on_service(function: str) -> str:
    return f"SELECT {function}(pid) FROM pg_stat_activity WHERE {_SERVICES}"


def _function(name: str, body: str) -> str:
    return f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body} END$$"
