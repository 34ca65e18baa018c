"""What Locust loads: the users, the shape that was asked for, thresholds, and the report at the end.

`scripts/load traffic` starts it, with a server if need be; for those who know Locust it is a locustfile like any other.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

# Locust imports this file by its path: its neighbours are found beside it.
sys.path.insert(0, str(Path(__file__).parent))

import gevent
from locust import events
from locust.env import Environment
from locust.runners import WorkerRunner
from measures import Window
from prompts import KINDS
from report import Report, Sample
from shapes import SHAPES, Goal, Shape
from users import LeavingUser, NonsenseUser, OpenAIUser, Settings, TritonUser

_SAMPLE_SECONDS = 2.0

# Exactly one shape may be seen by Locust: the one that was asked for.
Asked: type[Shape] = type("Asked", (SHAPES[os.environ.get("TRAFFIC_SHAPE", "constant")],), {})

__all__ = ["Asked", "LeavingUser", "NonsenseUser", "OpenAIUser", "TritonUser"]


@events.init_command_line_parser.add_listener
def _options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tritonlm")
    group.add_argument("--prompts", choices=list(KINDS), default="fixed", help="what is asked")
    group.add_argument("--throughput", type=float, default=1.0, help="requests a second of each user")
    group.add_argument("--seconds", type=float, default=60.0, help="how long it lasts at most")
    group.add_argument("--most-users", type=int, default=16, help="how many there are when there are most")
    group.add_argument("--grpc", default="", help="Triton's gRPC address; without it nobody goes past the gateway")
    group.add_argument("--key", default="", help="an API key")
    group.add_argument("--report", default="", help="file for the report (HTML)")
    group.add_argument("--first", type=float, default=500.0, help="goal: first text, 95th percentile, in ms")
    group.add_argument("--between", type=float, default=100.0, help="goal: between tokens, 95th percentile, in ms")
    group.add_argument("--failures", type=float, default=0.0, help="goal: share of requests that may fail")


@events.init.add_listener
def _settle(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    assert options is not None
    Settings.kind, Settings.throughput, Settings.grpc, Settings.key = (
        options.prompts, options.throughput, options.grpc, options.key,
    )  # fmt: skip
    if not options.grpc and TritonUser in environment.user_classes:
        environment.user_classes.remove(TritonUser)
    Asked.users, Asked.seconds = options.most_users, options.seconds
    Asked.goal = Goal(options.first, options.between, options.failures)
    if not isinstance(environment.runner, WorkerRunner):
        Watcher(environment)


class Watcher:
    """Samples what is measured, and judges it in the end."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._samples: list[Sample] = []
        self._whole: Window | None = None
        environment.events.test_start.add_listener(self._start)
        environment.events.quitting.add_listener(self._finish)

    def _start(self, **_: Any) -> None:
        self._whole = Window(self._environment.stats)
        self._task = gevent.spawn(self._sample)

    def _sample(self) -> None:
        runner = self._environment.runner
        assert runner is not None
        passed = 0.0
        while True:
            window = Window(runner.stats)
            gevent.sleep(_SAMPLE_SECONDS)
            passed += _SAMPLE_SECONDS
            self._samples.append(Sample(passed, runner.user_count, window.close(_SAMPLE_SECONDS)))

    def _finish(self, **_: Any) -> None:
        options, shape = self._environment.parsed_options, self._environment.shape_class
        assert options is not None
        assert isinstance(shape, Shape)
        if self._whole is None or not self._samples:
            self._environment.process_exit_code = 1
            return
        self._task.kill()
        whole = self._whole.close(self._samples[-1].seconds)
        found = getattr(shape, "found", None)
        searched = hasattr(shape, "found")
        # A search breaks its goal on purpose: what counts is whether it found any rate that keeps it.
        kept = found is not None if searched else shape.goal.is_kept(whole)
        report = Report(self._environment, options, self._samples, whole, shape, kept)
        print(report.summary())
        if options.report:
            Path(options.report).write_text(report.html(), encoding="utf-8")
            print(f"report: {options.report}")
        self._environment.process_exit_code = 0 if kept else 1
