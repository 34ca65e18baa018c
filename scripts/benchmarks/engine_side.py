"""The engine on the caller's thread, as the benchmarks measure it. It does not know Triton."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tritonlm.contract import Checkpoint, GenerationRequest, SamplingParameters

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "model_repository" / "generate" / "1"))

from engine.config import INT4, INT8, EngineConfig  # noqa: E402
from engine.engine import Engine  # noqa: E402
from engine.request import Request  # noqa: E402
from engine.runners.interface import Runner  # noqa: E402
from engine.runners.native import build  # noqa: E402
from engine.runners.native.runner import unsupported_reason  # noqa: E402
from engine.runners.native.weights import bf16_packing_pays  # noqa: E402
from engine.runners.select import open_runner  # noqa: E402

_IDLE_SECONDS = 0.001

# The engine makes MKL's sums independent of alignment, which costs some speed. The transformers side runs without it.
os.environ.pop("MKL_CBWR", None)

Prompts = list[list[int]]


# Of a weight, with the scales of groups of 32; also of the vocabulary, which int4 keeps in 8 bits by default.
_BYTES = {INT8: 1.0, INT4: 4.5 / 8}


@dataclass(frozen=True)
class Seconds:
    prefill: float
    decode: float


def weight_bytes(folder: Path, dtype: torch.dtype, weights: str = "full") -> float:
    """Bytes that the engine reads for one weight on a CPU: bfloat16 takes twelve bits where the kernels pack it."""
    if unsupported_reason(Checkpoint(folder), dtype) or (library := build.kernels()) is None:
        return dtype.itemsize
    if weights in _BYTES:
        return _BYTES[weights]
    return 1.5 if dtype == torch.bfloat16 and bf16_packing_pays(library) else dtype.itemsize


def stored_bytes(folder: Path) -> float:
    """Bytes of a weight of a GGUF file."""
    checkpoint = Checkpoint(folder)
    return checkpoint.quantized_bytes() / checkpoint.quantized_count()


class SteppedEngine:
    """An engine whose steps run on this thread."""

    def __init__(self, runner: Runner, config: EngineConfig, decode: Callable[[list[int], bool], str]) -> None:
        self.runner, self.config = runner, config
        self._engine = Engine(runner, config, decode, ())

    def metric_values(self) -> dict[str, float]:
        return self._engine.metric_values()

    def measure(
        self,
        prompts: Prompts,
        new_tokens: int,
        temperature: float = 0.0,
        adapters: Sequence[str] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> Seconds:
        """`adapters`: those of the prompts, one each."""
        settings = {"max_tokens": new_tokens, "temperature": temperature, "seed": 0}
        parameters = [
            SamplingParameters.from_mapping({**settings, "adapter": name}) for name in adapters or [""] * len(prompts)
        ]
        finished: list[bool] = []

        def deliver(_: object, last: bool) -> None:
            if last:
                finished.append(True)

        start = clock()
        requests = self._submit(prompts, parameters, deliver)
        while not all(request.has_first_token for request in requests):
            self._step()
        middle = clock()
        # Sequences that were prefilled first have decoded already: only the tokens from here on are counted.
        remaining = sum(new_tokens - request.generated for request in requests)
        while len(finished) < len(requests):
            self._step()
        # None are left where each sequence gets one token.
        scale = len(prompts) * (new_tokens - 1) / remaining if remaining else 0.0
        return Seconds(middle - start, (clock() - middle) * scale)

    def steps(self, prompts: Prompts, new_tokens: int) -> Iterator[list[Request]]:
        """Generate greedily, and yield the requests after each step; the caller may stop at any time."""
        parameters = SamplingParameters.from_mapping({"max_tokens": new_tokens, "temperature": 0, "seed": 0})
        finished: list[bool] = []
        requests = self._submit(prompts, [parameters] * len(prompts), lambda _, last: finished.append(last))
        while sum(finished) < len(requests):
            self._step()
            yield requests

    def prompt_logprobs(self, prompt: list[int]) -> list[float]:
        """The log-probabilities of a prompt's tokens, but for the first one."""
        parameters = SamplingParameters.from_mapping({"max_tokens": 0, "seed": 0, "echo": True, "logprobs": 0})
        items: list[Any] = []
        self._submit([prompt], [parameters], lambda item, _: items.append(item), stream=False)
        while not items:
            self._step()
        entries = [entry for chunk in items for entry in chunk.logprobs]
        return [entry.logprob for entry in entries[1:]]

    def _submit(
        self,
        prompts: Prompts,
        parameters: Sequence[SamplingParameters],
        deliver: Callable[[Any, bool], None],
        *,
        stream: bool = True,
    ) -> list[Request]:
        requests = [
            Request(str(i), prompt, GenerationRequest(each, stream), deliver)
            for i, (prompt, each) in enumerate(zip(prompts, parameters, strict=True))
        ]
        for request in requests:
            self._engine.submit(request)
        return requests

    def _step(self) -> None:
        self._engine.process_inbox()
        if not self._engine.step():
            # All requests wait for adapters or grammars: a loop without a pause would keep Python's lock from them.
            time.sleep(_IDLE_SECONDS)
        self._engine.deliver_now()


class EngineSide(SteppedEngine):
    """The engine of a checkpoint."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        max_sequences: int,
        runner: str,
        weights: str = "full",
        speculative_tokens: int = 0,
        device: str = "cpu",
        **settings: Any,
    ) -> None:
        config = EngineConfig(
            device=device,
            dtype=dtype,
            max_sequences=max_sequences,
            runner=runner,
            weights=weights,
            speculative_tokens=speculative_tokens,
            **settings,
        )
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        super().__init__(
            open_runner(folder, config, torch.device(device)),
            config,
            lambda ids, skip: tokenizer.decode(ids, skip_special_tokens=skip),
        )
