"""Several language models in one server: two checkpoints side by side, loaded on demand, replaced under load."""

from __future__ import annotations

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
from fakes.gguf_writer import write_gguf
from fakes.hub_server import HubServer, hub_server
from fakes.tiny_lm import make_checkpoint
from tritonlm import Client
from tritonlm.contract.control import STATUS, Command
from tritonlm.contract.parts import PARTS
from tritonlm.serving.control import TritonControl, deadline_check
from tritonlm.serving.paths import model_repository
from tritonlm.serving.registry import add_entry, make_entry, read_registry

from .servers import LM, LOAD_SECONDS, Server, copy_repository, running, wait_until
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


def test_loading_a_loaded_unchanged_model_keeps_its_processes(server: Server) -> None:
    """Triton does nothing for a load request when the model is loaded and unchanged."""
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
    served = make_checkpoint(tmp_path / "mine", seed=1)
    newer = make_checkpoint(tmp_path / "newer", seed=2)
    options = ["--checkpoint", str(served), *(["--reload"] if by == "reload" else [])]
    # Slow enough that requests always run, without a busy core.
    repository = copy_repository(tmp_path, slow="native")
    with serving(repository, tmp_path, *options) as serve, http_of(serve) as http:
        before = text_of(http, "mine", max_tokens=100)
        stop = threading.Event()

        def send() -> list[str]:
            texts = []
            while not stop.is_set():
                texts.append(text_of(http, "mine", max_tokens=100))
            return [*texts, text_of(http, "mine", max_tokens=100)]

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
        after = text_of(http, "mine", max_tokens=100)
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


def use_hub(monkeypatch: pytest.MonkeyPatch, server: HubServer, folder: Path) -> None:
    # The tests of the gateway, which may run before in this process, set HF_HUB_OFFLINE.
    for name, value in {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def hub(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with two models, of which all need a token."""
    with hub_server(private=runs / "step_2920", other=runs / "step_3650") as server:
        server.token = "hf_secret"
        use_hub(monkeypatch, server, tmp_path)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server


def test_a_hub_model_is_downloaded_at_its_first_request(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = tmp_path / "models.json"
    add_entry(registry, make_entry(name="private", hf_repo="org/private", revision="v1"))
    add_entry(registry, make_entry(name="missing", hf_repo="org/missing"))
    monkeypatch.setenv("MODEL_REGISTRY_PATH", str(registry))
    with serving(model_repository(), tmp_path) as serve, http_of(serve) as http:
        assert len(text_of(http, "private")) > 0
        answer = http.post("/v1/completions", json={"model": "missing", "prompt": "a"})
        assert answer.status_code == 500
        assert "the Hugging Face Hub has no model org/missing; check the name, and the token" in answer.text
        assert "Traceback" not in answer.text
        # Three processes read the checkpoint, and one download serves them.
        assert hub.downloads("model.safetensors") == [""]


@pytest.mark.slow
def test_serve_takes_a_folder_and_a_hub_model_and_others_are_added_by_a_caller(
    hub: HubServer, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_REGISTRY_PATH", str(tmp_path / "models.yaml"))
    add_entry(tmp_path / "models.yaml", make_entry(name="unused", path=runs / "step_3650"))
    # The first argument names the default model.
    models = ["org/private@v1", f"local={runs / 'step_3650'}"]
    with serving(model_repository(), tmp_path, *models) as serve, http_of(serve) as http:
        states = {model["id"]: model["state"] for model in http.get("/v1/models").json()["data"]}
        assert (states["private"], states["local"]) == ("ready", "ready")
        assert "downloading org/private@v1" in serve.output.read_text()
        first, second = text_of(http, "private"), text_of(http, "local")
        assert first != second
        for model, text in (("org/other", second), (str(runs / "step_2920"), first)):
            answer = http.post("/api/load_model", json={"model_path": model})
            assert answer.status_code == 200, answer.text
            assert text_of(http, model.rpartition("/")[2]) == text
        for model, status in (("org/missing", 400), ("/nowhere/lm", 404)):
            answer = http.post("/api/load_model", json={"model_path": model})
            assert answer.status_code == status, answer.text
            assert "Traceback" not in answer.text
    registered = [entry.name for entry in read_registry(tmp_path / "models.yaml")]
    assert registered == ["unused", "other", "step_2920"]
    assert hub.downloads("model.safetensors") == ["", ""]


def test_the_parameter_checkpoint_of_a_plain_triton_takes_a_hub_model(hub: HubServer, tmp_path: Path) -> None:
    repository = copy_repository(tmp_path)
    for part in PARTS:
        config = repository / part / "config.pbtxt"
        config.write_text(config.read_text().replace(f"../{LM}/1", "org/private"))
    shutil.rmtree(repository / LM / "1")
    (repository / LM / "1").mkdir()
    with running(repository) as server:
        assert server.generate(text_input="Once upon", max_tokens=5).status_code == 200


@pytest.mark.slow
def test_serve_takes_gguf_files_from_disk_and_from_the_hub(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(runs / "step_2920", tmp_path / "lm-F32.gguf")
    (tmp_path / "repository").mkdir()
    shutil.copy(file, tmp_path / "repository")
    with hub_server(lm_gguf=tmp_path / "repository") as hub:
        use_hub(monkeypatch, hub, tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        names = ["lm-F32", "downloaded", "original"]
        models = [str(file), "downloaded=org/lm-gguf:F32", f"original={runs / 'step_2920'}"]
        with serving(model_repository(), tmp_path, *models, "--dtype", "float32") as serve, http_of(serve) as http:
            ready = {model["id"] for model in http.get("/v1/models").json()["data"] if model["state"] == "ready"}
            assert ready == set(names)
            assert len({text_of(http, name) for name in names}) == 1
        assert hub.downloads("lm-F32.gguf") == [""]
