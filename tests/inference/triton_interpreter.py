"""Finds triton-lang and sets its interpreter, for the tests of the GPU's kernels on a CPU.

The interpreter computes no bfloat16 products; a load on a GPU compares them (`self_check`). No other test needs the
wheel (188 MB), so the setup does not install it, and without it the tests of the kernels are skipped. To run them:

    pip install --no-deps --target .cache/triton-lang triton==3.6.0
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from engine.runners.gpu.block_attention import INTERPRETED

_FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "triton-lang"


def _find() -> bool:
    if _FOLDER.is_dir() and importlib.util.find_spec("triton") is None:
        sys.path.append(str(_FOLDER))
    return importlib.util.find_spec("triton") is not None


needs_triton = pytest.mark.skipif(
    not _find(), reason="not installed: pip install --no-deps --target .cache/triton-lang triton==3.6.0"
)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """For this test alone: other engines of the process compute without kernels. It is read when they are imported."""
    monkeypatch.setenv(INTERPRETED, "1")
