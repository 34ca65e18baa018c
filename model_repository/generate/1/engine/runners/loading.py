"""Loads weights at low priority and reports the progress.

Requests to other models keep their speed meanwhile; before an engine has been ready there are none. This module knows
thread priorities and transformers' progress bar, not the use of the weights.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import safe_open
from tritonlm.contract import Checkpoint
from tritonlm.contract.imports import without_collections, without_modules
from tritonlm.contract.load_progress import LoadProgress

from ..monitoring.step_journal import has_served

T = TypeVar("T")
# A thread of this niceness gets a tenth of a busy core, and all of an idle one.
_NICENESS = 10
# Kernels in Python for tensors without data. They take a quarter of torch's import; the native kernels need none.
_META_KERNELS = "torch._meta_registrations"


class _Load(threading.Thread, Generic[T]):
    def __init__(self, load: Callable[[], T], niceness: int) -> None:
        super().__init__(name="tritonlm-load")
        self._load, self._niceness = load, niceness
        self.result: T
        self.error: BaseException | None = None

    def run(self) -> None:
        # Niceness belongs to a thread, and the threads that it starts inherit it: here those of OpenMP, which end with
        # this thread. Lowering it again needs privileges, so the load runs in a thread of its own.
        before = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(before, self._niceness))
        try:
            self.result = self._load()
        except BaseException as error:  # the caller raises it
            self.error = error


def load_at_low_priority(load: Callable[[], T]) -> T:
    """The result of `load`, computed by a thread of low priority."""
    return _in_thread(load, _NICENESS)


def in_load_thread(load: Callable[[], T]) -> T:
    """The same for a whole model. The first one of a Triton is loaded at the usual priority: callers wait for it alone.

    At low priority it would wait for the imports of the processes that start beside it.
    """
    return _in_thread(load, _NICENESS if has_served() else 0)


def _in_thread(load: Callable[[], T], niceness: int) -> T:
    thread = _Load(load, niceness)
    thread.start()
    thread.join()
    if thread.error is not None:
        try:
            raise thread.error
        finally:
            # Break the cycle of error, traceback and thread: it would keep the memory of a failed load.
            thread.error = None
    return thread.result


def import_torch() -> None:
    """Import torch as a model is loaded: it is the largest part of a small model's load."""
    with without_collections(), without_modules(_META_KERNELS):
        in_load_thread(lambda: importlib.import_module("torch"))


def import_meta_kernels() -> None:
    """Import what `import_torch` leaves out: Hugging Face's modelling code, and compilers, compute without data."""
    with without_collections():
        in_load_thread(lambda: importlib.import_module(_META_KERNELS))


@contextlib.contextmanager
def reported_loading(sizes: Mapping[str, int], progress: LoadProgress) -> Iterator[None]:
    """Report the tensors that transformers loads within this context, by their bytes."""
    from transformers.utils import logging  # noqa: PLC0415 (the kernels do without transformers)

    sizes = {name.rpartition("model.")[2]: size for name, size in sizes.items()}

    def bar(factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return _counted(arguments[0], sizes, progress) if arguments else factory(*arguments, **options)

    before = logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _counted(entries: Any, sizes: dict[str, int], progress: LoadProgress) -> Iterator[Any]:
    for entry in entries:
        yield entry
        name = entry[0] if isinstance(entry, tuple) else entry
        # The model's name of a tensor and the file's may differ in a prefix.
        progress.add(sizes.get(str(name).rpartition("model.")[2], 0))


def tensor_bytes(folder: Path) -> dict[str, int]:
    """Each tensor's bytes by its name."""
    sizes = {}
    for file in Checkpoint(folder).weight_files():
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                part = opened.get_slice(name)
                width = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}.get(part.get_dtype(), 1)
                count = width
                for length in part.get_shape():
                    count *= length
                sizes[name] = count
    return sizes
