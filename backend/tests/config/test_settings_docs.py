"""`.env.example` and `docs/settings.md` are what the code prints; what they promise works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from src.config import settings as module
from src.config.database import parse
from src.config.settings import BACKEND, Settings, load_settings
from src.config.settings_docs import env_example, settings_markdown


def test_the_files_are_what_the_code_prints() -> None:
    remedy = (
        "run `python -m src config --format env > .env.example` and `--format markdown > ../docs/settings.md`"
    )
    assert (BACKEND / ".env.example").read_text(encoding="utf-8") == env_example(), remedy
    assert (BACKEND.parent / "docs/settings.md").read_text(encoding="utf-8") == settings_markdown(), remedy


def test_every_setting_is_in_both() -> None:
    for name in Settings.model_fields:
        assert re.search(rf"^# {name.upper()}=", env_example(), re.MULTILINE)
        assert f"| `{name.upper()}` |" in settings_markdown()


def test_the_first_example_is_neons_and_holds_placeholders_only() -> None:
    examples = re.findall(r"^# DATABASE_URL='(.*)'$", env_example(), re.MULTILINE)
    first = parse(examples[0])
    assert (first.neon, first.pooler, first.tls.mode) == (True, "tracking", "verify-full")
    for example in examples:
        found = parse(example)
        assert found.user == "USER"
        assert found.password is None or found.password.get_secret_value() == "PASSWORD"


def test_a_copy_with_every_line_switched_on_gives_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "copy.env"
    path.write_text(re.sub(r"^# ([A-Z_]+=)", r"\1", env_example(), flags=re.MULTILINE))
    monkeypatch.setattr(module, "ENV_FILE", path)
    monkeypatch.delenv("SIGNING_KEYS")
    switched_on, untouched = load_settings(), Settings.model_construct()
    for name in Settings.model_fields:
        if name != "database_url":
            assert getattr(switched_on, name) == getattr(untouched, name), name
