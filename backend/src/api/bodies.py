"""Bodies, read strictly: JSON in UTF-8 that means one thing only, checked against the shape of the operation.

`Strict(TaskCreate)` is a dependency that reads a body and gives the shape. It runs where it stands among an
endpoint's parameters, so a body is not read for a caller who is not known. FastAPI sees no body in it, so it
describes itself to `contract`, which puts it into OpenAPI.
"""

# FastAPI reads the annotations of dependencies, so they stay real types here.

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any, Final, Generic, NoReturn, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.requests import Request

from ..errors import InputFault, Invalid
from ..models.reading import names_in, structure_of
from . import problems
from .headers import sent_as

JSON: Final = "application/json"
MAX_DEPTH: Final = 32
MAX_VALUES: Final = 20_000
"""The largest batch has half as many. Each costs time also where it is only to be refused."""
_WORTH_ONE_STEP: Final = 1_000
"""From so many bytes one step is quicker: 270 us and not 360 for a batch of 100, but 4.4 and not 3.5 for a task."""
_INT64: Final = range(-(2**63), 2**63)
# A string, also one that does not end: what follows its opening quote is consumed at once and never tried again.
_STRINGS: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NOT_STRUCTURE: Final = bytes(set(range(256)) - set(b"[]{},"))
_STEPS: Final = {ord("["): 1, ord("]"): -1}
_ALIKE: Final = bytes.maketrans(b"{}", b"[]")
_PARAMETER: Final = re.compile(r'\s*;\s*(?:([!#$%&\'*+.^_`|~0-9A-Za-z-]+)=("[^"\\]*"|[^\s;",]+))?\s*')

Shape = TypeVar("Shape", bound=BaseModel)


class Strict(Generic[Shape]):
    """Reads a request's body as `shape`.

    Raises `UnsupportedMediaType` for anything but JSON in UTF-8, `Malformed` for what is no JSON, `Invalid` for
    JSON that is ambiguous (a name twice, NaN, a number beyond 64 bits), has too many values or is not of the shape.
    """

    def __init__(self, shape: type[Shape], examples: Mapping[str, Any]) -> None:
        self.shape = shape
        self.examples = examples
        self._validate: Final[Callable[[bytes], Shape]] = TypeAdapter(shape).validate_json

    async def __call__(self, request: Request) -> Shape:
        require(request, JSON)
        content = await whole(request)
        found = self._read(content) if len(content) >= _WORTH_ONE_STEP else None
        return found or self._examine(content)

    def _read(self, content: bytes) -> Shape | None:
        """In one step from bytes to shape; None for what is not well, or not quickly known to be."""
        structure = structure_of(content)
        if not _is_small(structure):
            return None
        try:
            found = self._validate(content)
        except ValidationError:
            return None
        # Of a name that comes twice in one object the parser behind this keeps the later value.
        return found if structure.count(b":") == names_in(found) else None

    def _examine(self, content: bytes) -> Shape:
        """Step by step, to say what is wrong."""
        body = parse(content)
        try:
            return self.shape.model_validate(body)
        except ValidationError as error:
            # Raised below, outside of this handler, so that no exception with the input in it hangs on ours.
            found = error.errors(include_url=False, include_input=False)
        listed = [
            {**fault, "loc": ("body", *_steps(body, fault["loc"]))}
            for fault in found[: problems.MAX_LISTED_FAULTS]
        ]
        raise problems.invalid([*listed, *found[problems.MAX_LISTED_FAULTS :]])

    def describe(self, operation: dict[str, Any]) -> type[BaseModel]:
        operation["requestBody"] = {
            "required": True,
            "content": {
                JSON: {
                    "schema": {"$ref": f"#/components/schemas/{self.shape.__name__}"},
                    "examples": {name: {"value": value} for name, value in self.examples.items()},
                }
            },
        }
        return self.shape


def require(request: Request, media_type: str) -> None:
    """Raises `UnsupportedMediaType` unless the body is declared as this, in UTF-8 and not compressed."""
    given, coded = sent_as(request, b"content-type"), sent_as(request, b"content-encoding")
    if given == [media_type] and not coded:
        return
    if (
        not given
        and request.headers.get("content-length", "0") == "0"
        and "transfer-encoding" not in request.headers
    ):
        raise problems.Malformed("A body is needed.")
    if len(given) != 1 or not _is_utf8(given[0], media_type):
        raise problems.UnsupportedMediaType
    if coded and coded[0].lower() not in ("identity", ""):
        raise problems.UnsupportedMediaType("The body must not be compressed.")


def _is_utf8(content_type: str, media_type: str) -> bool:
    name, separator, rest = content_type.partition(";")
    if name.strip().lower() != media_type:
        return False
    rest = separator + rest
    while rest:
        parameter = _PARAMETER.match(rest)
        if parameter is None:
            return False
        if (parameter[1] or "").lower() == "charset" and parameter[2].strip('"').lower() not in (
            "utf-8",
            "utf8",
        ):
            return False
        rest = rest[parameter.end() :]
    return True


async def whole(request: Request) -> bytes:
    """The body; the middleware bounds it. Raises `Malformed` when the client goes away in the middle of it."""
    pieces: list[bytes] = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise problems.Malformed("The body broke off.")
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


def parse(body: bytes) -> Any:
    """JSON as RFC 8259 has it, refused where two readers could understand it differently."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise problems.Malformed("The body is not UTF-8.") from None
    _bound(body)
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError:
        raise problems.Malformed("The body is not valid JSON.") from None


def _bound(body: bytes) -> None:
    """Raises for more depth or more values than any body of ours has, before they are made. Linear in the size.

    Where brackets do not pair up the decoder stops at the first that does not, so what comes later cannot matter.
    """
    opened = body.count(b"[") + body.count(b"{")
    if (opened <= MAX_DEPTH and opened + body.count(b",") <= MAX_VALUES) or _is_small(structure_of(body)):
        return
    structure = _STRINGS.sub(b"", body).translate(_ALIKE, _NOT_STRUCTURE)
    brackets = structure.translate(None, b",")[: 2 * MAX_VALUES]
    if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > MAX_DEPTH:
        raise problems.Malformed(f"The body is not valid JSON, or nested more than {MAX_DEPTH} deep.")
    if structure.count(b"[") + structure.count(b",") > MAX_VALUES:
        raise _refused(f"Has more than {MAX_VALUES} values.")


def _is_small(structure: bytes) -> bool:
    """Whether it has no more depth and values than is allowed; False also where that takes longer to find out."""
    if structure.count(b"[") + structure.count(b",") > MAX_VALUES:
        return False
    brackets = structure.translate(None, b",:")
    for _ in range(MAX_DEPTH):
        if not brackets:
            break
        # The innermost of each: one level less.
        brackets = brackets.replace(b"[]", b"")
    return not brackets


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _refused("Has a name twice in one object.")
    return found


def _integer(digits: str) -> int:
    # int() takes quadratic time, and refuses more than 4,300 digits in its own way.
    if len(digits) > 20 or (number := int(digits)) not in _INT64:
        raise _refused("Has a number out of range.")
    return number


def _decimal(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _refused("Has a number out of range.")
    return number


def _constant(name: str) -> NoReturn:
    raise _refused("Has a number that is not finite.")


def _steps(body: Any, place: tuple[int | str, ...]) -> Iterator[int | str]:
    """Where a fault lies in what was sent: Pydantic also names the member of a union, which is no step in it."""
    inside = body
    for number, step in enumerate(place):
        if isinstance(inside, dict) and step not in inside and number + 1 < len(place):
            continue
        yield step
        if isinstance(inside, dict):
            inside = inside.get(step)
        else:
            inside = inside[step] if isinstance(inside, list) and isinstance(step, int) else None


def _refused(sentence: str) -> Invalid:
    return Invalid(faults=[InputFault("", sentence)])


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_decimal, parse_constant=_constant
)
