"""Writes the Grafana dashboard: rows of panels with their queries. Run it after a change:

python docker/grafana/dashboard.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "dashboards" / "tritonlm.json"
_SOURCE = {"type": "prometheus", "uid": "prometheus"}
_WIDTH, _HEIGHT = 24, 8
_RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    # Queries by legend.
    queries: dict[str, str]
    description: str = ""
    kind: str = "timeseries"
    options: dict[str, Any] = field(default_factory=dict)


def quantiles(metric: str, by: str = "") -> dict[str, str]:
    labels = f"le, {by}" if by else "le"
    prefix = f"{{{{{by}}}}} " if by else ""
    return {
        f"{prefix}p{round(q * 100)}": f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{_RATE})))"
        for q in (0.5, 0.95, 0.99)
    }


def rate(metric: str, by: str, selector: str = "") -> dict[str, str]:
    return {f"{{{{{by}}}}}": f"sum by ({by}) (rate({metric}{selector}{_RATE}))"}


def ratio(numerator: str, denominator: str) -> dict[str, str]:
    query = f"sum by (model) (rate({numerator}{_RATE})) / sum by (model) (rate({denominator}{_RATE}))"
    return {"{{model}}": query}


ENGINE = "tritonlm_engine_"
ROWS: dict[str, list[Panel]] = {
    "Requests and latency": [
        Panel("Requests", "reqps", rate("tritonlm_requests_total", "status", '{route!="/metrics"}')),
        Panel("Time to first token", "s", quantiles("tritonlm_first_token_seconds")),
        Panel("Inter-token latency", "s", quantiles("tritonlm_inter_token_seconds")),
        Panel("Request duration", "s", quantiles("tritonlm_request_seconds")),
        Panel("Token throughput", "short", rate("tritonlm_tokens_total", "kind"), "Per second, at the gateways."),
        Panel("Finish reasons", "short", rate("tritonlm_sequences_total", "finish_reason"), "Sequences per second."),
        Panel("Errors", "short", rate("tritonlm_errors_total", "code"), "Errors per second, by code."),
        Panel("Tokens by API key", "short", rate("tritonlm_key_tokens_total", "key"), "Tokens per second."),
    ],
    "Queues and capacity": [
        Panel(
            "Gateway requests", "short",
            {"running": "sum(tritonlm_running_requests)", "waiting": "sum(tritonlm_waiting_requests)",
             "limit": "sum(tritonlm_requests_limit)"},
        ),
        Panel("Admission queue wait", "s", quantiles("tritonlm_admission_seconds")),
        Panel(
            "Engine slots", "short",
            {"{{model}} running": f"sum by (model) ({ENGINE}running)",
             "{{model}} waiting": f"sum by (model) ({ENGINE}waiting)",
             "{{model}} slots": f"sum by (model) ({ENGINE}slots)"},
        ),
        Panel(
            "KV cache usage", "percentunit",
            {"{{model}}": f"sum by (model) ({ENGINE}kv_blocks_used) / sum by (model) ({ENGINE}kv_blocks > 0)"},
        ),
        Panel("Preemptions", "short", rate(f"{ENGINE}preemptions_total", "model"), "Per second."),
        Panel(
            "Memory", "bytes",
            {"engine {{model}}": f"sum by (model) ({ENGINE}memory_bytes)",
             "gateway": "sum(process_resident_memory_bytes{job=~\"tritonlm-gateway\"})"},
        ),
    ],
    "Engines": [
        Panel("Queue time", "s", quantiles(f"{ENGINE}queue_seconds", "model")),
        Panel("Prefill time", "s", quantiles(f"{ENGINE}prefill_seconds", "model")),
        Panel("Step time", "s", ratio(f"{ENGINE}step_seconds_total", f"{ENGINE}steps_total")),
        Panel("Batch size", "short", ratio(f"{ENGINE}step_sequences_total", f"{ENGINE}steps_total")),
        Panel("Generated tokens", "short", rate(f"{ENGINE}generated_tokens_total", "model"), "Per second."),
        Panel("Prompt tokens", "short", {
            "{{model}} computed": f"sum by (model) (rate({ENGINE}prompt_tokens_total{_RATE}))",
            "{{model}} cached": f"sum by (model) (rate({ENGINE}cached_tokens_total{_RATE}))",
        }, "Per second."),
    ],
    "Faults": [
        Panel(
            "Restarts", "short", {"{{part}}": "sum by (part) (increase(tritonlm_repairs_total[1h]))"},
            "In the last hour.",
        ),
        Panel("Retries", "short", rate("tritonlm_retries_total", "error"), "Per second, by error."),
        Panel(
            "Resumed streams and client retries", "short",
            {"resumed": f"sum(rate(tritonlm_resumes_total{_RATE}))",
             "retried by clients": f"sum(rate(tritonlm_retried_requests_total{_RATE}))"},
            "Per second.",
        ),
        Panel("Model loads", "short", {
            "{{model}} {{outcome}}": "sum by (model, outcome) (increase(tritonlm_model_loads_total[1h]))",
        }, "In the last hour."),
        Panel("Training jobs", "short", {"{{state}}": "sum by (state) (tritonlm_training_jobs)"}),
        Panel(
            "Versions", "short",
            {"{{version}}, Python {{python}}": "count by (version, python) (tritonlm_build_info)"},
        ),
    ],
}  # fmt: skip


def _panel(panel: Panel, number: int, x: int, y: int, width: int) -> dict[str, Any]:
    return {
        "id": number,
        "title": panel.title,
        "description": panel.description,
        "type": panel.kind,
        "datasource": _SOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = number = 0
    for title, row in ROWS.items():
        number += 1
        panels.append({"id": number, "type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": _WIDTH, "h": 1}})
        y += 1
        columns = 4 if len(row) % 4 == 0 else 3
        for index, panel in enumerate(row):
            number += 1
            x = index % columns * (_WIDTH // columns)
            panels.append(_panel(panel, number, x, y + index // columns * _HEIGHT, _WIDTH // columns))
        y += -(-len(row) // columns) * _HEIGHT
    return {
        "uid": "tritonlm",
        "title": "tritonlm",
        "tags": ["tritonlm"],
        "schemaVersion": 41,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "panels": panels,
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
