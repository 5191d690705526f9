"""/docs and /openapi.json need nothing but this service."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from src.api.reference import SWAGGER_UI
from src.config.version import VERSION
from src.main import TITLE

if TYPE_CHECKING:
    import httpx

OUTSIDE = re.compile(r"""(?:src|href|url)\s*[=:(]\s*["']?(?:https?:)?//""")


async def test_docs_and_all_they_load_come_from_this_service(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert not OUTSIDE.search(page.text)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    loaded = re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page.text)
    assert set(loaded) == {"docs/swagger-ui.css", "docs/swagger-ui-bundle.js", "docs/start.js"}
    for address in loaded:
        answer = await client.get(f"/{address}")
        kind = "text/css" if address.endswith(".css") else "text/javascript"
        assert answer.status_code == 200
        assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
        assert answer.headers["cache-control"] == "public, max-age=3600"
        assert answer.headers["etag"]
        assert answer.content == (SWAGGER_UI / address.removeprefix("docs/")).read_bytes()
    style = (SWAGGER_UI / "swagger-ui.css").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(\s*[\"']?(?:https?:)?//", style)
    start = (await client.get("/docs/start.js")).text
    assert 'url: "openapi.json"' in start


async def test_nothing_else_can_be_read_through_the_reference(client: httpx.AsyncClient) -> None:
    for path in ("/docs/README.md", "/docs/..%2f..%2fmain.py", "/docs/%2e%2e/deps.py", "/docs/", "/redoc"):
        assert (await client.get(path)).status_code == 404


async def test_openapi_names_the_product_and_its_version(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert (document["info"]["title"], document["info"]["version"]) == (TITLE, VERSION)
    assert set(document["paths"]) >= {"/livez", "/readyz", "/health", "/metrics"}
    content = document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    assert list(content) == ["text/plain"]
    for path, item in document["paths"].items():
        if "get" in item and not item["get"]["security"]:
            assert (await client.get(path)).status_code == 200


def test_the_vendored_files_carry_their_licence() -> None:
    for name in ("LICENSE", "NOTICE", "swagger-ui-bundle.js.LICENSE.txt", "README.md"):
        assert (SWAGGER_UI / name).stat().st_size > 0
