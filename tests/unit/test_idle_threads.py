"""How idle threads wait, in this process and in those that it starts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tritonlm.contract.idle_threads import ASLEEP, sleep_when_idle

# What `tritonlm` does before it imports its command line, and what a process that it starts inherits.
_MAIN = """
import os, subprocess, sys
import tritonlm.__main__ as program
assert "numpy" not in sys.modules
class Line:
    @staticmethod
    def app():
        assert "numpy" not in sys.modules
        child = [sys.executable, "-c", "import os; print(*map(os.environ.get, {names}))"]
        print(subprocess.check_output(child, text=True))
sys.modules["tritonlm.cli"] = Line
program.main()
"""


def test_a_variable_that_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    set_one, *others = ASLEEP
    for name in others:
        # Set first, so that the end of the test removes what it sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv(set_one, "active")
    sleep_when_idle()
    assert os.environ[set_one] == "active"
    assert {name: os.environ[name] for name in others} == {name: ASLEEP[name] for name in others}


def test_the_program_sets_them_before_numpy_starts_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ASLEEP:
        monkeypatch.delenv(name, raising=False)
    code = _MAIN.format(names=repr(tuple(ASLEEP)))
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == list(ASLEEP.values())
