"""Speculative decoding does not change outputs, streamed or whole; draft and accepted tokens are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .caller import Answer, complete
from .servers import Server, free_ports, running, wait_until
from .test_observability import engine_metrics

pytestmark = pytest.mark.triton

PROMPT = "one two three four five six seven. " * 4
PARAMETER_SETS: tuple[dict[str, Any], ...] = (
    # This one repeats one token from the start.
    {"temperature": 0.0, "logit_bias": {"70": 100}}, {"temperature": 0.0},
    {"temperature": 0.3, "seed": 3}, {"temperature": 0.9, "top_p": 0.8, "seed": 4, "logprobs": 2},
    {"temperature": 0.0, "stop": [" two"]},
)  # fmt: skip


def generate_all(server: Server) -> list[Answer]:
    return [
        complete(server.grpc, PROMPT, stream=stream, max_tokens=150, return_token_ids=True, **parameters)
        for parameters in PARAMETER_SETS
        for stream in (True, False)
    ]


def test_outputs_are_unchanged_and_draft_tokens_are_counted(server: Server, repository: Path) -> None:
    expected = generate_all(server)
    ports = free_ports()
    with running(repository, speculative_tokens=12, **ports) as speculating:
        actual = generate_all(speculating)
        assert speculating.holds_nothing()
        drafted, accepted = (f"tritonlm_engine_speculative_{name}_tokens_total" for name in ("draft", "accepted"))
        # Metrics are exported once a second.
        wait_until(lambda: engine_metrics(ports["metrics_port"]).get(accepted, 0) > 0, "a draft token was accepted")
        metrics = engine_metrics(ports["metrics_port"])
    for output, reference in zip(actual, expected, strict=True):
        assert (output.text, output.token_ids) == (reference.text, reference.token_ids)
        assert (output.last.finish_reason, output.last.usage.completion) == (
            reference.last.finish_reason, reference.last.usage.completion
        )  # fmt: skip
    assert 0 < metrics[accepted] <= metrics[drafted]
