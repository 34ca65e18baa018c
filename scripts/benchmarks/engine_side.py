"""The engine, stepped on the caller's thread, as the benchmarks measure it. It knows nothing of Triton."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tritonlm.contract import GenerationRequest, SamplingParameters

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "model_repository" / "generate" / "1"))

from engine.config import EngineConfig  # noqa: E402
from engine.engine import Engine  # noqa: E402
from engine.request import Request  # noqa: E402
from engine.runners.select import open_runner  # noqa: E402

# The engine has torch sum alike wherever a row lies, which costs some speed: transformers, beside it, is to go without.
os.environ.pop("MKL_CBWR", None)

Prompts = list[list[int]]


@dataclass(frozen=True)
class Seconds:
    prefill: float
    decode: float


class EngineSide:
    """The engine, stepped on this thread."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        places: int,
        runner: str,
        weights: str = "full",
        guesses: int = 0,
        device: str = "cpu",
    ) -> None:
        config = EngineConfig(
            device=device, dtype=dtype, max_sequences=places, runner=runner, weights=weights, speculative_tokens=guesses
        )
        self.runner = open_runner(folder, config, torch.device(device))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._engine = Engine(
            self.runner, config, lambda ids, skip: tokenizer.decode(ids, skip_special_tokens=skip), ()
        )

    def measures(self) -> dict[str, float]:
        return self._engine.measures()

    def measure(self, prompts: Prompts, new_tokens: int, temperature: float = 0.0) -> Seconds:
        wanted = SamplingParameters.from_mapping({"max_tokens": new_tokens, "temperature": temperature, "seed": 0})
        ended: list[bool] = []
        requests = [
            Request(
                str(i), prompt, GenerationRequest(wanted, True), lambda _, last: ended.append(True) if last else None
            )
            for i, prompt in enumerate(prompts)
        ]
        start = time.perf_counter()
        for request in requests:
            self._engine.submit(request)
        while not all(request.started_answering for request in requests):
            self._step()
        middle = time.perf_counter()
        # Sequences whose prompt was read first are ahead: what is counted is what is left to decode from here.
        left = sum(new_tokens - request.generated for request in requests)
        while len(ended) < len(requests):
            self._step()
        scale = len(prompts) * (new_tokens - 1) / left
        return Seconds(middle - start, (time.perf_counter() - middle) * scale)

    def _step(self) -> None:
        self._engine.take_in()
        self._engine.step()
        self._engine.deliver_now()
