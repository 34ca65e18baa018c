"""The layering table holds in this repository, and the check reports each kind of violation."""

from __future__ import annotations

from pathlib import Path

import check_layers
import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_this_repository_follows_the_table() -> None:
    assert check_layers.check(ROOT) == []


def test_every_rule_covers_files_that_exist() -> None:
    for rule in check_layers.RULES:
        for pattern in rule.files:
            assert list(ROOT.glob(pattern)), f"no file matches {pattern}"


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("model_repository/generate/1/engine/engine.py", "import triton_python_backend_utils", "speaks token ids"),
        ("model_repository/generate/1/engine/engine.py", "from tritonlm import serving", "speaks token ids"),
        ("model_repository/generate/1/engine/scheduling/scheduler.py", "def f():\n    import torch", "plain Python"),
        ("model_repository/generate/1/engine/scheduling/scheduler.py", "from .helper import x", "through"),
        ("model_repository/tokenize/1/model.py", "from torch import nn", "thin adapter"),
        ("client/tritonlm/contract/chunk.py", "import pydantic", "standard library and numpy"),
        ("client/tritonlm/serving/triton.py", "import torch", "processes, not tensors"),
    ],
)
def test_a_violation_is_reported_with_file_line_and_reason(tmp_path: Path, file: str, source: str, reason: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    (path.parent / "helper.py").write_text("import torch\n", encoding="utf-8")
    path.write_text(f'"""A module."""\n{source}\n', encoding="utf-8")
    breaches = [breach for breach in check_layers.check(tmp_path) if breach.startswith(f"{file}:")]
    assert len(breaches) == 1
    assert reason in breaches[0]


@pytest.mark.parametrize("source", ["from tritonlm.b import y", "def f():\n    from . import b"])
def test_a_circle_is_reported_with_its_modules(tmp_path: Path, source: str) -> None:
    package = tmp_path / "client" / "tritonlm"
    package.mkdir(parents=True)
    (package / "a.py").write_text(source, encoding="utf-8")
    (package / "b.py").write_text("import tritonlm.c", encoding="utf-8")
    (package / "c.py").write_text("if TYPE_CHECKING:\n    from .a import z", encoding="utf-8")
    (line,) = check_layers.check(tmp_path)
    assert "circle" in line
    assert all(f"client/tritonlm/{name}.py" in line for name in "abc")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("model_repository/generate/1/engine/engine.py", "from tritonlm.contract import Chunk\nimport torch"),
        ("client/tritonlm/contract/chunk.py", "import json\nimport numpy as np\nfrom . import tensors"),
    ],
)
def test_allowed_imports_pass(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    assert check_layers.check(tmp_path) == []
