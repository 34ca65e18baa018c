"""Realistic traffic with Locust: HTTP and gRPC users, users that disconnect early, and users with invalid requests.

    scripts/load --quick                                       a smoke test of at most two minutes
    scripts/load traffic --shape saturation --seconds 180      search the highest rate within the goal
    scripts/load traffic --shape constant --most-users 20 --seconds 300 --report report.html

It starts the bundled language models and a gateway, or uses those at --url (and --grpc). Other options go to Locust:
--processes 2, --prompts chat, --first 300 (goal, in ms) …; `--help` lists all. Exit code 1 means that a goal was
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
    with fleet() as servers:
        arguments = servers.tritons[0].process.args
        yield servers.url, f"127.0.0.1:{arguments[arguments.index('--grpc-port') + 1]}"


def command(url: str, grpc: str, more: Sequence[str]) -> list[str]:
    # The stop timeout lets users finish their requests: a stream cut off at the end is not a failure of the server.
    options = ["--headless", "--only-summary", "--stop-timeout", "30", "--host", url, "--grpc", grpc]
    return [sys.executable, "-m", "locust", "-f", str(_FILE), *options, *more]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test of all kinds of users, with loose goals")
    parser.add_argument("--shape", choices=_SHAPES, default="constant", help="the number of users over time")
    parser.add_argument("--url", default="", help="the URL of a running gateway")
    parser.add_argument("--grpc", default="", help="with --url: its Triton's gRPC address")
    parser.add_argument("-h", "--help", action="store_true")
    known, more = parser.parse_known_args()
    if known.help:
        parser.print_help()
        subprocess.run(command("http://127.0.0.1", "", ["--help"]), check=True)
        return
    with server(known.url, known.grpc) as (url, grpc):
        options = [*(_QUICK if known.quick else []), *more]
        environment = {**os.environ, "TRAFFIC_SHAPE": known.shape}
        seconds = float(options[options.index("--seconds") + 1]) if "--seconds" in options else 60.0
        timeout = seconds + _GRACE_SECONDS
        done = subprocess.run(command(url, grpc, options), env=environment, timeout=timeout, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
