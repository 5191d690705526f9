"""A cursor leads on in the list that it was made for, and nowhere else."""

from __future__ import annotations

import base64
import os
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from examples import examples
from src.api import pages
from src.api.cursors import MAX_LENGTH, Cursors
from src.errors import Invalid
from src.services.task_pages import PageQuery, Position

if TYPE_CHECKING:
    from tests.api.conftest import Person

KEY, OTHER = os.urandom(32), os.urandom(32)
OWNER = uuid4()
AT = datetime(2026, 1, 1, tzinfo=UTC)
QUERY = PageQuery(is_completed=True, q="x")
POSITION = Position("2026-11-22T21:21:45.365959Z", uuid4())


def refused(cursors: Cursors, cursor: str, owner: UUID = OWNER, query: PageQuery = QUERY) -> Invalid:
    with pytest.raises(Invalid) as error:
        cursors.open(cursor, owner, query)
    assert [fault.pointer for fault in error.value.faults] == ["cursor"]
    return error.value


@given(st.uuids(), st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31)), st.uuids())  # noqa: DTZ001
@settings(max_examples=50, deadline=None)
def test_a_cursor_opens_to_the_position_it_was_made_from(task: UUID, at: datetime, owner: UUID) -> None:
    position = Position(at.isoformat(timespec="microseconds") + "Z", task)
    cursors = Cursors([KEY])
    cursor = cursors.seal(position, owner, QUERY)
    assert cursors.open(cursor, owner, QUERY) == position
    assert len(cursor) <= MAX_LENGTH
    assert set(cursor) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


OTHERS: dict[str, dict[str, Any]] = {
    "sort": {"sort": "updated_at"},
    "direction": {"descending": False},
    "state": {"is_completed": False},
    "no state": {"is_completed": None},
    "search": {"q": "y"},
    "no search": {"q": None},
    "created after": {"created_after": AT},
    "created before": {"created_before": AT},
    "updated after": {"updated_after": AT},
    "updated before": {"updated_before": AT},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_cursor_of_another_list_is_refused(name: str) -> None:
    cursors = Cursors([KEY])
    refused(cursors, cursors.seal(POSITION, OWNER, QUERY), query=replace(QUERY, **OTHERS[name]))


def test_the_size_of_a_page_and_the_way_of_counting_may_change_between_pages() -> None:
    cursors = Cursors([KEY])
    cursor = cursors.seal(POSITION, OWNER, QUERY)
    assert cursors.open(cursor, OWNER, replace(QUERY, limit=7, count="exact", after=POSITION)) == POSITION


def test_another_persons_cursor_is_refused() -> None:
    cursors = Cursors([KEY])
    refused(cursors, cursors.seal(POSITION, OWNER, QUERY), owner=uuid4())


def test_no_bit_of_a_cursor_can_be_changed() -> None:
    cursors = Cursors([KEY])
    sealed = base64.urlsafe_b64decode(cursors.seal(POSITION, OWNER, QUERY) + "==")
    for place in range(len(sealed) * 8):
        forged = bytearray(sealed)
        forged[place // 8] ^= 1 << place % 8
        refused(cursors, base64.urlsafe_b64encode(forged).decode().rstrip("="))


@given(st.text(max_size=MAX_LENGTH))
@settings(max_examples=200, deadline=None)
def test_whatever_else_is_given_for_a_cursor_is_refused(text: str) -> None:
    refused(Cursors([KEY]), text)


def test_a_cursor_has_one_spelling() -> None:
    cursors = Cursors([KEY])
    cursor = cursors.seal(POSITION, OWNER, QUERY)
    for spelling in (
        cursor + "=",
        cursor + "==",
        cursor + "\n",
        " " + cursor,
        cursor[:5] + "!" + cursor[5:],
        "",
    ):
        refused(cursors, spelling)
    assert cursors.open(cursor, OWNER, QUERY) == POSITION


def test_a_cursor_survives_a_rotation_of_keys_while_both_are_known() -> None:
    cursor = Cursors([KEY]).seal(POSITION, OWNER, QUERY)
    assert Cursors([OTHER, KEY]).open(cursor, OWNER, QUERY) == POSITION
    refused(Cursors([OTHER]), cursor)


CURSORS = ["cursor=A-_9", "cursor=", "cursor=a%20", "%63ursor=A", "xcursor=A", "cursor", "cursor=A=B"]
FILTERS = ["limit=5", "limit=x", "limit=5&limit=5", "q=a+b", "q=%20", "q=cursor=A", "order=asc", "nope=1", ""]
LONG = [f"cursor={'A' * 201}", f"q={'a' * 300}"]
PARAMETERS = st.sampled_from([*CURSORS, *FILTERS, *LONG])


@given(st.lists(PARAMETERS, max_size=4).map("&".join))
@settings(max_examples=examples(500), deadline=None)
async def test_what_a_list_is_asked_for_is_read_alike_remembered_or_not(text: str) -> None:
    try:
        whole: object = pages._read(text)
    except Invalid as invalid:
        whole = invalid.faults
    try:
        asked: object = await pages.Asked()(Request({"type": "http", "query_string": text.encode()}))
    except Invalid as invalid:
        asked = invalid.faults
    assert asked == whole


async def test_a_forged_or_foreign_cursor_is_422_over_http_and_is_not_repeated(
    ana: Person, ben: Person
) -> None:
    for number in range(3):
        await ana.create(str(number))
        await ben.create(str(number))
    cursor = (await ana.ask("GET", "/v1/tasks?limit=1")).json()["next_cursor"]
    assert (await ana.ask("GET", f"/v1/tasks?limit=2&cursor={cursor}")).status_code == 200
    swapped = cursor[:-2] + cursor[-1] + cursor[-2] if cursor[-1] != cursor[-2] else cursor[:-1]
    for person, query in (
        (ben, f"cursor={cursor}"),
        (ana, f"cursor={cursor}&sort=updated_at"),
        (ana, f"cursor={cursor}&order=asc"),
        (ana, f"cursor={cursor}&is_completed=false"),
        (ana, f"cursor={swapped}"),
        (ana, "cursor="),
        (ana, "cursor=" + "A" * 80),
        (ana, "cursor=" + "A" * 5000),
        (ana, "cursor=%00%ff%F0%9F%92%A9"),
    ):
        answer = await person.ask("GET", f"/v1/tasks?{query}")
        assert answer.status_code == 422, query
        assert [fault["pointer"] for fault in answer.json()["errors"]] == ["cursor"]
        assert cursor[:20] not in answer.text
