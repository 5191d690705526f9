"""Passwords as they come in: normalised, bounded, and shown to nobody."""

from __future__ import annotations

import unicodedata
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, SecretStr, WithJsonSchema
from pydantic_core import PydanticCustomError, PydanticKnownError

from ..errors import ConfigurationError, Fault
from .base import STORABLE

PASSWORD_MIN_LENGTH: Final = 8
PASSWORD_MAX_BYTES: Final = 1024
_COMMON = Path(__file__).with_name("common-passwords") / "passwords.txt"
# The first entry, the last entry, and the most common password.
_KNOWN = ("!qaz1qaz", "password", "zzzzzzzzzz")


def _normalised(secret: SecretStr) -> SecretStr:
    """As RFC 8265 prepares an OpaqueString: every space is U+0020, and the whole is in NFC.

    So one password is the same from every keyboard. The characters that the RFC forbids are let pass, because
    nobody can be told which sign of theirs it is without showing it.
    """
    value = secret.get_secret_value()
    # The bound comes first: no time is spent on what is too long. A character is at least one byte.
    if len(value) > PASSWORD_MAX_BYTES or len(_encoded(value)) > PASSWORD_MAX_BYTES:
        raise PydanticCustomError(
            "password_too_long", "A password has {most} bytes at most", {"most": PASSWORD_MAX_BYTES}
        )
    if "\x00" in value:
        raise PydanticCustomError("text_nul", "Text must not contain the character U+0000")
    spaced = "".join(" " if unicodedata.category(sign) == "Zs" else sign for sign in value)
    normalised = unicodedata.normalize("NFC", spaced)
    # Some signs are longer in this form, in which the same password has to be accepted too.
    if len(normalised.encode()) > PASSWORD_MAX_BYTES:
        raise PydanticCustomError(
            "password_too_long", "A password has {most} bytes at most", {"most": PASSWORD_MAX_BYTES}
        )
    return SecretStr(normalised)


def _encoded(value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text_surrogate", "Text must not contain lone surrogates") from None


def _worth_having(secret: SecretStr) -> SecretStr:
    value = secret.get_secret_value()
    if len(value) < PASSWORD_MIN_LENGTH:
        raise PydanticKnownError("string_too_short", {"min_length": PASSWORD_MIN_LENGTH})
    if is_common(value):
        raise PydanticCustomError("password_common", "This password is among the most common ones")
    return secret


def is_common(password: str) -> bool:
    """Whether it stands in the list of passwords that are tried first, whatever its capitals."""
    return f"\n{password.lower()}\n".encode() in _common()


def require_common_passwords() -> None:
    """Raises `ConfigurationError` unless the list of common passwords is there and can be searched."""
    _common()


@cache
def _common() -> bytes:
    # One text of 200 KiB, read in 0.2 ms when it is first asked; a look takes 0.15 ms. As a set the same lines take
    # 2.9 MiB and 7 ms, for a look of 0.1 us that is followed by 24 ms of hashing.
    try:
        text = _COMMON.read_bytes()
    except OSError as error:
        raise _unusable("cannot be read") from error
    # A checkout on Windows, or a ZIP file made there, may have CRLF line ends.
    found = b"\n" + text.replace(b"\r\n", b"\n").rstrip(b"\n") + b"\n"
    if not all(f"\n{entry}\n".encode() in found for entry in _KNOWN):
        raise _unusable("lacks entries that it should have")
    return found


def _unusable(problem: str) -> ConfigurationError:
    return ConfigurationError(
        [
            Fault(
                f"{_COMMON.parent.name}/{_COMMON.name}",
                f"The list of common passwords {problem}, so no new password can be checked.",
                "Restore the file of the installed version: git checkout -- backend/src/models/common-passwords",
            )
        ]
    )


def _schema(**more: Any) -> WithJsonSchema:
    told = {"type": "string", "format": "password", "writeOnly": True, "pattern": STORABLE.pattern}
    return WithJsonSchema({**told, **more})


NewPassword = Annotated[
    SecretStr,
    AfterValidator(_normalised),
    AfterValidator(_worth_having),
    _schema(
        minLength=PASSWORD_MIN_LENGTH,
        maxLength=PASSWORD_MAX_BYTES,
        description=(
            f"{PASSWORD_MIN_LENGTH} characters or more, {PASSWORD_MAX_BYTES} bytes of UTF-8 at most, and none of the "
            "most common passwords. It is compared in NFC, and every kind of space is one."
        ),
    ),
]
"""A password that somebody chooses."""

GivenPassword = Annotated[SecretStr, AfterValidator(_normalised), _schema(maxLength=PASSWORD_MAX_BYTES)]
"""A password that somebody says they have: it is only bounded, because rules change and passwords stay."""
