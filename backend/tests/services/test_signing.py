"""Where the keys of our own tokens come from: the settings, or a file that is made once and read by nobody else."""

from __future__ import annotations

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

import pytest

from src.config.settings import load_settings
from src.errors import ConfigurationError, Unauthenticated
from src.services import signing
from src.services.identity import Identity
from src.services.signing import FILE_NAME, SigningKeys, new_key

ANA = UUID("018f4e6a-7c11-7bbd-9d0e-3a52cf7d9e10")


@pytest.fixture(autouse=True)
def _no_key_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIGNING_KEYS")


def fault(directory: Path, **settings: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        SigningKeys.from_settings(load_settings(data_directory=directory, **settings))
    assert [each.variable for each in caught.value.faults] == ["SIGNING_KEYS"]
    return str(caught.value)


def test_in_development_a_key_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    directory = tmp_path / "not" / "yet" / "there"
    settings = load_settings(data_directory=directory)
    first = SigningKeys.from_settings(settings)
    path = directory / FILE_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in directory.iterdir()] == [FILE_NAME]
    kept = path.read_text()
    assert SigningKeys.from_settings(settings).derive(b"x") == first.derive(b"x")
    assert path.read_text() == kept
    assert SigningKeys.from_settings(load_settings(signing_keys=kept.strip())).derive(b"x") == first.derive(
        b"x"
    )


def test_all_who_make_a_key_at_once_get_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = threading.Barrier(8)

    def made() -> str:
        at_once.wait(30)  # Each has seen that there is none.
        return new_key()

    monkeypatch.setattr(signing, "new_key", made)
    settings = load_settings(data_directory=tmp_path / "data")
    with ThreadPoolExecutor(8) as pool:
        starts = [pool.submit(SigningKeys.from_settings, settings) for _ in range(8)]
        assert len({start.result().derive(b"x") for start in starts}) == 1
    assert [each.name for each in (tmp_path / "data").iterdir()] == [FILE_NAME]


def test_a_kept_key_that_cannot_be_used_is_told_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    for text in ("", "not a key", "A" * 43, "é"):
        path.write_text(text)
        path.chmod(0o600)
        message = fault(tmp_path)
        assert str(path) in message
        assert path.read_text() == text
    path.write_text(new_key())
    path.chmod(0o644)
    assert "can be read by others" in fault(tmp_path)
    path.unlink()
    path.mkdir()
    assert "cannot be used" in fault(tmp_path)
    assert "cannot be used" in fault(Path(os.devnull) / "data")


@pytest.mark.parametrize("environment", ["production", "PRODUCTION "])
def test_production_makes_no_key_and_takes_none_from_the_data_directory(
    tmp_path: Path, environment: str
) -> None:
    SigningKeys.from_settings(load_settings(data_directory=tmp_path))
    message = fault(tmp_path, environment=environment)
    assert "production" in message
    assert "python -m src keys new" in message
    given = load_settings(environment=environment, signing_keys=new_key(), data_directory=tmp_path / "none")
    assert SigningKeys.from_settings(given)
    assert not (tmp_path / "none").exists()


async def test_two_keys_with_a_comma_or_a_line_between_them_are_a_rotation() -> None:
    old, new = new_key(), new_key()
    for text in (f"{new},{old}", f"{new}, {old}", f"{new}\n{old}\n"):
        during = Identity.from_settings(load_settings(signing_keys=text))
        for keys in (old, new):
            token = Identity.from_settings(load_settings(signing_keys=keys)).signing.mint(ANA, None, 60)
            assert await during.principal(f"Bearer {token}")
        after = Identity.from_settings(load_settings(signing_keys=new))
        assert await after.principal(f"Bearer {during.signing.mint(ANA, None, 60)}")
        with pytest.raises(Unauthenticated):
            token = Identity.from_settings(load_settings(signing_keys=old)).signing.mint(ANA, None, 60)
            await after.principal(f"Bearer {token}")


def test_a_key_is_in_no_representation() -> None:
    text = new_key()
    settings = load_settings(signing_keys=text)
    shown = (
        repr(settings)
        + str(settings)
        + repr(SigningKeys.from_settings(settings))
        + repr(Identity.from_settings(settings))
    )
    assert text[4:20] not in shown
