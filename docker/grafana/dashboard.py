"""Writes the dashboard: rows of panels, each a question with its query. Run it after a change.

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
    # The legend of each query.
    queries: dict[str, str]
    about: str = ""
    kind: str = "timeseries"
    options: dict[str, Any] = field(default_factory=dict)


def quantiles(metric: str, by: str = "") -> dict[str, str]:
    labels = f"le, {by}" if by else "le"
    shown = f"{{{{{by}}}}} " if by else ""
    return {
        f"{shown}p{round(q * 100)}": f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{_RATE})))"
        for q in (0.5, 0.95, 0.99)
    }


def rate(metric: str, by: str, chosen: str = "") -> dict[str, str]:
    return {f"{{{{{by}}}}}": f"sum by ({by}) (rate({metric}{chosen}{_RATE}))"}


def ratio(over: str, under: str) -> dict[str, str]:
    query = f"sum by (model) (rate({over}{_RATE})) / sum by (model) (rate({under}{_RATE}))"
    return {"{{model}}": query}


ENGINE = "tritonlm_engine_"
ROWS: dict[str, list[Panel]] = {
    "How callers fare": [
        Panel("Requests", "reqps", rate("tritonlm_requests_total", "status", '{route!="/metrics"}')),
        Panel("Time to first text", "s", quantiles("tritonlm_first_token_seconds")),
        Panel("Time between tokens", "s", quantiles("tritonlm_inter_token_seconds")),
        Panel("Whole requests", "s", quantiles("tritonlm_request_seconds")),
        Panel("Tokens", "short", rate("tritonlm_tokens_total", "kind"), "Each second, at the gateways."),
        Panel("How sequences end", "short", rate("tritonlm_sequences_total", "finish_reason"), "Each second."),
        Panel("Errors", "short", rate("tritonlm_errors_total", "code"), "Each second, by code."),
        Panel("By key", "short", rate("tritonlm_key_tokens_total", "key"), "Tokens each second."),
    ],
    "Room": [
        Panel(
            "Inside the gateways", "short",
            {"running": "sum(tritonlm_running_requests)", "waiting": "sum(tritonlm_waiting_requests)",
             "limit": "sum(tritonlm_requests_limit)"},
        ),
        Panel("Wait for a turn", "s", quantiles("tritonlm_admission_seconds")),
        Panel(
            "Engines' places", "short",
            {"{{model}} running": f"sum by (model) ({ENGINE}running)",
             "{{model}} waiting": f"sum by (model) ({ENGINE}waiting)",
             "{{model}} places": f"sum by (model) ({ENGINE}places)"},
        ),
        Panel(
            "KV cache in use", "percentunit",
            {"{{model}}": f"sum by (model) ({ENGINE}kv_blocks_used) / sum by (model) ({ENGINE}kv_blocks > 0)"},
        ),
        Panel("Preemptions", "short", rate(f"{ENGINE}preemptions_total", "model"), "Each second."),
        Panel(
            "Memory", "bytes",
            {"engine {{model}}": f"sum by (model) ({ENGINE}memory_bytes)",
             "gateway": "sum(process_resident_memory_bytes{job=~\"tritonlm-gateway\"})"},
        ),
    ],
    "Inside the engines": [
        Panel("Queue", "s", quantiles(f"{ENGINE}queue_seconds", "model")),
        Panel("Prefill", "s", quantiles(f"{ENGINE}prefill_seconds", "model")),
        Panel("Time of a step", "s", ratio(f"{ENGINE}step_seconds_total", f"{ENGINE}steps_total")),
        Panel("Size of a batch", "short", ratio(f"{ENGINE}step_sequences_total", f"{ENGINE}steps_total")),
        Panel("Generated tokens", "short", rate(f"{ENGINE}generated_tokens_total", "model"), "Each second."),
        Panel("Prompt tokens", "short", {
            "{{model}} computed": f"sum by (model) (rate({ENGINE}prompt_tokens_total{_RATE}))",
            "{{model}} from the cache": f"sum by (model) (rate({ENGINE}cached_tokens_total{_RATE}))",
        }, "Each second."),
    ],
    "Faults": [
        Panel(
            "Repairs", "short", {"{{part}}": "sum by (part) (increase(tritonlm_repairs_total[1h]))"},
            "In the last hour.",
        ),
        Panel("Further tries", "short", rate("tritonlm_tries_again_total", "error"), "Each second, by the error."),
        Panel(
            "Resumed streams and callers' retries", "short",
            {"resumed": f"sum(rate(tritonlm_resumes_total{_RATE}))",
             "retried by callers": f"sum(rate(tritonlm_retried_requests_total{_RATE}))"},
            "Each second.",
        ),
        Panel("Loads of models", "short", {
            "{{model}} {{outcome}}": "sum by (model, outcome) (increase(tritonlm_model_loads_total[1h]))",
        }, "In the last hour."),
        Panel("Training jobs", "short", {"{{state}}": "sum by (state) (tritonlm_training_jobs)"}),
        Panel(
            "What runs", "short",
            {"{{version}}, Python {{python}}": "count by (version, python) (tritonlm_build_info)"},
        ),
    ],
}  # fmt: skip


def _panel(panel: Panel, number: int, x: int, y: int, width: int) -> dict[str, Any]:
    return {
        "id": number,
        "title": panel.title,
        "description": panel.about,
        "type": panel.kind,
        "datasource": _SOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
            for place, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = number = 0
    for title, row in ROWS.items():
        number += 1
        panels.append({"id": number, "type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": _WIDTH, "h": 1}})
        y += 1
        across = 4 if len(row) % 4 == 0 else 3
        for place, panel in enumerate(row):
            number += 1
            x = place % across * (_WIDTH // across)
            panels.append(_panel(panel, number, x, y + place // across * _HEIGHT, _WIDTH // across))
        y += -(-len(row) // across) * _HEIGHT
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
