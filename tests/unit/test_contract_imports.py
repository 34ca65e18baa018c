"""The imports at the start of a process, without garbage collections."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest
import tritonlm
from tritonlm.contract.imports import without_collections


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
    program = (
        "import gc, sys, runpy; gc.callbacks.append(lambda phase, info: info['generation'] == 2 and sys.exit(3));"
        "sys.argv = ['tritonlm', '--version']; runpy.run_module('tritonlm', run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, f"tritonlm {tritonlm.__version__}\n"), ran.stderr
