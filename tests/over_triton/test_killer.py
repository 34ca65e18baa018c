"""A request that kills its process whenever it is computed is ended; the others end with unchanged texts."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from .servers import LM, WAIT_SECONDS, copy_repository, wait_until
from .test_serve import Serve, serving
from .test_survival import find_process

pytestmark = pytest.mark.triton

OTHERS = 16


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    folder = tmp_path_factory.mktemp("killer")
    with pytest.MonkeyPatch.context() as environment:
        # Nobody's request may end because a busy machine takes long to start the killed processes.
        environment.setenv("TRITONLM_REPAIR_SECONDS", str(WAIT_SECONDS))
        # Slow enough that the killer finds the process at work.
        with serving(copy_repository(folder, slow="native"), folder) as serve:
            yield serve


# Long enough that each process is still at work when the killer, which is slow on a busy machine, has found it. The
# others are shorter: after the second death each of them is computed apart, one after the other.
TOKENS, KILLERS_TOKENS = 20, 200
# Each request waits for up to four processes that start, and for the others.
REQUEST_SECONDS = 4 * WAIT_SECONDS
KILLER = "The killer"


def body(prompt: str) -> dict[str, Any]:
    tokens = KILLERS_TOKENS if prompt.startswith(KILLER) else TOKENS
    return {"model": LM, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "seed": 5, "temperature": 1}


def send(url: str, prompt: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=body(prompt), timeout=REQUEST_SECONDS, trust_env=False)


def journal(serve: int) -> dict[str, Any]:
    """The engine's step journal: the requests in the current steps, and those that were in one when a process died."""
    for file in Path(tempfile.gettempdir()).glob(f"tritonlm-steps-*-{serve}-*-generate-*"):
        with contextlib.suppress(OSError, ValueError), file.open("rb") as opened:
            return dict(json.loads(opened.read(int.from_bytes(opened.read(8), "little")) or b"{}"))
    return {}


def computed_now(serve: int) -> list[str]:
    """The fingerprints of the requests in the current step."""
    return [name for step in journal(serve).get("steps", []) for name, _ in step]


class Killer:
    """Kills `generate` whenever a request of this fingerprint is in a step; and once Triton, after the first time."""

    def __init__(self, serve: Serve, fingerprint: str, *, kills_triton: bool) -> None:
        self._serve, self._pid, self._fingerprint = serve, serve.process.pid, fingerprint
        self._kills_triton = kills_triton
        self.kills = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _kill_in_step(self, process: psutil.Process) -> None:
        """Stop the process and look again before the kill: between steps it would count for no request."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
            if self._fingerprint in computed_now(self._pid):
                before = journal(self._pid)
                process.kill()
                self.kills += 1
                self._wait_for_successor(before)
            else:
                process.resume()

    def _wait_for_successor(self, journal_before: dict[str, Any]) -> None:
        """Wait until the next process has read the journal; it may begin the request at once.

        Where the kill has brought down Triton, too, the journal says so, and this death does not count.
        """
        while journal(self._pid) in ({}, journal_before) and not self._ended.is_set():
            time.sleep(0.002)

    def _run(self) -> None:
        process = find_process(self._serve, "generate")
        while not self._ended.is_set():
            if self._fingerprint in computed_now(self._pid):
                self._kill_in_step(process)
                if self.kills and self._kills_triton:
                    self._kills_triton = False
                    find_process(self._serve, "tritonserver").kill()
                process = find_process(self._serve, "generate")
            time.sleep(0.002)


@pytest.mark.parametrize("kills_triton", [False, True])
def test_a_request_that_kills_its_process_is_ended(served: Serve, kills_triton: bool) -> None:
    url, pid = f"http://127.0.0.1:{served.ports['port']}", served.process.pid
    triton = find_process(served, "tritonserver").pid
    # A killer is remembered.
    prompts, killers = [f"Once {number}" for number in range(OTHERS)], f"{KILLER} {kills_triton}"
    with ThreadPoolExecutor(OTHERS + 1) as threads:
        responses = threads.map(lambda prompt: send(url, prompt), prompts)
        undisturbed = [response.json()["choices"] for response in responses]
        wait_until(lambda: not computed_now(pid), "the engine is idle")
        alone = threads.submit(send, url, killers)
        deadline, seen = time.monotonic() + WAIT_SECONDS, []
        while not seen and time.monotonic() < deadline:
            seen = computed_now(pid)
        assert alone.result().is_success, "without the killer the request succeeds"
        with Killer(served, seen[0], kills_triton=kills_triton) as killer:
            killed, *others = threads.map(lambda prompt: send(url, prompt), [killers, *prompts])
    assert killed.status_code == 500, f"after {killer.kills} kills"
    assert killed.json()["error"]["code"] == "request_failed_repeatedly"
    assert killed.headers["x-should-retry"] == "false"
    assert [response.json()["choices"] for response in others] == undisturbed
    # One more if a kill has brought down Triton, which has locks in memory that it shares with the process.
    assert 2 <= killer.kills <= 4 + (find_process(served, "tritonserver").pid != triton)
