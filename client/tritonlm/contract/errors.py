"""The error tree, and its one table: error, Triton code, HTTP status, OpenAI type and code.

Triton carries an error as text alone (a gRPC stream has no status per response), so `to_wire` appends a short
machine-readable tail to the sentence and `from_wire` reads it back. This file does not know who raises what.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import ClassVar
from urllib.parse import quote, unquote


class TritonLMError(Exception):
    """Anything that a caller of tritonlm can be told. The class says the case, the message says the remedy."""

    triton_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        # Where it is known: in how many seconds to come back, and what else an HTTP answer tells.
        self.retry_after: int | None = None
        self.headers: dict[str, str] = {}

    def to_wire(self) -> str:
        """The sentence with its machine-readable tail: what Triton carries to the caller."""
        # Quoted: a parameter that does not exist may be named anything.
        param = f" param={quote(self.param, safe='[]', errors='replace')}" if self.param else ""
        return f"{self.message} [code={self.code}{param}]"


class InvalidRequest(TritonLMError):
    triton_code, http_status, openai_type, code = "INVALID_ARG", 400, "invalid_request_error", "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"

    @classmethod
    def of(cls, context: int, prompt: int, completion: int) -> ContextLengthExceeded:
        """The sentence that OpenAI's clients match."""
        return cls(
            f"This model's maximum context length is {context} tokens, however you requested {prompt + completion} "
            f"tokens ({prompt} in your prompt; {completion} for the completion). Please reduce your prompt; or "
            "completion length.",
            "prompt",
        )


class CheckpointError(TritonLMError):
    triton_code, code = "INTERNAL", "checkpoint_error"


class EngineFailure(TritonLMError):
    triton_code, code = "INTERNAL", "engine_failure"


class RequestFailedRepeatedly(EngineFailure):
    """Two processes died while they computed it: to send it again would only end a third one."""

    code = "request_failed_repeatedly"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.headers["x-should-retry"] = "false"


class InvalidKey(TritonLMError):
    triton_code, http_status, openai_type, code = "INVALID_ARG", 401, "invalid_request_error", "invalid_api_key"


class InsufficientScope(TritonLMError):
    triton_code, http_status, openai_type, code = "INVALID_ARG", 403, "permission_error", "insufficient_scope"


class RateLimited(TritonLMError):
    triton_code, http_status, openai_type, code = "UNAVAILABLE", 429, "rate_limit_exceeded", "rate_limit_exceeded"


class QueueFull(TritonLMError):
    triton_code, http_status, openai_type, code = "UNAVAILABLE", 429, "rate_limit_exceeded", "queue_full"


class QueueTimeout(TritonLMError):
    triton_code, http_status, openai_type, code = "UNAVAILABLE", 503, "server_error", "queue_timeout"


class Draining(TritonLMError):
    triton_code, http_status, openai_type, code = "UNAVAILABLE", 503, "server_error", "draining"


class ModelNotFound(TritonLMError):
    triton_code, http_status, openai_type, code = "NOT_FOUND", 404, "invalid_request_error", "model_not_found"


class Unavailable(TritonLMError):
    """Nobody answers: Triton is not there, or lost its connection."""

    triton_code, http_status, openai_type, code = "UNAVAILABLE", 503, "server_error", "unavailable"


class NotLoaded(Unavailable):
    """The model is there and is not loaded, or is just being replaced: loading it, or waiting, helps."""

    code = "not_loaded"


class Broken(Unavailable):
    """It answered, and does so no more: a process has died or hangs. It will be brought back; going on then is safe."""

    code = "broken"


class NoRoom(TritonLMError):
    """A model does not fit beside those that are loaded: unloading one that nobody uses helps."""

    triton_code, http_status, openai_type, code = "UNAVAILABLE", 503, "server_error", "no_room"

    @classmethod
    def of(cls, needed: int, taken: int, budget: int) -> NoRoom:
        sizes = [f"{size / 2**20:,.0f} MiB" for size in (needed, taken, budget)]
        message = "this model needs {}, and others take {} of the memory budget of {}; unload one".format(*sizes)
        # What is missing goes along in numbers.
        return cls(message, str(taken + needed - budget))

    def __str__(self) -> str:
        # Of an exception at a model's load Triton tells this much.
        return self.to_wire()

    @property
    def missing(self) -> int:
        return int(self.param) if self.param and self.param.isdigit() else 0


class TimedOut(TritonLMError):
    triton_code, http_status, openai_type, code = "UNAVAILABLE", 504, "server_error", "timeout"


class NotOffered(TritonLMError):
    triton_code, http_status, openai_type, code = "INVALID_ARG", 501, "not_implemented", "not_implemented"


class Cancelled(TritonLMError):
    triton_code, http_status, openai_type, code = "CANCELLED", 499, "invalid_request_error", "cancelled"


ERRORS: tuple[type[TritonLMError], ...] = (
    InvalidRequest,
    ContextLengthExceeded,
    InvalidKey,
    InsufficientScope,
    RateLimited,
    QueueFull,
    QueueTimeout,
    Draining,
    ModelNotFound,
    Unavailable,
    NotLoaded,
    Broken,
    NoRoom,
    TimedOut,
    NotOffered,
    Cancelled,
    EngineFailure,
    RequestFailedRepeatedly,
    CheckpointError,
)

_BY_CODE = {error.code: error for error in ERRORS}
_TAIL = re.compile(r"^(?P<message>.*) \[code=(?P<code>[a-z_]+)(?: param=(?P<param>\S+))?\]$", re.DOTALL)
# What Triton itself puts in front of an ensemble's or a queue's error.
_PREFIX = re.compile(r"^(?:in ensemble '[^']*', )?(?:\[request id: .*?\] )?")
_RESTRICTED = "this Triton keeps listing and loading models for those who know its secret; set TRITONLM_TRITON_SECRET"


def _unknown(found: re.Match[str]) -> TritonLMError:
    missing = found["why"] == "is not found"
    kind, why = (ModelNotFound, "does not exist") if missing else (NotLoaded, "is not loaded")
    return kind(f"the model {found['name']!r} {why}", "model")


# What Triton says by itself, in its own words.
_TRITONS_OWN: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], TritonLMError]], ...] = (
    (re.compile(r"Exceeds maximum queue size"), lambda found: QueueFull(found.string)),
    (re.compile(r"Request timeout expired"), lambda found: QueueTimeout(found.string)),
    (re.compile(r"^Server is stopping"), lambda _: Draining("this Triton is stopping")),
    # It begins or ends: who has answered lately is waited for.
    (re.compile(r"^Server not ready"), lambda _: Unavailable("this Triton is not ready")),
    (re.compile(r"(?:protocol|API) is restricted"), lambda _: InsufficientScope(_RESTRICTED)),
    # An ensemble whose part has just gone.
    (
        re.compile(r"^Internal error from Core$"),
        lambda _: Broken("a part of the model has gone; it will be brought back"),
    ),
    (
        re.compile(r"Stub process '(?P<name>.*?)(?:_\d+_\d+)?' is not healthy"),
        lambda found: Broken(f"the process of {found['name']!r} has died; it will be brought back"),
    ),
    (re.compile(r"^Request for unknown model: '(?P<name>[^']*)' (?P<why>.*)$"), _unknown),
    (
        re.compile(r"^requested model (?:version is not available for model )?'(?P<name>[^']*)'"),
        lambda found: NotLoaded(f"the model {found['name']!r} is not loaded", "model"),
    ),
)
# A model that refuses to load: Triton tells the exception with the places in the code where it came from.
_REFUSED_LOAD = re.compile(r"\b(?P<kind>CheckpointError|NoRoom): (?P<message>.*?)(?:\s+At:\s.*)?$", re.DOTALL)


def from_code(code: str | None, message: str, param: str | None = None) -> TritonLMError:
    """The error of this code, as HTTP tells it."""
    return _BY_CODE.get(code or "", TritonLMError)(message, param)


def from_wire(text: str) -> TritonLMError:
    """The error behind a message that came out of Triton, ours or Triton's own."""
    text = _PREFIX.sub("", text, count=1)
    if found := _TAIL.match(text):
        return from_code(found["code"], found["message"], unquote(found["param"]) if found["param"] else None)
    if own := _tritons_own(text):
        return own
    if found := _REFUSED_LOAD.search(text):
        return CheckpointError(found["message"]) if found["kind"] == "CheckpointError" else from_wire(found["message"])
    return TritonLMError(text)


def _tritons_own(text: str) -> TritonLMError | None:
    for words, error in _TRITONS_OWN:
        if found := words.search(text):
            return error(found)
    return None
