"""Several language models in one server: two checkpoints side by side, loaded on demand, replaced under load."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fakes.tiny_lm import make_checkpoint
from tritonlm import Client
from tritonlm.contract.control import STATUS, Command
from tritonlm.serving.control import TritonControl, deadline_check
from tritonlm.serving.paths import model_repository
from tritonlm.serving.registry import add_entry, make_entry

from .servers import LM, LOAD_SECONDS, copy_repository, running, wait_until
from .test_serve import Serve, serving

pytestmark = pytest.mark.triton

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}


def children(process_id: int) -> set[int]:
    return {child.pid for child in psutil.Process(process_id).children(recursive=True)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoint folders of one training, named by step."""
    folder = tmp_path_factory.mktemp("runs")
    for step in (2920, 3650):
        make_checkpoint(folder / f"step_{step}", seed=step)
    return folder


def text_of(http: httpx.Client, model: str, **options: Any) -> str:
    answer = http.post("/v1/completions", json={"model": model, "prompt": "Once upon", **GREEDY, **options})
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def http_of(serve: Serve, seconds: float = 60) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{serve.ports['port']}", timeout=seconds, trust_env=False)


def test_loading_a_loaded_unchanged_model_keeps_its_processes(tmp_path: Path) -> None:
    """Triton does nothing for a load request when the model is loaded and unchanged."""
    with running(copy_repository(tmp_path)) as server:
        processes = children(server.process_id)
        server.control.load(LM, deadline_check(LOAD_SECONDS))
        assert children(server.process_id) == processes


def test_two_checkpoints_side_by_side_and_a_third_on_demand(runs: Path, tmp_path: Path) -> None:
    registry = tmp_path / "models.yaml"
    add_entry(registry, make_entry(name="lazy", path=runs / "step_3650", max_sequences=3, max_context_tokens=100))
    options = ["--registry", str(registry)]
    for step in (2920, 3650):
        options += ["--checkpoint", str(runs / f"step_{step}")]
    with serving(model_repository(), tmp_path, *options) as serve, http_of(serve) as http:
        states = {model["id"]: model["state"] for model in http.get("/v1/models").json()["data"]}
        waiting = dict.fromkeys(("lazy", "abacus", "fable"), "unavailable")
        assert states == {"step_2920": "ready", "step_3650": "ready", **waiting}
        first, second = (text_of(http, f"step_{step}") for step in (2920, 3650))
        assert first != second
        # The first checkpoint is the default model.
        response = http.post("/generate", json={"prompt": "Once upon", "max_tokens": 24, "temperature": 0}).json()
        assert (response["model"], response["generated_text"][: len("Once upon")]) == ("step_2920", "Once upon")
        assert http.get("/info").json()["checkpoint"] == "step_2920"
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda _: text_of(http, "lazy"), range(8))) == {second}
        lazy = http.get("/v1/models/lazy").json()
        assert (lazy["state"], lazy["max_model_len"], lazy["slots"]) == ("ready", 100, 3)
        # The command line adds one to the running server.
        added = [sys.executable, "-m", "tritonlm.cli", "add", "late", "--model", str(runs / "step_2920")]
        subprocess.run([*added, "--registry", str(registry)], check=True, timeout=60)
        assert text_of(http, "late") == first


@pytest.mark.parametrize("by", ["command", "reload"])
def test_a_checkpoint_is_replaced_under_load_without_failed_requests(by: str, tmp_path: Path) -> None:
    served = make_checkpoint(tmp_path / "mine", seed=1, n_layer=6, n_embd=128)
    newer = make_checkpoint(tmp_path / "newer", seed=2, n_layer=6, n_embd=128)
    options = ["--checkpoint", str(served), *(["--reload"] if by == "reload" else [])]
    with serving(model_repository(), tmp_path, *options) as serve, http_of(serve) as http:
        before = text_of(http, "mine", max_tokens=300)
        stop = threading.Event()

        def send() -> list[str]:
            texts = []
            while not stop.is_set():
                texts.append(text_of(http, "mine", max_tokens=300))
            return [*texts, text_of(http, "mine", max_tokens=300)]

        with ThreadPoolExecutor(16) as pool, TritonControl("127.0.0.1", serve.ports["http_port"]) as control:
            futures = [pool.submit(send) for _ in range(16)]
            try:
                wait_until(lambda: control.command("mine-generate", Command(STATUS))["running"] >= 8, "8 requests run")
                for file in newer.iterdir():
                    shutil.copy2(file, served / file.name)
                if by == "command":
                    with Client(serve.grpc) as client:
                        assert client.status("mine")["stale"]
                        assert client.models.load("mine").state == "ready"
                        assert not client.status("mine")["stale"]
                else:
                    wait_until(lambda: serve.printed("mine is reloaded"), "it is reloaded")
            finally:
                stop.set()
            texts = [text for future in futures for text in future.result()]
        after = text_of(http, "mine", max_tokens=300)
        assert before != after
        assert set(texts) == {before, after}
        assert all(future.result()[-1] == after for future in futures)


def test_a_broken_new_checkpoint_keeps_the_old_one_serving(runs: Path, tmp_path: Path) -> None:
    served = tmp_path / "mine"
    shutil.copytree(runs / "step_2920", served)
    with serving(model_repository(), tmp_path, "--checkpoint", str(served)) as serve, http_of(serve) as http:
        before = text_of(http, "mine")
        (served / "config.json").write_text("{", encoding="utf-8")
        with Client(serve.grpc) as client, pytest.raises(Exception, match="is not valid JSON"):
            client.models.load("mine")
        assert text_of(http, "mine") == before


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's protocol that a download needs, for one private repository and one token."""

    folder: Path

    def do_HEAD(self) -> None:
        self._respond(body=False)

    def do_GET(self) -> None:
        self._respond(body=True)

    def _respond(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        content, headers = b"", {"X-Repo-Commit": "c" * 40}
        if self.headers.get("Authorization") != "Bearer hf_secret":
            status, content = 401, b'{"error": "Invalid credentials"}'
        elif path.startswith("/api/models/org/private/revision/v1"):
            files = [{"rfilename": file.name} for file in self.folder.iterdir()]
            status, content = 200, json.dumps({"id": "org/private", "sha": "c" * 40, "siblings": files}).encode()
        elif path.startswith(f"/api/models/org/private/tree/{'c' * 40}"):
            tree = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                     for file in self.folder.iterdir()]  # fmt: skip
            status, content = 200, json.dumps(tree).encode()
        elif path.startswith("/org/private/resolve/") and (self.folder / path.rpartition("/")[2]).is_file():
            status, content = 200, (self.folder / path.rpartition("/")[2]).read_bytes()
            headers["ETag"] = f'"{path.rpartition("/")[2]}-{len(content)}"'
        else:
            status = 404
            headers["X-Error-Code"] = "RepoNotFound"
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(runs: Path) -> Iterator[str]:
    handler = type("Served", (Hub,), {"folder": runs / "step_2920"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_hub_model_is_downloaded_at_its_first_request(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = tmp_path / "models.json"
    add_entry(registry, make_entry(name="private", hf_repo="org/private", revision="v1"))
    add_entry(registry, make_entry(name="missing", hf_repo="org/missing"))
    for name, value in {"HF_ENDPOINT": hub, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path / "hub")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MODEL_REGISTRY_PATH", str(registry))
    with serving(model_repository(), tmp_path) as serve, http_of(serve) as http:
        assert len(text_of(http, "private")) > 0
        answer = http.post("/v1/completions", json={"model": "missing", "prompt": "a"})
        assert answer.status_code == 500
        assert "the Hugging Face Hub refuses org/missing at main (HTTP status 404)" in answer.text
        assert "Traceback" not in answer.text
