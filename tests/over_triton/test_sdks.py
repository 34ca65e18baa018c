"""Popular client libraries with the gateway: completions, streams, chats and error classes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tritonlm.serving.paths import model_repository

from .gateways import gateway_to
from .servers import LM, Server

pytestmark = pytest.mark.triton

CHECKOUT = model_repository().parent
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def url(shared_small_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with gateway_to(shared_small_server.grpc, tmp_path_factory.mktemp("gateway")) as gateway:
        yield f"{gateway.url}/v1"


@pytest.mark.parametrize(("folder", "version"), [("", "3."), (".cache/openai-1", "1.")], ids=["latest", "1.x"])
def test_openai(url: str, folder: str, version: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT / folder) if folder else ""}
    program = Path(__file__).with_name("sdk_basics.py")
    result = subprocess.run(
        [sys.executable, str(program), url, LM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(version)


def test_langchain(url: str) -> None:
    from langchain_openai import ChatOpenAI, OpenAI  # noqa: PLC0415 (slow to import)

    arguments: dict[str, Any] = {"base_url": url, "api_key": "unused", "model": LM, "max_retries": 0, **GREEDY}
    text = OpenAI(**arguments)
    assert "".join(text.stream("Once upon")) == text.invoke("Once upon") != ""
    assert text.batch(["Once", "Two"])[0] == text.invoke("Once")
    chat = ChatOpenAI(**arguments)
    whole = chat.invoke("hello")
    assert "".join(str(chunk.content) for chunk in chat.stream("hello")) == whole.content != ""
    assert whole.response_metadata["token_usage"]["completion_tokens"] == 12
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ChatOpenAI(**{**arguments, "temperature": 3}).invoke("hello")
    with pytest.raises(openai.NotFoundError):
        OpenAI(**{**arguments, "model": "nope"}).invoke("Once")


def test_litellm(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise litellm downloads its list of prices.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm  # noqa: PLC0415 (slow to import)

    common: dict[str, Any] = {"api_base": url, "api_key": "unused", "num_retries": 0, **GREEDY}
    chat: dict[str, Any] = {"model": f"openai/{LM}", "messages": [{"role": "user", "content": "hello"}], **common}
    whole = litellm.completion(**chat).choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**chat, stream=True)) == whole
    text: dict[str, Any] = {"model": f"text-completion-openai/{LM}", "prompt": "Once upon", **common}
    whole = litellm.text_completion(**text).choices[0].text
    parts = [chunk.choices[0].text or "" for chunk in litellm.text_completion(**text, stream=True)]
    assert "".join(parts) == whole != ""
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**{**chat, "temperature": 3})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**chat, "model": "openai/nope"})


def test_llm(url: str, tmp_path: Path) -> None:
    models = [
        f"- {{model_id: {name}, model_name: {served}, api_base: '{url}', completion: {kind}}}\n"
        for name, served, kind in (("chat", LM, "false"), ("text", LM, "true"), ("lost", "nope", "false"))
    ]
    (tmp_path / "extra-openai-models.yaml").write_text("".join(models), encoding="utf-8")

    def llm(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llm", *words, "--key", "unused"],
            env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
            capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    options = ("-o", "max_tokens", "12", "-o", "temperature", "0")
    for model in ("chat", "text"):
        streamed, whole = llm("-m", model, "hello", *options), llm("-m", model, "hello", *options, "--no-stream")
        assert (streamed.returncode, whole.returncode) == (0, 0), streamed.stderr + whole.stderr
        assert streamed.stdout == whole.stdout
        assert len(whole.stdout) > 1
    lost = llm("-m", "lost", "hello")
    assert lost.returncode != 0
    assert "does not exist" in lost.stderr
