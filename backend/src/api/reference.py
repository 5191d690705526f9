"""The reference: /openapi.json, /docs and the pages behind each problem's `type`, with no internet.

`/docs` is Swagger UI from files kept in `static/swagger-ui` (their licence lies beside them). The pages and
`docs/problems.md` are printed from the error family: `python -m src.api.reference > ../docs/problems.md`.
"""

import html
import sys
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response

from ..errors import NotFound
from . import contract, problems

SWAGGER_UI = Path(__file__).parent / "static" / "swagger-ui"
_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "start.js": "text/javascript; charset=utf-8",
}
# Swagger UI styles its elements in place and draws its icons from data: URLs; it needs nothing else.
_DOCS_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
)

router = APIRouter(include_in_schema=False)


# The page's addresses are relative, so that it also works below a prefix that a proxy takes away.
_DOCS_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="reference"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    # Written once: anybody may ask, and writing it takes longer than most requests.
    state = request.app.state
    if state.description is None:
        state.description = JSONResponse(request.app.openapi()).body
    return Response(state.description, media_type=contract.JSON)


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    page = _DOCS_PAGE.format(title=html.escape(request.app.title))
    return HTMLResponse(page, headers={"content-security-policy": _DOCS_POLICY})


@router.get("/docs/{asset}")
async def asset(asset: str) -> Response:
    if asset not in _ASSETS:
        raise NotFound
    headers = {"cache-control": "public, max-age=3600", "content-type": _ASSETS[asset]}
    return FileResponse(SWAGGER_UI / asset, headers=headers)


@router.get("/problems")
async def catalogue() -> HTMLResponse:
    return _page("Problems", "".join(_section(kind) for kind in problems.kinds()))


@router.get("/problems/{slug}")
async def problem(slug: str) -> HTMLResponse:
    for kind in problems.kinds():
        if kind.slug == slug:
            return _page(kind.title, _section(kind))
    raise NotFound


def _section(kind: type[Any]) -> str:
    title, meaning = html.escape(kind.title), html.escape(kind.meaning)
    return (
        f"<h2>{title}</h2><p><code>{problems.path_of(kind)}</code>, status {kind.status}</p><p>{meaning}</p>"
    )


def _page(title: str, body: str) -> HTMLResponse:
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<link rel="icon" href="data:,"><style>body{font:1rem/1.5 sans-serif;max-width:42rem;'
        f"margin:2rem auto;padding:0 1rem}}</style></head><body>{body}</body></html>"
    )
    return HTMLResponse(page, headers={"content-security-policy": _PAGE_POLICY})


def install(app: FastAPI) -> None:
    """Makes `app.openapi()` tell the truth about errors; the document is made when it is first asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                description=app.description,
                routes=app.routes,
                tags=app.openapi_tags,
                license_info=app.license_info,
                servers=app.servers,
            )
            contract.describe(made, app.routes)
            app.openapi_schema = problems.complete(made)
            contract.finish(app.openapi_schema)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
    app.include_router(router)


_CATALOGUE = """# Problems

Every error is answered as `application/problem+json` (RFC 9457) with `type`, `title`, `status` and
`request_id`, and with `detail` where there is more to say. The `type` is a path on the service, where the
same text stands. Nothing that a client sent is sent back.

Two promises hold: **503 means that nothing was written**, and 504 `outcome-unknown` means that a write was
sent and its answer was lost.

| status | type | what happened |
|---|---|---|
{rows}

Members beyond RFC 9457: `request_id` (also the `X-Request-ID` header, and in the log); `errors` for bad
input, each with a `pointer` (a JSON Pointer into the body, or a parameter's name) and a `detail`, {limit} at most;
`constraint` with `conflict`. Statuses that are not in the table have the type `about:blank`.

Printed by the code: `cd backend && .venv/bin/python -m src.api.reference > ../docs/problems.md`.
"""


def markdown() -> str:
    """The text of docs/problems.md."""
    rows = (
        f"| {kind.status} | `{problems.path_of(kind)}` | **{kind.title}.** {kind.meaning} |"
        for kind in problems.kinds()
    )
    return _CATALOGUE.format(rows="\n".join(rows), limit=problems.MAX_LISTED_FAULTS)


if __name__ == "__main__":
    sys.stdout.write(markdown())
