"""The description of the API by somebody else's rules: Redocly's recommended ones, which code generators rely on.

The linter is a package of npm, put into a temporary directory and forgotten; `make test-all` runs it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from src.config.settings import Settings
from src.main import create_app

VERSION = "2.77.0"
# Probes have no way to be refused by what is sent to them. Lines of JSON cannot be described in OpenAPI 3.1, so the
# shape of one is named in words only.
KNOWN = """
openapi.json:
  operation-4xx-response:
    - '#/paths/~1livez/get/responses'
    - '#/paths/~1.well-known~1jwks.json/get/responses'
    - '#/paths/~1readyz/get/responses'
    - '#/paths/~1health/get/responses'
    - '#/paths/~1metrics/get/responses'
  no-unused-components:
    - '#/components/schemas/TaskImport'
"""


def redocly(directory: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise RuntimeError("Node.js and npm are missing: apt-get install nodejs npm (20 or newer).")
    done = subprocess.run(
        [
            npm,
            "install",
            "--silent",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            f"@redocly/cli@{VERSION}",
        ],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=170,
    )
    if done.returncode:
        raise RuntimeError(f"npm could not install @redocly/cli {VERSION}:\n{done.stderr[-2000:]}")
    return directory / "node_modules" / ".bin" / "redocly"


@pytest.mark.debian
def test_the_description_of_the_api_has_nothing_that_redocly_would_change() -> None:
    with tempfile.TemporaryDirectory(prefix="groundwork-redocly-") as name:
        directory = Path(name)
        linter = redocly(directory)

        def lint(document: dict[str, object]) -> str:
            (directory / "openapi.json").write_text(json.dumps(document))
            done = subprocess.run(
                [linter, "lint", "openapi.json", "--format=json"],
                cwd=directory,
                capture_output=True,
                text=True,
                timeout=60,
            )
            found = json.loads(done.stdout)
            return "\n".join(
                f"{each['ruleId']}: {each['message']} {each['location'][0].get('pointer')}"
                for each in found["problems"]
                if not each.get("ignored")
            )

        (directory / ".redocly.lint-ignore.yaml").write_text(KNOWN)
        document = create_app(Settings()).openapi()
        assert lint(document) == ""
        # It looks at what it is given.
        spoilt = json.loads(json.dumps(document))
        del spoilt["paths"]["/v1/tasks"]["get"]["operationId"], spoilt["components"]["schemas"]["TaskRead"]
        assert "operation-operationId" in lint(spoilt)
