"""What production installs is known: every package, its version, its licence, and who needs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from src.cli import inventory

BACKEND = Path(__file__).resolve().parents[2]
# What may be given to others together with MIT code, and asks for no more than its own text.
TAKEN = {
    "MIT", "MIT-0", "MIT License", "Apache-2.0", "Apache Software License", "BSD-2-Clause", "BSD-3-Clause",
    "ISC", "ISC License (ISCL)", "PSF-2.0", "The Unlicense (Unlicense)", "Mozilla Public License 2.0 (MPL 2.0)",
}  # fmt: skip


def alternatives(licence: str) -> list[set[str]]:
    """What has to be fulfilled: one of these sets, each whole."""
    return [set(one.split(" AND ")) for one in licence.split(" OR ")]


def test_every_package_has_a_licence_that_may_be_taken() -> None:
    unknown = {
        package.name: package.licence
        for package in inventory.packages()
        if package.installed and not any(one <= TAKEN for one in alternatives(package.licence or "none"))
    }
    assert unknown == {}
    assert alternatives("Apache-2.0 OR GPL-3.0-only AND MIT") == [{"Apache-2.0"}, {"GPL-3.0-only", "MIT"}]


def test_what_is_pinned_is_installed_and_nothing_that_is_needed_is_unpinned() -> None:
    """The pins are whole: `pip install --require-hashes` would refuse them otherwise, here and everywhere."""
    listed = {package.name: package for package in inventory.packages() if package.installed}
    direct = tomllib.loads((BACKEND / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower().replace("_", "-") for line in direct}
    assert sorted(names - listed.keys()) == []
    reached, open_ends = set(names), list(names)
    while open_ends:
        for name in listed[open_ends.pop()].needs:
            if name in listed and name not in reached:
                reached.add(name)
                open_ends.append(name)
    # What extras bring is not followed; what is there on other machines only needs nothing here.
    extras = {"cryptography", "cffi", "pycparser", "greenlet", "argon2-cffi", "argon2-cffi-bindings"}
    assert sorted(listed.keys() - reached - extras) == []


def test_a_package_of_another_version_than_its_pin_is_found(tmp_path: Path) -> None:
    other = tmp_path / "requirements.txt"
    for line in ("uvicorn==0.0.1 \\\n", "there-is-no-such-package==1\n"):
        other.write_text(line)
        with pytest.raises(inventory.Mismatch):
            inventory.packages(other)
    other.write_text("there-is-no-such-package==1 ; sys_platform == 'win32' \\\n")
    assert [package.installed for package in inventory.packages(other)] == [False]


def test_the_bill_of_materials_is_whole_and_the_same_each_time() -> None:
    made = [
        subprocess.run(
            [sys.executable, "-m", "src.cli.inventory"], cwd=BACKEND, capture_output=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert made[0] == made[1]
    bill = json.loads(made[0])
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", bill["serialNumber"])
    pinned = re.findall(
        r"^([\w.-]+)(?:\[[^]]+\])?==([^\s;\\]+)", (BACKEND / "requirements.txt").read_text(), re.MULTILINE
    )
    assert {(one["name"], one["version"]) for one in bill["components"]} == set(pinned)
    references = [one["bom-ref"] for one in bill["components"]]
    assert len(set(references)) == len(references)
    for one in bill["components"]:
        assert one["purl"] == f"pkg:pypi/{one['name']}@{one['version']}" == one["bom-ref"]
        assert one["type"] == "library"
        assert one["scope"] == "optional" or one["licenses"][0]["license"]["name"]
    root = bill["metadata"]["component"]["bom-ref"]
    known = {*references, root}
    assert {each["ref"] for each in bill["dependencies"]} == known
    assert {name for each in bill["dependencies"] for name in each["dependsOn"]} <= known
    fastapi = next(each for each in bill["dependencies"] if each["ref"].startswith("pkg:pypi/fastapi@"))
    assert any(name.startswith("pkg:pypi/starlette@") for name in fastapi["dependsOn"])
