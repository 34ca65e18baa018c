"""Writes every error in OpenAI's format, `{"error": {message, type, param, code}}`, limited in size, no traceback.

The error classes are the contract's; this module adds those of HTTP itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tritonlm.client.request_fields import mistake
from tritonlm.contract import QueueFull, TritonLMError
from tritonlm.contract.errors import shown

from .. import metrics

_log = logging.getLogger("tritonlm.gateway")
_MAX_MESSAGE_LENGTH = 2000
RETRY_AFTER_SECONDS = 1
_ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
# FastAPI's words for what Python's json module does not read, though it may be JSON.
_UNREADABLE = "There was an error parsing the body"
_INTERNAL = "internal error; the gateway's log has the details"


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class AnthropicErrorBody(ErrorBody):
    """OpenAI's fields in Anthropic's form."""

    type: Literal["error"]


# The error responses of every route, for the OpenAPI document.
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning}
    for status, meaning in (
        (400, "an invalid value; `param` names it"),
        (401, "no key, or a wrong one"),
        (403, "the key lacks the scope, or a page of another origin called"),
        (404, "no such model"),
        (408, "the body did not arrive in time"),
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
    text = message if len(message) <= _MAX_MESSAGE_LENGTH else message[:_MAX_MESSAGE_LENGTH] + "…"
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def body_of(error: Exception) -> dict[str, Any]:
    """The body for an error, also for one in the middle of a stream. Details of an internal error are only logged."""
    if isinstance(error, TritonLMError):
        return error_body(error.message, error.openai_type, error.param, error.code)
    _log.error("a stream failed", exc_info=error)
    return error_body(_INTERNAL, "server_error", code="internal_error")


def response_of(error: TritonLMError, path: str = "") -> JSONResponse:
    """The response to an error, in the form of the API that the path belongs to."""
    headers = {}
    if error.http_status in (429, 503):
        headers["Retry-After"] = str(error.retry_after or RETRY_AFTER_SECONDS)
    if error.http_status == 501:
        headers["x-should-retry"] = "false"
    return _response(path, body_of(error), error.http_status, {**headers, **error.headers})


def uses_anthropic_form(path: str) -> bool:
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def anthropic_body(body: Mapping[str, Any], status: int) -> dict[str, Any]:
    """An error's body in Anthropic's form, from one in OpenAI's. `param` and `code` stay beside Anthropic's fields."""
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {**body["error"], "type": kind}}


def _response(
    path: str, body: Mapping[str, Any], status: int, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    content = anthropic_body(body, status) if uses_anthropic_form(path) else body
    return JSONResponse(content, status, headers)


def internal_response(path: str) -> JSONResponse:
    return _response(path, error_body(_INTERNAL, "server_error", code="internal_error"), 500)


def cross_site_response(path: str, origin: str) -> JSONResponse:
    """The response to a page that may not call."""
    message = (
        f"pages of {shown(origin)} may not call this server; to allow them, set TRITONLM_CORS_ALLOW_ORIGINS "
        "(tritonlm gateway: --cors-allow-origins)"
    )
    return _response(path, error_body(message, "permission_error", code="origin_not_allowed"), 403)


def wrong_host_response(path: str, host: str) -> JSONResponse:
    """The response to a request that any web page may have sent."""
    message = (
        f"the header Host is {shown(host)}, which is no name of this server, and without a key any web page could have "
        "sent this request; create a key with tritonlm keys create NAME, or add that host's origin, such as "
        "http://HOST:PORT, to TRITONLM_CORS_ALLOW_ORIGINS (tritonlm gateway: --cors-allow-origins)"
    )
    return _response(path, error_body(message, "permission_error", code="host_not_allowed"), 403)


def install(app: FastAPI) -> None:
    app.add_exception_handler(TritonLMError, _handle_contract_error)
    app.add_exception_handler(RequestValidationError, _handle_invalid_body)
    app.add_exception_handler(HTTPException, _handle_http_error)


async def _handle_contract_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TritonLMError)
    if isinstance(error, QueueFull):
        # The engine refused it without a time; estimate it from the rate at which requests end.
        error.retry_after = error.retry_after or request.app.state.services.admission.retry_after()
    return response_of(error, request.url.path)


async def _handle_invalid_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problem: Mapping[str, Any] = error.errors()[0]
    if problem["type"] == "json_invalid":
        return _invalid_request(request, "the body is not valid JSON", None)
    named = mistake(problem["type"], problem["loc"][1:], problem["msg"], error.body)
    return _invalid_request(request, named.message, named.param)


def _invalid_request(request: Request, message: str, param: str | None) -> JSONResponse:
    return _response(request.url.path, error_body(message, "invalid_request_error", param, "invalid_value"), 400)


async def _handle_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.detail == _UNREADABLE:
        message = "the body cannot be read: it must be JSON in UTF-8, not nested hundreds of levels deep"
        return _invalid_request(request, message, None)
    return http_response(error, request.method, request.url.path)


def http_response(error: HTTPException, method: str, path: str) -> JSONResponse:
    messages = {404: f"unknown URL ({method} {path}); /docs lists the URLs", 405: f"{path} does not accept {method}"}
    message = messages.get(error.status_code, str(error.detail))
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return _response(path, error_body(message, kind), error.status_code, error.headers)
