"""Which authentication methods a database server may ask for, as libpq's `require_auth`.

asyncpg 0.32 answers whatever method the server asks for, clear text included, and offers no hook: a password given as
a callable is called before the connection is made. So its protocol class is subclassed, and what the server sends is
checked before asyncpg sees it, until the server has been accepted. From then on nothing lies between transport and
driver. `docs/decisions/0075-scram-only.md` has the alternatives.
"""

from __future__ import annotations

import struct
from contextvars import ContextVar
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, Final

import asyncpg
from asyncpg import connect_utils, protocol

_OK: Final = 0
_SASL_FINAL: Final = 12
_FURTHER: Final = frozenset({8, 11, _SASL_FINAL})
"""Authentication messages that go on with a method which was asked for before."""
_METHODS: Final = {3: "password", 5: "md5", 7: "gss", 9: "sspi", 10: "scram-sha-256"}


class AuthenticationMethodRefused(asyncpg.InterfaceError):
    """The server asked for an authentication method that this connection does not allow; no password was sent."""


class Check:
    """The methods that one connection allows, and what its server asked for."""

    def __init__(self, allowed: frozenset[str]) -> None:
        self.allowed = allowed
        self.accepted = False
        self.refused: str | None = None
        self._asked: str | None = None
        self._proven = False

    def permits(self, code: int) -> bool:
        """Whether an authentication message with this code may be answered. Sets `accepted` or `refused`."""
        if code in _FURTHER:
            self._proven = self._proven or code == _SASL_FINAL
            return True
        if code != _OK:
            self._asked = _METHODS.get(code, f"method {code}")
            if self._asked not in self.allowed:
                self.refused = self._asked
        elif self._asked == "scram-sha-256" and not self._proven:
            self.refused = "scram-sha-256 without a proof that the server has the password"
        elif self._asked is None and "none" not in self.allowed:
            self.refused = "none"
        else:
            self.accepted = True
        return self.refused is None


_check: ContextVar[Check | None] = ContextVar("authentication_check", default=None)


async def connect(methods: frozenset[str], **arguments: Any) -> asyncpg.Connection[Any]:
    """As `asyncpg.connect`, but answers only these methods. Raises AuthenticationMethodRefused for any other."""
    setattr(connect_utils, "protocol", _checking_protocol())  # noqa: B010 - the stubs do not have it
    check = Check(methods)
    token = _check.set(check)
    try:
        connection: asyncpg.Connection[Any] = await asyncpg.connect(**arguments)
    except Exception as error:
        if check.refused is not None:
            raise AuthenticationMethodRefused(
                f"The server asked for authentication by {check.refused}; "
                f"allowed are {', '.join(sorted(methods))}."
            ) from error
        raise
    finally:
        _check.reset(token)
    if not check.accepted:
        # Another version of the driver makes its protocol in another way.
        connection.terminate()
        raise AuthenticationMethodRefused("The driver did not check the server's authentication method.")
    return connection


@cache
def _checking_protocol() -> SimpleNamespace:
    class CheckingProtocol(protocol.Protocol):
        """asyncpg's protocol; checks what the server asks for while the connection is made."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            check = _check.get()
            if check is not None:
                self.pending = b""
                # On the instance, so that it is gone when the check is done.
                vars(self)["data_received"] = partial(self._check_messages, check)

        def _check_messages(self, check: Check, data: bytes) -> None:
            self.pending += data
            while len(self.pending) >= 5:
                kind, length = struct.unpack_from("!ci", self.pending)
                if len(self.pending) < length + 1:
                    return
                end = max(length + 1, 5)
                if kind == b"R" and not check.permits(int.from_bytes(self.pending[5:9], "big")):
                    self.pending = b""
                    vars(self)["transport"].abort()
                    return
                message, self.pending = self.pending[:end], self.pending[end:]
                if check.accepted:
                    message += self.pending
                    transport = vars(self)["transport"]
                    del vars(self)["data_received"], vars(self)["transport"]
                    # uvloop has kept a reference to the method.
                    transport.set_protocol(self)
                    super().data_received(message)
                    return
                super().data_received(message)

        def connection_made(self, transport: Any) -> None:
            vars(self)["transport"] = transport
            super().connection_made(transport)

    return SimpleNamespace(Protocol=CheckingProtocol)
