"""Counts restarts per part in a JSON file, from which the gateway exports `tritonlm_repairs_total`.

The supervisor writes the file and resets it at its start. This module does not know why a part was restarted.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from pathlib import Path

from . import paths


def restart_counts_file(http_port: int) -> Path:
    """The file of the Triton with this HTTP port."""
    return paths.cache() / "logs" / f"restarts-{http_port}.json"


class RestartCounts:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._counts: Counter[str] = Counter()
        self._write()

    def add(self, part: str) -> None:
        self._counts[part] += 1
        self._write()

    def _write(self) -> None:
        """Replace the file atomically. A full disk must not prevent a restart."""
        new = self._file.with_suffix(".new")
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(self._counts), encoding="utf-8")
            os.replace(new, self._file)


def read_restart_counts(file: Path | None) -> dict[str, int]:
    """Counts by part; empty when there is no readable file."""
    if file is None:
        return {}
    try:
        counts = json.loads(file.read_text(encoding="utf-8"))
        return {str(part): int(count) for part, count in counts.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
