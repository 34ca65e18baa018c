"""A trained model served by `tritonlm serve`: chats through the gateway, texts of many bytes, a process that dies."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from over_triton.servers import wait_until
from over_triton.test_serve import Serve, serving
from over_triton.test_survival import victim
from transformers import AutoTokenizer
from tritonlm.serving.paths import model_repository

from .texts import CHAT, PATTERNS, PROMPTS

pytestmark = pytest.mark.triton

LM = "smollm2"
UNFINISHED = "\ufffd"


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    options = ("--checkpoint", f"{LM}={smollm2}", "--dtype", "float32", "--device", "cpu", "--kv-cache-tokens", "8192")
    with serving(model_repository(), tmp_path_factory.mktemp("served"), *options) as serve:
        yield serve


@pytest.fixture(scope="module")
def sdk(served: Serve) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{served.ports['port']}/v1"
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=120) as client:
        yield client


def streamed(sdk: openai.OpenAI, on_piece: Callable[[], None] = lambda: None, **wanted: Any) -> list[str]:
    """The pieces of one completion's text."""
    pieces = []
    for event in sdk.completions.create(model=LM, stream=True, **wanted):
        pieces += [choice.text for choice in event.choices if choice.text]
        on_piece()
    return pieces


def test_a_chat_is_answered_whole_and_streamed(sdk: openai.OpenAI, smollm2: Path) -> None:
    wanted: dict[str, Any] = {"model": LM, "messages": CHAT, "temperature": 0, "max_tokens": 40}
    whole = sdk.chat.completions.create(**wanted)
    (choice,) = whole.choices
    assert choice.finish_reason == "stop"
    assert "Paris" in choice.message.content
    assert "<|" not in choice.message.content
    prompt = AutoTokenizer.from_pretrained(smollm2).apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=False
    )
    assert whole.usage.prompt_tokens == len(prompt)
    events = list(sdk.chat.completions.create(**wanted, stream=True))
    deltas = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(deltas) == choice.message.content
    assert events[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_characters_of_many_bytes_stream_whole(sdk: openai.OpenAI, name: str) -> None:
    """What the model writes is the line that it has read, and the prompt comes before it (`echo`)."""
    prompt = PATTERNS[name]
    wanted: dict[str, Any] = {
        "prompt": prompt, "max_tokens": 48, "temperature": 0, "extra_body": {"ignore_eos": True, "echo": True},
    }  # fmt: skip
    whole = sdk.completions.create(model=LM, **wanted).choices[0].text
    pieces = streamed(sdk, **wanted)
    assert "".join(pieces) == whole
    assert len(pieces) > 5
    written = whole.removeprefix(prompt)
    assert written != whole
    # The last character may be cut by the limit of tokens; no other one.
    assert UNFINISHED not in whole.rstrip(UNFINISHED)
    assert all(UNFINISHED not in piece for piece in pieces[:-1])
    assert len(written.encode()) > 1.5 * len(written), written
    assert prompt.splitlines()[0][:6] in written


def test_a_killed_process_changes_no_text(served: Serve, sdk: openai.OpenAI) -> None:
    prompts = PROMPTS[:4]
    wanted: dict[str, Any] = {"max_tokens": 40, "temperature": 0.7, "extra_body": {"ignore_eos": True}}

    def texts(on_piece: Callable[[], None]) -> list[str]:
        def one(number: int) -> str:
            return "".join(streamed(sdk, on_piece, prompt=prompts[number], seed=number, **wanted))

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(one, range(len(prompts))))

    undisturbed = texts(lambda: None)
    lock, seen = threading.Lock(), 0
    killed = threading.Event()

    def kill_in_the_midst() -> None:
        nonlocal seen
        with lock:
            seen += 1
            if seen == 5 * len(prompts):
                victim(served, f"{LM}-generate").send_signal(signal.SIGKILL)
                killed.set()

    assert texts(kill_in_the_midst) == undisturbed
    assert killed.is_set()
    wait_until(lambda: sdk.completions.create(model=LM, prompt="a", max_tokens=1) is not None, "it answers again")
