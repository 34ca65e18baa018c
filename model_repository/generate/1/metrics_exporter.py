"""The metrics exporter: copies the engine's metric values into Triton's own metrics, once a second.

It knows names, kinds and Triton's API, and not what the values mean. Each call to that API is a round trip to Triton's
process. So a separate thread makes them, and it sends only the counters and gauges that have changed. A model that is
unloaded during such a call would stay in memory for ever, so the exporter is paused before an unload.
"""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

from .engine.fleet import EngineInterface
from .engine.monitoring.metrics import COUNTER, GAUGE, HISTOGRAM, METRIC_SPECS, MetricSpec

_INTERVAL_SECONDS = 1.0
_PAUSE_TIMEOUT_SECONDS = 1.0
_JOIN_SECONDS = 5.0


class MetricsExporter:
    def __init__(self, pb_utils: Any, engines: EngineInterface, model: str) -> None:
        self._pb_utils, self._engines = pb_utils, engines
        self._exported: dict[str, float] = {}
        self._metrics = self._create_all(model)
        self._closing, self._wake = threading.Event(), threading.Event()
        self._paused_until = 0.0
        self._paused = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics_exporter", daemon=True)

    def start(self) -> None:
        if self._metrics:
            self._thread.start()

    def pause(self, seconds: float) -> None:
        """Export once more with gauges of zero, then nothing for this long. Return when that export is done."""
        if not self._thread.is_alive():
            return
        self._paused.clear()
        self._paused_until = time.monotonic() + seconds
        self._wake.set()
        self._paused.wait(_PAUSE_TIMEOUT_SECONDS)

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)

    def _create_all(self, model: str) -> dict[str, Any]:
        try:
            return {spec.name: self._create(spec, model) for spec in METRIC_SPECS}
        except self._pb_utils.TritonModelException as error:
            # Triton was started without metrics.
            self._pb_utils.Logger.log_warn(f"the engine's metrics are not exported: {error}")
            return {}

    def _create(self, spec: MetricSpec, model: str) -> Any:
        kinds = self._pb_utils.MetricFamily
        kind = {COUNTER: kinds.COUNTER, GAUGE: kinds.GAUGE, HISTOGRAM: kinds.HISTOGRAM}[spec.kind]
        family = kinds(name=spec.prometheus_name, description=spec.description, kind=kind)
        options = {"buckets": list(spec.buckets)} if spec.kind == HISTOGRAM else {}
        metric = family.Metric(labels={"model": model}, **options)
        # Triton returns the same metric for the same name and labels, and counts no references. If an unloaded model
        # deleted it, a model loaded under the same name would use a deleted metric. So it is never deleted.
        for kept in (family, metric):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
        return metric

    def _run(self) -> None:
        while True:
            self._wake.wait(_INTERVAL_SECONDS)
            self._wake.clear()
            if self._closing.is_set():
                return
            pausing = time.monotonic() < self._paused_until
            if not (pausing and self._paused.is_set()):
                self.export(gauges=not pausing)
            if pausing:
                self._paused.set()

    def export(self, gauges: bool = True) -> None:
        """Without `gauges` all gauges are exported as zero."""
        values, timed = self._engines.metric_values(), self._engines.take_timed()
        for spec in METRIC_SPECS:
            metric = self._metrics[spec.name]
            if spec.kind == HISTOGRAM:
                for seconds in timed[spec.name]:
                    metric.observe(seconds)
                continue
            value, before = float(values[spec.name]), self._exported.get(spec.name, 0.0)
            if spec.kind == GAUGE and not gauges:
                value = 0.0
            if spec.kind == GAUGE and value != before:
                metric.set(value)
            elif value > before:
                metric.increment(value - before)
            self._exported[spec.name] = value
