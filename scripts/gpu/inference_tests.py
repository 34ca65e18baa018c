"""The quick tests of tests/inference on the device: those whose engine is not bound to the CPU."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Any

import pytest
from stage import ROOT, Options, Report

# The kernels' own tests run on a CPU. The others choose the device by themselves: a GPU where there is one.
FILES = (
    "test_families.py", "test_graphs.py", "test_async_sampling.py", "test_engine.py", "test_speculation_engine.py",
    "test_step_journal.py",
)  # fmt: skip
_TINY = ("-k", "async_step and not mixed", "tests/inference/test_graphs.py")
# The time to stop and report before the stage is killed.
_RESERVED_SECONDS = 5.0


class Counts:
    """Counts outcomes, reports each file when its tests have ended, and stops before the stage's time is over."""

    def __init__(self, options: Options, report: Report) -> None:
        self._options, self._report = options, report
        self._outcomes: Counter[str] = Counter()
        self._file, self._began = "", time.monotonic()
        self.failed: list[str] = []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        file = nodeid.partition("::")[0]
        if file != self._file:
            self.end_file()
            self._file, self._began, self._outcomes = file, time.monotonic(), Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[report.outcome] += 1
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_runtest_setup(self) -> None:
        if self._options.left() < _RESERVED_SECONDS:
            pytest.exit("the stage's time is over", returncode=0)

    def end_file(self) -> None:
        if self._file:
            seconds = round(time.monotonic() - self._began, 1)
            self._report(file=self._file, seconds=seconds, **self._outcomes)


def run(options: Options, report: Report) -> None:
    # `auto` would choose the kernels on a CPU, which this check is not about.
    os.environ["TRITONLM_RUNNER"] = "graphs"
    os.chdir(ROOT)
    chosen = [*_TINY] if options.tiny else [f"tests/inference/{name}" for name in FILES]
    counts = Counts(options, report)
    plugins: list[Any] = [counts]
    arguments = ["-m", "not slow", "-p", "no:cacheprovider", "--maxfail", "20", "--tb", "short"]
    code = pytest.main([*arguments, "--basetemp", str(options.scratch / "tests"), *chosen], plugins=plugins)
    counts.end_file()
    report(failed=counts.failed, exit_code=int(code))
    if code != pytest.ExitCode.OK:
        raise AssertionError(f"{len(counts.failed)} tests failed")
