"""Fields of quantization_config with their types, and errors that name them. This module knows no format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .layout import QuantizationError


class Fields:
    def __init__(self, values: Any, path: str = "quantization_config") -> None:
        if not isinstance(values, Mapping):
            raise QuantizationError(f"{path} is {values!r}, not an object")
        self._values, self.path = values, path

    def _value(self, names: Sequence[str], default: Any) -> tuple[str, Any]:
        name = next((name for name in names if self._values.get(name) is not None), names[0])
        value = self._values.get(name)
        return f"{self.path}.{name}", default if value is None else value

    def integer(self, *names: str, default: int | None = None, allowed: Sequence[int] = ()) -> int:
        """The first of these fields that there is."""
        path, value = self._value(names, default)
        if value is None:
            raise QuantizationError(f"{path} is missing")
        if not isinstance(value, int) or isinstance(value, bool):
            raise QuantizationError(f"{path} is {value!r}, not a whole number")
        if allowed and value not in allowed:
            raise QuantizationError(f"{path} is {value}; what is read is {' or '.join(map(str, allowed))}")
        return value

    def group(self, *names: str, default: int | None = None) -> int:
        """The size of a group, or -1."""
        size = self.integer(*names, default=default)
        if size != -1 and size < 1:
            path, _ = self._value(names, default)
            raise QuantizationError(f"{path} is {size}, neither the size of a group nor -1")
        return size

    def flag(self, name: str, default: bool) -> bool:
        path, value = self._value((name,), default)
        if not isinstance(value, bool):
            raise QuantizationError(f"{path} is {value!r}, not true or false")
        return value

    def text(self, *names: str, default: str, allowed: Sequence[str] = ()) -> str:
        """In lower case."""
        path, value = self._value(names, default)
        if not isinstance(value, str) or (allowed and value.lower() not in allowed):
            raise QuantizationError(f"{path} is {value!r}; what is read is {' or '.join(allowed) or 'a text'}")
        return value.lower()

    def pair(self, name: str) -> tuple[int, int] | None:
        """Two sizes, as [128, 128], or nothing."""
        path, value = self._value((name,), None)
        if value is None:
            return None
        sizes = value if isinstance(value, list) else []
        if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise QuantizationError(f"{path} is {value!r}, not two sizes such as [128, 128]")
        return sizes[0], sizes[1]

    def names(self, *names: str) -> list[str]:
        path, value = self._value(names, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise QuantizationError(f"{path} is {value!r}, not a list of names")
        return value

    def part(self, name: str) -> Fields | None:
        path, value = self._value((name,), None)
        return None if value is None else Fields(value, path)

    def parts(self, name: str) -> list[Fields]:
        """The objects of an object, by name."""
        path, value = self._value((name,), {})
        if not isinstance(value, Mapping):
            raise QuantizationError(f"{path} is {value!r}, not an object")
        return [Fields(part, f"{path}.{key}") for key, part in value.items()]

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def __iter__(self) -> Iterator[str]:
        return map(str, self._values)

    def refuse(self, name: str, reason: str) -> None:
        """Where the field has a value that is not empty."""
        path, value = self._value((name,), None)
        if value not in (None, False, [], {}):
            raise QuantizationError(f"{path} is {value!r}: {reason}")

    def refuse_quantized(self, modules: Sequence[str], *names: str) -> None:
        """Where a list of modules that are not quantized names one that is."""
        path, _ = self._value(names, [])
        for pattern in self.names(*names):
            for module in modules:
                if matches(module, pattern, path):
                    raise QuantizationError(f"{path} names {pattern}, but {module} is quantized in the files")


def matches(module: str, pattern: str, path: str) -> bool:
    """As Hugging Face's code does: the pattern is the module, one around it, its end, or a regular expression."""
    try:
        is_match = re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) is not None
    except re.error as error:
        raise QuantizationError(f"{path} has {pattern!r}, which is no regular expression: {error}") from None
    return is_match or module.endswith(pattern)
