"""An import of the longest tasks there can be takes no more memory than one of short ones."""

from __future__ import annotations

import json
import tempfile
import tracemalloc

from owning import somebody
from src.models.task import DESCRIPTION_MAX_LENGTH
from src.services import tasks
from src.services.database import Database

TASKS = 600


async def test_an_import_of_long_tasks_holds_a_few_megabytes_of_them(app_database: Database) -> None:
    long = {"title": "x", "description": "\N{GRINNING FACE}" * DESCRIPTION_MAX_LENGTH}
    line = json.dumps(long, ensure_ascii=False).encode() + b"\n"
    with tempfile.TemporaryFile() as file:
        for _ in range(TASKS):
            file.write(line)
        file.seek(0)
        tracemalloc.start()
        try:
            loaded = await tasks.load(app_database, somebody(), file)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert loaded.count == TASKS
    assert TASKS * len(line) > 3 * peak, f"{peak >> 20} MB"
