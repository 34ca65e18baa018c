"""A fake of the part of Triton's `triton_python_backend_utils` that the models use.

It checks what Triton checks: text must be encodable, and arrays must be arrays.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np
from tritonlm.contract.tensors import Array


class Tensor:
    def __init__(self, name: str, array: Array) -> None:
        assert isinstance(array, np.ndarray), f"{name} must be an array"
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Array:
        return self._array


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        message.encode()
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def error(self) -> TritonError | None:
        return self._error


class InferenceRequest:
    def __init__(
        self,
        inputs: dict[str, Array],
        outputs: list[str],
        parameters: dict[str, Any] | None = None,
        request_id: str = "",
    ) -> None:
        self._inputs, self._outputs, self._id = inputs, outputs, request_id
        self._parameters = json.dumps(parameters or {})

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self._inputs.items()]

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def parameters(self) -> str:
        return self._parameters

    def request_id(self) -> str:
        return self._id


class Logger:
    """Records logged errors for tests. Each test clears them first."""

    errors: ClassVar[list[str]] = []

    @classmethod
    def log_error(cls, message: str) -> None:
        message.encode()
        cls.errors.append(message)

    @classmethod
    def log_warn(cls, message: str) -> None:
        message.encode()


class TritonModelException(Exception):
    pass


class Metric:
    """One series of a family. It checks each call as Triton does."""

    def __init__(self, kind: int, labels: dict[str, str], buckets: list[float] | None = None) -> None:
        assert (kind == MetricFamily.HISTOGRAM) == (buckets is not None)
        self.kind, self.labels, self.value, self.observed = kind, labels, 0.0, list[float]()

    def increment(self, amount: float) -> None:
        assert self.kind != MetricFamily.HISTOGRAM
        assert amount >= 0 or self.kind == MetricFamily.GAUGE
        self.value += amount

    def set(self, value: float) -> None:
        assert self.kind == MetricFamily.GAUGE
        self.value = value

    def observe(self, value: float) -> None:
        assert self.kind == MetricFamily.HISTOGRAM
        self.observed.append(value)


class MetricFamily:
    """Records families by name for tests: the latest one of each name."""

    COUNTER, GAUGE, HISTOGRAM = range(3)
    families: ClassVar[dict[str, MetricFamily]] = {}

    def __init__(self, name: str, description: str, kind: int) -> None:
        assert description
        self.name, self.kind, self.metrics = name, kind, list[Metric]()
        self.families[name] = self

    def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Metric:  # noqa: N802 (Triton's)
        self.metrics.append(Metric(self.kind, labels, buckets))
        return self.metrics[-1]


TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
