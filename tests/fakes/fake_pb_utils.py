"""The part of Triton's `triton_python_backend_utils` that our models use, without Triton.

It keeps Triton's strictness where a model could get it wrong: text must be encodable, arrays must be arrays.
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
        wanted: list[str],
        parameters: dict[str, Any] | None = None,
        request_id: str = "",
    ) -> None:
        self._inputs, self._wanted, self._id = inputs, wanted, request_id
        self._parameters = json.dumps(parameters or {})

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self._inputs.items()]

    def requested_output_names(self) -> list[str]:
        return self._wanted

    def parameters(self) -> str:
        return self._parameters

    def request_id(self) -> str:
        return self._id


class Logger:
    """What was logged as an error, for tests to read; each test clears it first."""

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
    """One series of a family; every call is checked as Triton does."""

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
    """What was published, by name, for tests to read: the newest family of a name."""

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
