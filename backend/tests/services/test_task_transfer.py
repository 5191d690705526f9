"""Exports and imports: the same tasks again, all or nothing, one at a time, and nothing left behind."""

from __future__ import annotations

import asyncio
import io
import json
import random
from contextlib import aclosing
from datetime import UTC
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from examples import examples
from owning import create, exported, listed, owned, shown, somebody, update
from postgres_server import PostgresServer
from proxies import Proxy
from src.config.database import parse
from src.errors import Invalid, RequestError, TooManyRequests, Unauthenticated, Unavailable
from src.models import TaskRead
from src.models.rendering import render_timestamp
from src.services import task_lines, task_transfer, tasks
from src.services.database import Database, Limits
from src.services.task_lines import BLANK_LINES_MAX, FAULTS_MAX, LINE_MAX_BYTES
from src.services.tasks import Known, PageQuery
from waiting import eventually


async def load(database: Database, author: Known, *lines: Any, **more: Any) -> int:
    written = [line if isinstance(line, bytes) else json.dumps(line, default=str).encode() for line in lines]
    return (await tasks.load(database, author, io.BytesIO(b"\n".join(written)), **more)).count


async def faults(database: Database, author: Known, *lines: Any) -> list[tuple[str, str]]:
    with pytest.raises(Invalid) as caught:
        await load(database, author, *lines)
    return [(fault.pointer, fault.detail) for fault in caught.value.faults]


async def many(database: Database, author: Known, count: int) -> None:
    await create(database, author)
    async with database.transaction(owner=author.user_id) as connection:
        # Some thousands in a statement: its time is bounded, also on a busy machine.
        for first in range(2, count + 1, 5_000):
            await connection.execute(
                "INSERT INTO tasks (user_id, id, title, description)"
                " SELECT $1, gen_random_uuid(), 'a', repeat('x', 500) FROM generate_series($2::int, $3::int)",
                author.user_id,
                first,
                min(first + 4_999, count),
            )


async def settle(database: Database) -> None:
    """Until every connection is back."""
    await eventually(lambda: not database.observe().pool.in_use)


async def test_what_is_exported_is_imported_as_it_was(either: Database) -> None:
    ada, bob = somebody(), somebody()
    first = await create(
        either, ada, title='quotes " and \\ and \n lines', description="Ünïcödé 🎉 \x01\x02\x7f"
    )
    await create(either, ada, title="second", is_completed=True)
    await update(either, ada, first.id, description="tab\t, line \u2028 separator, \\. and \\N")
    await create(either, bob, title="bob's")
    lines = await exported(either, ada)
    assert [shown(line.decode()).title for line in lines.splitlines()] == [first.title, "second"]
    stored = await owned(either, ada)
    assert [shown(line.decode()) for line in lines.splitlines()] == [stored[first.id], *(
        task for task in stored.values() if task.id != first.id
    )]  # fmt: skip
    eve = somebody()
    assert await load(either, eve, lines) == 2
    again = await exported(either, eve)
    assert again == lines.replace(str(ada.user_id).encode(), str(eve.user_id).encode())


TEXTS = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=30)
MOMENTS = st.datetimes(timezones=st.just(UTC)).map(render_timestamp)
LINES = st.lists(
    st.fixed_dictionaries(
        {"id": st.uuids().map(str), "title": TEXTS.map(lambda text: f"x{text}")},
        optional={
            "description": st.none() | TEXTS,
            "is_completed": st.booleans(),
            "version": st.integers(1, 10**9),
            "created_at": MOMENTS,
            "updated_at": MOMENTS,
        },
    ),
    max_size=8,
    unique_by=lambda line: line["id"],
)
DEFAULTS = {"description": None, "is_completed": False, "version": 1}


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(lines=LINES, ascii_only=st.booleans())
@example(
    lines=[
        {"id": str(uuid4()), "title": "a", "created_at": moment, "updated_at": moment}
        for moment in ("0001-01-01T00:00:00.000000Z", "9999-12-31T23:59:59.999999Z")
    ],
    ascii_only=True,
)
async def test_any_line_that_is_accepted_reads_back_equal(
    app_database: Database, lines: list[dict[str, Any]], ascii_only: bool
) -> None:
    ada = somebody()
    written = [json.dumps(line, ensure_ascii=ascii_only).encode() for line in lines]
    assert await load(app_database, ada, *written) == len(lines)
    stored = {task["id"]: task for task in map(json.loads, (await exported(app_database, ada)).splitlines())}
    assert len(stored) == len(lines)
    for line in lines:
        task = stored[line["id"]]
        stamps = {"created_at": task["created_at"], "updated_at": line.get("created_at", task["updated_at"])}
        assert task == {"user_id": str(ada.user_id)} | DEFAULTS | stamps | line


async def test_lines_may_end_as_they_do_elsewhere(either: Database) -> None:
    ada = somebody()
    text = b'\xef\xbb\xbf{"title":"a"}\r\n\r\n  \n{"title":"b"}\n{"title":"c","user_id":"%s"}' % bytes(
        str(uuid4()), "ascii"
    )
    assert await load(either, ada, text) == 3
    found = await listed(either, ada)
    assert {task.title for task in found} == {"a", "b", "c"}
    assert {task.user_id for task in found} == {ada.user_id}
    assert await load(either, ada, b"") == 0


async def test_each_faulty_line_is_named_and_nothing_is_imported(
    either: Database, database: Database
) -> None:
    ada = somebody()
    said = await faults(
        either,
        ada,
        {"title": "fine"},
        {"title": ""},
        b"",
        {"title": "a", "secret-name": 1},
        b"not json",
        b'{"title":"a","title":"b"}',
        b'{"title":"\xff"}',
        {"title": "a", "description": 5, "is_completed": "yes"},
        b"[]",
        b'{"title":"\\u0000"}',
        b'{"title":"\\ud800"}',
        b"[" * 100_000,
        b'{"title":"a","version":' + b"1" * 5000 + b"}",
        {"title": "a", "version": 0},
        {"title": "a", "created_at": "infinity"},
        b'{"title":"' + b"a" * LINE_MAX_BYTES + b'"}',
        {"title": "a", "id": "1"},
    )
    assert [pointer for pointer, _ in said] == [
        "/1/title",
        "/3",
        "/4",
        "/5",
        "/6",
        "/7/description",
        "/7/is_completed",
        "/8",
        "/9/title",
        "/10/title",
        "/11",
        "/12",
        "/13/version",
        "/14/created_at",
        "/15",
        "/16/id",
    ]
    assert all(detail.startswith(f"Line {int(pointer.split('/')[1]) + 1}: ") for pointer, detail in said)
    assert "secret-name" not in str(said)
    assert await listed(either, ada) == []
    async with database.transaction() as connection:
        assert await connection.fetchval("SELECT count(*) FROM users") == 0


ODD = [
    "{",
    "}",
    ":",
    ",",
    '"',
    "\\",
    " ",
    "[",
    "]",
    "\r",
    "\x0c",
    "\ufeff",
    '"title"',
    '"a"',
    '"t\\u0069tle"',
]
FIELDS = [
    '{"title":"a"}',
    '"description":"{"',
    '"version":2',
    '"version":true',
    '"created_at":5',
    '"user_id":null',
]
PIECES = st.lists(st.sampled_from([*ODD, *FIELDS, f'"id":"{uuid4()}"']), max_size=7).map("".join)
WELL_OR_NOT = st.lists(
    PIECES.map(lambda inside: f'{{"title":"a",{inside}}}') | PIECES, min_size=1, max_size=5
)


@settings(max_examples=examples(3_000), deadline=None)
@given(lines=WELL_OR_NOT)
@example(lines=['{"title":"a"},{"title":"b"}'])
@example(lines=['{"title":"a"},{"title":"b"}', '{"title":"c"', '"description":"d"}'])
@example(lines=['{"title":"a"},{"title":"b"}', '{"title":"}', '{"}'])
@example(lines=['{"title":"a","title":"b"}', '{"title":"a"}'])
@example(lines=['{"title":"a","t\\u0069tle":"b"}'])
@example(lines=[f'{{"title":"a","id":"{uuid4()}"}}', '{"title":"\\\\","description":null,"version":7}\r'])
def test_lines_read_together_are_what_each_is_by_itself(lines: list[str]) -> None:
    texts = [f"{line}\n".encode() for line in lines]
    found: list[Any] = []
    each = [task_lines._task(number, text, found) for number, text in enumerate(texts, 2)]
    together = task_lines._tasks(texts, task_lines._IMPORTS)
    looked = task_lines._tasks(texts, task_lines._LOOKED)
    assert (looked is None) == (together is None)
    if together is None:
        # Where every line is well they are read in one step, but for what is not the usual way to write them.
        assert (
            None in each
            or "\\" in str(lines)
            or any(text[:1] != b"{" for text in texts)
            or "true" in str(lines)
        )
        return
    assert [task.model_dump(exclude_unset=True) for task in together] == [
        task and task.model_dump(exclude_unset=True) for task in each
    ]


async def test_no_more_faults_are_told_than_are_read(either: Database) -> None:
    said = await faults(either, somebody(), *({"title": ""} for _ in range(500)))
    assert [pointer for pointer, _ in said] == [f"/{line}/title" for line in range(FAULTS_MAX)]


async def test_blank_lines_mean_nothing_until_they_are_a_flood(either: Database) -> None:
    blanks = [b""] * BLANK_LINES_MAX
    assert await load(either, somebody(), *blanks, {"title": "a"}) == 1
    said = await faults(either, somebody(), {"title": "a"}, *blanks, b"", b"", b"")
    assert [pointer for pointer, _ in said] == [f"/{BLANK_LINES_MAX + 1}"]


async def test_an_id_that_is_taken_is_named_by_its_line(either: Database) -> None:
    ada, bob = somebody(), somebody()
    hers, his, twice = await create(either, ada), await create(either, bob), uuid4()
    lines = [
        {"title": "a", "id": hers.id},
        {"title": "b", "id": his.id},
        {"title": "c", "id": twice},
        {"title": "d", "id": twice},
    ]
    assert await faults(either, ada, *lines) == [
        ("/0/id", "Line 1: There is a task of this id."),
        ("/3/id", "Line 4: There is a task of this id."),
    ]
    assert await owned(either, ada) == {hers.id: hers}
    assert await load(either, ada, *lines[1:3]) == 2


async def test_a_long_import_is_all_or_nothing(app_database: Database) -> None:
    """Longer than a chunk, and its last line is the first one's again."""
    ada, same = somebody(), uuid4()
    lines: list[Any] = [{"title": "a", "id": same}]
    lines += [{"title": f"task {number}"} for number in range(4_500)]
    said = await faults(app_database, ada, *lines, {"title": "z", "id": same})
    assert said == [("/4501/id", "Line 4502: There is a task of this id.")]
    assert await listed(app_database, ada) == []
    progress: list[int] = []
    assert await load(app_database, ada, *lines, on_progress=progress.append) == 4_501
    assert progress == sorted(progress)
    assert progress[-1] == 4_501
    page = await tasks.page(app_database, ada.user_id, PageQuery(count="exact"))
    assert page.count == 4_501


async def test_a_deleted_users_import_is_refused(either: Database, database: Database) -> None:
    ada = somebody("ada@example.com")
    await load(either, ada, {"title": "a"})
    async with database.transaction() as connection:
        assert await connection.fetchval("SELECT email FROM users") == ada.email
        await connection.execute("DELETE FROM users")
    with pytest.raises(Unauthenticated):
        await load(either, ada, {"title": "a"})
    assert await exported(either, ada) == b""


# One at a time, and nothing left behind


async def test_one_export_or_import_runs_at_a_time(app_database: Database) -> None:
    ada, bob = somebody(), somebody()
    await many(app_database, ada, 2_000)
    running = tasks.export(app_database, ada.user_id)
    await anext(running)
    for attempt in (
        anext(tasks.export(app_database, bob.user_id)),
        load(app_database, bob, {"title": "a"}),
    ):
        with pytest.raises(TooManyRequests) as caught:
            await attempt
        assert caught.value.retry_after_seconds
    # Everything else goes on.
    assert len(await listed(app_database, ada, limit=5)) == 5
    await running.aclose()
    assert await load(app_database, bob, {"title": "a"}) == 1
    assert len(await exported(app_database, bob)) > 0
    await settle(app_database)


async def test_two_services_do_not_stand_in_each_others_way(
    app_database: Database, database: Database
) -> None:
    ada = somebody()
    await many(app_database, ada, 2_000)
    running = tasks.export(app_database, ada.user_id)
    await anext(running)
    assert len((await exported(database, ada)).splitlines()) == 2_000
    await running.aclose()


async def test_an_export_that_nobody_begins_holds_nothing(app_database: Database) -> None:
    ada = somebody()
    await create(app_database, ada)
    waiting = tasks.export(app_database, ada.user_id)
    assert app_database.observe().pool.in_use == 0
    assert len(await exported(app_database, ada)) > 0
    await waiting.aclose()


async def test_l2_exports_and_imports_cancelled_at_any_moment_leak_nothing(
    app_database_url: str, database: Database
) -> None:
    chance = random.Random(7)
    ada = somebody()
    lines = b"\n".join(b'{"title":"task %d"}' % number for number in range(6_000))
    async with Database(parse(app_database_url), Limits(pool_size=2)) as service:
        await many(service, ada, 3_000)
        before = (await tasks.page(service, ada.user_id, PageQuery(count="exact"))).count

        async def slowly() -> None:
            async with aclosing(tasks.export(service, ada.user_id)) as pieces:
                async for _ in pieces:
                    await asyncio.sleep(0.001)

        for turn in range(40):
            work = slowly() if turn % 2 else load(service, ada, lines)
            task = asyncio.create_task(work)
            await asyncio.sleep(chance.uniform(0, 0.08))
            task.cancel()
            done = await asyncio.gather(task, return_exceptions=True)
            assert isinstance(done[0], asyncio.CancelledError | int | None), done
        await settle(service)
        after = (await tasks.page(service, ada.user_id, PageQuery(count="exact"))).count
        assert after is not None
        assert before is not None
        assert (after - before) % 6_000 == 0
        assert len((await exported(service, ada)).splitlines()) == after
        async with asyncio.timeout(60):
            while await _in_transaction(database):
                await asyncio.sleep(0.05)


async def _in_transaction(database: Database) -> int:
    async with database.transaction() as connection:
        count: int = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
            " AND datname = current_database() AND pid <> pg_backend_pid()"
        )
    return count


async def test_an_export_that_nobody_reads_on_is_ended(
    app_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_transfer, "STALL_SECONDS", 1.0)
    ada = somebody()
    await many(app_database, ada, 40_000)
    running = tasks.export(app_database, ada.user_id)
    read = len(await anext(running))
    await settle(app_database)
    with pytest.raises(Unavailable) as caught:
        async for piece in running:
            read += len(piece)
    assert caught.value.reason == "export-stalled"
    assert read < 40_000 * 500
    # The database is not blamed for it.
    assert app_database.observe().status == "up"
    monkeypatch.undo()
    assert len((await exported(app_database, ada)).splitlines()) == 40_000


async def test_an_export_is_of_one_moment(app_database: Database) -> None:
    ada = somebody()
    await many(app_database, ada, 20_000)
    running = tasks.export(app_database, ada.user_id)
    read = await anext(running)
    async with app_database.transaction(owner=ada.user_id) as connection:
        await connection.execute("DELETE FROM tasks WHERE user_id = $1", ada.user_id)
    read += b"".join([piece async for piece in running])
    assert len(read.splitlines()) == 20_000
    assert {shown(line.decode()).user_id for line in read.splitlines()} == {ada.user_id}
    assert await exported(app_database, ada) == b""


async def test_an_export_cut_short_says_so(postgres: PostgresServer, app_database_url: str) -> None:
    ada = somebody()
    with Proxy(postgres.port) as proxy:
        async with Database(parse(proxy.through(app_database_url))) as service:
            await many(service, ada, 40_000)
            running = tasks.export(service, ada.user_id)
            await anext(running)
            proxy.reset_all()
            with pytest.raises(RequestError):
                _ = [piece async for piece in running]
            assert len((await exported(service, ada)).splitlines()) == 40_000
            await settle(service)


async def test_an_import_cut_short_wrote_nothing(postgres: PostgresServer, app_database_url: str) -> None:
    ada = somebody()
    with Proxy(postgres.port) as proxy:
        async with Database(parse(proxy.through(app_database_url))) as service:
            await create(service, ada)

            def cut(stored: int) -> None:
                if stored:
                    proxy.reset_all()

            with pytest.raises(Unavailable):
                await load(service, ada, *({"title": "a"} for _ in range(9_000)), on_progress=cut)
            assert len(await listed(service, ada)) == 1
            assert await load(service, ada, {"title": "a"}) == 1
            await settle(service)


async def test_others_are_served_while_an_import_runs(app_database: Database) -> None:
    ada, bob = somebody(), somebody()
    await create(app_database, bob)
    loading = asyncio.create_task(load(app_database, ada, *({"title": f"t{n}"} for n in range(20_000))))
    served = 0
    while not loading.done():
        async with asyncio.timeout(30):
            await listed(app_database, bob)
        served += 1
    assert await loading == 20_000
    assert served > 20
    assert isinstance((await listed(app_database, bob))[0], TaskRead)
