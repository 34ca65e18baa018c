"""`tritonlm inspect`: what a model is, what it takes to serve it here, and what is in the way. No weights are loaded.

The engine answers its part in a process of its own, which needs torch; a command imports none.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tritonlm.checkpoints import report
from tritonlm.checkpoints.hub import fetch_texts
from tritonlm.checkpoints.reference import parse
from tritonlm.checkpoints.resolve import folder_of
from tritonlm.checkpoints.tensors import Tensor, plain_tensors, tensors_of
from tritonlm.contract import Checkpoint
from tritonlm.contract.quantization import QuantizationError

from .checkpoints import Model, errors_printed
from .common import FAILED, AsJson, console, print_json
from .engine_process import engine_command, engine_environment

_ENGINE_SECONDS = 120
_SLOTS = 8


def inspect(
    model: Model,
    slots: Annotated[int, typer.Option(min=1, max=4096, help="requests at once, for the memory")] = _SLOTS,
    context: Annotated[
        int | None, typer.Option(min=1, help="tokens of each request; default: 2048, or the model's whole context")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Describe a model: architecture, context, number types, memory, runner, speed, and what is not supported.

    Exit code 1 when it cannot be served.
    """
    with errors_printed():
        facts = _inspect(model, slots, context)
    if as_json:
        print_json(facts)
    else:
        _print(facts)
    if facts["problems"]:
        raise typer.Exit(FAILED)


def _inspect(model: str, slots: int, context: int | None) -> dict[str, Any]:
    checkpoint, remote = _open(model)
    facts: dict[str, Any] = {"model": model, "problems": report.problems(checkpoint, weights=not remote)}
    if not (checkpoint.folder / "config.json").is_file():
        return facts
    stored = remote or tensors_of(checkpoint)
    try:
        tensors, quantization = plain_tensors(checkpoint.config, stored)
    except QuantizationError as error:
        tensors, quantization = stored, "in a way that is not read"
        if remote:
            facts["problems"].append(str(error))
    facts |= report.describe(checkpoint, stored, tensors, quantization)
    engine, problem = _ask_engine(checkpoint.folder, remote)
    if engine is None:
        # Both may meet the same.
        return facts | {"engine": None, "problems": list(dict.fromkeys([*facts["problems"], problem]))}
    tokens = min(context or engine["likely_tokens"], facts["context_length"])
    return facts | {
        "engine": engine,
        "memory": {"slots": slots, "context": tokens, **report.memory(engine, facts["parameters"], slots, tokens)},
        "speed": report.speed(engine, checkpoint, tensors),
    }


def _open(model: str) -> tuple[Checkpoint, list[Tensor]]:
    """The checkpoint, and its tensors where its weights are not on this machine."""
    source = parse(model)
    if isinstance(source, Path):
        return Checkpoint(folder_of(source)), []
    path, tensors = fetch_texts(source)
    return Checkpoint(folder_of(path)), tensors


def _ask_engine(folder: Path, remote: Sequence[Tensor]) -> tuple[dict[str, Any] | None, str]:
    """The engine's facts, or why it has none."""
    tensors = {tensor.name: (tensor.dtype, tensor.shape) for tensor in remote}
    try:
        result = subprocess.run(
            engine_command("inspection", str(folder)),
            env=engine_environment(),
            input=json.dumps(tensors),
            capture_output=True,
            text=True,
            timeout=_ENGINE_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["the engine gives no answer"]
        return None, lines[-1]
    except subprocess.TimeoutExpired:
        return None, f"the engine does not answer within {_ENGINE_SECONDS} s"
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts, ""


def _print(facts: Mapping[str, Any]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, text in _rows(facts):
        table.add_row(name, text)
    console.print(facts["model"], highlight=False, markup=False, soft_wrap=True)
    console.print(table, highlight=False, markup=False)


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if "architecture" in facts:
        rows += [
            ("architecture", f"{facts['architecture']}: {facts['layers']} layers of {facts['width']}, vocabulary of "
             f"{facts['vocab_size']:,}"),
            ("parameters", f"{facts['parameters'] / 1e6:,.1f} M"),
            ("context", f"{facts['context_length']:,} tokens"),
            ("chat template", "yes" if facts["chat_template"] else "no: text completion only"),
            ("weights", _weights(facts)),
        ]  # fmt: skip
    if facts.get("engine"):
        rows += _engine_rows(facts)
    return [*rows, *[("not supported", problem) for problem in facts["problems"]]]


def _weights(facts: Mapping[str, Any]) -> str:
    total = max(sum(facts["number_types"].values()), 1)
    types = ", ".join(f"{name} ({count / total:.0%})" for name, count in facts["number_types"].items())
    quantization = f", quantized: {facts['quantization']}" if facts["quantization"] else ""
    return f"{types}{quantization}; {facts['file_bytes'] / 1e6:,.0f} MB"


def _engine_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    engine, memory, speed = facts["engine"], facts["memory"], facts["speed"]
    why = f" (Hugging Face's code; not the C++ kernels: {engine['reason']})" if engine["reason"] else " (C++ kernels)"
    total, weights, kv_cache, process = (
        f"{memory[f'{part}_bytes'] / 1e6:,.0f} MB" for part in ("total", "weight", "kv_cache", "process")
    )
    rows = [
        ("runner", f"{engine['runner']}{why}, {engine['device']}, {engine['dtype']}"),
        ("memory", f"{total} for {memory['slots']} slots of {memory['context']:,} tokens: {weights} weights, "
         f"{kv_cache if memory['kv_cache_bytes'] else 'unknown'} KV cache in {engine['kv_dtype']}, {process} process"),
    ]  # fmt: skip
    if speed is None:
        return rows
    int8 = f", {speed['tokens_per_second_int8']:,.0f} with --weights int8" if "tokens_per_second_int8" in speed else ""
    limit = f"at most {speed['tokens_per_second']:,.0f} tokens/s for one request{int8}"
    return [*rows, ("speed", f"{limit}; memory is read at {engine['read_bytes_per_second'] / 1e9:.0f} GB/s")]
