"""Every tensor of the model repository: name, type, shape and meaning. A tensor has the same name in every model.

A test compares each config.pbtxt and the table in model_repository/README.md with this module. The content of JSON
tensors is defined in `parameters`, `request` and `chunk`. numpy is imported only to pack an array, so that processes
that need only names start without it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[np.generic]"

# Triton's type names to numpy's.
NUMPY_TYPE = {"STRING": "object", "INT32": "int32", "INT64": "int64", "BOOL": "bool", "FP32": "float32"}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor as Triton sees it, without the batch dimension, which is always 1 (one prompt per request)."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    meaning: str
    optional: bool = False
    ragged: bool = False

    def pack(self, value: object) -> Array:
        """A value (scalar, text or list of numbers) as this tensor's array, batch dimension included."""
        import numpy as np  # noqa: PLC0415 (see above)

        if self.dtype == "STRING":
            data = value.encode() if isinstance(value, str) else value
            return np.array([[data]], dtype=object)
        return np.asarray(value, dtype=NUMPY_TYPE[self.dtype]).reshape(1, -1)

    def text(self, array: Array) -> str:
        """The string of a STRING tensor with one element."""
        value = array.reshape(-1)[0]
        return value.decode() if isinstance(value, bytes) else str(value)


# Inputs of an LM (the ensemble). All are optional, but exactly one prompt is needed.
TEXT_INPUT = TensorSpec("text_input", "STRING", (1,), "the prompt as text", optional=True)
INPUT_IDS = TensorSpec("input_ids", "INT32", (-1,), "or the prompt as token ids", optional=True, ragged=True)
MESSAGES = TensorSpec(
    "messages", "STRING", (1,), "or a chat as JSON: a list of messages, or an object with it and tools", optional=True
)
STREAM = TensorSpec("stream", "BOOL", (1,), "many responses as text is generated, or (default) one", optional=True)
SAMPLING_PARAMETERS = TensorSpec(
    "sampling_parameters", "STRING", (1,), "parameters as a JSON object (or flat request parameters)", optional=True
)
EXCLUDE_INPUT = TensorSpec(
    "exclude_input_in_output", "BOOL", (1,), "leave the prompt out of the text; default: only when streaming",
    optional=True,
)  # fmt: skip

# tokenize -> generate
PROMPT_IDS = TensorSpec("prompt_ids", "INT32", (-1,), "the prompt's token ids", optional=True, ragged=True)
REQUEST = TensorSpec("request", "STRING", (1,), "the validated request, as JSON", optional=True)

# tokenize -> caller, outside the ensemble
RENDERED_PROMPT = TensorSpec("rendered_prompt", "STRING", (1,), "a chat as text, as its template renders it")

# caller -> generate, outside the ensemble: cancel, ping, status, drain
CONTROL = TensorSpec("control", "STRING", (1,), "a command to the engine, as JSON", optional=True)
REPORT = TensorSpec("report", "STRING", (1,), "the engine's report on a command, as JSON")
EMBEDDING = TensorSpec("embedding", "FP32", (-1,), "the prompt as a unit vector, for a request with embed")

# generate -> detokenize: one tensor, since each tensor has a fixed transfer cost.
CHUNK = TensorSpec(
    "chunk", "STRING", (1,), "a part of the output, as JSON: a window of token ids, where to cut its text, …"
)

# detokenize -> caller
TEXT_OUTPUT = TensorSpec("text_output", "STRING", (1,), "the text of this response")
CHUNK_INDEX = TensorSpec("chunk_index", "INT32", (1,), "0, 1, 2 … without a gap")
FINISH_REASON = TensorSpec("finish_reason", "STRING", (1,), "empty, then stop, length, timeout or cancelled")
USAGE = TensorSpec("usage", "INT32", (3,), "tokens so far: prompt, completion, prompt tokens found in the cache")
TOKEN_IDS = TensorSpec("token_ids", "INT32", (-1,), "the new token ids (with return_token_ids)", ragged=True)
SEED = TensorSpec("seed", "INT64", (1,), "the seed in use, from the request or random")
LOGPROBS = TensorSpec("logprobs", "STRING", (1,), "log-probabilities by token text, as JSON, or empty")
PIECE = TensorSpec(
    "piece", "STRING", (1,), "with as_piece, instead of the other outputs: a JSON object that holds them by name"
)

LM_INPUTS = (TEXT_INPUT, INPUT_IDS, MESSAGES, STREAM, SAMPLING_PARAMETERS, EXCLUDE_INPUT)
LM_OUTPUTS = (TEXT_OUTPUT, CHUNK_INDEX, FINISH_REASON, USAGE, TOKEN_IDS, SEED, LOGPROBS, PIECE)
TOKENIZE_INPUTS = LM_INPUTS
TOKENIZE_OUTPUTS = tuple(replace(spec, optional=False, ragged=False) for spec in (PROMPT_IDS, REQUEST))
GENERATE_INPUTS = (PROMPT_IDS, REQUEST, CONTROL)
GENERATE_OUTPUTS = (CHUNK, REPORT, EMBEDDING, USAGE)
DETOKENIZE_INPUTS = (CHUNK,)
DETOKENIZE_OUTPUTS = tuple(replace(spec, ragged=False) for spec in LM_OUTPUTS)
