"""The playground: one page and its parts, from this package's own files, open to everybody; what it calls is not.

It knows files and headers; the page itself knows the API.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

from tritonlm.contract import ModelNotFound

_FOLDER = Path(__file__).resolve().parents[1] / "playground"
_PAGE = "index.html"
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# Nothing from elsewhere, and nobody may show it inside a page of his own.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    routes = APIRouter(include_in_schema=False)
    parts = {file.name: file.read_bytes() for file in _FOLDER.iterdir() if file.suffix in _KINDS}

    def part(name: str) -> Response:
        kind = _KINDS[Path(name).suffix]
        return Response(parts[name], media_type=f"{kind}; charset=utf-8", headers=_HEADERS)

    @routes.get("/playground")
    async def page() -> Response:
        return part(_PAGE)

    @routes.get("/playground/{name}")
    async def part_of_the_page(name: str) -> Response:
        if name not in parts:
            raise ModelNotFound("the playground has no such part", "name")
        return part(name)

    return routes
