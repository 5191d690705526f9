"""What may come in, and how it is shown: the shapes by themselves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from examples import examples
from src.models import Task, TaskCreate, TaskRead, TaskUpdate, User, UserCreate, UserRead
from src.models.base import WHITE_SPACE, Text
from src.models.task import Description, Title


def refused(shape: Any, **fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        shape(**fields)
    return str(caught.value.errors()[0]["type"])


def test_the_white_space_list_is_pythons_own() -> None:
    assert {chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()} == set(WHITE_SPACE)


@pytest.mark.parametrize("shape", [TaskCreate, TaskUpdate])
def test_unknown_fields_are_refused(shape: Any) -> None:
    assert refused(shape, title="a", user_id=uuid4()) == "extra_forbidden"
    assert refused(shape, title="a", version=3) == "extra_forbidden"
    assert refused(UserCreate, email="a@example.com", id=uuid4()) == "extra_forbidden"


@pytest.mark.parametrize("shape", [TaskCreate, TaskUpdate])
def test_a_title_has_1_to_255_code_points_and_more_than_white_space(shape: Any) -> None:
    assert shape(title="𝒳" * 255).title == "𝒳" * 255
    assert refused(shape, title="𝒳" * 256) == "string_too_long"
    assert refused(shape, title="") == "string_too_short"
    assert refused(shape, title=WHITE_SPACE) == "text_blank"
    assert shape(title=WHITE_SPACE + "a" + WHITE_SPACE).title == WHITE_SPACE + "a" + WHITE_SPACE


@pytest.mark.parametrize("shape", [TaskCreate, TaskUpdate])
@pytest.mark.parametrize("field", ["title", "description"])
def test_text_that_postgresql_cannot_hold_is_refused(shape: Any, field: str) -> None:
    fields = {"title": "a"} | {field: "a\x00b"}
    assert refused(shape, **fields) == "text_nul"
    # Pydantic itself refuses some of these, before our rule is asked.
    assert refused(shape, **fields | {field: "a\ud800b"}) in {"text_surrogate", "string_unicode"}
    with pytest.raises(ValidationError):
        shape.model_validate_json(r'{"title": "a", "FIELD": "\ud800"}'.replace("FIELD", field))
    with pytest.raises(ValidationError):
        UserCreate(email="a\x00@example.com")


@given(st.text(max_size=4) | st.text(st.sampled_from(f"{WHITE_SPACE}\0a"), max_size=4))
@settings(max_examples=examples(1000), deadline=None)
def test_a_text_is_taken_out_of_json_where_it_is_taken_out_of_python(text: str) -> None:
    for kind in (Title, Description, Text):
        adapter = TypeAdapter(kind)
        assert _taken(adapter.validate_json, json.dumps(text)) == _taken(adapter.validate_python, text)


def test_each_white_space_alone_is_no_title_in_json_either() -> None:
    title = TypeAdapter(Title)
    for code in range(0xD800):
        text = json.dumps(chr(code))
        assert _taken(title.validate_json, text) == (chr(code) not in f"{WHITE_SPACE}\0"), text


def _taken(validate: Callable[[str], object], text: str) -> bool:
    try:
        validate(text)
    except ValidationError:
        return False
    return True


def test_a_description_has_at_most_10000_code_points() -> None:
    assert TaskCreate(title="a", description="𝒳" * 10_000).description == "𝒳" * 10_000
    assert TaskCreate(title="a", description="").description == ""
    assert refused(TaskCreate, title="a", description="x" * 10_001) == "string_too_long"


@pytest.mark.parametrize("value", [1, 0, "true", "yes", None])
def test_completed_is_a_boolean_and_nothing_like_one(value: Any) -> None:
    assert refused(TaskUpdate, is_completed=value) == "bool_type"
    assert refused(TaskCreate, title="a", is_completed=value) == "bool_type"


def test_absent_is_not_null() -> None:
    assert TaskUpdate().changes() == {}
    assert TaskUpdate(description=None).changes() == {"description": None}
    assert TaskUpdate(is_completed=False).changes() == {"is_completed": False}
    assert refused(TaskUpdate, title=None) == "string_type"
    assert refused(TaskCreate, title=None) == "string_type"
    assert TaskCreate.model_json_schema()["required"] == ["title"]
    assert "required" not in TaskUpdate.model_json_schema()


def test_an_error_never_quotes_the_input() -> None:
    with pytest.raises(ValidationError) as caught:
        UserCreate(email="secret words")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("Ada.Lovelace@Example.COM", "ada.lovelace@example.com"),
        ("ada@EXÄMPLE.com", "ada@xn--exmple-cua.com"),
        ("İ@example.com", None),
        ("ada@xn--exmple-cua.com", "ada@xn--exmple-cua.com"),
        ("a+b@example.com", "a+b@example.com"),
        ("", None),
        ("ada", None),
        ("ada@", None),
        ("@example.com", None),
        ("ada@b@example.com", None),
        ('"ada b"@example.com', None),
        ("ada @example.com", None),
        (" ada@example.com", None),
        ("Ada <ada@example.com>", None),
        ("ada@[127.0.0.1]", None),
        ("é@example.com", None),
        ("a@" + "b" * 63 + ("." + "c" * 63) * 3 + ".com", None),
    ],
)
def test_an_address_is_stored_in_lower_case_and_ascii(given: str, stored: str | None) -> None:
    if stored is None:
        assert refused(UserCreate, email=given) == "email"
    else:
        assert UserCreate(email=given).email == stored


def test_a_timestamp_is_written_in_one_way() -> None:
    def written(moment: datetime) -> str:
        shown = UserRead(id=uuid4(), email="a@example.com", created_at=moment, updated_at=moment)
        return str(shown.model_dump(mode="json")["created_at"])

    assert written(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)) == "2026-01-02T03:04:05.000000Z"
    assert (
        written(datetime(2026, 1, 2, 3, 4, 5, 120000, tzinfo=timezone(timedelta(hours=5.5))))
        == "2026-01-01T21:34:05.120000Z"
    )
    assert written(datetime.min.replace(tzinfo=UTC)) == "0001-01-01T00:00:00.000000Z"
    assert written(datetime.max.replace(tzinfo=UTC)) == "9999-12-31T23:59:59.999999Z"
    moment = datetime(2026, 1, 2)  # noqa: DTZ001
    assert refused(UserRead, id=uuid4(), email="a", created_at=moment, updated_at=moment) == "timezone_aware"
    edge = datetime.max.replace(tzinfo=timezone(timedelta(hours=-1)))
    assert refused(UserRead, id=uuid4(), email="a", created_at=edge, updated_at=edge) == "timestamp_range"


def test_openapi_says_how_a_timestamp_is_written() -> None:
    shown = TaskRead.model_json_schema(mode="serialization")["properties"]["created_at"]
    assert shown["format"] == "date-time"
    assert shown["pattern"].endswith("Z$")


def test_ids_are_uuid7_made_here() -> None:
    assert User(email="a@example.com").id.version == 7
    assert Task(user_id=uuid4(), title="a").id.version == 7


def test_read_shapes_show_every_column() -> None:
    """A column that is added must be shown, or left out on purpose, here."""
    assert set(TaskRead.model_fields) == set(Task.__table__.columns.keys())  # type: ignore[attr-defined]
    hidden = {"token_epoch", "disabled_at"}
    assert set(UserRead.model_fields) | hidden == set(User.__table__.columns.keys())  # type: ignore[attr-defined]
