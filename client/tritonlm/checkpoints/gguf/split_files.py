"""The names of a split GGUF file's parts. It opens no file."""

from __future__ import annotations

import re
from pathlib import Path

from tritonlm.contract.errors import CheckpointError

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_MAX_PARTS = 1000


def part_files(file: Path) -> list[Path]:
    """All parts of a split file, of which `file` is one; the file itself if it is not split."""
    match = _PART.fullmatch(file.name)
    if match is None or int(match["count"]) < 2:
        return [file]
    count = int(match["count"])
    if count > _MAX_PARTS:
        raise CheckpointError(f"{file} names {count:,} parts, above the limit of {_MAX_PARTS:,}")
    return [file.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
