"""The lines of a batch's files: requests to read and check, answers to append. A line that was cut is removed."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_REQUESTS = 50_000
_MAX_ERRORS = 100
_MAX_ID = 512
# Python's json module reads fewer levels the deeper it is called: what it reads here must be readable and writable when
# the request is sent, too.
_MAX_DEPTH = 500


@dataclass(frozen=True)
class Line:
    custom_id: str
    body: dict[str, Any]


@dataclass
class Progress:
    """What the output files hold."""

    done: set[str] = field(default_factory=set)
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0

    def add(self, line: dict[str, Any]) -> None:
        self.done.add(line["custom_id"])
        response = line.get("response") or {}
        if response.get("status_code") != 200:
            self.failed += 1
            return
        self.completed += 1
        usage = response["body"].get("usage") or {}
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        self.input_tokens += usage.get("prompt_tokens", usage.get("input_tokens", 0))
        self.output_tokens += usage.get("completion_tokens", usage.get("output_tokens", 0))
        self.cached_tokens += details.get("cached_tokens", 0)


def read_lines(file: Path) -> Iterator[Line]:
    """The requests of a checked file."""
    with file.open("rb") as lines:
        for text in lines:
            if text.strip():
                fields = json.loads(text)
                yield Line(fields["custom_id"], fields["body"])


def check_file(file: Path, endpoint: str) -> tuple[int, list[dict[str, Any]]]:
    """The number of requests, and the mistakes in OpenAI's form."""
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    with file.open("rb") as lines:
        for number, text in enumerate(lines, 1):
            if not text.strip() or len(errors) >= _MAX_ERRORS:
                continue
            if problem := _problem(text, endpoint, seen):
                param, message = problem
                errors.append({"code": "invalid_request", "line": number, "param": param, "message": message})
            if len(seen) > MAX_REQUESTS:
                message = f"a batch has at most {MAX_REQUESTS} requests"
                return len(seen), [{"code": "too_many_requests", "line": number, "param": None, "message": message}]
    if not seen and not errors:
        errors.append({"code": "empty_file", "line": None, "param": None, "message": "the file has no request"})
    return len(seen), errors


def _problem(text: bytes, endpoint: str, seen: set[str]) -> tuple[str | None, str] | None:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None, "the line is not valid JSON"
    if text.count(b"[") + text.count(b"{") > _MAX_DEPTH and _is_too_deep(fields):
        return None, f"the line is nested more than {_MAX_DEPTH} levels deep"
    if not isinstance(fields, dict):
        return None, "the line must be an object with custom_id, method, url and body"
    custom_id, body = fields.get("custom_id"), fields.get("body")
    is_named = isinstance(custom_id, str) and 1 <= len(custom_id) <= _MAX_ID
    checks = (
        (not is_named, "custom_id", f"custom_id must be a string of 1 to {_MAX_ID} characters"),
        (is_named and custom_id in seen, "custom_id", "this custom_id occurs twice"),
        (fields.get("method") != "POST", "method", "method must be POST"),
        (fields.get("url") != endpoint, "url", f"url must be the batch's endpoint, {endpoint}"),
        (not isinstance(body, dict), "body", "body must be an object"),
        (isinstance(body, dict) and body.get("stream"), "body.stream", "a batch does not stream; leave stream out"),
    )
    if isinstance(custom_id, str) and is_named:
        seen.add(custom_id)
    return next(((param, message) for is_wrong, param, message in checks if is_wrong), None)


def _is_too_deep(value: Any) -> bool:
    """Whether lists and objects are nested beyond the limit; without recursion, which Python limits."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        parts = (part for outer in level for part in (outer.values() if isinstance(outer, dict) else outer))
        level = [part for part in parts if isinstance(part, (dict, list))]
    return bool(level)


def read_progress(*files: Path) -> Progress:
    """What was written before. A line that was cut by a kill is removed."""
    progress = Progress()
    for file in files:
        if not file.is_file():
            continue
        whole = 0
        with file.open("rb") as lines:
            for text in lines:
                if not text.endswith(b"\n"):
                    break
                progress.add(json.loads(text))
                whole += len(text)
        with file.open("rb+") as lines:
            lines.truncate(whole)
    return progress


def append(file: Path, line: dict[str, Any]) -> None:
    # ASCII: readers may split at Unicode's line ends, too.
    with file.open("ab") as lines:
        lines.write(json.dumps(line).encode() + b"\n")


def answer_line(custom_id: str, status: int, request_id: str, body: Any) -> dict[str, Any]:
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": _line_id(), "custom_id": custom_id, "response": response, "error": None}


def error_line(custom_id: str, code: str, message: str) -> dict[str, Any]:
    """A request that was not sent."""
    error = {"code": code, "message": message}
    return {"id": _line_id(), "custom_id": custom_id, "response": None, "error": error}


def _line_id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"
