"""The lines of an import: read in slices, each a task or a fault that is named by the line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, BinaryIO, Final, NamedTuple
from uuid import UUID

from pydantic import TypeAdapter, ValidationError

from ..errors import InputFault
from ..models import TaskImport
from ..models.reading import names_in, structure_of

LINE_MAX_BYTES: Final = 256 * 1024
"""The longest task, with every character escaped, has half of it."""

BLANK_LINES_MAX: Final = 1000
"""Enough for every habit of writing, too few to keep anybody waiting."""

FAULTS_MAX: Final = 20
"""After so many faulty lines an import looks no further."""

CHUNK_LINES: Final = 1_000
_SLICE_LINES: Final = 100


class Lines(NamedTuple):
    """Tasks, and the numbers of the lines that they came in."""

    numbers: list[int]
    tasks: list[TaskImport]
    size: int


class _Looked(TaskImport):
    """A line that is only looked at. To make an id for it takes as long as all the rest."""

    id: UUID = UUID(int=0)


async def read(
    file: BinaryIO, faults: list[InputFault], *, only_to_look: bool = False
) -> AsyncIterator[Lines]:
    """The lines in slices that are looked at in a millisecond or two; what is wrong with others goes to `faults`.

    Tasks that were `only_to_look` at have no id of their own where their line has none.

    Reading waits in a thread. Validating does not: a thread that keeps the interpreter busy would delay whatever
    the event loop does by its switch interval, each time.
    """
    number = blank = 0
    while raw := await asyncio.to_thread(_some, file):
        for start in range(0, len(raw), _SLICE_LINES):
            texts = raw[start : start + _SLICE_LINES]
            tasks = _tasks(texts, _LOOKED if only_to_look else _IMPORTS)
            if tasks is not None:
                numbers = list(range(number + 1, number + 1 + len(texts)))
                number += len(texts)
            else:
                numbers, tasks = [], []
                for text in texts:
                    number += 1
                    if not text.strip():
                        blank += 1
                        if blank > BLANK_LINES_MAX:
                            # Millions of them would keep the transaction waiting for a line that is one.
                            faults.append(
                                fault(number, "", f"Is one of more than {BLANK_LINES_MAX} blank lines.")
                            )
                            return
                    elif (task := _task(number, text, faults)) is not None:
                        numbers.append(number)
                        tasks.append(task)
            yield Lines(numbers, tasks, sum(map(len, texts)))
            await asyncio.sleep(0)


def _some(file: BinaryIO) -> list[bytes]:
    """The next lines; of one that is too long, no more than shows that it is."""
    lines: list[bytes] = []
    size = 0
    while len(lines) < CHUNK_LINES and size < LINE_MAX_BYTES and (line := file.readline(LINE_MAX_BYTES + 1)):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(LINE_MAX_BYTES)):
            pass
        lines.append(line)
        size += len(line)
    return lines


def _tasks(texts: list[bytes], shape: TypeAdapter[Any]) -> list[TaskImport] | None:
    """Lines that are all well, read in one step as one array; None when they have to be looked at one by one.

    No string reaches over the end of its line, because JSON has no line feed in one, and no object lies in a task. So
    each line that begins with a brace begins a task, and where there are as many tasks as lines, each holds one.
    """
    if max(map(len, texts)) > LINE_MAX_BYTES or not all(text.startswith(b"{") for text in texts):
        return None
    array = b"[%b\n]" % b"\n,".join(texts)
    try:
        tasks: list[TaskImport] = shape.validate_json(array)
    except ValidationError:
        return None
    whole = len(tasks) == len(texts) and structure_of(array).count(b":") == names_in(*tasks)
    return tasks if whole else None


def _task(number: int, text: bytes, faults: list[InputFault]) -> TaskImport | None:
    if len(text) > LINE_MAX_BYTES:
        faults.append(fault(number, "", f"Is longer than {LINE_MAX_BYTES} bytes."))
        return None
    try:
        return _IMPORT.validate_python(_JSON.decode(text.decode("utf-8-sig" if number == 1 else "utf-8")))
    except ValidationError as error:
        for each in error.errors(include_url=False, include_context=False, include_input=False):
            # An unknown field's own name is input, and is not said.
            known = () if each["type"] == "extra_forbidden" else each["loc"]
            faults.append(fault(number, "".join(f"/{step}" for step in known), f"{each['msg']}."))
    except (ValueError, RecursionError):
        faults.append(fault(number, "", "Is not a JSON object in UTF-8 that names each field once."))
    return None


def fault(number: int, field: str, detail: str) -> InputFault:
    return InputFault(f"/{number - 1}{field}", f"Line {number}: {detail}")


def said(faults: list[InputFault]) -> str:
    del faults[FAULTS_MAX:]
    listed = "The first faults are listed. " if len(faults) == FAULTS_MAX else ""
    return f"{listed}Nothing was imported."


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


_IMPORT: Final = TypeAdapter(TaskImport)
_IMPORTS: Final = TypeAdapter(list[TaskImport])
_LOOKED: Final = TypeAdapter(list[_Looked])
_JSON: Final = json.JSONDecoder(object_pairs_hook=_each_once)
