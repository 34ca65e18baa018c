"""A fixture that waits for a condition of another thread; and the tests of further ISA variants are marked as slow."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from .isa_variants import VARIANTS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every ISA variant but the one of this processor has to be compiled first."""
    for item in items:
        values = getattr(item, "callspec", None) and item.callspec.params.values()  # type: ignore[attr-defined]
        if any(isinstance(value, str) and value in VARIANTS and value != "all" for value in values or ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def wait_for() -> Callable[[Callable[[], bool]], None]:
    def wait(condition: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "timeout"
            time.sleep(0.01)

    return wait
