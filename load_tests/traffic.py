"""Traffic as it comes in life: HTTP and gRPC users, some who leave, some who send nonsense; by Locust.

    scripts/load --quick                                       two minutes at most: a smoke test
    scripts/load traffic --shape saturation --seconds 180      the highest rate within the goal
    scripts/load traffic --shape constant --most-users 20 --seconds 300 --report report.html

It starts the bundled language models and a gateway, or takes those at --url (and --grpc). What it does not know of
goes to Locust: --processes 2, --prompts chat, --first 300 (goal, in ms) …; `--help` shows all. Exit code 1: a goal was
missed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from servers import fleet

_FILE = Path(__file__).parent / "traffic" / "locustfile.py"
_SHAPES = ("constant", "steps", "spike", "saturation")
_QUICK = ["--most-users", "12", "--seconds", "45", "--first", "5000", "--between", "1000"]
_GRACE_SECONDS = 120


@contextlib.contextmanager
def server(url: str, grpc: str) -> Iterator[tuple[str, str]]:
    if url:
        yield url, grpc
        return
    with fleet() as found:
        arguments = found.tritons[0].process.args
        yield found.url, f"127.0.0.1:{arguments[arguments.index('--grpc-port') + 1]}"


def command(url: str, grpc: str, more: Sequence[str]) -> list[str]:
    # Who is to go ends what has begun: a stream that is cut off in the midst is no failure of the server.
    told = ["--headless", "--only-summary", "--stop-timeout", "30", "--host", url, "--grpc", grpc]
    return [sys.executable, "-m", "locust", "-f", str(_FILE), *told, *more]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test of all kinds of users, with wide goals")
    parser.add_argument("--shape", choices=_SHAPES, default="constant", help="how many users there are when")
    parser.add_argument("--url", default="", help="a gateway that runs already")
    parser.add_argument("--grpc", default="", help="with --url: its Triton's gRPC address")
    parser.add_argument("-h", "--help", action="store_true")
    known, more = parser.parse_known_args()
    if known.help:
        parser.print_help()
        subprocess.run(command("http://127.0.0.1", "", ["--help"]), check=True)
        return
    with server(known.url, known.grpc) as (url, grpc):
        asked = [*(_QUICK if known.quick else []), *more]
        environment = {**os.environ, "TRAFFIC_SHAPE": known.shape}
        seconds = float(asked[asked.index("--seconds") + 1]) if "--seconds" in asked else 60.0
        done = subprocess.run(command(url, grpc, asked), env=environment, timeout=seconds + _GRACE_SECONDS, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
