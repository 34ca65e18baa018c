"""Turns a call's arguments into its sequences: prompts × choices, each of them one request to an LM.

Arguments that can be checked without a model are checked here; errors name the argument. No I/O here.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tritonlm.client.model_names import ServedModel
from tritonlm.client.transport import Call, Prompt
from tritonlm.client.types import CachedTokens, CompletionUsage, Piece
from tritonlm.contract import InvalidRequest, SamplingParameters, TimedOut
from tritonlm.contract.structured_outputs import check_unicode

T = TypeVar("T")
# The limit of sequences per call: each occupies a slot of the engine.
MAX_SEQUENCES = 128
# Prompts of a call that are computed at once where it may have more of them: a long list leaves slots to others.
_MAX_TOGETHER = 32
# Parameters that the client sets itself; a call cannot pass them.
RESERVED_PARAMETERS = ("choice", "as_piece", "resume_token_ids", "timeout")

PromptArgument = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Plan:
    """The sequences of one call. Sequence i is choice i % each of prompt i // each."""

    id: str
    created: int
    model: ServedModel
    calls: list[Call]
    # Choices returned per prompt, and sequences computed per prompt (more than n with best_of).
    n: int
    each: int
    stream: bool
    include_usage: bool
    parameters: SamplingParameters
    # Whether log-probabilities are returned, or only used for best_of.
    show_logprobs: bool

    def __post_init__(self) -> None:
        assert len(self.calls) % self.each == 0
        assert 1 <= self.n <= self.each


def completion_plan(
    model: ServedModel,
    prompt: PromptArgument,
    *,
    n: int | None = None,
    best_of: int | None = None,
    suffix: str | None = None,
    stream: bool | None = None,
    stream_options: Mapping[str, Any] | None = None,
    user: str | None = None,
    request_id: str | None = None,
    timeout: float = 600.0,
    **parameters: Any,
) -> Plan:
    prompts = read_prompts(prompt)
    if suffix is not None:
        raise InvalidRequest(
            "suffix is not supported: this model has no fill-in-the-middle tokens; leave it out", "suffix"
        )
    check_text("user", user)
    streamed, include_usage = read_stream(stream, stream_options)
    count = _count("n", n, 1)
    each = _count("best_of", best_of, count)
    if each < count:
        raise InvalidRequest(f"best_of must be at least n (got {each} and {count})", "best_of")
    if each > count and streamed:
        raise InvalidRequest("best_of cannot be streamed: the best choice is only known at the end", "best_of")
    sampling = read_parameters(model.parameters(parameters))
    show = sampling.logprobs is not None
    sent = sampling.to_mapping()
    if each > count and not show:
        sent["logprobs"] = 0
    common = _Common(model, request_id, "cmpl", streamed, timeout, sent, each)
    return Plan(
        common.id, int(time.time()), model, common.calls(prompts), count, each, streamed, include_usage, sampling, show
    )


def chat_plan(
    model: ServedModel,
    chat: str,
    *,
    further: Mapping[str, Any] | None = None,
    n: int | None = None,
    logprobs: bool | None = None,
    top_logprobs: int | None = None,
    max_tokens: int | None = None,
    max_completion_tokens: int | None = None,
    stream: bool | None = None,
    stream_options: Mapping[str, Any] | None = None,
    user: str | None = None,
    request_id: str | None = None,
    timeout: float = 600.0,
    **parameters: Any,
) -> Plan:
    """`chat`: the messages and tools as JSON. `further`: parameters that the caller did not send."""
    if "echo" in parameters:
        raise InvalidRequest("echo is not offered for chats; use completions", "echo")
    check_text("user", user)
    streamed, include_usage = read_stream(stream, stream_options)
    limit = _read_chat_limit(max_tokens, max_completion_tokens)
    _check_logprobs(logprobs, top_logprobs)
    sampling = read_parameters({**model.parameters(parameters), "max_tokens": limit})
    count = _count("n", n, 1)
    sent = sampling.to_mapping() | ({"logprobs": top_logprobs or 0} if logprobs else {}) | dict(further or {})
    common = _Common(model, request_id, "chatcmpl", streamed, timeout, sent, count)
    calls = common.calls([Prompt(messages=chat)])
    return Plan(
        common.id, int(time.time()), model, calls, count, count, streamed, include_usage, sampling, bool(logprobs)
    )


def _read_chat_limit(max_tokens: int | None, max_completion_tokens: int | None) -> int | None:
    if max_tokens is not None and max_completion_tokens is not None and max_tokens != max_completion_tokens:
        raise InvalidRequest(
            "max_tokens and max_completion_tokens have the same meaning; send one", "max_completion_tokens"
        )
    limit = max_tokens if max_completion_tokens is None else max_completion_tokens
    if limit == 0:
        raise InvalidRequest("max_tokens must be at least 1", "max_tokens")
    return limit


def _check_logprobs(logprobs: Any, top_logprobs: int | None) -> None:
    if not _is_flag(logprobs):
        raise InvalidRequest("logprobs must be true or false (top_logprobs is the number of alternatives)", "logprobs")
    if top_logprobs is not None and not logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
    try:
        SamplingParameters.from_mapping({"logprobs": top_logprobs or 0})
    except InvalidRequest as error:
        raise InvalidRequest(error.message.replace("logprobs", "top_logprobs", 1), "top_logprobs") from None


@dataclass(frozen=True)
class _Common:
    """The settings shared by all sequences of a call."""

    model: ServedModel
    request_id: str | None
    prefix: str
    stream: bool
    timeout: float
    parameters: dict[str, Any]
    each: int
    id: str = field(init=False)

    def __post_init__(self) -> None:
        check_text("request_id", self.request_id)
        if (
            isinstance(self.timeout, bool)
            or not isinstance(self.timeout, (int, float))
            or not 0 < self.timeout <= 86_400
        ):
            raise InvalidRequest("timeout must be a number of seconds above 0, at most 86400", "timeout")
        object.__setattr__(self, "id", f"{self.prefix}-{self.request_id or secrets.token_hex(12)}")

    def calls(self, prompts: Sequence[Prompt]) -> list[Call]:
        if len(prompts) * self.each > MAX_SEQUENCES:
            raise InvalidRequest(
                f"prompts × choices must be at most {MAX_SEQUENCES} (got {len(prompts) * self.each}); send fewer",
                "n" if self.each > 1 else "prompt",
            )
        # Choices of a prompt share its seed and differ by their number. Equal prompts get different seeds.
        seeds = [self.parameters.get("seed", secrets.randbits(63)) for _ in prompts]
        # The engine cancels by id, so ids must be unique even if a caller sends the same id twice.
        root = f"{self.id}-{secrets.token_hex(4)}"
        return [
            Call(
                self.model.lm,
                f"{root}-{index}",
                prompt,
                {
                    **self.parameters,
                    "seed": seeds[index // self.each],
                    **({"choice": index % self.each} if index % self.each else {}),
                },
                self.stream,
                self.timeout,
            )
            for index, prompt in enumerate(prompt for prompt in prompts for _ in range(self.each))
        ]


def read_prompts(prompt: Any, param: str = "prompt") -> list[Prompt]:
    """A text, a list of texts, a list of ids (one prompt), or a list of lists of ids."""

    def is_ids(value: Any) -> bool:
        return bool(value) and isinstance(value, (list, tuple)) and all(type(item) is int for item in value)

    if isinstance(prompt, str):
        check_unicode(param, prompt)
        return [Prompt(text=prompt)]
    if is_ids(prompt):
        return [Prompt(input_ids=_ids(prompt, param))]
    if isinstance(prompt, (list, tuple)) and prompt:
        if all(isinstance(item, str) for item in prompt):
            return [read_prompts(item, param)[0] for item in prompt]
        if all(is_ids(item) for item in prompt):
            return [Prompt(input_ids=_ids(item, param)) for item in prompt]
    raise InvalidRequest(
        f"{param} must be a string, a list of strings, a list of token ids or a list of such lists; no list may be "
        "empty",
        param,
    )


def _ids(values: Sequence[int], param: str) -> tuple[int, ...]:
    if not all(0 <= value < 2**31 for value in values):
        raise InvalidRequest(f"{param} holds a number that is not a token id", param)
    return tuple(values)


def in_parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """A long list in the parts that are computed one after the other."""
    for first in range(0, len(items), _MAX_TOGETHER):
        yield items[first : first + _MAX_TOGETHER]


def in_timed_parts(items: Sequence[T], timeout: float) -> Iterator[tuple[Sequence[T], float]]:
    """The same, each part with what is left of the time for all of them when its turn comes."""
    deadline = time.monotonic() + timeout
    for part in in_parts(items):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimedOut.of_request()
        yield part, left


def read_stream(stream: bool | None, options: Mapping[str, Any] | None) -> tuple[bool, bool]:
    """Whether to stream, and whether to end the stream with the usage."""
    if not _is_flag(stream):
        raise InvalidRequest("stream must be true or false", "stream")
    if options is None:
        return bool(stream), False
    if not stream:
        raise InvalidRequest("stream_options needs stream: true", "stream_options")
    if not isinstance(options, Mapping):
        raise InvalidRequest('stream_options must be an object such as {"include_usage": true}', "stream_options")
    for name, value in options.items():
        # No obfuscation is sent: what declines it is honoured.
        if name == "include_obfuscation" and value:
            param = f"stream_options.{name}"
            raise InvalidRequest(f"{param} must be false: no obfuscation is ever sent", param)
        if name not in ("include_usage", "include_obfuscation"):
            raise InvalidRequest(f"stream_options has only include_usage (got {str(name)[:64]!r})", "stream_options")
    include = options.get("include_usage")
    if not _is_flag(include):
        raise InvalidRequest("stream_options.include_usage must be true or false", "stream_options.include_usage")
    return True, bool(include)


def read_parameters(values: Mapping[str, Any]) -> SamplingParameters:
    for name in RESERVED_PARAMETERS:
        if values.get(name) is not None:
            raise InvalidRequest(f"{name} is not a parameter of this call", name)
    return SamplingParameters.from_mapping(
        {name: value for name, value in values.items() if name not in RESERVED_PARAMETERS}
    )


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _count(name: str, value: Any, default: int) -> int:
    if value is None:
        return default
    if type(value) is not int or not 1 <= value <= MAX_SEQUENCES:
        raise InvalidRequest(f"{name} must be an integer from 1 to {MAX_SEQUENCES} (got {value!r:.60})", name)
    return value


def check_text(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, str) and len(value) <= 256):
        raise InvalidRequest(f"{name} must be a string of at most 256 characters", name)
    check_unicode(name, value or "")


def usage_of(plan: Plan, last: Mapping[int, Piece]) -> CompletionUsage:
    """The usage up to each sequence's last piece so far. A prompt counts once for all of its choices."""
    firsts = [piece for index, piece in last.items() if index % plan.each == 0]
    prompt = sum(piece.prompt_tokens for piece in firsts)
    completion = sum(piece.completion_tokens for piece in last.values())
    return CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=CachedTokens(cached_tokens=sum(piece.cached_tokens for piece in firsts)),
    )
