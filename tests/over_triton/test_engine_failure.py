"""When the engine fails: each request in it gets one clear error and its end, and the engine goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tritonlm.contract import EngineFailure
from tritonlm.contract.control import PING

from .caller import ask, call
from .servers import ENGINE, LM, Server, copy_repository, running

pytestmark = pytest.mark.triton

# The prompts that break a step of the engine of `breakable` are exactly so long.
BREAKING = 13
BROKEN_FORWARD = f"""

_open_runner = open_runner


def open_runner(folder, config, device):
    runner = _open_runner(folder, config, device)
    whole_forward = runner.forward

    def forward(plan):
        if any(len(piece.request.prompt_ids) == {BREAKING} for piece in plan):
            raise RuntimeError("a secret of the engine")
        return whole_forward(plan)

    runner.forward = forward
    return runner
"""


@pytest.fixture(scope="module")
def without_numbers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Triton whose LM's weights hold NaN."""
    repository = copy_repository(tmp_path_factory.mktemp("nan"))
    file = repository / LM / "1" / "model.safetensors"
    weights = load_file(file)
    weights["transformer.h.0.mlp.c_fc.weight"].fill_(torch.nan)
    save_file(weights, file, metadata={"format": "pt"})
    with running(repository) as server:
        yield server


@pytest.fixture(scope="module")
def breakable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Triton in which an exception can be caused inside a step."""
    repository = copy_repository(tmp_path_factory.mktemp("breakable"), slow=True, n_layer=4)
    with (repository / ENGINE / "1" / "engine" / "runners.py").open("a", encoding="utf-8") as file:
        file.write(BROKEN_FORWARD)
    with running(repository) as server:
        yield server


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_weights_without_numbers_fail_each_request_by_itself(without_numbers: Server, stream: bool) -> None:
    with contextlib.ExitStack() as stack:
        calls = [
            stack.enter_context(call(without_numbers.grpc, f"{number} birds", stream=stream, temperature=temperature))
            for number in range(4)
            for temperature in (0.0, 1.0)
        ]
        for made in calls:
            with pytest.raises(EngineFailure, match="not finite"):
                made.answer()
            assert made.is_over()
    assert without_numbers.command(PING)["failed"] >= len(calls)
    assert without_numbers.holds_nothing()


def test_an_exception_in_a_step_fails_the_requests_in_it_and_no_others(breakable: Server) -> None:
    wanted: dict[str, Any] = {"temperature": 0.0, "max_tokens": 400, "ignore_eos": True}
    reference = ask(breakable.grpc, "Once", **{**wanted, "max_tokens": 20})
    with contextlib.ExitStack() as stack:
        beside = [stack.enter_context(call(breakable.grpc, f"{number} birds", **wanted)) for number in range(3)]
        firsts = [made.next() for made in beside]
        assert [first.final for first in firsts] == [False] * len(firsts)
        response = breakable.generate(input_ids=[1] * BREAKING)
        # Triton's own port gives every failed answer the status 400; what it was stands at the text's end.
        assert response.is_error
        assert response.json()["error"].endswith("send the request again [code=engine_failure]")
        assert "secret" not in response.text
        for made in beside:
            with pytest.raises(EngineFailure, match="send the request again"):
                made.answer()
            assert made.is_over()
    assert breakable.command(PING)["failed"] == 1 + len(beside)
    assert breakable.holds_nothing()
    again = ask(breakable.grpc, "Once", **{**wanted, "max_tokens": 20})
    assert again.text == reference.text
