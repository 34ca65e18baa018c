"""The kernels in C++ against Hugging Face's code, in every form they are compiled to; and row by row the same bits."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.config import EngineConfig
from engine.runners.native import build
from engine.runners.native.runner import NativeRunner, why_not
from engine.runners.native.weights import packed
from engine.runners.reference import ReferenceRunner
from engine.runners.select import open_runner
from engine.scheduling.scheduler import Slice
from fakes.sequences import Sequence, every_logits
from fakes.tiny_lm import make_checkpoint
from safetensors.torch import load_file, save_file
from tritonlm.contract import Checkpoint, CheckpointError

from .forms import FORMS, library_of

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Ragged, and with one block of logits left over beside the pairs.
VOCABULARY = 493
# Heads of one vector and of several.
_LLAMA = {
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
}  # fmt: skip
_SLOWER = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_SHRUNK = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {"n_embd": 32, "n_head": 2, "n_layer": 2}, "odd": {"n_embd": 96, "n_head": 2, "n_layer": 3},
    "inner": {"n_embd": 64, "n_head": 1, "n_layer": 1, "n_inner": 96},
    "tiles": {"n_embd": 128, "n_head": 2, "n_layer": 2}, "wide": {"n_embd": 192, "n_head": 2, "n_layer": 1},
    "llama": {"model_type": "llama", **_LLAMA, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True,
              "rope_parameters": _SLOWER},
    "mistral": {"model_type": "mistral", **_LLAMA, "num_key_value_heads": 1, "sliding_window": None,
                "rope_parameters": _SHRUNK},
    "qwen2": {"model_type": "qwen2", **_LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 64, "num_key_value_heads": 2},
}  # fmt: skip
# Heads of a multiple of 32, in blocks of a multiple of 16 tokens, are attended in AMX's tiles where there are such.
BLOCKS = {"tiles": 16, "wide": 32, "llama": 16, "qwen3": 32}


def config_of(dtype: str, **settings: Any) -> EngineConfig:
    return EngineConfig(**{"device": "cpu", "dtype": dtype, "max_sequences": 8, "block_tokens": 4, **settings})


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    places = "max_position_embeddings" if "model_type" in SHAPES[request.param] else "n_positions"
    sizes: dict[str, Any] = {places: 64, "initializer_range": 0.2, "vocab_size": VOCABULARY, **SHAPES[request.param]}
    folder = make_checkpoint(tmp_path_factory.mktemp("native") / request.param, seed=3, **sizes)
    # Biases begin as zeros and scales as ones: whoever forgot them would not be found out.
    weights, draw = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(4)
    for weight in (weight for weight in weights.values() if weight.dim() == 1):
        weight.add_(0.2 * torch.randn(weight.shape, generator=draw))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# The last one differs from AVX2 in nothing but its speed.
@pytest.fixture(scope="module", params=[name for name in FORMS if name != "plain"])
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return library_of(request.param)


def runner_of(folder: Path, dtype: str, library: ctypes.CDLL, threads: int = 2, weights: str = "full") -> NativeRunner:
    block = BLOCKS.get(folder.name, 4)
    config = config_of(dtype, threads=threads, weights=weights, block_tokens=block, kv_cache_tokens=100 * block)
    return NativeRunner(folder, config, CPU, DTYPES[dtype], library)


def sequences(seed: int, *lengths: int) -> list[Sequence]:
    """With room for blocks of any size."""
    draw, block = random.Random(seed), itertools.count(1)
    return [
        Sequence([draw.randrange(VOCABULARY) for _ in range(length + 8)], [next(block) for _ in range(length // 4 + 3)])
        for length in lengths
    ]


def whole(found: list[Sequence], lengths: tuple[int, ...]) -> list[Any]:
    return [Slice(sequence, 0, length) for sequence, length in zip(found, lengths, strict=True)]  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_those_of_transformers(folder: Path, library: ctypes.CDLL, dtype: str) -> None:
    ours = runner_of(folder, dtype, library)
    # In bfloat16 ours keeps float32 between the products, so float32 is what both are held to.
    theirs = ReferenceRunner(folder, config_of("float32"))
    lengths = (1, 5, 17, 33)
    plan = whole(sequences(0, *lengths), lengths)
    expected, found = (every_logits(runner, plan) for runner in (theirs, ours))
    spread = expected.std()
    apart = (found - expected).abs().max() / spread
    assert apart < (1e-4 if dtype == "float32" else 0.25)
    assert (ours.forward(plan).hidden - theirs.forward(plan).hidden).abs().max() < (1e-3 if dtype == "float32" else 0.5)
    if dtype == "bfloat16":
        # Not further away than Hugging Face's own bfloat16.
        rounded = every_logits(ReferenceRunner(folder, config_of("bfloat16", runner="reference")), plan).float()
        assert apart <= 1.5 * (rounded - expected).abs().max() / spread
    ours.close()


@pytest.mark.parametrize(("dtype", "weights"), [("float32", "full"), ("bfloat16", "full"), ("bfloat16", "int8")])
def test_threads_that_are_kept_from_their_work_change_nothing(folder: Path, dtype: str, weights: str) -> None:
    # Far more than there are cores: who loses his is overtaken by others, who do his piece once more.
    crowd = runner_of(folder, dtype, library_of("all"), threads=4 * (os.cpu_count() or 1) + 1, weights=weights)
    alone = runner_of(folder, dtype, library_of("all"), threads=1, weights=weights)
    for seed in range(20):
        lengths = tuple(random.Random(seed).choices(range(1, 40), k=5))
        plan = whole(sequences(seed, *lengths), lengths)
        expected, found = alone.forward(plan), crowd.forward(plan)
        assert torch.equal(found.hidden, expected.hidden)
        assert torch.equal(every_logits(crowd, plan), every_logits(alone, plan))
    for runner in (crowd, alone):
        runner.close()


@pytest.mark.parametrize("weights", ["full", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_alone_among_others_and_however_its_prompt_was_cut(
    folder: Path, library: ctypes.CDLL, dtype: str, weights: str
) -> None:
    runner = runner_of(folder, dtype, library, weights=weights)
    lengths = tuple(random.Random(1).sample(range(1, 40), 7))
    together = every_logits(runner, whole(sequences(1, *lengths), lengths)).split(lengths)
    found = sequences(1, *lengths)
    order = random.Random(2).sample(range(len(found)), len(found))
    for number in order:
        sequence, length = found[number], lengths[number]
        cuts = sorted({0, length, *random.Random(number).choices(range(length + 1), k=2)})
        parts = [
            every_logits(runner, [Slice(sequence, start, end - start)])  # type: ignore[arg-type]
            for start, end in itertools.pairwise(cuts)
        ]
        assert torch.equal(torch.cat(parts), together[number])
    # And one step further, all of them at once or each by itself: in the step itself now.
    for sequence, length in zip(found, lengths, strict=True):
        del sequence.ids[length + 1 :]
    further = [Slice(sequence, length, 1) for sequence, length in zip(found, lengths, strict=True)]  # type: ignore[arg-type]
    computed = runner.forward(further)
    at_once = computed.logits
    assert computed.best is not None
    for mine, torchs in zip((computed.best.values, computed.best.ids), at_once.max(dim=-1), strict=True):
        assert torch.equal(mine, torchs)
    assert len(at_once) == len(further)
    assert torch.equal(at_once, torch.cat([runner.forward([piece]).logits for piece in further]))
    # What is projected from hidden states afterwards are the same bits.
    assert torch.equal(at_once, every_logits(runner, further))
    runner.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_whoever_shares_its_beginning(folder: Path, library: ctypes.CDLL, dtype: str) -> None:
    """Prompts with one beginning hold the same blocks, which their last rows are attended to together."""
    block, runner = BLOCKS.get(folder.name, 4), runner_of(folder, dtype, library)
    draw = random.Random(7)
    beginning = [draw.randrange(VOCABULARY) for _ in range(64)]
    free = itertools.count(1)
    stem = [next(free) for _ in range(64 // block)]
    found, lengths = [], []
    for shared in (0, 16, 32, 32, 32, 48, 48, 17, 32, 32):
        length = draw.randrange(shared + 1, 60)
        ids = beginning[:shared] + [draw.randrange(VOCABULARY) for _ in range(length + 1 - shared)]
        whole_blocks = shared // block
        own = [next(free) for _ in range(len(ids) // block + 1 - whole_blocks)]
        found.append(Sequence(ids, stem[:whole_blocks] + own, needs_every_row=False))
        lengths.append(length)
    runner.forward([Slice(Sequence(beginning, stem), 0, 64)])  # type: ignore[arg-type]
    runner.forward(whole(found, tuple(lengths)))
    last = [Slice(sequence, length, 1) for sequence, length in zip(found, lengths, strict=True)]  # type: ignore[arg-type]
    alone = torch.cat([runner.forward([piece]).logits for piece in last])
    for count in (2, 5, len(last)):
        assert torch.equal(runner.forward(last[:count]).logits, alone[:count])
    draw.shuffle(order := list(range(len(last))))
    assert torch.equal(runner.forward([last[i] for i in order]).logits, alone[order])
    runner.close()


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_the_number_of_threads_changes_no_bit(folder: Path, library: ctypes.CDLL, threads: int) -> None:
    one, other = runner_of(folder, "bfloat16", library), runner_of(folder, "bfloat16", library, threads)
    plan = whole(sequences(5, 30, 3, 9), (30, 3, 9))
    for _ in range(20):
        assert torch.equal(every_logits(one, plan), every_logits(other, plan))
    one.close()
    other.close()


def test_weights_without_numbers_give_logits_without_numbers(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "nan"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    next(weight for name, weight in weights.items() if ".mlp." in name and weight.dim() == 2).fill_(torch.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    library = build.kernels()
    assert library is not None
    for dtype in DTYPES:
        runner = runner_of(broken, dtype, library)
        (sequence,) = sequences(0, 5)
        del sequence.ids[5:]
        computed = runner.forward(whole([sequence], (5,)))
        assert len(computed.logits) == 1
        assert computed.logits.isnan().all()
        assert computed.best is not None
        assert computed.best.values.isnan().all()
        runner.close()


def test_what_the_kernels_cannot_compute_is_left_to_the_reference(tmp_path: Path, folder: Path) -> None:
    assert isinstance(open_runner(folder, config_of("float32"), CPU), NativeRunner)
    assert isinstance(open_runner(folder, config_of("float32", runner="reference"), CPU), ReferenceRunner)
    other = make_checkpoint(tmp_path / "other", n_embd=48, n_head=4, n_layer=1)
    assert isinstance(open_runner(other, config_of("float32"), CPU), ReferenceRunner)
    with pytest.raises(CheckpointError, match=r"runner native cannot serve .*: its widths are not multiples of 32"):
        open_runner(other, config_of("float32", runner="native"), CPU)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "opt"}, "model_type is none of gpt2, llama,"), ({"activation_function": "relu"}, "activation"),
        ({"n_head": 8}, "heads are not as wide"), ({"scale_attn_weights": False}, "scaled in another way"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scaled in another way"), ({"n_inner": 100}, "multiples of 32"),
        ({"tie_word_embeddings": False}, "output layer"), ({"add_cross_attention": True}, "another sequence"),
    ],
)  # fmt: skip
def test_every_reason_is_named(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    config = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 1, "vocab_size": 9, "n_positions": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert why_not(Checkpoint(tmp_path), torch.float32) == ""
    assert "another type" in why_not(Checkpoint(tmp_path), torch.float16)
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    assert said in why_not(Checkpoint(tmp_path), torch.float32)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_act": "gelu"}, "not SiLU"), ({"hidden_size": 100}, "multiples of 32"), ({"head_dim": 48}, "as wide"),
        ({"num_key_value_heads": 3}, "1 to 16"), ({"sliding_window": 8}, "window"), ({"hidden_size": None}, "names no"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "positions"), ({"partial_rotary_factor": 0.5}, "positions"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "positions"),
        ({"num_key_value_heads": "two"}, "not as those"), ({"rope_scaling": [2.0]}, "not as those"),
        ({"rope_parameters": {"rope_type": ["default"]}}, "not as those"),
    ],
)  # fmt: skip
def test_every_reason_is_named_of_llamas_kin_too(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    config = {
        "model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "vocab_size": 9,
        "num_hidden_layers": 1, "max_position_embeddings": 16,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert why_not(Checkpoint(tmp_path), torch.float32) == ""
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    assert said in why_not(Checkpoint(tmp_path), torch.float32)


def test_without_a_compiler_torch_computes(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build.kernels.cache_clear()
    monkeypatch.setenv(build.CACHE, str(tmp_path / "none"))
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        assert isinstance(open_runner(folder, config_of("float32"), CPU), ReferenceRunner)
        with pytest.raises(CheckpointError, match="cannot be compiled here"):
            open_runner(folder, config_of("float32", runner="native"), CPU)
    finally:
        build.kernels.cache_clear()


@pytest.mark.parametrize(("capability", "isa"), [("avx2", "AVX2"), ("default", "SSE41")])
def test_on_a_processor_without_avx512_all_runners_give_the_same_text(
    tmp_path: Path, capability: str, isa: str
) -> None:
    """One setting limits torch and the kernels; a new process, since both choose once."""
    make_checkpoint(
        tmp_path / "lm", seed=3, n_embd=64, n_head=2, n_layer=2, initializer_range=0.2, vocab_size=VOCABULARY
    )
    script = Path(__file__).with_name("greedy_by_runner.py")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": isa}
    told = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "lm")],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert found["capability"] == capability.upper()
    assert found["kinds"] == {"native": "NativeRunner", "reference": "ReferenceRunner"}
    assert found["ids"]["native"] == found["ids"]["reference"] == found["ids"]["transformers"]


def test_packing_puts_sixteen_outputs_side_by_side() -> None:
    weight = torch.arange(20 * 4, dtype=torch.float32).view(20, 4)
    floats, halves, octets = (packed(weight, dtype) for dtype in (torch.float32, torch.bfloat16, torch.int8))
    assert floats.shape == (2, 4, 16, 1)
    assert halves.shape == (2, 2, 16, 2)
    # Eight bits come in steps of 64 inputs.
    assert octets.shape == (2, 16, 16, 4)
    for output, number in itertools.product(range(20), range(4)):
        assert floats[output // 16, number, output % 16, 0] == weight[output, number]
        assert octets[output // 16, number // 4, output % 16, number % 4] == weight[output, number]
        assert halves[output // 16, number // 2, output % 16, number % 2] == weight[output, number]
    assert not octets[:, 1:].any()
    assert not floats[1, :, 4:].any()
