"""Add settings of newer Tritons, which older ones cannot read, to the configurations of a model repository.

    python newer_triton.py MODEL_REPOSITORY --max-inflight-requests 256

Since 25.11 an ensemble can limit the responses of one step that wait for the next step, so that a slow reader does not
fill the memory. The script edits config.pbtxt as text and does not contact Triton.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_ENSEMBLE = re.compile(r"^ensemble_scheduling \{\n", flags=re.MULTILINE)
_INFLIGHT = "  max_inflight_requests: {count}\n"


def with_inflight_bound(config: str, count: int) -> str:
    """An ensemble's configuration with the limit; any other configuration unchanged."""
    return _ENSEMBLE.sub(lambda match: match[0] + _INFLIGHT.format(count=count), config, count=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--max-inflight-requests", type=int, default=256, help="0: change nothing")
    arguments = parser.parse_args()
    if arguments.max_inflight_requests <= 0:
        return
    for file in sorted(arguments.repository.glob("*/config.pbtxt")):
        text = file.read_text(encoding="utf-8")
        changed = with_inflight_bound(text, arguments.max_inflight_requests)
        if changed != text:
            file.write_text(changed, encoding="utf-8")
            print(f"{file}: updated")


if __name__ == "__main__":
    main()
