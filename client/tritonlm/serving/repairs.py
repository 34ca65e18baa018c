"""How often what has been started again: counted in a file, so that the gateway can tell it among its metrics.

The supervisor writes, and counts from nothing when it starts. It does not know why something was repaired.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from pathlib import Path

from . import paths


def file_of(http_port: int) -> Path:
    """Of the Triton with this port."""
    return paths.cache() / "logs" / f"repairs-{http_port}.json"


class Repairs:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._counts: Counter[str] = Counter()
        self._write()

    def note(self, part: str) -> None:
        self._counts[part] += 1
        self._write()

    def _write(self) -> None:
        """Whole or not at all. A disk that is full must not keep anything from being repaired."""
        new = self._file.with_suffix(".new")
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(self._counts), encoding="utf-8")
            os.replace(new, self._file)


def read_repairs(file: Path | None) -> dict[str, int]:
    """By part; nothing where nobody counts."""
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {str(part): int(count) for part, count in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
