"""Rate limits shared by several gateways in a Redis, which the test starts; skipped if redis-server is missing."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.fake_transport import LM
from tritonlm.access.keys import KeyFile, Limits

from .conftest import WAIT_SECONDS, running_gateway

pytest.importorskip("redis", reason="the package redis is not installed (pip install 'tritonlm[redis]')")
pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="there is no redis-server here")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "redis-server does not start"
                time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait(WAIT_SECONDS)


def test_two_gateways_share_limits_and_refuse_requests_when_the_storage_is_gone(
    redis: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    url, process = redis
    file = KeyFile(tmp_path / "keys.json")
    headers = {"Authorization": f"Bearer {file.create('a', ['infer'], Limits(requests_per_minute=3))}"}
    body = {"model": LM, "prompt": "a", "max_tokens": 2}
    with (
        running_gateway(keys=file.path, limits_storage=url) as one,
        running_gateway(keys=file.path, limits_storage=url) as other,
    ):
        statuses = [
            gateway.http.post("/v1/completions", json=body, headers=headers).status_code
            for gateway in (one, other, one, other)
        ]
        assert statuses == [200, 200, 200, 429]
        process.kill()
        process.wait(WAIT_SECONDS)
        answer = one.http.post("/v1/completions", json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert int(answer.headers["retry-after"]) >= 1
