"""Every error as OpenAI's body: `{"error": {message, type, param, code}}`, bounded in size, without a traceback.

The cases are the contract's table; this file adds those that only HTTP knows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tritonlm.contract import QueueFull, TritonLMError

from . import metrics

_log = logging.getLogger("tritonlm.gateway")
_LONGEST_MESSAGE = 2000
RETRY_AFTER_SECONDS = 1
_INTERNAL = "the gateway failed; its log says why"


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


# What any route may answer, for the documentation.
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning}
    for status, meaning in (
        (400, "a value that is not possible; `param` names it"),
        (401, "no key, or a wrong one"),
        (404, "no such model"),
        (413, "the body is too large"),
        (429, "too many requests, or the queue is full; see Retry-After"),
        (500, "the engine or the gateway failed"),
        (501, "not offered by this model"),
        (503, "not loaded, or stopping; see Retry-After"),
        (504, "not finished in time"),
    )
}


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    metrics.record_error(code or kind)
    shown = message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + "…"
    return {"error": {"message": shown, "type": kind, "param": param, "code": code}}


def body_of(error: Exception) -> dict[str, Any]:
    """The body of an error that came in the middle of a stream; what is not ours goes to the log alone."""
    if isinstance(error, TritonLMError):
        return error_body(error.message, error.openai_type, error.param, error.code)
    _log.error("a stream failed", exc_info=error)
    return error_body(_INTERNAL, "server_error", code="internal_error")


def response_of(error: TritonLMError) -> JSONResponse:
    headers = {}
    if error.http_status in (429, 503):
        headers["Retry-After"] = str(error.retry_after or RETRY_AFTER_SECONDS)
    if error.http_status == 501:
        headers["x-should-retry"] = "false"
    return JSONResponse(body_of(error), error.http_status, {**headers, **error.headers})


def install(app: FastAPI) -> None:
    app.add_exception_handler(TritonLMError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid_body)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _internal)


async def _ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TritonLMError)
    if isinstance(error, QueueFull):
        # The engine's own refusal: when a place will be free, the rate at which requests end tells.
        error.retry_after = error.retry_after or request.app.state.admission.retry_after()
    return response_of(error)


async def _invalid_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problem: Mapping[str, Any] = error.errors()[0]
    if problem["type"] == "json_invalid":
        return _bad("the body is not valid JSON", None)
    # The kind of a union's member is no place in the body.
    place = [str(part) for part in problem["loc"][1:] if isinstance(part, int) or str(part).isidentifier()]
    if not place:
        return _bad("the body must be a JSON object", None)
    param = place[0][:64]
    if problem["type"] == "extra_forbidden":
        return _bad(f"unknown parameter {param!r}", param)
    if problem["type"] == "missing":
        return _bad(f"{param} is needed", param)
    return _bad(f"{param}: {problem['msg']}", param)


def _bad(message: str, param: str | None) -> JSONResponse:
    return JSONResponse(error_body(message, "invalid_request_error", param, "invalid_value"), 400)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"unknown URL ({request.method} {request.url.path}); /docs lists the URLs",
        405: f"{request.url.path} does not take {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return JSONResponse(error_body(message, kind), error.status_code, error.headers)


async def _internal(request: Request, error: Exception) -> JSONResponse:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse(error_body(_INTERNAL, "server_error", code="internal_error"), 500)
