"""The playground: a page and its files, which need no key; the API calls of the page do.

This module serves files with security headers. The page itself uses the API.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

from tritonlm.contract import ModelNotFound

router = APIRouter(include_in_schema=False)
_FOLDER = Path(__file__).resolve().parents[1] / "playground"
_PAGE = "index.html"
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_FILES = {file.name: file.read_bytes() for file in _FOLDER.iterdir() if file.suffix in _MEDIA_TYPES}
# The page loads nothing from other origins, and other pages may not embed it.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/playground")
async def page() -> Response:
    return _file_response(_PAGE)


@router.get("/playground/{name}")
async def file(name: str) -> Response:
    if name not in _FILES:
        raise ModelNotFound("the playground has no such file", "name")
    return _file_response(name)


def _file_response(name: str) -> Response:
    media_type = _MEDIA_TYPES[Path(name).suffix]
    return Response(_FILES[name], media_type=f"{media_type}; charset=utf-8", headers=_HEADERS)
