"""The settings as text: `.env.example`, `docs/settings.md`, and the effective settings.

`python -m src config --format env` and `--format markdown` print the two files; a test keeps them equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from ..errors import ConfigurationError
from . import BACKEND
from .redaction import MASK
from .settings import TOPICS, Settings, migration_connection, require_database
from .sources import ACCEPTED, HINTED, RENAMED
from .validation_messages import OTHER_NAMES, as_text

NEON_EXAMPLE = "postgresql://USER:PASSWORD@ep-NAME-pooler.REGION.aws.neon.tech/DATABASE?sslmode=require&channel_binding=require"
_OTHER_EXAMPLES = (
    ("Any PostgreSQL from 15 to 18; the certificate is verified unless the host is this machine.",
     "postgresql://USER:PASSWORD@db.example.com:5432/DATABASE"),
    ("With an authority of your own.",
     "postgresql://USER:PASSWORD@db.example.com/DATABASE?sslmode=verify-full&sslrootcert=/etc/ssl/my-ca.pem"),
    ("A Unix socket.", "postgresql://USER@/DATABASE?host=/run/postgresql"),
)  # fmt: skip
_WIDTH = 110


@dataclass(frozen=True, slots=True)
class Row:
    """An effective setting: its name, its value without secrets, and its source."""

    name: str
    value: str
    origin: str
    description: str


def env_example() -> str:
    """The text of `.env.example`: every setting with its description and default."""
    lines = [
        "# Settings of Groundwork. Copy this file to backend/.env and uncomment the lines you want to change.",
        "# The environment takes precedence. Values are literal; quote one with spaces or # in single quotes.",
        "# Generated from src/config/ by: python -m src config --format env > .env.example",
        "",
        "# Your database, pasted as Neon's dashboard shows it (pooled or direct). Without one, `make run` starts a",
        "# private PostgreSQL.",
        f"# DATABASE_URL='{NEON_EXAMPLE}'",
        "",
    ]
    for sentence, example in _OTHER_EXAMPLES:
        lines += [f"# {sentence}", f"# DATABASE_URL='{example}'", ""]
    for topic in TOPICS:
        lines += [f"# --- {topic.__doc__} ---", ""]
        for name, field in topic.model_fields.items():
            if name == "database_url":
                continue
            lines += [f"# {part}" for part in _wrapped(f"{field.description} {_hint(field)}".strip())]
            lines += [f"# {name.upper()}={_default(field)}", ""]
    return "\n".join(lines).rstrip() + "\n"


def settings_markdown() -> str:
    """The text of `docs/settings.md`."""
    lines = [
        "# Settings",
        "",
        "Generated from `backend/src/config/` by `python -m src config --format markdown`; a test keeps them equal.",
        "",
        "A setting is read from the environment, then from `backend/.env`, then from a file of its name in the",
        "directory `SECRETS_DIR`; otherwise it has its default. An empty value counts as unset. All values are",
        "validated at start: invalid ones end the program with exit code 3 and one message that lists all of them.",
        "`python -m src config` prints the effective settings and their sources, without secrets.",
    ]
    for topic in TOPICS:
        lines += [
            "",
            f"## {topic.__doc__}",
            "",
            "| Setting | Values | Default | Description |",
            "|---|---|---|---|",
        ]
        for name, field in topic.model_fields.items():
            default = _default(field)
            cells = (
                f"`{name.upper()}`",
                _values(field),
                f"`{default}`" if default else "unset",
                str(field.description),
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", *_other_names(), "", *_ADDRESSES]) + "\n"


def _other_names() -> list[str]:
    """The section about names that are no settings."""
    lines = [
        "## Old names, and names of other tools",
        "",
        "White space, line ends and invisible characters around a value are removed. Warnings are logged as",
        "`configuration.weak` and printed by `python -m src config`: secrets that every user of the machine can read,",
        "weak TLS, and the names below that are not used.",
        "",
        "| Variable | Effect |",
        "|---|---|",
    ]
    lines += [f"| `{old.upper()}` | refused: renamed to `{new.upper()}` |" for old, new in RENAMED.items()]
    lines += [
        f"| `{name.upper()}` | used as `{ours.upper()}` if that is unset |" for name, ours in ACCEPTED.items()
    ]
    lines += [
        f"| `{name.upper()}` | not used; a warning points to `{ours.upper()}` |"
        for name, ours in HINTED.items()
    ]
    return [
        *lines,
        f"| `{'`, `'.join(OTHER_NAMES)}` | not used; named in the error when `DATABASE_URL` is unset |",
        "",
        "`DATABASE_URL_UNPOOLED` is used only if it comes from the same source as `DATABASE_URL`.",
    ]


def effective(settings: Settings) -> list[Row]:
    """The effective settings, in the order of `.env.example`."""
    rows = []
    for name, field in Settings.model_fields.items():
        value = _safe(settings, name)
        rows.append(Row(name.upper(), value, settings.origin(name), str(field.description)))
    return rows


def understood(settings: Settings) -> list[Row]:
    """What the addresses mean: hosts, TLS, pooler, and the database of migrations; and warnings."""
    rows = [Row("warning", warning, variable, "") for variable, warning in settings.warnings]
    if settings.database_url is not None:
        connection = require_database(settings)
        tls = connection.tls.mode + (f", authorities in {connection.tls.root_certificate or 'the system'}"
                                     if connection.tls.verified else "")  # fmt: skip
        rows += [
            Row(
                "hosts",
                ", ".join(str(host) for host in connection.hosts),
                "DATABASE_URL",
                "database hosts",
            ),
            Row("tls", tls, "DATABASE_URL", "how the server is verified"),
            Row("pooler", connection.pooler, "DATABASE_URL", "the connection pooler in front"),
            *(Row("warning", warning, "DATABASE_URL", "") for warning in connection.warnings),
        ]
    if settings.database_url is not None or settings.database_migration_url is not None:
        connection = migration_connection(settings)
        rows.append(
            Row("migrations", connection.redacted(), connection.variable, "the database of migrations")
        )
    return rows


def _safe(settings: Settings, name: str) -> str:
    value = getattr(settings, name)
    if not isinstance(value, SecretStr):
        return "" if value is None else as_text(value)
    if not name.startswith("database_"):
        return MASK
    if name == "database_migration_url":
        return migration_connection(settings).redacted()
    try:
        return require_database(settings).redacted()
    except ConfigurationError:
        return MASK


def _wrapped(text: str) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + len(word) + 1 > _WIDTH:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line]


def _default(field: FieldInfo) -> str:
    value: Any = field.default
    if value is None or value == ():
        return ""
    if isinstance(value, Path):
        # Not the path of this checkout: the setting is relative to backend/.
        return str(value.relative_to(BACKEND))
    return as_text(value)


def _hint(field: FieldInfo) -> str:
    values = _values(field)
    return f"({values})" if values not in {"text", "path", "address", "secret"} else ""


def _values(field: FieldInfo) -> str:
    """The values allowed: the words, or the type and its bounds."""
    if isinstance(field.json_schema_extra, dict):
        return str(field.json_schema_extra["values"])
    kinds = [kind for kind in _members(field.annotation) if kind is not NoneType]
    kind = kinds[0]
    if get_origin(kind) is Literal:
        return ", ".join(str(word) for word in get_args(kind))
    names: Mapping[Any, str] = {bool: "true, false", int: "integer", float: "number", Path: "path"}
    name = "address" if kind is SecretStr else names.get(kind, "text")
    low = [bound for bound in field.metadata if isinstance(bound, Ge | Gt)]
    high = [bound.le for bound in field.metadata if isinstance(bound, Le)]
    if kind in {int, float} and low and high:
        start = f"{low[0].ge}" if isinstance(low[0], Ge) else f"above {low[0].gt}"
        return f"{name}, {start} to {high[0]}"
    return name


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in {Union, UnionType} else (annotation,)


_ADDRESSES = (
    "## The form of DATABASE_URL",
    "",
    "Paste the address as your provider prints it: with quotes or `psql '...'` around it, as `postgres://`,",
    "`postgresql://` or `postgresql+asyncpg://`, with several hosts, an IPv6 address in brackets, a Unix socket",
    "(`?host=/run/postgresql`, or the directory percent-encoded as the host), or as libpq's `host=... user=...`.",
    "Percent-encode special characters in the password; otherwise it is accepted only if the URL has one reading. Line",
    "breaks and invisible characters inside an address, and placeholders such as `[YOUR-PASSWORD]`, `<password>` or",
    "`$(DB_PASSWORD)`, are refused.",
    "",
    "| `sslmode` | Encrypted | Server verified | Used |",
    "|---|---|---|---|",
    "| `verify-full` | yes | certificate and host name | by default for every host that is not this machine; also for "
    "`require` with Neon, `channel_binding=require`, `sslnegotiation=direct` or `sslrootcert` |",
    "| `verify-ca` | yes | certificate only | if named together with `sslrootcert`; otherwise `verify-full` is used |",
    "| `require` | yes | no | if named; a warning is logged |",
    "| `prefer`, `allow` | perhaps | no | if named; a warning is logged unless the host is this machine |",
    "| `disable` | no | no | if named (with a warning), and by default for this machine and Unix sockets |",
    "",
    "| Parameter | Effect |",
    "|---|---|",
    "| `sslrootcert` | a file of certificate authorities; unset or `system`: the operating system's, or certifi's |",
    "| `sslcert`, `sslkey`, `sslpassword` | the client certificate |",
    "| `require_auth` | the authentication methods that the server may ask for, as in libpq |",
    "| `options=-c name=value` | server settings; refused behind a pooler, as PgBouncer does |",
    "| `pgbouncer=true` | the same as `DATABASE_POOLER=transaction` |",
    "| keepalives, `gssencmode=prefer`, `schema=public`, `supa`, `workaround`, `uselibpqcompat`, Neon's "
    "`options=endpoint=...` | none |",
    "| `connection_limit`, `pool_timeout`, `schema`, `sslmode=no-verify`, `sslaccept` and others of other drivers | "
    "refused; the message names what to use instead |",
    "",
    "PGPASSWORD, PGSSLMODE, `~/.pgpass`, service files and other sources of libpq are never read.",
)
