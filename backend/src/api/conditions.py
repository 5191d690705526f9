"""What makes a request safe to send twice or beside others': entity tags (RFC 9110, 13) and Idempotency-Key.

The services know a tag, and a key, without the quotes that HTTP may put around it. The classes with `describe`
are dependencies; `contract` puts their headers into OpenAPI.
"""

# FastAPI reads the annotations of dependencies, so they stay real types here.

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from pydantic import BaseModel
from starlette.requests import Request

from ..errors import InputFault, Invalid, PreconditionFailed, PreconditionRequired
from ..models.kept_answer import KEY, KEY_MAX_LENGTH
from ..services.idempotency import IdempotencyKey
from ..services.task_rows import ANY_VERSION
from .headers import sent_as

# Blanks are consumed at once and never tried again: else a header of 30 kB of them would take seconds.
_TAG: Final = re.compile(r'\s*+(?:(W/)?"([\x21\x23-\x7e\x80-\xff]*+)")?\s*+(?:,|\Z)')


def quoted(etag: str) -> str:
    """The tag as it stands in the header; ours are strong."""
    return f'"{etag}"'


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags of one condition. `any` stands for `*`; what is no list of tags holds none, so it never matches."""

    any: bool
    strong: frozenset[str]
    weak: frozenset[str]

    @classmethod
    def of(cls, values: Sequence[str]) -> Self:
        """Reads the values of all header lines of that name."""
        text = ",".join(values).strip()
        if text == "*":
            return cls(True, frozenset(), frozenset())
        strong, weak = set[str](), set[str]()
        place = 0
        while place < len(text):
            found = _TAG.match(text, place)
            if found is None or found.end() == place:
                return cls(False, frozenset(), frozenset())
            if found[2] is not None:
                (weak if found[1] else strong).add(found[2])
            place = found.end()
        return cls(False, frozenset(strong), frozenset(weak))

    def hold(self, etag: str) -> bool:
        """The weak comparison, for `If-None-Match`: whether `etag` is among the tags, weak or strong."""
        return self.any or etag in self.strong or etag in self.weak


_NO_TAGS: Final = Tags.of(())


class IfNoneMatch:
    """The tags that a reader has already."""

    async def __call__(self, request: Request) -> Tags:
        given = sent_as(request, b"if-none-match")
        return Tags.of(given) if given else _NO_TAGS

    def describe(self, operation: dict[str, Any]) -> None:
        _header(operation, "If-None-Match", "The ETag that you have; 304 when it is still the current one.")


@dataclass(frozen=True, slots=True)
class Condition:
    """Of a write. `if_match` is a tag, ANY_VERSION, or None for whatever is there; `only_new`: nothing may be there."""

    if_match: str | None = None
    only_new: bool = False


class IfMatch:
    """The version that a writer means. Where writing may also create, `If-None-Match: *` says that it has to.

    Raises `PreconditionRequired` when the operator asks for a condition and none is given.
    """

    def __init__(self, *, creates: bool = False) -> None:
        self._creates = creates

    async def __call__(self, request: Request) -> Condition:
        matching = sent_as(request, b"if-match")
        new = sent_as(request, b"if-none-match")
        if new and not (self._creates and Tags.of(new).any):
            raise _refused("If-None-Match", "Has to be * here." if self._creates else "Is for reading.")
        if new and matching:
            # There is something and there is nothing: never.
            raise PreconditionFailed
        if new:
            return Condition(only_new=True)
        if not matching:
            if request.app.state.settings.require_if_match:
                raise PreconditionRequired
            return Condition()
        tags = Tags.of(matching)
        if tags.any:
            return Condition(ANY_VERSION)
        if len(tags.strong) > 1:
            raise _refused("If-Match", "Has to be one ETag, or *.")
        # A weak tag, or what is none, matches no version: the empty one is nobody's.
        return Condition(next(iter(tags.strong), ""))

    def describe(self, operation: dict[str, Any]) -> None:
        _header(
            operation,
            "If-Match",
            "The ETag last read, or `*`; 412 when it is not the current one any more.",
            pattern=r'^(\*|(W/)?"[!#-~]*")$',
        )
        if self._creates:
            _header(
                operation,
                "If-None-Match",
                "`*`: only if there is no such task yet; else 412.",
                enum=["*"],
            )


class Repeat:
    """Whether the answer to this request is to be kept, and given again when it is repeated."""

    def __init__(self, key: str | None, hours: float) -> None:
        self._key = key
        self._hours = hours

    @property
    def key(self) -> str | None:
        return self._key

    def of(self, operation: str, body: BaseModel) -> IdempotencyKey | None:
        """The key for this operation with this body: as it was sent, but for the order and the blanks."""
        if self._key is None:
            return None
        sent = body.model_dump_json(exclude_unset=True).encode("utf-8")
        return IdempotencyKey.of(self._key, operation, sent, hours=self._hours)


KEPT: Final = (
    "A name for this request, of your choice: a repeat with the same name does nothing and is answered as the first "
    "was, with `Idempotency-Replayed: true`."
)
EXCHANGE: Final = (
    "A name for this exchange, made by chance. When its answer is lost, send it again with the same name: it gives the "
    "same refresh token, where without a name it would end the session."
)


class IdempotencyHeader:
    """Reads `Idempotency-Key`, with or without the quotes of the standard's draft. Raises `Invalid`."""

    def __init__(self, meaning: str = KEPT) -> None:
        self._meaning = meaning

    async def __call__(self, request: Request) -> Repeat:
        hours = request.app.state.settings.idempotency_hours
        given = sent_as(request, b"idempotency-key")
        if not given:
            return Repeat(None, hours)
        if len(given) > 1:
            raise _refused("Idempotency-Key", "Has to be given once.")
        key = given[0]
        if len(key) > 1 and key[0] == key[-1] == '"':
            key = key[1:-1]
        if not KEY.fullmatch(key):
            raise _refused("Idempotency-Key", f"Has to be 1 to {KEY_MAX_LENGTH} visible ASCII characters.")
        # Should the server give the request up, the client may be told to repeat it.
        request.scope["state"]["repeatable"] = True
        return Repeat(key, hours)

    def describe(self, operation: dict[str, Any]) -> None:
        _header(
            operation,
            "Idempotency-Key",
            self._meaning,
            minLength=1,
            maxLength=KEY_MAX_LENGTH,
            pattern="^[!-~]+$",
        )


def _header(operation: dict[str, Any], name: str, description: str, **schema: Any) -> None:
    operation.setdefault("parameters", []).append(
        {"name": name, "in": "header", "description": description, "schema": {"type": "string", **schema}}
    )


def _refused(header: str, sentence: str) -> Invalid:
    return Invalid(faults=[InputFault(header, sentence)])
