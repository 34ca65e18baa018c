"""All errors, each with its Triton code, HTTP status, and OpenAI type and code.

Triton carries an error as text only (a gRPC stream has no status per response), so `to_wire` appends a short
machine-readable tail to the message and `from_wire` parses it. This module does not know who raises the errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import ClassVar
from urllib.parse import quote, unquote

# Names that an error lists.
_MAX_NAMES = 20


def shown(value: object) -> str:
    """The caller's value, shortened for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


class TritonLMError(Exception):
    """The base of all errors that reach a caller. The class is the kind of error; the message names the remedy."""

    triton_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        # Seconds after which to retry, if known, and further headers of the HTTP response.
        self.retry_after: int | None = None
        self.headers: dict[str, str] = {}

    def to_wire(self) -> str:
        """The message with its machine-readable tail, as Triton carries it to the caller."""
        # Quoted, since the name of an unknown parameter may hold any character.
        param = f" param={quote(self.param, safe='[]', errors='replace')}" if self.param else ""
        return f"{self.message} [code={self.code}{param}]"

    def forbid_retries(self) -> None:
        """SDKs send a request again after most errors, unless this header tells them not to."""
        self.headers["x-should-retry"] = "false"


class InvalidRequest(TritonLMError):
    triton_code, http_status, openai_type, code = "INVALID_ARG", 400, "invalid_request_error", "invalid_value"

    @classmethod
    def for_value(cls, name: str, expected: str, value: object) -> InvalidRequest:
        """A value that is not what its name expects."""
        return cls(f"{name} must be {expected} (got {shown(value)})", name)

    @classmethod
    def for_token(cls, name: str, token_id: int, vocab_size: int) -> InvalidRequest:
        """A token id that a model does not have."""
        return cls(
            f"{name} holds the token id {token_id}, which is outside this model's vocabulary: 0 to {vocab_size - 1}",
            name,
        )


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"

    @classmethod
    def for_lengths(cls, context: int, prompt: int, completion: int) -> ContextLengthExceeded:
        """The wording that OpenAI's clients match."""
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
    """Two processes died while they computed this request; a retry would probably end a third one."""

    code = "request_failed_repeatedly"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.forbid_retries()


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


class AdapterNotFound(TritonLMError):
    """Not a ModelNotFound: the language model is there, so that neither loading it nor a retry would help."""

    triton_code, http_status, openai_type, code = "NOT_FOUND", 404, "invalid_request_error", "adapter_not_found"

    @classmethod
    def of(cls, name: str, model: str, known: Iterable[str]) -> AdapterNotFound:
        names = sorted(known)
        listed = ", ".join(names[:_MAX_NAMES]) + (" …" if len(names) > _MAX_NAMES else "")
        return cls(f"{model} has no adapter {shown(name)}; it has {listed or 'none'}", "adapter")


class Unavailable(TritonLMError):
    """Triton is not reachable, or the connection was lost."""

    triton_code, http_status, openai_type, code = "UNAVAILABLE", 503, "server_error", "unavailable"


class NotLoaded(Unavailable):
    """The model exists and is not loaded, or is being replaced; load it or wait."""

    code = "not_loaded"


class Broken(Unavailable):
    """A process that answered before has died or hangs. It will be restarted, and the call can be resumed then."""

    code = "broken"


class NoRoom(TritonLMError):
    """A model does not fit into memory beside the loaded models; unload one that is not in use."""

    triton_code, http_status, openai_type, code = "UNAVAILABLE", 503, "server_error", "no_room"

    @classmethod
    def for_sizes(cls, needed: int, taken: int, budget: int) -> NoRoom:
        sizes = [f"{size / 2**20:,.0f} MiB" for size in (needed, taken, budget)]
        message = "this model needs {}, and others take {} of the memory budget of {}; unload one".format(*sizes)
        # The number of missing bytes is sent as the error's param.
        return cls(message, str(taken + needed - budget))

    def __str__(self) -> str:
        # Triton forwards the text of an exception that a model raises while loading.
        return self.to_wire()

    @property
    def missing(self) -> int:
        return int(self.param) if self.param and self.param.isdigit() else 0


class TimedOut(TritonLMError):
    triton_code, http_status, openai_type, code = "UNAVAILABLE", 504, "server_error", "timeout"

    @classmethod
    def of_request(cls) -> TimedOut:
        """The request reached its own limit: a retry would compute all of it again, and reach the limit again."""
        error = cls("the request did not finish within its time limit")
        error.forbid_retries()
        return error


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
    AdapterNotFound,
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
# The prefix that Triton adds to an ensemble's or a queue's error.
_PREFIX = re.compile(r"^(?:in ensemble '[^']*', )?(?:\[request id: .*?\] )?")
_RESTRICTED = "listing and loading models needs the secret of this Triton; set TRITONLM_TRITON_SECRET"


def _unknown_model(match: re.Match[str]) -> TritonLMError:
    missing = match["reason"] == "is not found"
    kind, reason = (ModelNotFound, "does not exist") if missing else (NotLoaded, "is not loaded")
    return kind(f"the model {match['name']!r} {reason}", "model")


# Messages that Triton itself writes.
_TRITON_MESSAGES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], TritonLMError]], ...] = (
    (re.compile(r"Exceeds maximum queue size"), lambda match: QueueFull(match.string)),
    (re.compile(r"Request timeout expired"), lambda match: QueueTimeout(match.string)),
    (re.compile(r"^Server is stopping"), lambda _: Draining("this Triton is stopping")),
    # Triton is starting or stopping; a client that got answers before waits for it.
    (re.compile(r"^Server not ready"), lambda _: Unavailable("this Triton is not ready")),
    (re.compile(r"(?:protocol|API) is restricted"), lambda _: InsufficientScope(_RESTRICTED)),
    # A part of the ensemble has just died.
    (
        re.compile(r"^Internal error from Core$"),
        lambda _: Broken("a part of the model has died; it will be restarted"),
    ),
    (
        re.compile(r"Stub process '(?P<name>.*?)(?:_\d+_\d+)?' is not healthy"),
        lambda match: Broken(f"the process of {match['name']!r} has died; it will be restarted"),
    ),
    (re.compile(r"^Request for unknown model: '(?P<name>[^']*)' (?P<reason>.*)$"), _unknown_model),
    (
        re.compile(r"^requested model (?:version is not available for model )?'(?P<name>[^']*)'"),
        lambda match: NotLoaded(f"the model {match['name']!r} is not loaded", "model"),
    ),
)
# A model that refuses to load: Triton reports the exception followed by its traceback.
_REFUSED_LOAD = re.compile(r"\b(?P<kind>CheckpointError|NoRoom): (?P<message>.*?)(?:\s+At:\s.*)?$", re.DOTALL)


def from_code(code: str | None, message: str, param: str | None = None) -> TritonLMError:
    """The error with this code, as an HTTP body carries it."""
    return _BY_CODE.get(code or "", TritonLMError)(message, param)


def from_wire(text: str) -> TritonLMError:
    """The error that a message from Triton stands for, whether tritonlm's or Triton's own."""
    text = _PREFIX.sub("", text, count=1)
    if match := _TAIL.match(text):
        error = from_code(match["code"], match["message"], unquote(match["param"]) if match["param"] else None)
        # Headers do not travel; what an engine ends in time has reached its own limit.
        if isinstance(error, TimedOut):
            error.forbid_retries()
        return error
    if known := _from_triton_message(text):
        return known
    if match := _REFUSED_LOAD.search(text):
        return CheckpointError(match["message"]) if match["kind"] == "CheckpointError" else from_wire(match["message"])
    return TritonLMError(text)


def _from_triton_message(text: str) -> TritonLMError | None:
    for pattern, make_error in _TRITON_MESSAGES:
        if match := pattern.search(text):
            return make_error(match)
    return None
