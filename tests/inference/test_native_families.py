"""Every family that the kernels compute, against transformers, in every ISA variant; its rows' bits in any batch."""

from __future__ import annotations

import ctypes
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.runners.native.families import FAMILIES
from engine.runners.native.runner import NativeRunner, unsupported_reason
from engine.scheduling.scheduler import Slice
from fakes.sequences import Sequence, every_logits
from fakes.tiny_lm import make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from tritonlm.contract import Checkpoint

from .family_zoo import CONTEXT, VOCABULARY, ZOO
from .family_zoo.routing import clear_ids
from .harness import make_engine, run, submit
from .isa_variants import FLOAT_VARIANTS, library_of
from .test_native import CPU, DTYPES, config_of

LENGTHS = (1, 5, 17, 33, 60)
# The blocks of a sequence: enough for any block size.
_BLOCKS = 16

# test_native.py tries the others: what they add does not depend on the family.
CASES = [
    ("all", "float32", "full"), ("all", "bfloat16", "int8"),
    *((name, "bfloat16", "full") for name in FLOAT_VARIANTS if name != "plain"),
]  # fmt: skip


class Family:
    """A checkpoint of random weights, and what transformers computes with it."""

    def __init__(self, name: str, folder: Path, **changes: int) -> None:
        sizes: dict[str, Any] = {"initializer_range": 0.2, "vocab_size": VOCABULARY, **ZOO[name], **changes}
        model_type = name.split(maxsplit=1)[0]
        sizes.setdefault("n_positions" if "n_embd" in sizes else "max_position_embeddings", CONTEXT)
        self.name, self.folder = name, make_checkpoint(folder, seed=3, model_type=model_type, **sizes)
        for file in folder.glob("*.safetensors"):
            # New biases are 0 and new norm weights 1, which would hide that they are ignored.
            weights, generator = load_file(file), torch.Generator().manual_seed(4)
            for tensor, weight in weights.items():
                if weight.dim() == 1 or "norm" in tensor or tensor.endswith("bias"):
                    weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
            save_file(weights, file, metadata={"format": "pt"})
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.sequences = [
            Sequence(ids, list(range(1 + n * _BLOCKS, 1 + (n + 1) * _BLOCKS)))
            for n, ids in enumerate(clear_ids(self.model, 1, LENGTHS, range(3, VOCABULARY)))
        ]
        self.logits = self._logits(self.model)
        rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.bf16_error = self.error(self._logits(rounded))

    def _logits(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            inputs = [torch.tensor([sequence.ids]) for sequence in self.sequences]
            return torch.cat([model(ids, use_cache=False).logits[0].float() for ids in inputs])

    def error(self, logits: torch.Tensor) -> float:
        """The mean error, relative to the spread of the logits."""
        return float((logits - self.logits).abs().mean() / self.logits.std())

    def runner(self, dtype: str, library: ctypes.CDLL, **settings: Any) -> NativeRunner:
        config = config_of(dtype, kv_cache_tokens=len(LENGTHS) * _BLOCKS * 16, **{"block_tokens": 16, **settings})
        return NativeRunner(self.folder, config, CPU, DTYPES[dtype], library)

    def plan(self) -> list[Slice]:
        return [Slice(sequence, 0, len(sequence.ids)) for sequence in self.sequences]  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=ZOO)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp("families") / request.param.replace(" ", "-"))


@pytest.fixture(scope="module", params=[name for name in FLOAT_VARIANTS if name != "plain"])
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return library_of(request.param)


def test_every_family_is_in_the_zoo() -> None:
    assert {name.split(maxsplit=1)[0] for name in ZOO} == set(FAMILIES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_equal_those_of_transformers(family: Family, library: ctypes.CDLL, dtype: str) -> None:
    assert unsupported_reason(Checkpoint(family.folder), DTYPES[dtype]) == ""
    runner = family.runner(dtype, library)
    logits = every_logits(runner, family.plan())
    if dtype == "float32":
        assert (logits - family.logits).abs().max() / family.logits.std() < 1e-4
    else:
        # With bfloat16 the kernels keep float32 between matmuls: they are not worse than transformers in bfloat16.
        assert family.error(logits) < max(1.1 * family.bf16_error, 2e-3)
    runner.close()


@pytest.mark.parametrize(("variant", "dtype", "weights"), CASES)
def test_a_row_is_the_same_alone_in_a_batch_and_with_any_prompt_chunks(
    family: Family, variant: str, dtype: str, weights: str
) -> None:
    runner = family.runner(dtype, library_of(variant), weights=weights)
    batch = every_logits(runner, family.plan()).split(LENGTHS)
    for number, (sequence, expected) in enumerate(zip(family.sequences, batch, strict=True)):
        length = len(sequence.ids)
        cuts = sorted({0, length, *random.Random(number).choices(range(length + 1), k=2)})
        chunks = [
            every_logits(runner, [Slice(sequence, start, end - start)])  # type: ignore[arg-type]
            for start, end in itertools.pairwise(cuts)
        ]
        assert torch.equal(torch.cat(chunks), expected)
    last = [Slice(sequence, len(sequence.ids) - 1, 1) for sequence in family.sequences]  # type: ignore[arg-type]
    together = every_logits(runner, last)
    assert torch.equal(together, torch.cat([rows[-1:] for rows in batch]))
    runner.close()


def test_greedy_texts_equal_those_of_transformers(family: Family) -> None:
    check_greedy_texts(family)


def test_a_context_within_the_original_one_has_the_short_factors_of_longrope(tmp_path: Path) -> None:
    # Its original context is 96: texts of this test would get the long factors in the whole context.
    family = Family("phi3 short", tmp_path / "phi3", max_position_embeddings=2 * CONTEXT)
    check_greedy_texts(family, max_context_tokens=CONTEXT)


def check_greedy_texts(family: Family, **settings: int) -> None:
    engine = make_engine(
        family.folder, runner="native", dtype="float32", block_tokens=16, kv_cache_tokens=1024, **settings
    )
    outputs = [submit(engine, sequence.ids, max_tokens=16) for sequence in family.sequences]
    run(engine)
    for sequence, output in zip(family.sequences, outputs, strict=True):
        # A position's logits depend on the tokens up to it only: one forward has those after each new token.
        with torch.no_grad():
            logits = family.model(torch.tensor([[*sequence.ids, *output.token_ids]]), use_cache=False).logits[0]
        assert len(output.token_ids) == 16
        assert output.token_ids == logits[len(sequence.ids) - 1 : -1].argmax(-1).tolist()
