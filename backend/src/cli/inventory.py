"""What production installs, as a bill of materials (CycloneDX 1.6 in JSON): `make sbom`, `python -m src.cli.inventory`.

It is read from `requirements.txt` and the metadata of the installed packages, so nothing is asked of any registry, and
the same packages give the same text.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid5

from ..config.version import VERSION

REQUIREMENTS: Final = Path(__file__).resolve().parents[2] / "requirements.txt"
_NAMESPACE: Final = UUID("1f0c4c56-3a0e-5d0b-8a54-0f7f0a0e6b11")
_PIN: Final = re.compile(r"([A-Za-z0-9][\w.-]*)(?:\[[\w,-]+\])?==([^\s;\\]+)([^\\]*)")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Mismatch(Exception):
    """What is installed is not what is pinned."""


@dataclass(frozen=True)
class Package:
    """One pin. `licence` and `needs` are None and empty for what is installed on other machines only."""

    name: str
    version: str
    licence: str | None
    needs: tuple[str, ...]
    installed: bool

    @property
    def reference(self) -> str:
        return f"pkg:pypi/{self.name}@{self.version}"


def packages(requirements: Path = REQUIREMENTS) -> list[Package]:
    """Every pin, by name. Raises `Mismatch` where another version is installed."""
    found = []
    pins: dict[str, list[tuple[str, str]]] = {}
    for line in requirements.read_text(encoding="utf-8").splitlines():
        if pin := _PIN.match(line):
            pins.setdefault(_normal(pin[1]), []).append((pin[2], pin[3]))
    for name, versions in sorted(pins.items()):
        try:
            there: metadata.PackageMetadata | None = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            there = None
        installed = None if there is None else str(there["Version"])
        conditional = any(";" in rest for _, rest in versions)
        if installed not in {version for version, _ in versions} and not (there is None and conditional):
            raise Mismatch(f"{name}: {installed or 'nothing'} is installed where another version is pinned.")
        for version, _ in versions:
            known = there if version == installed else None
            needs = tuple(sorted(_needed(name))) if known is not None else ()
            found.append(
                Package(
                    name, version, licence_of(known) if known else None, needs, installed=known is not None
                )
            )
    return found


def licence_of(package: metadata.PackageMetadata) -> str | None:
    """Its licence as its authors name it: an SPDX expression where there is one, else what the classifiers say."""
    if "License-Expression" in package:
        return package["License-Expression"]
    listed = [
        line.rpartition(" :: ")[2]
        for line in package.get_all("Classifier", [])
        if line.startswith("License ::")
    ]
    named = package["License"].strip().splitlines() if "License" in package else []
    return " AND ".join(listed) or (named[0] if named and len(named[0]) < 60 else None)


def document() -> dict[str, Any]:
    """The bill of materials: each package with its licence, and what needs what."""
    listed = packages()
    known = {package.name: package.reference for package in listed if package.installed}
    root = f"pkg:generic/groundwork@{VERSION}"
    components = [_component(package) for package in listed]
    depends = [{"ref": root, "dependsOn": sorted(package.reference for package in listed)}]
    depends += [
        {
            "ref": package.reference,
            "dependsOn": sorted({known[name] for name in package.needs if name in known}),
        }
        for package in listed
    ]
    body = {
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": root,
                "name": "groundwork",
                "version": VERSION,
                "licenses": [{"license": {"id": "MIT"}}],
            }
        },
        "components": components,
        "dependencies": depends,
    }
    serial = uuid5(_NAMESPACE, json.dumps(body, sort_keys=True))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        **body,
    }


def _component(package: Package) -> Mapping[str, Any]:
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": package.reference,
        "name": package.name,
        "version": package.version,
        "purl": package.reference,
        "scope": "required" if package.installed else "optional",
    }
    if package.licence is not None:
        component["licenses"] = [{"license": {"name": package.licence}}]
    return component


def _needed(name: str) -> Iterator[str]:
    for line in metadata.requires(name) or ():
        wanted, _, condition = line.partition(";")
        if "extra ==" not in condition and (first := _NAME.match(wanted.strip())):
            yield _normal(first[0])


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    json.dump(document(), sys.stdout, indent=2)
    sys.stdout.write("\n")
