"""An engine of asynchronous steps without a GPU: its recordings overwrite their output, as CUDA graphs do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engine.engine import Engine
from engine.runners import graphs
from engine.runners.graph_runner import GraphRunner
from engine.runners.interface import ForwardOutput

from .harness import make_engine


def replayed(compute: graphs.Compute) -> graphs.Compute:
    """Like a CUDA graph: each replay overwrites the previous output."""
    first = compute()
    output = ForwardOutput(first.logits.clone(), first.hidden.clone())

    def replay() -> ForwardOutput:
        latest = compute()
        output.logits.copy_(latest.logits)
        output.hidden.copy_(latest.hidden)
        return output

    return replay


class AsyncEngine:
    """An engine with the graph runner, and a counter of asynchronous steps."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.engine: Engine = make_engine(folder, **{"runner": "graphs", **settings})
        self.runner, self._count = watched(self.engine)

    @property
    def async_steps(self) -> int:
        return self._count[0]


def watched(engine: Engine) -> tuple[GraphRunner, list[int]]:
    """Replace the recorder of the engine's graph runner. Return the runner, and its count of asynchronous steps."""
    runner = engine.runner
    assert isinstance(runner, GraphRunner)
    runner._recorder = replayed
    count, forward_async = [0], runner.forward_async

    def counted(plan: Any, ids: torch.Tensor) -> ForwardOutput:
        count[0] += 1
        return forward_async(plan, ids)

    runner.forward_async = counted  # type: ignore[method-assign]
    return runner, count
