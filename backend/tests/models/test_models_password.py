"""Passwords as they come in: bounded before anything else, the same from every keyboard, and never shown."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from leaks import CANARY, forms
from src.api import problems
from src.models import password as passwords
from src.models.base import Shape
from src.models.password import GivenPassword, NewPassword, is_common

LIST = Path(passwords.__file__).with_name("common-passwords")


class Choosing(Shape):
    password: NewPassword


class Giving(Shape):
    password: GivenPassword


SHAPES = [Choosing, Giving]


def taken(shape: Any, password: str) -> str:
    return str(shape(password=password).password.get_secret_value())


def refused(shape: Any, password: object) -> tuple[str, str]:
    """The kind of the fault, and what the client is told."""
    with pytest.raises(ValidationError) as caught:
        shape(password=password)
    (found,) = caught.value.errors()
    return str(found["type"]), problems.input_fault({**found, "loc": ("body", *found["loc"])}).detail


def test_a_new_password_has_8_characters() -> None:
    assert taken(Choosing, "öäü€𝒳x-1") == "öäü€𝒳x-1"
    assert refused(Choosing, "öäü€𝒳x-") == ("string_too_short", "Has to have at least 8 character(s).")
    assert refused(Choosing, "")[0] == "string_too_short"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_password_is_bounded_in_bytes(shape: Any) -> None:
    told = ("password_too_long", "Has to have at most 1024 bytes in UTF-8.")
    assert taken(shape, "€" * 341 + "x") == "€" * 341 + "x"
    assert refused(shape, "€" * 341 + "xx") == told
    assert refused(shape, "x" * 1025) == told


@pytest.mark.parametrize("shape", SHAPES)
def test_ten_megabytes_are_refused_without_being_looked_at(
    shape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What would look at it is not there.
    monkeypatch.setattr(passwords, "_encoded", None)
    monkeypatch.setattr(passwords, "unicodedata", None)
    assert refused(shape, "x" * 10_000_000)[0] == "password_too_long"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("typed", "same"),
    [
        ("cafe\u0301 noir", "café noir"),
        ("\u212bngstrom-8", "Ångstrom-8"),
        ("two\u00a0words\u3000here", "two words here"),
        ("ﬁne and ﬂat", "ﬁne and ﬂat"),
        ("  spaces stay  ", "  spaces stay  "),
        ("Capitals Stay", "Capitals Stay"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("👩‍👩‍👧‍👦 family", "👩‍👩‍👧‍👦 family"),
    ],
)
def test_a_password_is_the_same_from_every_keyboard(shape: Any, typed: str, same: str) -> None:
    assert taken(shape, typed) == same
    assert taken(shape, taken(shape, typed)) == same


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_no_unicode_text_is_no_password(shape: Any) -> None:
    assert refused(shape, "a password\x00")[0] == "text_nul"
    assert refused(shape, "a password\ud800")[0] in {"text_surrogate", "string_unicode"}
    for other in (12345678, None, ["a password"], {"a": "password"}, b"\xff" * 9):
        assert refused(shape, other)[0] in {"string_type", "string_unicode"}


@pytest.mark.parametrize(
    "common", ["password", "Password1", "QWERTYUIOP", "12345678", "iLoveYou1", "00000000"]
)
def test_a_common_password_is_not_chosen_but_may_be_given(common: str) -> None:
    assert refused(Choosing, common) == (
        "password_common",
        "Is one of the most common passwords, which are tried first.",
    )
    assert taken(Giving, common) == common


def test_every_line_of_the_list_is_found_and_their_neighbours_are_not() -> None:
    lines = (LIST / "passwords.txt").read_text(encoding="ascii").splitlines()
    assert lines == sorted(set(lines))
    assert f"{len(lines):,} of them" in (LIST / "README.md").read_text(encoding="utf-8")
    assert all(len(line) >= 8 and line == line.lower() for line in lines)
    assert all(is_common(line) for line in [lines[0], lines[-1], *lines[:: len(lines) // 200]])
    assert not any(is_common(line + "§") or is_common("§" + line) for line in lines[:: len(lines) // 200])
    assert not is_common("correct horse battery staple")


def test_a_password_given_is_only_bounded() -> None:
    assert taken(Giving, "") == ""
    assert taken(Giving, "short") == "short"


@pytest.mark.parametrize("shape", SHAPES)
def test_the_schema_says_password_and_never_to_be_read(shape: Any) -> None:
    schema = shape.model_json_schema()["properties"]["password"]
    assert (schema["type"], schema["format"], schema["writeOnly"]) == ("string", "password", True)
    assert schema["maxLength"] == 1024
    assert schema.get("minLength") == (8 if shape is Choosing else None)
    assert shape.model_json_schema(mode="serialization")["properties"]["password"]["writeOnly"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_password_is_in_no_repr_dump_or_error(shape: Any) -> None:
    held = shape(password=CANARY + " and more")
    said = [repr(held), str(held), f"{held.password}", repr(held.password), str(held.model_dump())]
    said.append(held.model_dump_json())
    for bad in ({"password": CANARY + "\x00"}, {"password": CANARY * 300}, {"password": CANARY, "x": CANARY}):
        for refuse in (lambda b=bad: shape(**b), lambda b=bad: shape.model_validate_json(json.dumps(b))):
            with pytest.raises(ValidationError) as caught:
                refuse()
            said += [str(caught.value), "".join(traceback.format_exception(caught.value))]
            body = [{**one, "loc": ("body", *one["loc"])} for one in caught.value.errors()]
            said.append(problems.body_of(problems.invalid(body), "a-request").decode())
    text = "\n".join(said).encode()
    assert [name for name, form in forms(CANARY).items() if form in text] == []


def test_the_list_is_read_when_it_is_first_needed() -> None:
    passwords._common.cache_clear()
    taken(Giving, "12345678")
    refused(Choosing, "short")
    assert passwords._common.cache_info().currsize == 0
    refused(Choosing, "12345678")
    assert passwords._common.cache_info().currsize == 1
