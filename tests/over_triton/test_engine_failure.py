"""A failure in the engine: each affected request ends with one clear error, and the engine continues."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tritonlm.contract import EngineFailure
from tritonlm.contract.control import PING

from .caller import call, complete
from .servers import ENGINE, LM, Server, copy_repository, running

pytestmark = pytest.mark.triton

# A prompt of this length raises an error in a step of `breakable`.
BREAKING = 13
BROKEN_FORWARD = f"""

_open_runner = open_runner


def open_runner(folder, config, device, *arguments):
    runner = _open_runner(folder, config, device, *arguments)
    original_forward = runner.forward

    def forward(plan):
        if any(len(piece.request.prompt_ids) == {BREAKING} for piece in plan):
            raise RuntimeError("a secret of the engine")
        return original_forward(plan)

    runner.forward = forward
    return runner
"""


@pytest.fixture(scope="module")
def nan_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
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
    """A Triton whose engine raises an exception for some prompts."""
    repository = copy_repository(tmp_path_factory.mktemp("breakable"), slow="native", n_layer=4)
    with (repository / ENGINE / "1" / "engine" / "runners" / "select.py").open("a", encoding="utf-8") as file:
        file.write(BROKEN_FORWARD)
    with running(repository) as server:
        yield server


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_nan_weights_fail_each_request(nan_server: Server, stream: bool) -> None:
    with contextlib.ExitStack() as stack:
        calls = [
            stack.enter_context(call(nan_server.grpc, f"{number} birds", stream=stream, temperature=temperature))
            for number in range(4)
            for temperature in (0.0, 1.0)
        ]
        for request in calls:
            with pytest.raises(EngineFailure, match="not finite"):
                request.read_all()
            assert request.is_over()
    assert nan_server.command(PING)["failed"] >= len(calls)
    assert nan_server.holds_nothing()


def test_an_exception_in_a_step_fails_only_the_requests_in_it(breakable: Server) -> None:
    parameters: dict[str, Any] = {"temperature": 0.0, "max_tokens": 400, "ignore_eos": True}
    reference = complete(breakable.grpc, "Once", **{**parameters, "max_tokens": 20})
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(call(breakable.grpc, f"{number} birds", **parameters)) for number in range(3)]
        firsts = [request.next() for request in others]
        assert [first.final for first in firsts] == [False] * len(firsts)
        response = breakable.generate(input_ids=[1] * BREAKING)
        # Triton replies 400 to every failed request; the error code is at the end of the message.
        assert response.is_error
        assert response.json()["error"].endswith("send the request again [code=engine_failure]")
        assert "secret" not in response.text
        for request in others:
            with pytest.raises(EngineFailure, match="send the request again"):
                request.read_all()
            assert request.is_over()
    assert breakable.command(PING)["failed"] == 1 + len(others)
    assert breakable.holds_nothing()
    again = complete(breakable.grpc, "Once", **{**parameters, "max_tokens": 20})
    assert again.text == reference.text
