"""Give a model repository's configurations what newer Tritons have settings for, and older ones cannot read.

    python newer_triton.py MODEL_REPOSITORY --max-inflight-requests 256

From 25.11 an ensemble can bound how many answers of one step may wait for the next one: so a reader that is slow does
not fill the memory. It knows texts of configurations, and no Triton.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_ENSEMBLE = re.compile(r"^ensemble_scheduling \{\n", flags=re.MULTILINE)
_INFLIGHT = "  max_inflight_requests: {count}\n"


def bounded(config: str, count: int) -> str:
    """An ensemble's configuration with the bound; any other as it was."""
    return _ENSEMBLE.sub(lambda found: found[0] + _INFLIGHT.format(count=count), config, count=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--max-inflight-requests", type=int, default=256, help="0: change nothing")
    arguments = parser.parse_args()
    if arguments.max_inflight_requests <= 0:
        return
    for file in sorted(arguments.repository.glob("*/config.pbtxt")):
        text = file.read_text(encoding="utf-8")
        made = bounded(text, arguments.max_inflight_requests)
        if made != text:
            file.write_text(made, encoding="utf-8")
            print(f"{file}: written anew")


if __name__ == "__main__":
    main()
