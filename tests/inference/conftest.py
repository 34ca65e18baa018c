"""A fixture that waits for a condition of another thread; and the tests of further ISA variants are marked as slow, and
measure nothing where they emulate instructions.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from engine.runners.native import weights

from .isa_variants import EMULATED, KERNEL_VARIANTS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every ISA variant but the one of this processor has to be compiled first."""
    for item in items:
        values = getattr(item, "callspec", None) and item.callspec.params.values()  # type: ignore[attr-defined]
        if any(isinstance(value, str) and value in KERNEL_VARIANTS and value != "all" for value in values or ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def packs_without_measuring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """To measure whether packed weights are faster takes emulated instructions tens of seconds."""
    values = getattr(request.node, "callspec", None) and request.node.callspec.params.values()
    if any(isinstance(value, str) and value in EMULATED for value in values or ()):
        monkeypatch.setenv(weights.BF16_BITS, "12")


@pytest.fixture
def wait_for() -> Callable[[Callable[[], bool]], None]:
    def wait(condition: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "timeout"
            time.sleep(0.01)

    return wait
