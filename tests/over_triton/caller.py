"""A test client: one request over gRPC with `tritonclient`, whose responses are read one by one.

Every wait has a limit, and leaving the context ends the stream. It knows the contract's tensors, not the server.
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
    # By time.monotonic().
    arrived_at: float


@dataclass(frozen=True)
class Answer:
    """All responses to a request that ended without an error."""

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
    """The LM's inputs as arrays, by name; values that are arrays already are not converted."""
    specs = {spec.name: spec for spec in LM_INPUTS}
    return {name: value if isinstance(value, np.ndarray) else specs[name].pack(value) for name, value in inputs.items()}


def _wire_input(name: str, array: Tensor) -> grpc.InferInput:
    dtypes = {spec.name: spec.dtype for spec in LM_INPUTS}
    tensor = grpc.InferInput(name, list(array.shape), _WIRE_TYPE.get(dtypes[name], dtypes[name]))
    tensor.set_data_from_numpy(array)
    return tensor


class Call:
    """A running request: a context manager in which its responses can be read."""

    def __init__(
        self,
        address: str,
        inputs: Mapping[str, object],
        request_id: str = "",
        parameters: Mapping[str, Any] | None = None,
        send_now: bool = True,
    ) -> None:
        self.id, self._inputs, self._parameters = request_id, inputs, parameters or {}
        self._arrived: queue.SimpleQueue[tuple[Any, Any, float]] = queue.SimpleQueue()
        self._client = grpc.InferenceServerClient(address)
        self._client.start_stream(
            lambda result, error: self._arrived.put((result, error, time.monotonic())), stream_timeout=WAIT_SECONDS
        )
        # The arrival time of the last response that was read.
        self.last_arrival = time.monotonic()
        if send_now:
            try:
                self.send()
            except BaseException:
                self.close()
                raise

    def send(self) -> None:
        """Send the request over the open stream."""
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
        """The next response; an error is raised."""
        result, error, self.last_arrival = self._arrived.get(timeout=WAIT_SECONDS)
        if error is not None:
            raise from_wire(error.message())
        return _read(result, self.last_arrival)

    def __iter__(self) -> Iterator[Response]:
        while True:
            response = self.next()
            yield response
            if response.final:
                return

    def read_all(self, *before: Response) -> Answer:
        """Read to the end (`before` has been read already); no response may follow the final one."""
        responses = [*before, *self]
        assert self.is_over(), "a response came after the final one"
        return Answer(responses)

    def is_over(self) -> bool:
        """Wait until Triton has ended the stream; return whether all of its responses have been read."""
        self._client.stop_stream()
        return self._arrived.empty()


def complete(address: str, prompt: str, *, stream: bool = True, **parameters: Any) -> Answer:
    """Send a prompt and read all responses."""
    with call(address, prompt, stream=stream, **parameters) as request:
        return request.read_all()


def call(
    address: str, prompt: str, *, stream: bool = True, request_id: str = "", send_now: bool = True, **parameters: Any
) -> Call:
    """A request for a completion without the prompt, streamed or whole; with `send_now=False` it is sent later."""
    inputs: dict[str, object] = {TEXT_INPUT.name: prompt, STREAM.name: stream, EXCLUDE_INPUT.name: True}
    # Triton's own request parameters cannot be lists.
    lists = {name: value for name, value in parameters.items() if isinstance(value, (list, tuple, dict))}
    if lists:
        inputs[SAMPLING_PARAMETERS.name] = json.dumps(lists)
    flat = {name: value for name, value in parameters.items() if name not in lists}
    return Call(address, inputs, request_id, flat, send_now)


def _read(result: grpc.InferResult, arrived_at: float) -> Response:
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
        arrived_at=arrived_at,
    )
