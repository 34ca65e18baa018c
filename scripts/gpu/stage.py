"""What every stage of the GPU check gets: its options, and how it reports. It knows no stage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
# The folders that Python imports the repository's modules from.
SOURCES = ("client", "model_repository/generate/1", "scripts/benchmarks", "tests")


@dataclass(frozen=True)
class Options:
    device: str
    # Models of some thousand weights and few repetitions: a rehearsal on a CPU.
    tiny: bool
    # Engines of the stage `fleet`.
    devices: int
    out: Path
    # Of time.monotonic, which all processes of a machine share: the end of the stage.
    deadline: float = float("inf")

    @property
    def scratch(self) -> Path:
        """A folder for temporary files, removed at the end of the check."""
        return self.out / "scratch"

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def left(self) -> float:
        """Seconds until the end of the stage."""
        return self.deadline - time.monotonic()


class Reporter:
    """Prints one JSON line for each result as soon as it is known, and appends it to a file."""

    def __init__(self, stage: str, file: Path, terminal: TextIO, began: float) -> None:
        self._stage, self._file, self._terminal, self._began = stage, file, terminal, began

    def __call__(self, **result: Any) -> None:
        at = round(time.monotonic() - self._began, 1)
        line = json.dumps({"stage": self._stage, "at_seconds": at, **result}, default=str)
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        print(line, file=self._terminal, flush=True)


class Skipped(Exception):
    """What a stage needs is missing: the reason, and what to do."""


Report = Callable[..., None]
Run = Callable[[Options, Report], None]
