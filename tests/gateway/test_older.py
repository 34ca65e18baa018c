"""The routes of older systems: the documented requests return the documented fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes.checkpoints import write_checkpoint
from fakes.fake_repository import FakeModel, FakeRepository
from fakes.fake_transport import ABOUT_LM, LM
from tritonlm.serving.registry import add_entry, make_entry, read_registry

from .conftest import Gateway, running_gateway

# Method, path, body and response fields, as documented.
DOCUMENTED: list[tuple[str, str, dict[str, Any] | None, set[str]]] = [
    # a queue in front of a GPT-2
    ("POST", "/completions", {"prompt": "The future of AI is", "max_tokens": 15, "temperature": 0.8},
     {"id", "object", "created", "model", "choices", "usage"}),
    ("POST", "/completions", {"prompt": "Once upon a time", "max_tokens": 10}, {"choices", "usage"}),
    ("GET", "/queue", None, {"queue_size"}),
    ("GET", "/health", None, {"status", "model", "queue"}),
    ("GET", "/", None, {"endpoints"}),
    # an inference server for checkpoints
    ("POST", "/generate",
     {"prompt": "123+456=", "max_tokens": 100, "temperature": 0.8, "top_k": None, "stop_on_newline": False},
     {"prompt", "generated_text", "tokens_generated", "model"}),
    ("POST", "/generate", {"prompt": "123+", "max_tokens": 30, "temperature": 0.0}, {"generated_text"}),
    ("POST", "/generate", {"prompt": "H+B=", "max_tokens": 50, "temperature": 0.8, "top_k": 10}, {"generated_text"}),
    ("POST", "/generate",
     {"prompt": "123\n456\n", "max_tokens": 100, "temperature": 0.5, "stop_on_newline": True}, {"generated_text"}),
    ("GET", "/health", None, {"status", "model_loaded", "checkpoint"}),
    ("GET", "/info", None, {"checkpoint", "step", "val_loss", "model_layers", "model_dim", "vocab_size"}),
    ("GET", "/", None, {"service", "version", "checkpoint", "status", "endpoints"}),
    # a chat server
    ("POST", "/chat", {"prompt": "What is machine learning?"},
     {"prompt", "response", "tokens_generated", "time_seconds", "tokens_per_second"}),
    ("POST", "/chat", {"prompt": "Explain quantum computing", "max_tokens": 256}, {"response"}),
    ("POST", "/chat", {"prompt": "Write a creative story", "max_tokens": 200, "temperature": 0.7}, {"response"}),
    ("GET", "/health", None, {"status", "model", "model_loaded", "note"}),
    # a language model API
    ("GET", "/api/status", None, {"status", "model_loaded", "device", "timestamp"}),
    ("GET", "/api/models", None, {"pretrained_models", "trained_models"}),
    ("POST", "/api/load_model", {"model_type": LM}, {"message"}),
    ("POST", "/api/load_model", {"model_path": f"out/{LM}"}, {"message"}),
    ("POST", "/api/generate", {"prompt": "Once upon a time", "max_new_tokens": 150, "temperature": 0.8, "top_k": 40},
     {"prompt", "generated_text", "parameters"}),
    # an OpenAI-compatible API over Hugging Face models
    ("GET", "/v1/models", None, {"object", "data"}),
    ("GET", "/healthz", None, {"status"}),
    ("POST", "/v1/completions", {"model": LM, "prompt": "Write a haiku about fast APIs", "max_tokens": 64},
     {"choices"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "body", "fields"), DOCUMENTED, ids=[f"{row[0]} {row[1]}" for row in DOCUMENTED]
)
def test_documented_requests_work(
    gateway: Gateway, method: str, path: str, body: dict[str, Any] | None, fields: set[str]
) -> None:
    response = gateway.http.request(method, path, json=body)
    assert response.status_code == 200, response.text
    assert fields <= set(response.json())


def test_generate_returns_the_prompt_and_its_continuation(gateway: Gateway) -> None:
    answer = gateway.post("/generate", prompt="123+456=", max_tokens=7).json()
    assert answer["generated_text"].startswith("123+456=")
    assert len(answer["generated_text"]) > len("123+456=")
    assert (answer["prompt"], answer["model"]) == ("123+456=", LM)
    (call,) = gateway.transport.calls
    assert (call.parameters["max_tokens"], call.parameters["temperature"]) == (7, 0.8)


@pytest.mark.parametrize(
    ("path", "body", "sent"),
    [
        ("/generate", {"prompt": "a"}, {"max_tokens": 100, "temperature": 0.8}),
        ("/generate", {"prompt": "a", "stop_on_newline": True}, {"stop": ["\n"]}),
        ("/generate", {"prompt": "a", "top_k": 10}, {"top_k": 10}),
        ("/chat", {"prompt": "a"}, {"max_tokens": 128, "temperature": 0.0}),
        ("/api/generate", {"prompt": "a"}, {"max_tokens": 150, "temperature": 0.8, "top_k": 40}),
    ],
)
def test_defaults_are_as_documented(gateway: Gateway, path: str, body: dict[str, Any], sent: dict[str, Any]) -> None:
    assert gateway.post(path, **body).status_code == 200
    assert sent.items() <= gateway.transport.calls[0].parameters.items()


@pytest.mark.parametrize("path", ["/generate", "/chat", "/api/generate"])
@pytest.mark.parametrize(
    ("change", "param"),
    [({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 2049}, "max_tokens"), ({"temperature": 2.1}, "temperature"),
     ({"heat": 1}, "heat"), ({"prompt": 5}, "prompt")],
)  # fmt: skip
def test_ranges_are_as_documented(gateway: Gateway, path: str, change: dict[str, Any], param: str) -> None:
    if path == "/api/generate":
        change = {name.replace("max_tokens", "max_new_tokens"): value for name, value in change.items()}
        param = param.replace("max_tokens", "max_new_tokens")
    response = gateway.post(path, **{"prompt": "a", **change})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_chat_uses_the_template_if_there_is_one(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway.post("/chat", prompt="hello")
    monkeypatch.setitem(ABOUT_LM, "chat_template", "{{ messages }}")
    gateway.post("/chat", prompt="hello")
    plain, templated = gateway.transport.calls
    assert (plain.prompt.text, plain.prompt.messages) == ("hello", None)
    assert json.loads(templated.prompt.messages or "") == [{"role": "user", "content": "hello"}]


def test_a_streamed_chat_is_text_and_ends_with_its_speed(gateway: Gateway) -> None:
    complete = gateway.post("/chat", prompt="hello", temperature=0).json()["response"]
    text = gateway.post("/chat/stream", prompt="hello", temperature=0).text
    *blocks, last = [block for block in text.split("\n\n") if block]
    parts = ["\n".join(line.removeprefix("data: ") for line in block.split("\n")) for block in blocks]
    assert "".join(parts) == complete
    kind, data = last.split("\n")
    assert kind == "event: done"
    assert set(json.loads(data.removeprefix("data: "))) == {"tokens_generated", "time_seconds", "tokens_per_second"}


def test_a_requests_state_is_available_by_its_id(gateway: Gateway) -> None:
    completion = gateway.post("/completions", prompt="a", max_tokens=5).json()
    entry = gateway.http.get(f"/requests/{completion['id']}").json()
    assert (entry["status"], entry["completion_tokens"]) == ("completed", 5)
    assert entry["finished"] >= entry["created"]

    gateway.transport.pause = 0.2
    with gateway.http.stream(
        "POST", "/completions", json={"prompt": "a b", "stream": True}, headers={"x-request-id": "mine"}
    ) as response:
        lines = response.iter_lines()
        next(lines)
        entry = httpx.get(f"{gateway.url}/requests/cmpl-mine", trust_env=False).json()
        assert (entry["status"], entry["finished"]) == ("processing", None)
        list(lines)
    assert gateway.http.get("/requests/cmpl-mine").json()["status"] == "completed"
    assert gateway.http.get("/requests/nobody").status_code == 404
    state = gateway.http.get("/queue").json()
    assert state["requests"]["completed"] == 2
    (model,) = [model for model in state["models"] if model["model"] == LM]
    assert (model["tritons"], model["slots"], model["tokens_per_second"]) == (1, 64, 12.5)
    assert model["places"] == state["places"] == state["slots"] == 64
    assert (model["kv_blocks"], model["kv_blocks_used"]) == (128, 3)


def test_a_requests_id_may_hold_slashes(gateway: Gateway) -> None:
    gateway.http.post("/v1/completions", json={"model": LM, "prompt": "a"}, headers={"x-request-id": "team/7"})
    assert gateway.http.get("/requests/cmpl-team/7").json()["status"] == "completed"


def test_without_a_model_the_answer_is_503() -> None:
    with running_gateway(load_on_demand=False) as gateway:
        check_refusals_without_a_model(gateway)


def check_refusals_without_a_model(gateway: Gateway) -> None:
    gateway.transport.loaded = False
    for path in ("/generate", "/chat", "/completions", "/api/generate"):
        assert gateway.post(path, prompt="a").status_code == 503
    assert gateway.http.get("/api/status").json()["model_loaded"] is False


def test_unsupported_requests_get_501(gateway: Gateway) -> None:
    body = {
        "dataset": "shakesphere", "output_dir": "out/x", "model_type": "gpt2", "batch_size": 4, "learning_rate": 3e-5,
        "max_iters": 20, "eval_interval": 5,
    }  # fmt: skip
    assert gateway.post("/api/train", **body).status_code == 501
    gateway.transport.has_embeddings = False
    refused = gateway.post("/v1/embeddings", model=LM, input="a")
    assert (refused.status_code, refused.headers["x-should-retry"]) == (501, "false")
    assert "ENABLE_EMBEDDINGS" in refused.json()["error"]["message"]
    assert gateway.post("/api/load_model", model_type="nope").status_code == 404
    assert gateway.post("/api/load_model").status_code == 400


def test_tokenizer_info_has_the_fields_of_evaluation_tools(gateway: Gateway) -> None:
    tokenizer = gateway.http.get("/tokenizer_info").json()
    assert tokenizer["eos_token"] == "<end>"
    assert "chat_template" in tokenizer


def test_load_model_registers_a_folder_that_the_server_does_not_know(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "runs" / "mine")
    registry = tmp_path / "models.yaml"
    with running_gateway(registry=registry) as gateway:
        refused = gateway.post("/api/load_model", model_path=str(folder))
        assert refused.status_code == 400
        assert "has no *.safetensors weights" in refused.json()["error"]["message"]
        assert not registry.exists()
        (folder / "model.safetensors").write_bytes(b"")
        # The fake Triton knows no other model; this one is registered, and then asked for.
        assert gateway.post("/api/load_model", model_path=str(folder)).status_code == 404
        assert [entry.path for entry in read_registry(registry)] == [folder]
        other = write_checkpoint(tmp_path / "others" / "mine")
        (other / "model.safetensors").write_bytes(b"")
        taken = gateway.post("/api/load_model", model_path=str(other))
        assert taken.status_code == 400
        assert "another model is registered as mine" in taken.json()["error"]["message"]
        for nowhere in ("/no/where", "no where", "a\0b", "x" * 5000, "y" * 300, "../" * 100 + "nowhere"):
            assert gateway.post("/api/load_model", model_path=nowhere).status_code in (400, 404)


@pytest.fixture
def registered(tmp_path: Path) -> Path:
    """A registry with `mine`, a folder, and `small`, a file whose name has a space and a plus."""
    registry = tmp_path / "models.yaml"
    for folder in ("runs", "others"):
        (write_checkpoint(tmp_path / folder / "mine") / "model.safetensors").write_bytes(b"")
    file = tmp_path / "my lm+.gguf"
    file.write_bytes(b"GGUF")
    add_entry(registry, make_entry(name="mine", path=tmp_path / "runs" / "mine"))
    add_entry(registry, make_entry(name="small", path=file))
    return registry


@pytest.mark.parametrize(
    ("path", "name"), [("runs/mine", "mine"), ("elsewhere/mine", "mine"), ("my lm+.gguf", "small")]
)
def test_load_model_loads_the_model_that_a_path_names(registered: Path, path: str, name: str) -> None:
    transport = FakeRepository({"mine": FakeModel(1), "small": FakeModel(1)}, 10)
    with running_gateway(transport, registry=registered) as gateway:
        answer = gateway.post("/api/load_model", model_path=str(registered.parent / path))
        assert answer.status_code == 200, answer.text
    assert transport.loads_of == {name: 1}


@pytest.mark.parametrize(
    ("path", "message"),
    [("{}/others/mine", "another model is registered as mine"), ("org/mine:Q4_K_M", "org/mine")],
)
def test_load_model_loads_no_other_model_of_a_similar_name(registered: Path, path: str, message: str) -> None:
    transport = FakeRepository({"mine": FakeModel(1), "small": FakeModel(1)}, 10)
    with running_gateway(transport, registry=registered) as gateway:
        answer = gateway.post("/api/load_model", model_path=path.format(registered.parent))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model_path")
    assert message in answer.json()["error"]["message"]
    assert not transport.loads_of
