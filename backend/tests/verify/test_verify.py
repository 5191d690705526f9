"""The checks find what is wrong, say what to do, and leave everything as it was."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest

from clusters import Authority, PgBouncer, Proxy, Thief, at, resolving
from conftest import Administrator
from postgres_server import PostgresServer
from remedies import run_statements
from src.config.database import parse
from src.config.settings import load_settings
from src.services import schema
from src.verify import runner, server
from src.verify.check import CheckResult, Outcome
from src.verify.runner import CHECKS, CheckRun, Report
from waiting import eventually

CANARY = "p%@:/ é"


async def examine(url: str, timeout_seconds: float = runner.TIMEOUT_SECONDS, **settings: Any) -> Report:
    # Port 1 is nobody's: a service that happens to run on this machine is not part of these tests.
    loaded = load_settings(database_url=url, **({"port": 1} | settings))
    return await runner.run(lambda: loaded, timeout_seconds=timeout_seconds)


def result(report: Report, name: str) -> CheckResult:
    (found,) = [run.result for run in report.runs if run.check.name == name]
    return found


def failures(report: Report) -> list[str]:
    return [run.check.name for run in report.runs if run.result.outcome is Outcome.FAILED]


async def execute(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def role(url: str, *grants: str) -> AsyncIterator[str]:
    """A role with the given rights on the database of `url`; gives its URL."""
    name = f"somebody_{time.monotonic_ns()}"
    await execute(
        url, f"CREATE ROLE {name} LOGIN PASSWORD 'pw'", *(f"GRANT {grant} TO {name}" for grant in grants)
    )
    try:
        yield f"postgresql://{name}:pw@{url.rpartition('@')[2]}"
    finally:
        await execute(url, f"DROP OWNED BY {name}", f"DROP ROLE {name}")


# The list


def test_every_check_has_a_name_a_promise_and_needs_only_what_was_looked_at_before() -> None:
    seen: set[str] = set()
    for check in CHECKS:
        assert check.name not in seen
        assert set(check.requires) <= seen
        assert check.description.endswith(".")
        seen.add(check.name)


# A sound database


async def test_a_sound_database_passes_every_check(private_postgres: Callable[..., PostgresServer]) -> None:
    server = private_postgres()
    await schema.create_tables(parse(server.url))
    settings = load_settings(database_url=server.application_url, port=1)
    said: list[CheckRun] = []
    reports: list[Report] = []

    async def latency_is_passed() -> bool:
        """A busy machine may make round trips long, and they are warned about."""
        said.clear()
        reports.append(await runner.run(lambda: settings, on_result=said.append))
        return result(reports[-1], "latency").outcome is Outcome.PASSED

    await eventually(latency_is_passed)
    report = reports[-1]
    assert report.exit_code == 0
    assert report.count(Outcome.PASSED) == len(CHECKS) - 1, report.document()
    assert result(report, "service").outcome is Outcome.NOT_RUN
    assert [run.check for run in said] == list(CHECKS)
    document = json.loads(json.dumps(report.document()))
    assert document["ok"] is True
    assert [check["name"] for check in document["checks"]] == [check.name for check in CHECKS]


async def test_nothing_of_the_database_is_changed(database_url: str) -> None:
    await execute(
        database_url,
        "INSERT INTO users (email) VALUES ('ana@example.com')",
        "INSERT INTO tasks (user_id, title) SELECT id, 'Buy milk' FROM users",
        "CREATE SEQUENCE counter",
        "SELECT nextval('counter')",
    )
    before = await everything(database_url)
    report = await examine(database_url)
    assert result(report, "users and tasks").outcome is Outcome.PASSED
    assert result(report, "uniqueness").outcome is Outcome.PASSED
    assert await everything(database_url) == before


async def everything(url: str) -> dict[str, list[Any]]:
    """Rows with the transactions that wrote them, and the catalogue, as text."""
    queries = {
        "users": "SELECT xmin::text, * FROM users",
        "tasks": "SELECT xmin::text, * FROM tasks",
        "deleted users": "SELECT xmin::text, * FROM deleted_users",
        "idempotency keys": "SELECT xmin::text, * FROM idempotency_keys",
        "classes": "SELECT oid, xmin::text, relname, relkind, relfilenode, relacl::text FROM pg_class",
        "columns": "SELECT xmin::text, attrelid, attname FROM pg_attribute",
        "constraints": "SELECT xmin::text, conname FROM pg_constraint",
        "indexes": "SELECT xmin::text, indexrelid FROM pg_index",
        "roles": "SELECT oid, rolname FROM pg_roles WHERE rolname NOT LIKE 'somebody%'",
        "settings": "SELECT setconfig::text FROM pg_db_role_setting "
        "WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())",
        "sequences": "SELECT sequencename, last_value FROM pg_sequences",
        "prepared": "SELECT gid FROM pg_prepared_xacts",
    }
    connection = await asyncpg.connect(url)
    try:
        return {
            name: sorted(str(tuple(row)) for row in await connection.fetch(query))
            for name, query in queries.items()
        }
    finally:
        await connection.close()


async def test_no_connection_is_left_open(database_url: str, postgres: PostgresServer) -> None:
    with Proxy(postgres.port) as proxy:
        await examine(proxy.through(database_url))
        await eventually(lambda: not proxy.open_connections)
        assert proxy.traffic.connections > 0


async def test_a_cancelled_run_closes_its_connections(database_url: str, postgres: PostgresServer) -> None:
    with Proxy(postgres.port) as proxy:
        reached = asyncio.Event()
        settings = load_settings(database_url=proxy.through(database_url), port=1)

        def on_result(run: CheckRun) -> None:
            if run.check.name == "latency":
                reached.set()
                proxy.freeze()

        task = asyncio.create_task(runner.run(lambda: settings, on_result=on_result))
        await reached.wait()
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        proxy.thaw()
        await eventually(lambda: not proxy.open_connections)


# Reaching the server


async def test_a_refused_port_is_named_and_what_depends_on_it_is_not_run(database_url: str) -> None:
    report = await examine(at(database_url, 1))
    assert failures(report) == ["network"]
    assert report.exit_code == 1
    assert "127.0.0.1:1" in str(result(report, "network").cause)
    assert result(report, "TLS").summary == "not run: requires network"
    assert report.count(Outcome.PASSED) == 2


async def test_an_unknown_host_is_named() -> None:
    report = await examine("postgresql://u:pw@nowhere.invalid/x")
    assert failures(report) == ["DNS"]
    assert "nowhere.invalid" in str(result(report, "DNS").cause)


async def test_one_living_host_of_several_is_enough_and_the_dead_one_is_named(
    database_url: str, postgres: PostgresServer
) -> None:
    url = database_url.replace(f"127.0.0.1:{postgres.port}", f"127.0.0.1:1,127.0.0.1:{postgres.port}")
    report = await examine(url)
    network = result(report, "network")
    assert network.outcome is Outcome.WARNED
    assert "127.0.0.1:1 " in str(network.cause)
    assert result(report, "users and tasks").outcome is Outcome.PASSED


async def test_a_silent_server_ends_within_the_bound(database_url: str, postgres: PostgresServer) -> None:
    with Proxy(postgres.port) as proxy:
        proxy.black_hole()
        begun = time.monotonic()
        report = await examine(
            proxy.through(database_url), timeout_seconds=1.5, database_connect_timeout_seconds=60
        )
        assert time.monotonic() - begun < 30
    assert failures(report) == ["credentials"]
    assert report.exit_code == 1


async def test_a_server_that_falls_silent_in_the_middle_ends_within_the_bound(
    database_url: str, postgres: PostgresServer
) -> None:
    with Proxy(postgres.port) as proxy:
        settings = load_settings(database_url=proxy.through(database_url), port=1)

        def on_result(run: CheckRun) -> None:
            if run.check.name == "durability":
                proxy.black_hole()

        begun = time.monotonic()
        report = await runner.run(lambda: settings, on_result=on_result, timeout_seconds=2)
        assert time.monotonic() - begun < 40
    assert "schema revision" in failures(report)
    assert result(report, "clock").outcome is Outcome.NOT_RUN


async def test_what_answers_but_is_no_postgresql_is_told(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        report = await examine(f"postgresql://u:pw@127.0.0.1:{port}/x?sslmode=prefer")
    finally:
        server.close()
    assert failures(report) == ["TLS"]
    assert "does not speak PostgreSQL" in str(result(report, "TLS").cause)


# TLS


async def test_a_verified_certificate_is_described(
    database_url: str, postgres: PostgresServer, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    with Proxy(postgres.port, tls=authority.server_context("127.0.0.1")) as proxy:
        report = await examine(
            f"{proxy.through(database_url)}?sslmode=verify-full&sslrootcert={authority.root_path}"
        )
        tls = result(report, "TLS")
        assert tls.outcome is Outcome.PASSED
        for part in ("TLSv1.3", "name and CA", "trustme", "days left"):
            assert part in tls.summary
        assert result(report, "users and tasks").outcome is Outcome.PASSED
        unverified = result(await examine(f"{proxy.through(database_url)}?sslmode=require"), "TLS")
        assert unverified.outcome is Outcome.WARNED
        assert "not verified" in unverified.summary


@pytest.mark.parametrize(
    ("names", "parameters"),
    [
        (("127.0.0.1",), "sslmode=verify-full"),
        (("db.example.com",), "sslmode=verify-full&sslrootcert={root}"),
    ],
    ids=["unknown authority", "another host's certificate"],
)
async def test_a_bad_certificate_is_refused_before_a_password_leaves(
    names: tuple[str, ...], parameters: str, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    with Thief(authority.server_context(*names)) as thief:
        query = parameters.format(root=authority.root_path)
        report = await examine(f"postgresql://ana:{quote(CANARY, safe='')}@127.0.0.1:{thief.port}/x?{query}")
        assert thief.passwords == []
        assert thief.heard == b""
    assert failures(report) == ["TLS"]
    assert report.exit_code == 3


async def test_a_server_without_tls_is_refused_before_a_password_leaves() -> None:
    with Thief() as thief:
        report = await examine(f"postgresql://ana:pw@127.0.0.1:{thief.port}/x?sslmode=require")
        assert thief.passwords == []
    assert failures(report) == ["TLS"]
    assert report.exit_code == 3
    assert "no TLS" in str(result(report, "TLS").cause)


# Credentials


async def test_a_wrong_password_is_a_fault_of_credentials(database_url: str) -> None:
    url = database_url.replace(parse(database_url).password.get_secret_value(), "wrong")  # type: ignore[union-attr]
    report = await examine(url)
    assert failures(report) == ["credentials"]
    assert report.exit_code == 3
    assert "DATABASE_URL" in str(result(report, "credentials").remedy)


async def test_an_unknown_database_is_a_fault_of_credentials(postgres: PostgresServer) -> None:
    report = await examine(postgres.url_for("nowhere"))
    assert failures(report) == ["credentials"]
    assert report.exit_code == 3
    assert "no database of that name" in str(result(report, "credentials").cause)


# Durability (D13)


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes", "synchronous_commit"])
async def test_a_server_that_can_lose_committed_rows_fails(
    private_postgres: Callable[..., PostgresServer], setting: str
) -> None:
    server = private_postgres(options={setting: "off"})
    await schema.create_tables(parse(server.url))
    report = await examine(server.url)
    assert failures(report) == ["durability"]
    assert report.exit_code == 1
    assert f"{setting} (set by command line) is off" in str(result(report, "durability").cause)
    assert f"without -c {setting}=off" in str(result(report, "durability").remedy)


async def test_synchronous_commit_switched_off_for_the_role_alone_is_found(
    database_url: str,
) -> None:
    async with role(database_url, "SELECT, INSERT, UPDATE, DELETE ON users, tasks, alembic_version") as url:
        await execute(database_url, f"ALTER ROLE {parse(url).user} SET synchronous_commit = off")
        durability = result(await examine(url), "durability")
        assert "synchronous_commit (set by user)" in str(durability.cause)
        await run_statements(durability.remedy, {parse(url).user: url}.__getitem__)
        # The server's own setting, which the role's hid, is the next finding.
        assert "set by user" not in str(result(await examine(url), "durability").cause)


async def test_each_place_that_switches_synchronous_commit_off_has_a_statement_that_helps(
    private_postgres: Callable[..., PostgresServer],
) -> None:
    server = private_postgres()
    await schema.create_tables(parse(server.url))
    for off, source in (
        ("ALTER ROLE groundwork SET synchronous_commit = off", "user"),
        ("ALTER DATABASE groundwork SET synchronous_commit = off", "database"),
        ("ALTER ROLE groundwork IN DATABASE groundwork SET synchronous_commit = off", "database user"),
        ("ALTER SYSTEM SET synchronous_commit = off", "configuration file"),
    ):
        await execute(server.url, off, "SELECT pg_reload_conf()")

        async def found(source: str = source) -> bool:
            return f"(set by {source})" in str(result(await examine(server.url), "durability").cause)

        await eventually(found)
        durability = result(await examine(server.url), "durability")
        await run_statements(durability.remedy, {"groundwork": server.url}.__getitem__)

        async def sound() -> bool:
            return result(await examine(server.url), "durability").outcome is Outcome.PASSED

        await eventually(sound)


async def test_neon_keeps_its_promise_in_its_storage_so_fsync_is_not_asked_for(
    database_url: str, postgres: PostgresServer, tmp_path: Path
) -> None:
    host = "ep-x.eu-central-1.aws.neon.tech"
    authority = Authority(tmp_path)
    with Proxy(postgres.port, tls=authority.server_context(host)) as proxy, resolving({host: "127.0.0.1"}):
        report = await examine(f"{proxy.through(database_url, host)}?sslrootcert={authority.root_path}")
    durability = result(report, "durability")
    # The server under test has synchronous_commit off as well, and that is no less wrong on Neon.
    assert "fsync by Neon's storage" in durability.summary
    assert "fsync" not in str(durability.cause)
    assert "synchronous_commit" in str(durability.cause)


# The schema


async def test_a_database_without_tables_is_told_to_migrate(empty_database_url: str) -> None:
    report = await examine(empty_database_url)
    assert result(report, "schema revision").outcome is Outcome.FAILED
    command = str(result(report, "schema revision").remedy)
    assert "python -m src migrate up" in command
    environment = {**os.environ, "DATABASE_URL": empty_database_url}
    await asyncio.to_thread(subprocess.run, command, shell=True, check=True, env=environment)
    assert result(await examine(empty_database_url), "schema revision").outcome is Outcome.PASSED
    for name in ("tables", "users and tasks", "cascade", "uniqueness"):
        assert result(report, name).outcome is Outcome.NOT_RUN
    assert report.exit_code == 1


async def test_another_programs_alembic_version_is_named_and_a_schema_of_its_own_helps(
    empty_database_url: str,
) -> None:
    await execute(
        empty_database_url,
        "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)",
        "INSERT INTO alembic_version VALUES ('1a2b3c4d5e6f')",
    )
    revision = result(await examine(empty_database_url), "schema revision")
    assert revision.outcome is Outcome.FAILED
    assert revision.summary == "1a2b3c4d5e6f, of another program"
    await run_statements(revision.remedy, {"groundwork": empty_database_url}.__getitem__)
    url = f"{empty_database_url}?options=-c%20search_path%3Dgroundwork"
    assert "options=-c%20search_path%3Dgroundwork" in str(revision.remedy)
    await schema.create_tables(parse(url))
    report = await examine(url)
    assert failures(report) == ["durability"]


async def test_a_role_that_may_not_create_tables_gets_the_grant_that_lets_it_migrate(
    empty_database_url: str,
) -> None:
    """Since PostgreSQL 15, `public` lets only the owner of the database create tables."""
    async with role(empty_database_url) as url:
        migration = result(await examine(url), "migration")
        assert migration.outcome is Outcome.FAILED
        assert "may not create tables" in migration.summary
        await run_statements(migration.remedy, {"groundwork": empty_database_url}.__getitem__)
        assert result(await examine(url), "migration").outcome is Outcome.PASSED
        await schema.create_tables(parse(url))


async def test_the_role_and_the_database_of_migrations_are_those_of_the_migration_url(
    database_url: str, app_database_url: str, second_database_url: str, postgres: PostgresServer
) -> None:
    async def migration(url: str | None) -> CheckResult:
        return result(await examine(app_database_url, database_migration_url=url), "migration")

    assert (await migration(database_url)).outcome is Outcome.PASSED
    assert "DATABASE_MIGRATION_URL is not set" in (await migration(None)).summary
    elsewhere = await migration(second_database_url)
    assert (elsewhere.outcome, elsewhere.exit_code) == (Outcome.FAILED, 3)
    assert "different servers, databases or schemas" in str(elsewhere.cause)
    bound = await migration(app_database_url)
    assert bound.outcome is Outcome.FAILED
    assert 'Name role "groundwork" in DATABASE_MIGRATION_URL' in str(bound.remedy)
    unreachable = await migration(at(database_url, 1))
    assert (unreachable.outcome, unreachable.summary) == (Outcome.FAILED, "connection refused")
    wrong = await migration(database_url.replace("//groundwork:", "//groundwork:not-"))
    assert (wrong.outcome, wrong.exit_code) == (Outcome.FAILED, 3)


async def test_a_newer_schema_is_warned_about(database_url: str) -> None:
    await execute(database_url, "UPDATE alembic_version SET version_num = '9999'")
    revision = result(await examine(database_url), "schema revision")
    assert revision.outcome is Outcome.WARNED
    assert "9999" in revision.summary


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("DROP INDEX ix_tasks_open", "ix_tasks_open"),
        ("ALTER TABLE tasks DROP CONSTRAINT ck_tasks_version_positive", "version_positive"),
        ("ALTER TABLE users ADD COLUMN nickname text", "nickname"),
    ],
)
async def test_what_differs_from_the_declaration_is_named(
    database_url: str, statement: str, named: str
) -> None:
    await execute(database_url, statement)
    report = await examine(database_url)
    assert result(report, "tables").outcome is Outcome.FAILED
    assert named in str(result(report, "tables").cause)
    assert result(report, "users and tasks").outcome is Outcome.PASSED


# The encoding


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_an_encoding_that_is_not_utf8_fails_and_the_printed_database_has_it(
    postgres: PostgresServer, administrator: Administrator, encoding: str
) -> None:
    name = f"test_{encoding.lower()}"
    administrator.execute(
        f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE_PROVIDER libc LOCALE 'C'"
    )
    try:
        found = result(await examine(postgres.url_for(name)), "encoding")
        assert (found.outcome, found.summary) == (Outcome.FAILED, encoding)
        await run_statements(found.remedy, {"groundwork": postgres.url_for(name)}.__getitem__)
        sound = postgres.url_for(f"{name}_utf8")
        await schema.create_tables(parse(sound))
        report = await examine(sound)
        assert failures(report) == ["durability"]
    finally:
        administrator.execute(f"DROP DATABASE {name} WITH (FORCE)")
        administrator.execute(f"DROP DATABASE IF EXISTS {name}_utf8 WITH (FORCE)")


# Users and tasks


async def test_a_function_that_the_services_statements_need_is_missed(database_url: str) -> None:
    """The checks run the service's own statements: SQL of their own would not call it."""
    await execute(database_url, "DROP FUNCTION admit")
    crud = result(await examine(database_url), "users and tasks")
    assert crud.outcome is Outcome.FAILED
    assert "differ from what the code expects" in str(crud.cause)


async def test_an_update_that_makes_no_new_version_is_seen(database_url: str) -> None:
    await execute(
        database_url,
        "CREATE FUNCTION keep_version() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN NEW.version := OLD.version; RETURN NEW; END'",
        "CREATE TRIGGER keep_version BEFORE UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION keep_version()",
    )
    before = await everything(database_url)
    assert "differs from what was written" in str(
        result(await examine(database_url), "users and tasks").cause
    )
    assert await everything(database_url) == before


async def test_a_missing_unique_index_is_seen_by_what_it_allows(database_url: str) -> None:
    await execute(database_url, "ALTER TABLE users DROP CONSTRAINT uq_users_email")
    assert result(await examine(database_url), "uniqueness").outcome is Outcome.FAILED


async def test_a_missing_cascade_is_seen_by_what_it_leaves_behind(database_url: str) -> None:
    await execute(database_url, "ALTER TABLE tasks DROP CONSTRAINT fk_tasks_user_id")
    assert result(await examine(database_url), "cascade").outcome is Outcome.FAILED


async def test_a_read_only_database_says_why_nothing_could_be_written(database_url: str) -> None:
    name = parse(database_url).database
    await execute(database_url, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    before = await everything(database_url)
    report = await examine(database_url)
    crud = result(report, "users and tasks")
    assert crud.outcome is Outcome.FAILED
    assert "read-only" in str(crud.cause)
    assert result(report, "cascade").outcome is Outcome.NOT_RUN
    assert await everything(database_url) == before


async def test_a_role_that_may_only_read_is_told_which_rights_it_lacks(database_url: str) -> None:
    async with role(database_url, "SELECT ON users, tasks, alembic_version") as url:
        report = await examine(url)
        crud, privileges = result(report, "users and tasks"), result(report, "privileges")
        assert crud.outcome is privileges.outcome is Outcome.FAILED
        assert "lacks a privilege" in str(crud.cause)
        assert "users (INSERT, DELETE)" in str(privileges.cause)
        await run_statements(privileges.remedy, {"groundwork": database_url}.__getitem__)
        again = await examine(url)
        assert result(again, "users and tasks").outcome is Outcome.PASSED
        assert result(again, "privileges").summary.endswith("has what it needs and no more")


async def test_a_lock_held_by_another_ends_in_a_cause(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
            report = await examine(database_url, database_lock_timeout_seconds=0.2)
    finally:
        await connection.close()
    for name in ("tables", "users and tasks"):
        assert "holds a lock" in str(result(report, name).cause)


@pytest.mark.parametrize("attribute", ["SUPERUSER", "BYPASSRLS"])
async def test_a_privileged_role_passes_locally_and_is_warned_about_in_production(
    database_url: str, attribute: str
) -> None:
    async with role(database_url, "groundwork_app") as url:
        user = parse(url).user
        await execute(database_url, f"ALTER ROLE {user} {attribute}")
        assert result(await examine(url), "privileges").outcome is Outcome.PASSED
        warned = result(await examine(url, environment="production"), "privileges")
        assert (warned.outcome, attribute.lower() in warned.summary.lower()) == (Outcome.WARNED, True)
        statements = await run_statements(
            warned.remedy, {"groundwork": database_url, str(user): url}.__getitem__
        )
        [login] = re.findall(r'CREATE ROLE "(\w+)" LOGIN', statements[-1])
        try:
            bound = f"postgresql://{login}:pw@{database_url.rpartition('@')[2]}"
            report = await examine(bound, environment="production", database_migration_url=database_url)
            for name in ("privileges", "isolation", "users and tasks", "migration"):
                assert result(report, name).outcome is Outcome.PASSED
        finally:
            await execute(database_url, f"DROP ROLE {login}")


async def test_what_default_privileges_gave_to_other_roles_is_listed_and_the_printed_revokes_end_it(
    empty_database_url: str,
) -> None:
    """As Supabase does for `anon`; before the migrations revoke it, and again after."""
    async with role(empty_database_url) as anon:
        name = parse(anon).user
        await execute(
            empty_database_url,
            f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON TABLES TO {name}",
            f"ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO {name}",
        )
        await schema.create_tables(parse(empty_database_url))
        await execute(
            empty_database_url,
            f"GRANT SELECT ON tasks TO {name}",
            f"GRANT EXECUTE ON FUNCTION sign_up(uuid, text, text, bytea) TO {name}, PUBLIC",
        )
        grantees = result(await examine(empty_database_url), "grantees")
        assert grantees.outcome is Outcome.FAILED
        assert f"{name}: EXECUTE on function sign_up" in str(grantees.cause)
        assert "PUBLIC: EXECUTE on function sign_up" in str(grantees.cause)
        assert "SELECT" in str(grantees.cause)
        await run_statements(grantees.remedy, {"groundwork": empty_database_url}.__getitem__)
        assert result(await examine(empty_database_url), "grantees").outcome is Outcome.PASSED
        await execute(empty_database_url, f"GRANT SELECT ON tasks TO {name}")
        assert result(await examine(empty_database_url), "grantees").outcome is Outcome.WARNED


async def test_a_clock_that_is_an_hour_off_is_warned_about(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = SimpleNamespace(time=lambda: time.time() + 3600, perf_counter=time.perf_counter)
    monkeypatch.setattr(server, "time", ours)
    clock = result(await examine(database_url), "clock")
    assert clock.outcome is Outcome.WARNED
    assert clock.summary.startswith(("-3600", "-3599"))


# Poolers


async def test_a_direct_server_is_told_from_a_configured_pooler(database_url: str) -> None:
    assert result(await examine(database_url), "pooler").summary == "none"
    pooler = result(await examine(database_url, database_pooler="transaction"), "pooler")
    assert pooler.outcome is Outcome.WARNED


@pytest.mark.debian
async def test_a_pooler_in_transaction_mode_is_found_out(postgres: PostgresServer, database_url: str) -> None:
    name = parse(database_url).database
    with PgBouncer(postgres) as bouncer:
        report = await examine(bouncer.url_for(name))
        assert "transaction mode, prepared statements not tracked" in result(report, "pooler").summary
        assert result(report, "pooler").outcome is Outcome.PASSED
        assert result(report, "users and tasks").outcome is Outcome.PASSED
        wrong = result(await examine(bouncer.url_for(name), database_pooler="none"), "pooler")
        assert wrong.outcome is Outcome.FAILED
        assert "DATABASE_POOLER=transaction" in str(wrong.remedy)
        wrong = result(await examine(bouncer.url_for(name), database_pooler="tracking"), "pooler")
        assert wrong.outcome is Outcome.FAILED


@pytest.mark.debian
async def test_a_pooler_that_keeps_sessions_is_told_from_one_that_does_not(
    postgres: PostgresServer, database_url: str
) -> None:
    with PgBouncer(postgres, pool_mode="session") as bouncer:
        report = await examine(bouncer.url_for(parse(database_url).database))
    assert result(report, "pooler").summary == "a proxy that keeps sessions"


# The running service


@pytest.mark.parametrize(
    ("answer", "outcome", "said"),
    [
        (b'HTTP/1.1 200 OK\r\n\r\n{"status": "pass"}', Outcome.PASSED, "reports pass"),
        (
            b'HTTP/1.1 200 OK\r\n\r\n{"status": "warn", "checks": {"pool": [{"status": "warn", "output": "full"}]}}',
            Outcome.WARNED,
            "pool: full",
        ),
        (
            b'HTTP/1.1 503 No\r\n\r\n{"status": "fail", "checks": {"database:connectivity": [{"status": "fail"}]}}',
            Outcome.FAILED,
            "database:connectivity: fail",
        ),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", Outcome.WARNED, "Another program than Groundwork"),
        (b"", Outcome.WARNED, "Another program than Groundwork"),
    ],
)
async def test_what_the_running_service_says_of_itself_is_passed_on(
    answer: bytes, outcome: Outcome, said: str
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        service = result(await examine("postgresql://u:pw@127.0.0.1:1/x", port=port), "service")
    finally:
        server.close()
    assert service.outcome is outcome
    assert said in f"{service.summary} {service.cause}"


# Secrets (C3)


@pytest.mark.parametrize(
    "tail",
    [
        "127.0.0.1:{port}/groundwork",
        "127.0.0.1:{port}/groundwork?sslmode=require",
        "127.0.0.1:1/x",
        "nowhere.invalid/x",
    ],
)
async def test_no_report_holds_the_password(postgres: PostgresServer, tail: str) -> None:
    url = f"postgresql://groundwork:{quote(CANARY, safe='')}@{tail.format(port=postgres.port)}"
    text = json.dumps((await examine(url)).document(), ensure_ascii=False)
    assert '"ok": false' in text
    for form in (CANARY, quote(CANARY, safe=""), base64.b64encode(CANARY.encode()).decode()):
        assert form not in text
