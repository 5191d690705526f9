"""An account of our own on the wire: signing up, logging in, and what either gives."""

from typing import Annotated, Final, Literal, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    SecretStr,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from sqlmodel import Field

from .base import STORABLE, Shape
from .password import GivenPassword, NewPassword
from .user import EMAIL_MAX_LENGTH, Email

REFRESH_TOKEN_MAX_LENGTH: Final = 128

RefreshToken = Annotated[str, StringConstraints(min_length=1, max_length=REFRESH_TOKEN_MAX_LENGTH), STORABLE]

_address: TypeAdapter[str] = TypeAdapter(Email)


def _as_stored(value: str) -> str:
    try:
        return _address.validate_python(value)
    except ValidationError:
        return value


GivenEmail = Annotated[
    str, StringConstraints(max_length=EMAIL_MAX_LENGTH), STORABLE, AfterValidator(_as_stored)
]


class SignUp(Shape):
    """What makes an account."""

    email: Email
    password: NewPassword


class LogIn(Shape):
    """What opens a session. What is no address is nobody's: that is for the answer to say, as of any other."""

    email: GivenEmail = Field(description="The address of the account.")
    password: GivenPassword


class Refresh(Shape):
    """What goes on with a session, or ends it."""

    refresh_token: RefreshToken


class AccountChange(Shape):
    """Another e-mail, another password, or both; the current password proves who asks.

    Absent is not null: what was not sent stays as it is, and reads as None in `new_email` and `new_password`.
    """

    # The current password and one change at the least.
    model_config = ConfigDict(json_schema_extra={"minProperties": 2})

    current_password: GivenPassword
    email: Email = Field(default_factory=lambda: "", description="The new address.")
    password: NewPassword = Field(default_factory=lambda: SecretStr(""), description="The new password.")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.new_email is None and self.new_password is None:
            raise PydanticCustomError("nothing_changed", "Names neither e-mail nor password")
        return self

    @property
    def new_email(self) -> str | None:
        return self.email if "email" in self.model_fields_set else None

    @property
    def new_password(self) -> SecretStr | None:
        return self.password if "password" in self.model_fields_set else None


class TokenRead(Shape):
    """RFC 6749, 5.1. The access token speaks for the user; the refresh token is exchanged for the next pair, once."""

    access_token: str
    token_type: Literal["Bearer"] = "Bearer"  # noqa: S105 - the scheme's name
    expires_in: int = Field(description="Seconds for which the access token is accepted.")
    refresh_token: str
