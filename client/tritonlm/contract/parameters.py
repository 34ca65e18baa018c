"""The parameters of a request: names, types, ranges, defaults and meanings.

`SamplingParameters.from_mapping` is the only validation; the server uses it, and clients use it to fail early. Limits
that depend on a checkpoint (context, vocabulary) are checked where the checkpoint is known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from .errors import InvalidRequest, shown
from .readers import MAX_LIST, Biases, Boolean, Integer, Number, Reader, Stops, Text, TokenIds
from .structured_outputs import KINDS, OTHER_NAMES, StructuredOutputs, merge_names

MAX_TOKENS_LIMIT = 1_000_000
MAX_NAME_CHARACTERS = 64
MAX_SALT_CHARACTERS = 256


def _parameter(reader: Reader, meaning: str, default: Any = None, *, allowed: str) -> Any:
    metadata = {"reader": reader, "meaning": meaning, "allowed": allowed}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SamplingParameters:
    """One request's parameters. `None` means "not sent" where no value means the same."""

    max_tokens: int | None = _parameter(
        Integer(0, MAX_TOKENS_LIMIT), "maximum tokens to generate; 0 only with echo; not sent: 16 (chat: what fits)",
        allowed="0 …",
    )  # fmt: skip
    min_tokens: int = _parameter(
        Integer(0, MAX_TOKENS_LIMIT), "no end of text and no stop before this many tokens", 0, allowed="0 … max_tokens"
    )
    temperature: float = _parameter(Number(0, 2), "0 is greedy; higher is more random", 1.0, allowed="0 … 2")
    top_k: int = _parameter(
        Integer(-1, MAX_TOKENS_LIMIT), "sample among the k likeliest tokens; 0 or -1: all", 0, allowed="-1 …"
    )
    top_p: float = _parameter(
        Number(0, 1, open_low=True), "sample among the likeliest tokens of this total probability", 1.0,
        allowed="above 0 … 1",
    )  # fmt: skip
    min_p: float = _parameter(
        Number(0, 1), "drop tokens below this fraction of the likeliest token's probability", 0.0, allowed="0 … 1"
    )
    repetition_penalty: float = _parameter(
        Number(0.01, 10), "divides the logit of tokens seen in the prompt or the output", 1.0, allowed="0.01 … 10"
    )  # fmt: skip
    presence_penalty: float = _parameter(
        Number(-2, 2), "subtracted from the logit of each generated token", 0.0, allowed="-2 … 2"
    )
    frequency_penalty: float = _parameter(
        Number(-2, 2), "subtracted from a token's logit for each time it was generated", 0.0, allowed="-2 … 2"
    )
    logit_bias: dict[int, float] = _parameter(
        Biases(), "added to the logits of these token ids", {}, allowed="{id: -100 … 100}"
    )
    seed: int | None = _parameter(
        Integer(-(2**63), 2**63 - 1, "a 64-bit integer"), "same seed, same text; not sent: random, and reported",
        allowed="64-bit",
    )  # fmt: skip
    choice: int = _parameter(
        Integer(0, 1023), "the index of this choice among those with the same prompt and seed", 0, allowed="0 … 1023"
    )
    stop: tuple[str, ...] = _parameter(
        Stops(), "strings that end the text; they are not part of it", (), allowed="a string or 1 … 16 of them"
    )
    stop_token_ids: tuple[int, ...] = _parameter(
        TokenIds(MAX_LIST), "token ids that end the text", (), allowed="list of ids"
    )
    ignore_eos: bool = _parameter(Boolean(), "continue after end of text", False, allowed="true, false")
    skip_special_tokens: bool = _parameter(
        Boolean(), "leave special tokens out of the text", True, allowed="true, false"
    )
    logprobs: int | None = _parameter(
        Integer(0, 20), "log-probabilities of the tokens, with this many alternatives", allowed="0 … 20"
    )
    echo: bool = _parameter(
        Boolean(), "return the prompt first, with its log-probabilities if requested", False, allowed="true, false"
    )
    logprobs_start: int = _parameter(
        Integer(0, MAX_TOKENS_LIMIT),
        "with echo and logprobs: skip so many tokens of the prompt, which may then come from the cache",
        0, allowed="0 …",
    )  # fmt: skip
    truncate_prompt_tokens: int | None = _parameter(
        Integer(1, MAX_TOKENS_LIMIT), "keep only this many tokens at the end of the prompt", allowed="1 …"
    )
    add_special_tokens: bool = _parameter(
        Boolean(), "add the tokenizer's special tokens to a text prompt", True, allowed="true, false"
    )
    structured_outputs: dict[str, Any] = _parameter(
        StructuredOutputs(), "the text follows a JSON schema, a regular expression, one of some choices, or a grammar",
        {}, allowed=f"{{{' | '.join(KINDS)}: …}}",
    )  # fmt: skip
    adapter: str = _parameter(
        Text(
            MAX_NAME_CHARACTERS, f"an adapter's name: at most {MAX_NAME_CHARACTERS} letters, digits, '.', '_' and '-'",
            r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$",
        ),
        "the name of an adapter of this LM; empty: the base alone", "",
        allowed=f"up to {MAX_NAME_CHARACTERS} of A-Z a-z 0-9 . _ -",
    )  # fmt: skip
    cache_salt: str = _parameter(
        Text(MAX_SALT_CHARACTERS, f"a string of at most {MAX_SALT_CHARACTERS} characters"),
        "the prefix cache is shared only between requests of the same salt", "",
        allowed=f"up to {MAX_SALT_CHARACTERS} characters",
    )  # fmt: skip
    return_token_ids: bool = _parameter(Boolean(), "fill the output token_ids", False, allowed="true, false")
    as_piece: bool = _parameter(
        Boolean(), "return all outputs in the tensor piece, which costs less to transfer", False, allowed="true, false"
    )
    resume_token_ids: tuple[int, ...] = _parameter(
        TokenIds(MAX_TOKENS_LIMIT), "tokens that an earlier attempt generated; generation continues after them", (),
        allowed="list of ids",
    )  # fmt: skip
    priority: int = _parameter(Integer(1, 3), "1 is served first, 3 last", 2, allowed="1, 2, 3")
    timeout: float | None = _parameter(
        Number(0, 86_400, open_low=True), "time limit of the request, in seconds", allowed="above 0 … 86400"
    )

    def __post_init__(self) -> None:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens must be at least 1 (0 only with echo)", "max_tokens")
        if self.logprobs_start and (not self.echo or self.logprobs is None):
            raise InvalidRequest("logprobs_start needs echo and logprobs", "logprobs_start")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens must not be above max_tokens (got {self.min_tokens} and {self.max_tokens})", "min_tokens"
            )
        if self.resume_token_ids and self.seed is None and self.temperature > 0:
            raise InvalidRequest("resume_token_ids needs the seed of the first attempt, or temperature 0", "seed")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParameters:
        """Read and check every field; `null` means "not sent"; an unknown name is refused."""
        if not isinstance(values, Mapping):
            raise InvalidRequest.for_value("sampling_parameters", "a JSON object", values)
        values = merge_names(values)
        readers: dict[str, Reader] = {f.name: f.metadata["reader"] for f in fields(cls)}
        for name in values:
            if name not in readers:
                # Bytes, since the wire quotes each that is not ASCII with three characters.
                short = str(name).encode(errors="replace")[:64].decode(errors="ignore")
                raise InvalidRequest(
                    f"unknown parameter {shown(name)}; known are {', '.join((*readers, *OTHER_NAMES))}", short
                )
        return cls(**{name: readers[name](name, value) for name, value in values.items() if value is not None})

    @classmethod
    def from_json(cls, text: str, flat: Mapping[str, Any]) -> SamplingParameters:
        """Merge the JSON tensor (may be empty) and Triton's flat request parameters."""
        try:
            values = json.loads(text) if text else {}
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"sampling_parameters is not valid JSON: {error}", "sampling_parameters") from error
        if not isinstance(values, dict):
            raise InvalidRequest.for_value("sampling_parameters", "a JSON object", values)
        if both := sorted(values.keys() & flat.keys()):
            raise InvalidRequest(
                f"{shown(both[0])} is given twice: in sampling_parameters and as a parameter", both[0][:64]
            )
        return cls.from_mapping({**values, **flat})

    def to_mapping(self) -> dict[str, Any]:
        """The values that differ from the defaults, ready for JSON; `from_mapping` restores an equal object."""
        values: dict[str, Any] = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            default = spec.default if spec.default is not MISSING else {}
            if value != default:
                values[spec.name] = list(value) if isinstance(value, tuple) else value
        return values
