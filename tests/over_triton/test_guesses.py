"""A Triton whose engine guesses ahead gives the answers of one that does not, streamed and whole, and tells of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .caller import Answer, ask
from .servers import Server, free_ports, running, wait_until
from .test_observability import engine_metrics

pytestmark = pytest.mark.triton

PROMPT = "one two three four five six seven. " * 4
WAYS: tuple[dict[str, Any], ...] = (
    # This one repeats itself from the beginning.
    {"temperature": 0.0, "logit_bias": {"70": 100}}, {"temperature": 0.0},
    {"temperature": 0.3, "seed": 3}, {"temperature": 0.9, "top_p": 0.8, "seed": 4, "logprobs": 2},
    {"temperature": 0.0, "stop": [" two"]},
)  # fmt: skip


def answers(server: Server) -> list[Answer]:
    return [
        ask(server.grpc, PROMPT, stream=stream, max_tokens=150, return_token_ids=True, **way)
        for way in WAYS
        for stream in (True, False)
    ]


def test_answers_are_the_same_and_guesses_are_counted(server: Server, repository: Path) -> None:
    expected = answers(server)
    ports = free_ports()
    with running(repository, speculative_tokens=12, **ports) as guessing:
        found = answers(guessing)
        assert guessing.holds_nothing()
        guesses, right = (f"tritonlm_engine_{name}_tokens_total" for name in ("guessed", "rightly_guessed"))
        # They are published once a second.
        wait_until(lambda: engine_metrics(ports["metrics_port"]).get(right, 0) > 0, "a guess was right")
        told = engine_metrics(ports["metrics_port"])
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.text, mine.token_ids) == (theirs.text, theirs.token_ids)
        assert (mine.last.finish_reason, mine.last.usage.completion) == (
            theirs.last.finish_reason, theirs.last.usage.completion
        )  # fmt: skip
    assert 0 < told[right] <= told[guesses]
