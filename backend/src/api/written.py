"""Answers whose body and headers are there already: nothing is looked up, lowered or encoded for them."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response

Headers = Sequence[tuple[bytes, bytes]]


class Written(Response):
    """JSON as a statement gave it, or None for an answer that has no body (204, 304).

    `headers` have their names in lower case; those of the body are added.
    """

    def __init__(self, body: str | None, headers: Headers, status: int = 200) -> None:
        self.status_code = status
        self.background = None
        self.body = encoded = b"" if body is None else body.encode()
        self.raw_headers = list(headers)
        if body is not None:
            self.raw_headers += [
                (b"content-length", b"%d" % len(encoded)),
                (b"content-type", b"application/json"),
            ]


def tagged(etag: str) -> tuple[bytes, bytes]:
    """The header of an entity tag, which is given without its quotes."""
    return b"etag", b'"%b"' % etag.encode("ascii")
