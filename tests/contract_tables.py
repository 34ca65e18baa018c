"""Generates the tables in model_repository/README.md and in docs/ from the code. Run it to update them:

    python tests/contract_tables.py

A test checks that the files are up to date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from pydantic_settings import BaseSettings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "model_repository" / "generate" / "1"))
sys.path.insert(0, str(ROOT / "tests"))

from engine.config import EngineConfig, environment_name  # noqa: E402
from engine.monitoring.metrics import METRIC_SPECS  # noqa: E402
from fakes.fake_transport import FakeTransport  # noqa: E402
from tritonlm import AsyncClient  # noqa: E402
from tritonlm.contract import SamplingParameters, tensors  # noqa: E402
from tritonlm.contract.structured_outputs import OTHER_NAMES  # noqa: E402
from tritonlm.contract.tensors import TensorSpec  # noqa: E402
from tritonlm.gateway.app import create_app  # noqa: E402
from tritonlm.gateway.limits.scopes import PUBLIC_PATHS, scope_of  # noqa: E402
from tritonlm.gateway.metrics import REGISTRY  # noqa: E402
from tritonlm.gateway.settings import GatewaySettings  # noqa: E402
from tritonlm.serving.settings import Settings, env_name, option_name  # noqa: E402

README = ROOT / "model_repository" / "README.md"
SETTINGS = ROOT / "docs" / "settings.md"
OBSERVABILITY = ROOT / "docs" / "observability.md"
# The suffixes that the exposition format adds to a metric's name.
SUFFIXES = {"counter": "total", "info": "info"}
SECURITY = ROOT / "docs" / "security.md"

_TENSORS_BY_ROUTE = (
    ("caller → LM", tensors.LM_INPUTS),
    ("LM → caller", tensors.LM_OUTPUTS),
    ("tokenize → generate", tensors.TOKENIZE_OUTPUTS),
    ("tokenize → caller", (tensors.RENDERED_PROMPT,)),
    ("generate → detokenize", (tensors.CHUNK,)),
    ("caller → generate", (tensors.CONTROL,)),
    ("generate → caller", (tensors.REPORT, tensors.EMBEDDING, tensors.USAGE)),
)


def tensor_table() -> str:
    rows = [
        (route, f"`{spec.name}`", f"{spec.dtype} {_shape(spec)}", spec.meaning)
        for route, specs in _TENSORS_BY_ROUTE
        for spec in specs
    ]
    return _table(("route", "tensor", "type", "meaning"), rows)


def parameter_table() -> str:
    rows = []
    for spec in fields(SamplingParameters):
        default = spec.default if spec.default is not MISSING else {}
        shown = "–" if default in (None, (), {}) else f"{default:g}" if isinstance(default, float) else str(default)
        rows.append((f"`{spec.name}`", spec.metadata["allowed"], shown.lower(), spec.metadata["meaning"]))
    rows += [(f"`{name}`", other.allowed, "–", other.meaning) for name, other in OTHER_NAMES.items()]
    return _table(("parameter", "allowed", "default", "meaning"), rows)


def serve_table() -> str:
    return _settings_table(Settings)


def gateway_table() -> str:
    return _settings_table(GatewaySettings)


def _settings_table(kind: type[BaseSettings]) -> str:
    rows = []
    for name, info in kind.model_fields.items():
        default = info.get_default(call_default_factory=True)
        if isinstance(default, list):
            default = ", ".join(Path(item).name for item in default)
        shown = "–" if default in (None, "") else f"`{default}`"
        rows.append((f"`{option_name(name)}`", f"`{env_name(name)}`", shown, str(info.description)))
    return _table(("option", "variable", "default", "meaning"), rows)


def engine_table() -> str:
    rows = [
        (
            f"`{spec.name}`",
            f"`{environment_name(spec.name)}`",
            f"`{spec.default:g}`" if isinstance(spec.default, float) else f"`{spec.default}`",
            spec.metadata["meaning"],
        )
        for spec in fields(EngineConfig)
    ]
    return _table(("parameter", "variable", "default", "meaning"), rows)


def scope_table() -> str:
    """The response of each route to each kind of key; `tests/gateway/test_keys.py` tests all of them."""
    paths = create_app(AsyncClient(transports=[FakeTransport()]), GatewaySettings()).openapi()["paths"]
    rows = []
    for path in sorted(paths):
        for method in paths[path]:
            scope = "–" if path in PUBLIC_PATHS else scope_of(method.upper(), path)
            refused = ("answered",) * 2 if path in PUBLIC_PATHS else ("401", "403")
            rows.append((f"`{method.upper()} {path}`", scope, *refused, "answered"))
    return _table(("route", "scope", "no key, a wrong one, a revoked one", "another scope", "the scope"), rows)


def gateway_metrics_table() -> str:
    """The metrics of `GET /metrics`, without the process metrics of the library."""
    rows = []
    for family in REGISTRY._collector_to_names:
        for metric in family.describe() if hasattr(family, "describe") else ():
            name = f"{metric.name}_{SUFFIXES[metric.type]}" if metric.type in SUFFIXES else metric.name
            labels = ", ".join(f"`{label}`" for label in getattr(family, "_labelnames", ())) or "–"
            rows.append((f"`{name}`", metric.type, labels, metric.documentation))
    return _table(("metric", "kind", "labels", "meaning"), rows)


def engine_metrics_table() -> str:
    rows = [(f"`{spec.prometheus_name}`", spec.kind, "`model`", spec.description) for spec in METRIC_SPECS]
    return _table(("metric", "kind", "labels", "meaning"), rows)


TABLES = {
    OBSERVABILITY: {"gateway": gateway_metrics_table, "engine": engine_metrics_table},
    README: {"tensors": tensor_table, "parameters": parameter_table},
    SECURITY: {"scopes": scope_table},
    SETTINGS: {"serve": serve_table, "gateway": gateway_table, "engine": engine_table},
}


def with_tables(file: Path) -> str:
    """The file's text with its tables generated from the code."""
    text = file.read_text(encoding="utf-8")
    for name, table in TABLES[file].items():
        parts = re.split(rf"(<!-- {name}: .*? -->\n)(.*?)(<!-- end -->)", text, maxsplit=1, flags=re.DOTALL)
        assert len(parts) == 5, f"{file} has no markers for the table {name}"
        before, begin, _, end, after = parts
        text = before + begin + table() + end + after
    return text


def _shape(spec: TensorSpec) -> str:
    return "[" + ", ".join("n" if size == -1 else str(size) for size in spec.dims) + "]"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def lines() -> Iterator[str]:
        for row in (head, ("---",) * len(head), *rows):
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n"

    return "".join(lines())


if __name__ == "__main__":
    for file in TABLES:
        file.write_text(with_tables(file), encoding="utf-8")
