"""Headers as the server hands them over: names in lower case, bytes, in the order in which they came."""

from __future__ import annotations

from starlette.requests import HTTPConnection


def sent_as(request: HTTPConnection, name: bytes) -> list[str]:
    """The values of all header lines of this name. Reads the request's own list, where Starlette would first make an
    object of it."""
    return [value.decode("latin-1") for given, value in request.scope["headers"] if given == name]
