"""/docs: Swagger UI over /openapi.json, all of it from this server.

The page is open, as health is: it tells what any copy of this program can do, and a browser sends no key with a link.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

router = APIRouter(include_in_schema=False)

ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
"""Files of Swagger UI, as the package fastapi-offline ships them; nothing of its code is run."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Seraph</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<main id="api"></main>
<noscript>This page needs JavaScript; <a href="openapi.json">openapi.json</a> says the same.</noscript>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""

START = """\
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#api",
  deepLinking: true,
  validatorUrl: null, // it would send the document to another host
  syntaxHighlight: false,
});
"""

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


@router.get("/docs")
async def page() -> Response:
    """The page."""
    return Response(PAGE, headers=HEADERS, media_type="text/html")


@router.get("/docs/start.js")
async def start() -> Response:
    """What the page runs: a file, because its policy allows no script inside it."""
    return Response(START, headers=HEADERS, media_type="text/javascript")


@router.get("/docs/{name}")
async def asset(name: str) -> Response:
    """A file of Swagger UI."""
    if name not in ASSETS:
        raise HTTPException(404)
    return FileResponse(_folder() / name, headers=HEADERS, media_type=ASSETS[name])


@router.get("/openapi.json")
async def document(request: Request) -> dict[str, object]:
    """The OpenAPI document."""
    described: dict[str, object] = request.app.openapi()
    return described


def _folder() -> Path:
    spec = find_spec("fastapi_offline")
    assert spec is not None and spec.submodule_search_locations, "a dependency of this package"
    return Path(spec.submodule_search_locations[0]) / "static"
