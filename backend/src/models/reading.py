"""JSON that Pydantic reads in one step, from bytes to shapes, and how to know that no name stood twice in it.

Of a name that comes twice in one object Pydantic's parser keeps the later value and tells nobody. But then there are
more names in the text than the shapes were given: in shapes that know all their names, each counts once.
"""

import re
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from pydantic import BaseModel, SecretStr

_ESCAPES: Final = re.compile(rb"\\.", re.DOTALL)
_QUOTED: Final = re.compile(rb'"[^"]*+"?')
_ALIKE: Final = bytes.maketrans(b"{}", b"[]")
_NEITHER_STRUCTURE_NOR_QUOTE: Final = bytes(set(range(256)) - set(b'[]{},:"'))
_SCALARS: Final = frozenset({str, bool, int, float, type(None), UUID, datetime, SecretStr})


def structure_of(content: bytes) -> bytes:
    """What stands outside of strings, of brackets (all square), commas and colons; nothing certain of what is no JSON.

    Two quotes side by side go: what lies between others is inside a string, or outside, as it was before. So most
    strings go without a look at each.
    """
    if b"\\" in content:
        content = _ESCAPES.sub(b"", content)
    return _QUOTED.sub(b"", content.translate(_ALIKE, _NEITHER_STRUCTURE_NOR_QUOTE).replace(b'""', b""))


def names_in(*shapes: BaseModel) -> int:
    """How many names stood in what was sent, where none stood twice in one object and all are of the shape."""
    count = 0
    level: list[Any] = [*shapes]
    while level:
        sent = [(one.__dict__, one.__pydantic_fields_set__) for one in level]
        count += sum([len(names) for _, names in sent])
        inside = [
            values[name] for values, names in sent for name in names if type(values[name]) not in _SCALARS
        ]
        level = [one for one in inside if type(one) is not list]
        level += [one for many in inside if type(many) is list for one in many if type(one) not in _SCALARS]
    return count
