"""Scripts of other web pages (CORS): only pages whose origin the operator named may read answers.

Tokens travel in `Authorization`, which a page's script has to hold itself, so credentials of the browser's own
(cookies) are never asked for, and `*` gives nobody anything that the token does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from starlette.responses import Response
from starlette.types import Scope

from ..config.api import ANY_ORIGIN

Headers = list[tuple[bytes, bytes]]

_METHODS: Final = b"GET, HEAD, POST, PUT, PATCH, DELETE"
_ALLOWED: Final = b"authorization, content-type, idempotency-key, if-match, if-none-match, x-request-id"
_EXPOSED: Final = b"etag, idempotency-replayed, link, location, retry-after, www-authenticate, x-request-id"
_PREFLIGHT_SECONDS: Final = b"600"


class Cors:
    """What is added to answers, for these origins."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._any = ANY_ORIGIN in origins
        self._origins = frozenset(origin.encode("ascii") for origin in origins)

    def headers(self, scope: Scope) -> Headers:
        """For every answer: what says whether the page that asks may read it, and to whom a cache may give it."""
        if self._any:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)]
        origin = _one(scope, b"origin")
        if origin not in self._origins:
            return [(b"vary", b"origin")]
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", _EXPOSED),
            (b"vary", b"origin"),
        ]

    def preflight(self, scope: Scope) -> Response | None:
        """Permits the request that a browser asks about; None when it asks about none, or for another page."""
        if scope["method"] != "OPTIONS" or not _one(scope, b"access-control-request-method"):
            return None
        if not self._any and _one(scope, b"origin") not in self._origins:
            return None
        response = Response(status_code=204)
        response.raw_headers += [
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-allow-headers", _ALLOWED),
            (b"access-control-max-age", _PREFLIGHT_SECONDS),
        ]
        return response


def _one(scope: Scope, wanted: bytes) -> bytes:
    for name, value in scope["headers"]:
        if name == wanted:
            return bytes(value)
    return b""
