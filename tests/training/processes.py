"""Runs `tritonlm train` in processes that are forked from one that has imported what a training needs.

The imports take many times as long as a small training. This module knows how such a process starts and ends, not what
it trains.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from subprocess import CompletedProcess

from tritonlm.cli import app

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["tritonlm.cli", "tritonlm.commands.train", "tritonlm.training.run", "matplotlib.backends.backend_agg"]
)
_RUN_SECONDS = 200.0


def start(*words: str, largest_file: int = resource.RLIM_INFINITY) -> tuple[ForkServerProcess, list[Connection]]:
    """The process, and what it writes to its standard output and error."""
    (output, child_output), (errors, child_errors) = _CONTEXT.Pipe(duplex=False), _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_train, args=(words, largest_file, child_output, child_errors))
    process.start()
    for connection in (child_output, child_errors):
        connection.close()
    return process, [output, errors]


def run(*words: str, largest_file: int = resource.RLIM_INFINITY) -> CompletedProcess[str]:
    process, outputs = start(*words, largest_file=largest_file)
    with ThreadPoolExecutor(len(outputs)) as readers:
        output, errors = readers.map(_read_all, outputs)
    process.join(_RUN_SECONDS)
    assert process.exitcode is not None, "the training does not end"
    return CompletedProcess(words, process.exitcode, output, errors)


def _read_all(connection: Connection) -> str:
    with connection, os.fdopen(os.dup(connection.fileno()), encoding="utf-8") as file:
        return file.read()


def _train(words: tuple[str, ...], largest_file: int, output: Connection, errors: Connection) -> None:
    # A process whose files may not grow would leave truncated bytecode to others.
    sys.dont_write_bytecode = True
    os.dup2(output.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    app(["train", *words], prog_name="tritonlm")
