"""Builds the images and tries them for real: what they may do, what they answer, how they end. Prints what it saw.

    python docker/try_containers.py [--base-image IMAGE] [--network host] [--torch-options "--index-url URL"]

It wants a Docker engine and compose (exit code 75 where there is none). It removes the containers that it started; the
images stay.
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
MOST_MEGABYTES = {"tritonlm-gateway": 250}
_WAIT_SECONDS = 240.0
LOCKED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")


def run(*command: str, quiet: bool = True, **more: Any) -> str:
    done = subprocess.run(command, text=True, capture_output=quiet, cwd=ROOT, check=False, **more)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{(done.stdout or '')[-3000:]}\n{(done.stderr or '')[-3000:]}")
    return (done.stdout or "").strip()


def say(what: str) -> None:
    print(what, flush=True)


def wait_until(condition: Any, what: str) -> float:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > _WAIT_SECONDS:
            sys.exit(f"waited {_WAIT_SECONDS:.0f} s in vain until {what}")
        time.sleep(0.2)
    return time.monotonic() - began


def ask(path: str, body: dict[str, Any] | None = None, key: str = "") -> tuple[int, str]:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(URL + path, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def build(base: str, network: str, torch_options: str) -> None:
    for image, file in IMAGES.items():
        began = time.monotonic()
        arguments = (
            {"BASE_IMAGE": base, "TORCH_OPTIONS": torch_options} if image == "tritonlm" else {"BASE_IMAGE": base}
        )
        command = ["docker", "build", *(["--network", network] if network else []), "-f", file, "-t", image]
        run(*command, *(part for each in arguments.items() for part in ("--build-arg", "=".join(each))), ".")
        size = int(run("docker", "image", "inspect", "-f", "{{.Size}}", image)) / 1e6
        say(f"built {image}: {size:.0f} MB in {time.monotonic() - began:.0f} s")
        if size > MOST_MEGABYTES.get(image, size):
            sys.exit(f"{image} has {size:.0f} MB, and at most {MOST_MEGABYTES[image]} are meant")


@contextmanager
def container(image: str, *options: str, command: tuple[str, ...] = ()) -> Iterator[str]:
    name = run("docker", "run", "--detach", "-p", f"127.0.0.1:{PORT}:8080", *LOCKED, *options, image, *command)
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
    began = time.monotonic()
    run("docker", "stop", "--time", "60", name)
    return time.monotonic() - began, int(run("docker", "inspect", "-f", "{{.State.ExitCode}}", name))


def try_gateway_alone() -> None:
    """Without a Triton it listens, says that it is not ready, and runs with as few rights as there can be."""
    with container("tritonlm-gateway", "-e", "TRITONLM_API_KEY=a-key-for-the-test", command=("gateway",)) as name:
        seconds = wait_until(lambda: ask("/health/live")[0] == 200, "the gateway listens")
        who = run("docker", "exec", name, "id", "-u")
        capabilities = run("docker", "exec", name, "grep", "CapEff", "/proc/1/status").split()[1]
        writes = subprocess.run(["docker", "exec", name, "touch", "/x"], capture_output=True, check=False).returncode
        ready = ask("/health/ready")[0]
        assert (who, int(capabilities, 16), ready) == ("10001", 0, 503)
        assert writes != 0
        say(
            f"gateway alone: listens after {seconds:.1f} s as user {who}, no capabilities, root read-only, "
            f"not ready without a Triton ({ready})"
        )
        seconds, code = stop(name)
        assert code == 0
        say(f"gateway alone: SIGTERM ends it in {seconds:.1f} s with {code}")


def try_whole() -> None:
    """One container with everything answers, and lets a running stream end before it does."""
    options = ("-e", "TRITONLM_API_KEY=a-key-for-the-test", "--shm-size", "256m")
    key = "a-key-for-the-test"
    with container("tritonlm", *options) as name:
        seconds = wait_until(lambda: is_healthy(name), "the container is healthy")
        answered(key)
        say(f"tritonlm: healthy after {seconds:.1f} s, abacus adds, root read-only, no capabilities")
        log = run("docker", "logs", name)
        assert "cannot be compiled" not in log, log[-2000:]
        drained(name, key)


def answered(key: str) -> None:
    status, text = ask("/v1/completions", {"model": "abacus", "prompt": "123+456=", "temperature": 0}, key)
    assert status == 200, text
    assert json.loads(text)["choices"][0]["text"] == "579", text


def drained(name: str, key: str) -> None:
    """A stream that runs when SIGTERM comes has its end; who comes after it is sent elsewhere; the exit code is 0."""
    body = {
        "model": "fable", "prompt": "Once upon a time", "max_tokens": 480, "ignore_eos": True, "stream": True,
        "n": 24, "temperature": 0.5, "seed": 1,
    }  # fmt: skip
    answers: list[tuple[int, str]] = []
    stream = threading.Thread(target=lambda: answers.append(ask("/v1/completions", body, key)))
    stream.start()
    time.sleep(0.5)
    running = stream.is_alive()
    seconds, code = stop(name)
    stream.join(60)
    ended = bool(answers) and answers[0][1].rstrip().endswith("data: [DONE]")
    say(
        f"SIGTERM while a stream {'ran' if running else 'had just ended'}: the stream "
        f"{'came to its end' if ended else 'broke off'}, exit code {code} after {seconds:.1f} s"
    )
    assert ended
    assert code == 0


def try_compose() -> None:
    """The topology of compose.yaml: two Tritons, a gateway; one Triton is stopped and the callers do not notice."""
    environment = {**os.environ, "PORT": str(PORT), "BIND": "127.0.0.1", "BUILD": "no"}
    command = [str(ROOT / "scripts" / "compose")]
    began = time.monotonic()
    try:
        run(*command, "up", env=environment)
        wait_until(lambda: ask("/health/ready")[0] == 200, "the gateway is ready")
        key = dict(line.split("=", 1) for line in (ROOT / "docker" / ".env").read_text().split())["TRITONLM_API_KEY"]
        answered(key)
        say(f"compose: two Tritons and a gateway answer after {time.monotonic() - began:.0f} s")
        assert ask("/v1/models")[0] == 401
        tritons = [run(*command, "ps", "-q", f"triton-{number}", env=environment) for number in (1, 2)]
        seconds, code = stop(tritons[0])
        for _ in range(20):
            answered(key)
        say(f"compose: one Triton stopped (exit code {code} after {seconds:.1f} s), 20 of 20 requests answered")
        assert code == 0
        drained(run(*command, "ps", "-q", "gateway", env=environment), key)
    finally:
        subprocess.run([*command, "down", "--volumes"], env=environment, capture_output=True, cwd=ROOT, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-image", default="debian:bookworm-slim")
    parser.add_argument("--network", default="", help="for docker build, where it needs the host's")
    parser.add_argument("--torch-options", default="", help="for pip: where torch comes from")
    arguments = parser.parse_args()
    engine = shutil.which("docker") and subprocess.run(["docker", "version"], capture_output=True, check=False)
    if not engine or engine.returncode:
        print("no Docker engine answers here", file=sys.stderr)
        sys.exit(NO_ENGINE)
    build(arguments.base_image, arguments.network, arguments.torch_options)
    try_gateway_alone()
    try_whole()
    try_compose()
    say("all is well")


if __name__ == "__main__":
    main()
