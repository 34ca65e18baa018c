"""The tables of model_repository/README.md, made from the contract. Run it to write them anew.

    python tests/contract_tables.py

A test holds the README to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from tritonlm.contract import SamplingParameters, tensors
from tritonlm.contract.tensors import TensorSpec

README = Path(__file__).resolve().parents[1] / "model_repository" / "README.md"

_WAYS = (
    ("caller → LM", tensors.LM_INPUTS),
    ("LM → caller", tensors.LM_OUTPUTS),
    ("tokenize → generate", tensors.TOKENIZE_OUTPUTS),
    ("generate → detokenize", tensors.CHUNK_TENSORS),
    ("caller → generate", (tensors.CONTROL,)),
    ("generate → caller", (tensors.REPORT,)),
)


def tensor_table() -> str:
    rows = [
        (way, f"`{spec.name}`", f"{spec.dtype} {_shape(spec)}", spec.meaning) for way, specs in _WAYS for spec in specs
    ]
    return _table(("way", "tensor", "type", "meaning"), rows)


def parameter_table() -> str:
    rows = []
    for spec in fields(SamplingParameters):
        default = spec.default if spec.default is not MISSING else {}
        shown = "–" if default in (None, (), {}) else f"{default:g}" if isinstance(default, float) else str(default)
        rows.append((f"`{spec.name}`", spec.metadata["allowed"], shown.lower(), spec.metadata["meaning"]))
    return _table(("parameter", "allowed", "default", "meaning"), rows)


def with_tables(readme: str) -> str:
    """The README's text with both tables as the contract has them now."""
    for name, table in (("tensors", tensor_table()), ("parameters", parameter_table())):
        parts = re.split(rf"(<!-- {name}: .*? -->\n)(.*?)(<!-- end -->)", readme, maxsplit=1, flags=re.DOTALL)
        assert len(parts) == 5, f"the README needs a place for the table of {name}"
        before, begin, _, end, after = parts
        readme = before + begin + table + end + after
    return readme


def _shape(spec: TensorSpec) -> str:
    return "[" + ", ".join("n" if size == -1 else str(size) for size in spec.dims) + "]"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def lines() -> Iterator[str]:
        for row in (head, ("---",) * len(head), *rows):
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n"

    return "".join(lines())


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
