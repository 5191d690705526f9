"""A secret given to the configuration comes out nowhere: not in a repr, an error, a traceback or a log."""

from __future__ import annotations

import base64
import copy
import io
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import asyncpg
import pytest
from pydantic import ValidationError

from clusters import Thief
from src.config.database import parse
from src.config.dsn import parse_dsn
from src.config.logging import configure, get_logger
from src.config.settings import Settings, load_settings, migration_connection, require_database
from src.config.settings_docs import effective, understood
from src.errors import ConfigurationError, GroundworkError

SECRET = "p%@:/ é"


def forms(secret: str) -> set[str]:
    """The secret as it may show itself: raw, escaped in some way, or in base64 at any of three offsets."""
    raw = secret.encode()
    found = {
        secret,
        repr(secret)[1:-1],
        ascii(secret)[1:-1],
        quote(secret),
        quote(secret, safe=""),
        quote_plus(secret),
    }
    found |= {quote(secret, safe="").lower(), raw.hex()}
    for offset in range(3):
        encoded = base64.b64encode(b"x" * offset + raw).decode()
        found.add(encoded[(0, 2, 3)[offset] : -4])
    return found


# Each of these holds the secret, as people would paste it, and is right or wrong in its own way.
RIGHT = [
    "postgresql://u:{encoded}@localhost/db",
    "postgresql://u:{raw}@localhost/db",
    "postgresql://u:{encoded}@ep-x-pooler.eu.aws.neon.tech/db?sslmode=require",
    "host=localhost user=u password='{raw}'",
    "postgresql://u@localhost/db?password={encoded}",
    "postgresql://u:{encoded}@localhost/db?sslcert=/c&sslkey=/k&sslmode=require&sslpassword={encoded}",
]
WRONG = [
    "postgresql://u:{raw}@localhost/db?sslmode={raw}",
    "postgresql://u:{encoded}@localhost/db?nonsense={encoded}",
    "postgresql://u:{raw}@localhost:port/db",
    "postgresql://u:{raw}localhost/db",
    "postgresql://{raw}",
    "postgresql:/u:{raw}@localhost/db",
    "{raw}",
    "{encoded}",
    "mysql://u:{raw}@localhost/db",
    "postgresql://u:{raw}\n@localhost/db",
    "postgresql://u:{encoded}%ff@localhost/db",
    "postgresql://u:{raw}@localhost/db?options=-c%20{encoded}",
    "postgresql://u:{raw}@localhost/db?connect_timeout={raw}",
    "postgresql://u:{raw}@localhost/db?{raw}",
    "postgresql://u:{raw}@localhost/db?{raw}=1",
    "postgresql://u:{raw}@localhost/db?sslrootcert=/no/such/file",
    "host=localhost user=u password='{raw}",
    "host=localhost user=u password={raw} {raw}",
]


def filled(template: str) -> str:
    return template.replace("{raw}", SECRET).replace("{encoded}", quote(SECRET, safe=""))


def whole_story(error: BaseException) -> str:
    """An error with everything that hangs on it, also what `from None` only hides."""
    told, queue, seen = [], [error], set()
    while queue:
        current = queue.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        told += [repr(current), str(current), repr(current.args), repr(vars(current))]
        told += traceback.format_exception(current)
        queue += [other for other in (current.__cause__, current.__context__) if other is not None]
    return "\n".join(told)


def assert_silent(*texts: str) -> None:
    for text in texts:
        for form in forms(SECRET):
            assert form not in text, f"the secret shows as {form!r}"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    root = logging.getLogger()
    before = list(root.handlers), root.level
    configure("debug", "json", stream)
    yield stream
    logging.captureWarnings(False)
    root.handlers[:], root.level = before


def test_the_search_would_find_it() -> None:
    encoded = base64.b64encode(f"u:{SECRET}".encode()).decode()
    for text in (f"x{SECRET}y", quote(SECRET), quote_plus(SECRET), ascii(SECRET), encoded):
        with pytest.raises(AssertionError):
            assert_silent(text)


@pytest.mark.parametrize("template", RIGHT)
def test_no_view_of_a_good_configuration_shows_it(template: str, log: io.StringIO) -> None:
    connection = parse(filled(template))
    views: list[Any] = [
        connection,
        connection.direct(),
        connection.tls,
        connection.with_database("x"),
        connection.warnings,
    ]
    if "sslcert" not in template:
        settings = load_settings(database_url=filled(template), database_migration_url=filled(template))
        views += [settings, settings.model_dump(), settings.model_dump_json(), settings.model_copy()]
        views += [
            effective(settings),
            understood(settings),
            require_database(settings),
            migration_connection(settings),
        ]
        views += [list(settings), copy.deepcopy(settings).__dict__]
    logger = get_logger("canary")
    for view in views:
        assert_silent(repr(view), str(view), f"{view}", f"{view!r}")
        logger.info("view", view=view)
    assert_silent(connection.redacted(), log.getvalue())


@pytest.mark.parametrize("template", WRONG)
@pytest.mark.parametrize("where", ["parse", "environment", "file", "secrets", "override"])
def test_no_error_about_a_bad_configuration_shows_it(
    template: str, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: io.StringIO
) -> None:
    value = filled(template)
    with pytest.raises(ConfigurationError) as caught:
        if where == "parse":
            parse(value).asyncpg_arguments()
        elif where == "override":
            load_settings(database_url=value, database_migration_url=value)
        elif where == "environment":
            monkeypatch.setenv("DATABASE_URL", value)
            monkeypatch.setenv("PORT", SECRET)
            monkeypatch.setenv("LOG_LEVEL", SECRET)
            monkeypatch.setenv("TRUSTED_PROXIES", SECRET)
            load_settings()
        elif where == "file":
            quoted = value.replace("\\", "\\\\").replace("'", "\\'")
            path = tmp_path / "env"
            path.write_text(f"DATABASE_URL='{quoted}'\nWORKERS='{SECRET}'\n")
            monkeypatch.setattr("src.config.settings.ENV_FILE", path)
            load_settings()
        else:
            (tmp_path / "DATABASE_URL").write_text(value)
            (tmp_path / "HEALTH_DETAILS").write_text(SECRET)
            load_settings(secrets_dir=tmp_path)
    get_logger("canary").error("refused", exc_info=caught.value)
    assert_silent(whole_story(caught.value), log.getvalue())
    assert caught.value.__context__ is None


def test_no_part_that_is_not_meant_for_others_shows_it() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(port=SECRET, database_url=filled(WRONG[0]))
    assert_silent(str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value)))
    for template in RIGHT + WRONG:
        assert_silent(repr(parse_dsn(filled(template), ())))


async def test_no_failed_connection_shows_it(log: io.StringIO) -> None:
    with Thief() as thief:
        address = f"postgresql://u:{quote(SECRET, safe='')}@127.0.0.1:{thief.port}/db"
        for query in (
            "",
            "?sslmode=verify-full",
            "?sslmode=require",
            "?connect_timeout=1&target_session_attrs=standby",
        ):
            connection = parse(address + query)
            with pytest.raises(
                (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, GroundworkError)
            ) as caught:
                await asyncpg.connect(**connection.asyncpg_arguments(), timeout=5)
            get_logger("canary").error("failed", exc_info=caught.value, connection=connection)
            assert_silent(whole_story(caught.value), log.getvalue())
        assert SECRET in thief.passwords


def test_a_library_that_prints_the_address_is_masked(log: io.StringIO) -> None:
    address = f"postgresql://u:{SECRET}@localhost/db"
    logging.getLogger("library").error("cannot use %s", address)
    get_logger("ours").error(
        "cannot", address=address, nested={"addresses": [address, address.encode().decode()]}
    )
    try:
        raise ValueError(address)
    except ValueError:
        get_logger("ours").exception("failed")
    assert_silent(log.getvalue())
    assert log.getvalue().count("postgresql://u:***@localhost/db") >= 4
