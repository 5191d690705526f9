"""PostgreSQL alone: our very statements by pgbench, the line below everything. `make bench ARGS=statements`.

No server can answer faster than its statements run. The role is the one that row-level security binds, the statements
are prepared, four connections ask. Beside each stands what a plain table read would take, without walls and tags.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from src.embedded.server import EmbeddedPostgres
from src.services import tasks
from src.services.statements import Statement
from src.services.task_pages import PageQuery, form_of, statement_for

from .clocks import difference, family, spent
from .data import TASKS_EACH, TEMPLATE, USERS
from .operations import DESCRIPTION, TITLE
from .report import table

CLIENTS: Final = 4
_USER: Final = "md5('user' || :n)::uuid"
_VALUES: Final[Mapping[str, str]] = {
    "owner": _USER,
    "limit": "50",
    "title": f"'{TITLE}'",
    "description": f"'{DESCRIPTION}'",
    "is_completed": "false",
    "email": "NULL",
    "request_hash": "sha256('x')",
    "key": "gen_random_uuid()::text",
    "kept_for": "interval '1 day'",
    "epoch": "NULL",
}
# As `data` makes them.
_AT: Final = "('2026-02-01Z'::timestamptz + :i * interval '1 minute' + :n * interval '10 ms')"
_STAMP: Final = f"lpad(to_hex((extract(epoch FROM {_AT}) * 1000)::bigint), 12, '0')"
_MARK: Final = "md5(:n || '-' || :i)"
_TASK: Final = (
    f"(substr({_STAMP}, 1, 8) || '-' || substr({_STAMP}, 9, 4) || '-7' || substr({_MARK}, 1, 3)"
    f" || '-8' || substr({_MARK}, 4, 3) || '-' || substr({_MARK}, 7, 12))::uuid"
)
_FIELDS: Final = "id, user_id, title, description, is_completed, version, created_at, updated_at"


def text_of(statement: Statement, task: str) -> str:
    """The statement with pgbench's variables in the place of its parameters; `task` is an id."""
    sql, names, constants = statement.sql, statement._compiled[1], statement._compiled[2]
    values = {**_VALUES, **{name: f"'{value}'" for name, value in constants.items()}, "id": task}
    # pgbench would take :MI within a text for one of its variables; the planner makes it a constant again.
    sql = re.sub(r"'(?:[^']|'')*'", lambda found: found[0].replace(":", "'||chr(58)||'"), sql)
    for number, name in reversed(list(enumerate(names, 1))):
        sql = sql.replace(f"${number}", f"({values[name]})")
    return " ".join(sql.split())


def statements() -> dict[str, str]:
    new = "gen_random_uuid()"
    return {
        "read one": text_of(tasks.READ, _TASK),
        "read one, a plain SELECT": f"SELECT {_FIELDS} FROM tasks WHERE user_id = {_USER} AND id = {_TASK}",
        "list 50": text_of(statement_for(form_of(PageQuery())), new),
        "list 50, a plain SELECT": f"SELECT {_FIELDS} FROM tasks WHERE user_id = {_USER}"
        " ORDER BY created_at DESC, id DESC LIMIT 50",
        "create with a key": text_of(tasks.CREATE_ONCE, new),
        "create": text_of(tasks.CREATE, new),
        "create, a plain INSERT": "INSERT INTO tasks (user_id, id, title, description)"
        f" VALUES ({_USER}, {new}, '{TITLE}', '{DESCRIPTION}') RETURNING {_FIELDS}",
    }


def main(server: EmbeddedPostgres, seconds: float) -> str:
    """A table of what each takes, on the database `TEMPLATE`."""
    rows = []
    for title, sql in statements().items():
        # Nobody's tasks are there for the bound role unless the statement names their owner.
        role = "groundwork" if "plain" in title else "app"
        per_second, cpu = measured(server, sql, seconds, role)
        rows.append([title, f"{per_second:,.0f}", f"{cpu:.0f}"])
    return table(["PostgreSQL alone, by pgbench", "a second", "CPU us"], rows)


def measured(server: EmbeddedPostgres, sql: str, seconds: float, role: str) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as where:
        script = Path(where) / "script.sql"
        script.write_text(f"\\set n random(1, {USERS})\n\\set i random(1, {TASKS_EACH})\n{sql};\n")
        words = ["-n", "-M", "prepared", "-c", str(CLIENTS), "-j", "1", "-T", str(max(round(seconds), 1))]
        url = server.url_for(TEMPLATE, role=role)
        before = spent(family(server.pid))
        # Backends that ended are in the postmaster's account of its children only, so it is read while they live.
        process = subprocess.Popen(
            [str(server.binaries / "pgbench"), *words, "-f", str(script), "-P", "1", url],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        after = before
        while process.poll() is None:
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                after = {**after, **spent(family(server.pid))}
        assert process.stdout is not None
        told = process.stdout.read()
    if process.returncode:
        raise RuntimeError(told)
    found = re.search(r"actually processed: (\d+)", told)
    assert found is not None
    per_second = re.search(r"tps = ([0-9.]+)", told)
    assert per_second is not None
    return float(per_second[1]), difference(before, after) / int(found[1]) * 1e6
