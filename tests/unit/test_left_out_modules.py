"""Parts of libraries that a process leaves out of its imports."""

from __future__ import annotations

import subprocess
import sys

from contract_tables import ROOT
from tritonlm.contract.imports import without_modules

# Prints what it checks, in a process that has not imported torch.
_LEAVE_OUT = """
from engine.runners.loading import import_meta_kernels, import_torch
import_torch()
import sys, torch
print("torch._meta_registrations" in sys.modules)
import_meta_kernels()
matrix = torch.empty(4, 4, device="meta")
print("torch._meta_registrations" in sys.modules, *torch.cholesky_inverse(matrix).shape)
"""


def test_a_module_is_empty_inside_and_as_usual_afterwards() -> None:
    sys.modules.pop("colorsys", None)
    with without_modules("colorsys", "json"):
        import colorsys  # noqa: PLC0415
        import json  # noqa: PLC0415 (imported before: it stays)

        assert not hasattr(colorsys, "rgb_to_hsv")
        assert json.loads("1") == 1
    import colorsys  # noqa: PLC0415

    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)


def test_an_engine_imports_torch_without_kernels_for_tensors_without_data_until_they_are_needed() -> None:
    folders = [str(ROOT / folder) for folder in ("client", "model_repository/generate/1")]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {folders}\n{_LEAVE_OUT}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.stdout.splitlines() == ["False", "True 4 4"], result.stderr
