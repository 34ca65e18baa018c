"""Builds the images and tests them with Docker: privileges, responses, shutdown. Prints the results.

    python docker/try_containers.py [--base-image IMAGE] [--network host] [--torch-options "--index-url URL"]

It requires a Docker engine and compose (exit code 75 without them). It removes the containers that it started and keeps
the images.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NO_ENGINE = 75
PORT = 18080
URL = f"http://127.0.0.1:{PORT}"
IMAGES = {"tritonlm-gateway": "docker/Dockerfile.gateway", "tritonlm": "docker/Dockerfile"}
MAX_MEGABYTES = {"tritonlm-gateway": 250}
_WAIT_SECONDS = 240.0
RESTRICTED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")


def run(*command: str, quiet: bool = True, **options: Any) -> str:
    result = subprocess.run(command, text=True, capture_output=quiet, cwd=ROOT, check=False, **options)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{(result.stdout or '')[-3000:]}\n{(result.stderr or '')[-3000:]}")
    return (result.stdout or "").strip()


def say(message: str) -> None:
    print(message, flush=True)


def wait_until(condition: Any, description: str) -> float:
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > _WAIT_SECONDS:
            sys.exit(f"timed out after {_WAIT_SECONDS:.0f} s: {description}")
        time.sleep(0.2)
    return time.monotonic() - start


def send(path: str, body: dict[str, Any] | None = None, key: str = "") -> tuple[int, str]:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(URL + path, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def build(base: str, network: str, torch_options: str) -> None:
    for image, file in IMAGES.items():
        start = time.monotonic()
        arguments = (
            {"BASE_IMAGE": base, "TORCH_OPTIONS": torch_options} if image == "tritonlm" else {"BASE_IMAGE": base}
        )
        command = ["docker", "build", *(["--network", network] if network else []), "-f", file, "-t", image]
        run(*command, *(part for item in arguments.items() for part in ("--build-arg", "=".join(item))), ".")
        size = int(run("docker", "image", "inspect", "-f", "{{.Size}}", image)) / 1e6
        say(f"built {image}: {size:.0f} MB in {time.monotonic() - start:.0f} s")
        if size > MAX_MEGABYTES.get(image, size):
            sys.exit(f"{image} has {size:.0f} MB; the limit is {MAX_MEGABYTES[image]} MB")


@contextmanager
def container(image: str, *options: str, command: tuple[str, ...] = ()) -> Iterator[str]:
    name = run("docker", "run", "--detach", "-p", f"127.0.0.1:{PORT}:8080", *RESTRICTED, *options, image, *command)
    try:
        yield name
    finally:
        subprocess.run(["docker", "rm", "--force", name], capture_output=True, check=False)


def is_healthy(name: str) -> bool:
    running, health = run("docker", "inspect", "-f", "{{.State.Running}} {{.State.Health.Status}}", name).split()
    if running != "true":
        log = subprocess.run(["docker", "logs", name], capture_output=True, text=True, check=False)
        sys.exit(f"the container ended:\n{(log.stdout + log.stderr)[-3000:]}")
    return health == "healthy"


def stop(name: str) -> tuple[float, int]:
    start = time.monotonic()
    run("docker", "stop", "--time", "60", name)
    return time.monotonic() - start, int(run("docker", "inspect", "-f", "{{.State.ExitCode}}", name))


def test_gateway_alone() -> None:
    """Without a Triton the gateway listens, reports that it is not ready, and runs with minimal rights."""
    with container("tritonlm-gateway", "-e", "TRITONLM_API_KEY=a-key-for-the-test", command=("gateway",)) as name:
        seconds = wait_until(lambda: send("/health/live")[0] == 200, "the gateway listens")
        user = run("docker", "exec", name, "id", "-u")
        capabilities = run("docker", "exec", name, "grep", "CapEff", "/proc/1/status").split()[1]
        writes = subprocess.run(["docker", "exec", name, "touch", "/x"], capture_output=True, check=False).returncode
        ready = send("/health/ready")[0]
        assert (user, int(capabilities, 16), ready) == ("10001", 0, 503)
        assert writes != 0
        say(
            f"gateway alone: listens after {seconds:.1f} s as user {user}, no capabilities, root read-only, "
            f"not ready without a Triton ({ready})"
        )
        seconds, code = stop(name)
        assert code == 0
        say(f"gateway alone: SIGTERM ends it in {seconds:.1f} s with {code}")


def test_full_image() -> None:
    """The full image serves requests, and lets a running stream finish at shutdown."""
    options = ("-e", "TRITONLM_API_KEY=a-key-for-the-test", "--shm-size", "256m")
    key = "a-key-for-the-test"
    with container("tritonlm", *options) as name:
        seconds = wait_until(lambda: is_healthy(name), "the container is healthy")
        check_sum(key)
        say(f"tritonlm: healthy after {seconds:.1f} s, abacus adds, root read-only, no capabilities")
        log = run("docker", "logs", name)
        assert "cannot be compiled" not in log, log[-2000:]
        check_drain(name, key)


def check_sum(key: str) -> None:
    status, text = send("/v1/completions", {"model": "abacus", "prompt": "123+456=", "temperature": 0}, key)
    assert status == 200, text
    assert json.loads(text)["choices"][0]["text"] == "579", text


def check_drain(name: str, key: str) -> None:
    """A stream that runs at SIGTERM finishes, and the exit code is 0."""
    body = {
        "model": "fable", "prompt": "Once upon a time", "max_tokens": 480, "ignore_eos": True, "stream": True,
        "n": 24, "temperature": 0.5, "seed": 1,
    }  # fmt: skip
    responses: list[tuple[int, str]] = []
    stream = threading.Thread(target=lambda: responses.append(send("/v1/completions", body, key)))
    stream.start()
    time.sleep(0.5)
    running = stream.is_alive()
    seconds, code = stop(name)
    stream.join(60)
    finished = bool(responses) and responses[0][1].rstrip().endswith("data: [DONE]")
    say(
        f"SIGTERM while a stream {'ran' if running else 'had just ended'}: the stream "
        f"{'finished' if finished else 'was cut off'}, exit code {code} after {seconds:.1f} s"
    )
    assert finished
    assert code == 0


def test_compose() -> None:
    """The services of compose.yaml: two Tritons and a gateway; one Triton stops without failed requests."""
    environment = {**os.environ, "PORT": str(PORT), "BIND": "127.0.0.1", "BUILD": "no"}
    command = [str(ROOT / "scripts" / "compose")]
    start = time.monotonic()
    try:
        run(*command, "up", env=environment)
        wait_until(lambda: send("/health/ready")[0] == 200, "the gateway is ready")
        key = dict(line.split("=", 1) for line in (ROOT / "docker" / ".env").read_text().split())["TRITONLM_API_KEY"]
        check_sum(key)
        say(f"compose: two Tritons and a gateway answer after {time.monotonic() - start:.0f} s")
        assert send("/v1/models")[0] == 401
        tritons = [run(*command, "ps", "-q", f"triton-{number}", env=environment) for number in (1, 2)]
        seconds, code = stop(tritons[0])
        for _ in range(20):
            check_sum(key)
        say(f"compose: one Triton stopped (exit code {code} after {seconds:.1f} s), 20 of 20 requests answered")
        assert code == 0
        check_drain(run(*command, "ps", "-q", "gateway", env=environment), key)
    finally:
        subprocess.run([*command, "down", "--volumes"], env=environment, capture_output=True, cwd=ROOT, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-image", default="debian:bookworm-slim")
    parser.add_argument("--network", default="", help="for docker build, if it needs the host's network")
    parser.add_argument("--torch-options", default="", help="pip options for torch")
    arguments = parser.parse_args()
    engine = shutil.which("docker") and subprocess.run(["docker", "version"], capture_output=True, check=False)
    if not engine or engine.returncode:
        print("no Docker engine is available", file=sys.stderr)
        sys.exit(NO_ENGINE)
    build(arguments.base_image, arguments.network, arguments.torch_options)
    test_gateway_alone()
    test_full_image()
    test_compose()
    say("all checks passed")


if __name__ == "__main__":
    main()
