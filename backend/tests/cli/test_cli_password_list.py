"""The list of common passwords as a checkout may leave it: with CRLF line ends, damaged, or missing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from conftest import open_directory
from installation import Installation, fetch

REPOSITORY = Path(__file__).resolve().parents[3]
LIST = Path("backend/src/models/common-passwords/passwords.txt")


@pytest.fixture
def installation() -> Iterator[Installation]:
    with open_directory() as directory, closing(Installation(directory)) as made:
        yield made


def test_a_list_with_crlf_line_ends_still_refuses_common_passwords(
    installation: Installation, database_url: str
) -> None:
    path = installation.backend.parent / LIST
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    for common in ("password", "!qaz1qaz", "zzzzzzzzzz"):
        result = installation.run(
            "user", "create", "ana@example.com", "--password", url=database_url, typed=f"{common}\n"
        )
        assert result.returncode == 2, result.stderr
        assert "common" in result.stderr
    assert fetch(database_url, "SELECT 1 FROM users") == []


@pytest.mark.parametrize("damage", ["missing", "truncated", "joined"])
def test_a_damaged_list_ends_the_start_with_exit_code_3(
    installation: Installation, database_url: str, damage: str
) -> None:
    path = installation.backend.parent / LIST
    text = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(text[: len(text) // 2])
    else:
        path.write_bytes(text.replace(b"\n", b" "))
    result = installation.run("serve", "--port", "0", url=database_url)
    assert result.returncode == 3
    assert "common-passwords/passwords.txt" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_a_checkout_with_autocrlf_has_lf_line_ends(tmp_path: Path) -> None:
    """Git for Windows sets core.autocrlf: with it shell scripts would not run."""
    source, clone = tmp_path / "source", tmp_path / "clone"
    source.mkdir()

    def git(*arguments: str, where: Path) -> None:
        subprocess.run(["git", "-C", where, *arguments], check=True, capture_output=True)

    for name in (".gitattributes", ".ci/run", str(LIST)):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((REPOSITORY / name).read_bytes())
    git("init", "-q", where=source)
    git("add", "--all", where=source)
    git("-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "-qm", "a", where=source)
    git("clone", "-q", "-c", "core.autocrlf=true", str(source), str(clone), where=tmp_path)
    for name in (".ci/run", str(LIST)):
        assert b"\r" not in (clone / name).read_bytes()
