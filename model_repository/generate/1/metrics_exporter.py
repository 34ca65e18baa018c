"""Publishes the engine's measures among Triton's own metrics, once a second.

It knows names, kinds and Triton's calls, and not what the measures mean. Every such call goes to Triton's process and
back, so a thread of its own makes them, and of counters and gauges only for what has changed. A model that is unloaded
during such a call would stay in memory for ever: who is about to unload it says so before.
"""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

from .engine.fleet import Engines
from .engine.monitoring.metrics import COUNTER, GAUGE, HISTOGRAM, MEASURES, Measure

_EVERY_SECONDS = 1.0
_LONGEST_CALLS_SECONDS = 1.0
_JOIN_SECONDS = 5.0


class Publisher:
    def __init__(self, pb_utils: Any, engines: Engines, model: str) -> None:
        self._pb_utils, self._engines = pb_utils, engines
        self._published: dict[str, float] = {}
        self._metrics = self._make_all(model)
        self._closing, self._woken = threading.Event(), threading.Event()
        self._resting_until = 0.0
        self._rests = threading.Event()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def start(self) -> None:
        if self._metrics:
            self._thread.start()

    def rest(self, seconds: float) -> None:
        """Publish once more, as if nothing were here, and no more for so long. Returns when that is done."""
        if not self._thread.is_alive():
            return
        self._rests.clear()
        self._resting_until = time.monotonic() + seconds
        self._woken.set()
        self._rests.wait(_LONGEST_CALLS_SECONDS)

    def close(self) -> None:
        self._closing.set()
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)

    def _make_all(self, model: str) -> dict[str, Any]:
        try:
            return {measure.name: self._make(measure, model) for measure in MEASURES}
        except self._pb_utils.TritonModelException as error:
            # Triton was started without metrics.
            self._pb_utils.Logger.log_warn(f"the engine's measures are not published: {error}")
            return {}

    def _make(self, measure: Measure, model: str) -> Any:
        kinds = self._pb_utils.MetricFamily
        kind = {COUNTER: kinds.COUNTER, GAUGE: kinds.GAUGE, HISTOGRAM: kinds.HISTOGRAM}[measure.kind]
        family = kinds(name=measure.published_name, description=measure.meaning, kind=kind)
        more = {"buckets": list(measure.buckets)} if measure.kind == HISTOGRAM else {}
        metric = family.Metric(labels={"model": model}, **more)
        # Triton gives the same metric to whoever asks for the same name and label, and does not count who uses it: one
        # model's end would leave another, which has just been loaded in its place, with what is no more.
        for kept in (family, metric):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
        return metric

    def _run(self) -> None:
        while True:
            self._woken.wait(_EVERY_SECONDS)
            self._woken.clear()
            if self._closing.is_set():
                return
            resting = time.monotonic() < self._resting_until
            if not (resting and self._rests.is_set()):
                self.publish(gauges=not resting)
            if resting:
                self._rests.set()

    def publish(self, gauges: bool = True) -> None:
        """Without the gauges their values are shown as nothing."""
        values, timed = self._engines.measures(), self._engines.take_timed()
        for measure in MEASURES:
            metric = self._metrics[measure.name]
            if measure.kind == HISTOGRAM:
                for seconds in timed[measure.name]:
                    metric.observe(seconds)
                continue
            value, before = float(values[measure.name]), self._published.get(measure.name, 0.0)
            if measure.kind == GAUGE and not gauges:
                value = 0.0
            if measure.kind == GAUGE and value != before:
                metric.set(value)
            elif value > before:
                metric.increment(value - before)
            self._published[measure.name] = value
