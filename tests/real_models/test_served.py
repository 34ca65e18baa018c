"""A trained model served by `tritonlm serve`: chats, multi-byte characters in streams, a killed process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from over_triton.servers import wait_until
from over_triton.test_serve import Serve
from over_triton.test_survival import find_process
from transformers import AutoTokenizer

from .conftest import LM
from .texts import CHAT, PATTERNS, PROMPTS

pytestmark = pytest.mark.triton

REPLACEMENT = "\ufffd"


def streamed(sdk: openai.OpenAI, on_chunk: Callable[[], None] = lambda: None, **parameters: Any) -> list[str]:
    """The text chunks of one streamed completion."""
    chunks = []
    for event in sdk.completions.create(model=LM, stream=True, **parameters):
        chunks += [choice.text for choice in event.choices if choice.text]
        on_chunk()
    return chunks


def test_a_chat_whole_and_streamed(sdk: openai.OpenAI, smollm2: Path) -> None:
    parameters: dict[str, Any] = {"model": LM, "messages": CHAT, "temperature": 0, "max_tokens": 40}
    whole = sdk.chat.completions.create(**parameters)
    (choice,) = whole.choices
    assert choice.finish_reason == "stop"
    assert "Paris" in choice.message.content
    assert "<|" not in choice.message.content
    prompt = AutoTokenizer.from_pretrained(smollm2).apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=False
    )
    assert whole.usage.prompt_tokens == len(prompt)
    events = list(sdk.chat.completions.create(**parameters, stream=True))
    deltas = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(deltas) == choice.message.content
    assert events[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_multi_byte_characters_are_streamed_whole(sdk: openai.OpenAI, name: str) -> None:
    """The model repeats the line of the prompt, and the output starts with the prompt (`echo`)."""
    prompt = PATTERNS[name]
    parameters: dict[str, Any] = {
        "prompt": prompt, "max_tokens": 48, "temperature": 0, "extra_body": {"ignore_eos": True, "echo": True},
    }  # fmt: skip
    whole = sdk.completions.create(model=LM, **parameters).choices[0].text
    chunks = streamed(sdk, **parameters)
    assert "".join(chunks) == whole
    assert len(chunks) > 5
    written = whole.removeprefix(prompt)
    assert written != whole
    # Only the last character may be incomplete, because of the token limit.
    assert REPLACEMENT not in whole.rstrip(REPLACEMENT)
    assert all(REPLACEMENT not in chunk for chunk in chunks[:-1])
    assert len(written.encode()) > 1.5 * len(written), written
    assert prompt.splitlines()[0][:6] in written


def test_a_killed_process_does_not_change_texts(served_smollm2: Serve, sdk: openai.OpenAI) -> None:
    prompts = PROMPTS[:4]
    parameters: dict[str, Any] = {"max_tokens": 40, "temperature": 0.7, "extra_body": {"ignore_eos": True}}

    def texts(on_chunk: Callable[[], None]) -> list[str]:
        def one(number: int) -> str:
            return "".join(streamed(sdk, on_chunk, prompt=prompts[number], seed=number, **parameters))

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(one, range(len(prompts))))

    undisturbed = texts(lambda: None)
    lock, count = threading.Lock(), 0
    killed = threading.Event()

    def count_and_kill() -> None:
        nonlocal count
        with lock:
            count += 1
            if count == 5 * len(prompts):
                find_process(served_smollm2, f"{LM}-generate").send_signal(signal.SIGKILL)
                killed.set()

    assert texts(count_and_kill) == undisturbed
    assert killed.is_set()
    wait_until(lambda: sdk.completions.create(model=LM, prompt="a", max_tokens=1) is not None, "it responds again")
