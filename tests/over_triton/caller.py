"""One request over gRPC, as a caller makes it with `tritonclient`: sent, then its responses read one by one.

Every wait has a limit, and leaving the context ends the stream. It knows the contract's tensors, not who serves them.
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient import grpc
from tritonlm.contract import Usage
from tritonlm.contract.errors import from_wire
from tritonlm.contract.tensors import (
    CHUNK_INDEX,
    EXCLUDE_INPUT,
    FINISH_REASON,
    LM_INPUTS,
    SAMPLING_PARAMETERS,
    SEED,
    STREAM,
    TEXT_INPUT,
    TEXT_OUTPUT,
    TOKEN_IDS,
    USAGE,
)
from tritonlm.contract.tensors import Array as Tensor

LM = "tiny"
WAIT_SECONDS = 60.0
_WIRE_TYPE = {"STRING": "BYTES"}


@dataclass(frozen=True)
class Response:
    text: str
    index: int
    finish_reason: str
    usage: Usage
    token_ids: list[int]
    seed: int
    final: bool
    # A moment of time.monotonic().
    at: float


@dataclass(frozen=True)
class Answer:
    """All responses to a request that ended well."""

    responses: list[Response]

    @property
    def text(self) -> str:
        return "".join(response.text for response in self.responses)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for response in self.responses for token_id in response.token_ids]

    @property
    def last(self) -> Response:
        return self.responses[-1]


def lm_inputs(inputs: Mapping[str, object]) -> dict[str, Tensor]:
    """Plain values as the arrays of the LM's inputs, by name; what is an array already stays as it is."""
    specs = {spec.name: spec for spec in LM_INPUTS}
    return {name: value if isinstance(value, np.ndarray) else specs[name].pack(value) for name, value in inputs.items()}


def _wire_input(name: str, array: Tensor) -> grpc.InferInput:
    dtypes = {spec.name: spec.dtype for spec in LM_INPUTS}
    tensor = grpc.InferInput(name, list(array.shape), _WIRE_TYPE.get(dtypes[name], dtypes[name]))
    tensor.set_data_from_numpy(array)
    return tensor


class Call:
    """A request under way: a context, inside which its responses can be read."""

    def __init__(
        self,
        address: str,
        inputs: Mapping[str, object],
        request_id: str = "",
        parameters: Mapping[str, Any] | None = None,
        at_once: bool = True,
    ) -> None:
        self.id, self._inputs, self._parameters = request_id, inputs, parameters or {}
        self._arrived: queue.SimpleQueue[tuple[Any, Any, float]] = queue.SimpleQueue()
        self._client = grpc.InferenceServerClient(address)
        self._client.start_stream(
            lambda result, error: self._arrived.put((result, error, time.monotonic())), stream_timeout=WAIT_SECONDS
        )
        # When the last of what has been read arrived.
        self.last_at = time.monotonic()
        if at_once:
            try:
                self.send()
            except BaseException:
                self.close()
                raise

    def send(self) -> None:
        """Send the request over the stream that is open."""
        self._client.async_stream_infer(
            LM,
            [_wire_input(name, array) for name, array in lm_inputs(self._inputs).items()],
            request_id=self.id,
            parameters=dict(self._parameters),
            enable_empty_final_response=True,
        )

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def next(self) -> Response:
        """The next response; the error that came instead is raised."""
        result, error, self.last_at = self._arrived.get(timeout=WAIT_SECONDS)
        if error is not None:
            raise from_wire(error.message())
        return _read(result, self.last_at)

    def __iter__(self) -> Iterator[Response]:
        while True:
            response = self.next()
            yield response
            if response.final:
                return

    def answer(self, *before: Response) -> Answer:
        """Read to the end (`before` has been read already); nothing may come after the final response."""
        responses = [*before, *self]
        assert self.is_over(), "a response came after the final one"
        return Answer(responses)

    def is_over(self) -> bool:
        """Wait until Triton has ended the stream; whether everything that it sent has been read."""
        self._client.stop_stream()
        return self._arrived.empty()


def ask(address: str, prompt: str, *, stream: bool = True, **parameters: Any) -> Answer:
    """A prompt's whole answer."""
    with call(address, prompt, stream=stream, **parameters) as made:
        return made.answer()


def call(
    address: str, prompt: str, *, stream: bool = True, request_id: str = "", at_once: bool = True, **parameters: Any
) -> Call:
    """Ask for a prompt's answer without the prompt itself, streamed or whole; where not at once, when it is sent."""
    inputs: dict[str, object] = {TEXT_INPUT.name: prompt, STREAM.name: stream, EXCLUDE_INPUT.name: True}
    # Lists are not possible among Triton's own parameters.
    lists = {name: value for name, value in parameters.items() if isinstance(value, (list, tuple, dict))}
    if lists:
        inputs[SAMPLING_PARAMETERS.name] = json.dumps(lists)
    flat = {name: value for name, value in parameters.items() if name not in lists}
    return Call(address, inputs, request_id, flat, at_once)


def _read(result: grpc.InferResult, at: float) -> Response:
    def numbers(name: str) -> list[int]:
        return [int(value) for value in result.as_numpy(name).reshape(-1)]

    return Response(
        text=TEXT_OUTPUT.text(result.as_numpy(TEXT_OUTPUT.name)),
        index=numbers(CHUNK_INDEX.name)[0],
        finish_reason=FINISH_REASON.text(result.as_numpy(FINISH_REASON.name)),
        usage=Usage(*numbers(USAGE.name)),
        token_ids=numbers(TOKEN_IDS.name),
        seed=numbers(SEED.name)[0],
        final=result.get_response().parameters["triton_final_response"].bool_param,
        at=at,
    )
