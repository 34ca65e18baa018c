"""The imports at the start of a process, without garbage collections."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from importlib.abc import MetaPathFinder

import pytest
import tritonlm
from tritonlm.cli import app
from tritonlm.contract.imports import without_collections
from typer.testing import CliRunner


class Node:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """Leave the collector as it was: without the objects of these tests, and with those of the collection frozen."""
    was_frozen = gc.get_freeze_count() > 0
    yield
    gc.unfreeze()
    gc.enable()
    gc.collect()
    if was_frozen:
        gc.freeze()


def test_objects_made_inside_are_never_collected() -> None:
    with without_collections():
        assert not gc.isenabled()
        kept = weakref.ref(Node())
    assert gc.isenabled()
    gc.collect()
    assert kept() is not None
    later = weakref.ref(Node())
    gc.collect()
    assert later() is None


def test_the_collector_is_left_as_it_was() -> None:
    with pytest.raises(ImportError), without_collections():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    with without_collections():
        pass
    assert not gc.isenabled()


def test_the_program_is_imported_without_collections() -> None:
    """`python -m tritonlm` and the installed command run the same function."""
    # An exception of a callback is ignored, and at its end Python collects in any case.
    program = (
        "import atexit, gc, os, sys, runpy; full = []; atexit.register(lambda: full and os._exit(3));"
        "gc.callbacks.append(lambda phase, info: info['generation'] == 2 and full.append(phase));"
        "sys.argv = ['tritonlm', '--version']; runpy.run_module('tritonlm', run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, f"tritonlm {tritonlm.__version__}\n"), ran.stderr


class _Missing(MetaPathFinder):
    """Finds that a module is missing, and notes whether the collector was enabled."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.enabled: list[bool] = []

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == self.name:
            self.enabled.append(gc.isenabled())
            raise ModuleNotFoundError(name=name)


def test_what_a_training_needs_is_imported_without_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = _Missing("tritonlm.training.errors")
    monkeypatch.delitem(sys.modules, finder.name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    result = CliRunner().invoke(app, ["train", "abacus"])
    assert (result.exit_code, finder.enabled) == (1, [False])
    assert "tritonlm.training.errors is missing" in result.stderr
    assert gc.isenabled()
