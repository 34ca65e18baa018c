"""The locustfile: users, the selected shape, goals, and the report at the end.

`scripts/load traffic` runs it, and starts servers if needed. It can also be run with Locust directly.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

# Locust imports this file by its path, so the folder must be added for the modules beside it.
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

# Locust uses the shape class that it finds in this file, so there must be only one.
SelectedShape: type[Shape] = type("SelectedShape", (SHAPES[os.environ.get("TRAFFIC_SHAPE", "constant")],), {})

__all__ = ["LeavingUser", "NonsenseUser", "OpenAIUser", "SelectedShape", "TritonUser"]


@events.init_command_line_parser.add_listener
def _options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tritonlm")
    group.add_argument("--prompts", choices=list(KINDS), default="fixed", help="the kind of prompts")
    group.add_argument("--throughput", type=float, default=1.0, help="requests per second of each user")
    group.add_argument("--seconds", type=float, default=60.0, help="the maximum duration")
    group.add_argument("--most-users", type=int, default=16, help="the maximum number of users")
    group.add_argument("--grpc", default="", help="Triton's gRPC address; without it there are no gRPC users")
    group.add_argument("--key", default="", help="an API key")
    group.add_argument("--report", default="", help="file for the report (HTML)")
    group.add_argument("--first", type=float, default=500.0, help="goal: first text, 95th percentile, in ms")
    group.add_argument("--between", type=float, default=100.0, help="goal: between tokens, 95th percentile, in ms")
    group.add_argument("--failures", type=float, default=0.0, help="goal: the maximum share of failed requests")


@events.init.add_listener
def _configure(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    assert options is not None
    Settings.kind, Settings.throughput, Settings.grpc, Settings.key = (
        options.prompts, options.throughput, options.grpc, options.key,
    )  # fmt: skip
    if not options.grpc and TritonUser in environment.user_classes:
        environment.user_classes.remove(TritonUser)
    SelectedShape.users, SelectedShape.seconds = options.most_users, options.seconds
    SelectedShape.goal = Goal(options.first, options.between, options.failures)
    if not isinstance(environment.runner, WorkerRunner):
        Sampler(environment)


class Sampler:
    """Samples the measurements during the run, and checks the goal at the end."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._samples: list[Sample] = []
        self._total: Window | None = None
        environment.events.test_start.add_listener(self._start)
        environment.events.quitting.add_listener(self._finish)

    def _start(self, **_: Any) -> None:
        self._total = Window(self._environment.stats)
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
        if self._total is None or not self._samples:
            self._environment.process_exit_code = 1
            return
        self._task.kill()
        total = self._total.close(self._samples[-1].seconds)
        met = shape.succeeded(total)
        report = Report(self._environment, options, self._samples, total, shape, met)
        print(report.summary())
        if options.report:
            Path(options.report).write_text(report.html(), encoding="utf-8")
            print(f"report: {options.report}")
        self._environment.process_exit_code = 0 if met else 1
