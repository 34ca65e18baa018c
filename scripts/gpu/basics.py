"""Imports, the device, and greedy texts of six families, which must equal those of transformers.

One prompt of each takes several steps, all launched before the device has begun the first, if nothing waits for it.
"""

from __future__ import annotations

import platform
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from engine.engine import Engine
from inference import harness
from stage import Options, Report

FAMILIES = ("gpt2", "llama", "mistral", "gemma2", "gpt_neox", "qwen3")
_PROMPTS, _TOKENS = 6, 12
# The longest prompt has five chunks of so many tokens. Cycles of a GPU in which a host can launch all of them.
_PREFILL_TOKENS, _CHUNKS, _BUSY_CYCLES = 32, 5, 200_000_000


def run(options: Options, report: Report) -> None:
    report(
        device=_device(options), numpy=np.__version__, torch=torch.__version__, transformers=transformers.__version__
    )
    families = FAMILIES[:2] if options.tiny else FAMILIES
    different = [name for name in families if not _equals_transformers(name, options, report)]
    if different:
        raise AssertionError(f"greedy texts differ from those of transformers: {', '.join(different)}")


def _device(options: Options) -> dict[str, Any]:
    if not options.on_gpu:
        return {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(options.device)
    free, total = torch.cuda.mem_get_info(options.device)
    return {
        "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count, "l2_bytes": getattr(properties, "L2_cache_size", None),
        "free_bytes": free, "total_bytes": total, "cuda": torch.version.cuda, "count": torch.cuda.device_count(),
        "driver": _driver(),
    }  # fmt: skip


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


def _equals_transformers(name: str, options: Options, report: Report) -> bool:
    began = time.perf_counter()
    folder = harness.save_model(name, options.scratch / f"basics-{name}")
    source = random.Random(name)
    some = [[source.randrange(3, harness.VOCABULARY) for _ in range(source.randint(1, 60))] for _ in range(_PROMPTS)]
    some.append([source.randrange(3, harness.VOCABULARY) for _ in range(_PREFILL_TOKENS * _CHUNKS)])
    expected = _generated(folder, some, options.device)
    engine = harness.make_engine(
        folder, device=options.device, runner="graphs", dtype="float32", max_sequences=4, prefill_tokens=_PREFILL_TOKENS
    )
    outputs = _engine_outputs(engine, some[:-1])
    if options.on_gpu:
        with torch.cuda.device(options.device):
            torch.cuda._sleep(_BUSY_CYCLES)
    # Alone: beside others its steps would sample tokens, and wait for them.
    outputs += _engine_outputs(engine, some[-1:])
    equal = sum(output.token_ids == ids for output, ids in zip(outputs, expected, strict=True))
    graphs = len(engine.runner.graphs.recordings)  # type: ignore[attr-defined]
    seconds = round(time.perf_counter() - began, 2)
    report(family=name, equal=equal, of=len(some), recorded_shapes=graphs, seconds=seconds)
    return equal == len(some)


def _engine_outputs(engine: Engine, some: list[list[int]]) -> list[harness.Collected]:
    outputs = [harness.submit(engine, prompt, max_tokens=_TOKENS, ignore_eos=True) for prompt in some]
    harness.run(engine)
    return outputs


@torch.inference_mode()
def _generated(folder: Path, some: list[list[int]], device: str) -> list[list[int]]:
    # The attention of the reference: others leave out what some families need.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().to(device)
    texts = []
    for prompt in some:
        ids = torch.tensor([prompt], device=device)
        output: Any = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=_TOKENS, do_sample=False, eos_token_id=None,
            pad_token_id=2,
        )  # fmt: skip
        texts.append(output[0, len(prompt) :].tolist())
    return texts
