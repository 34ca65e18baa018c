"""`tritonlm quantize`: writes a model with its linear layers in 4 or 8 bits, and measures what it loses on a text.

The engine does it in a process of its own, which needs torch; a command imports none.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from tritonlm.checkpoints.reference import parse
from tritonlm.checkpoints.resolve import folder_of
from tritonlm.checkpoints.texts import copy_texts
from tritonlm.checkpoints.tokenizer import load_tokenizer
from tritonlm.contract import Checkpoint, CheckpointError
from tritonlm.serving import terminal
from tritonlm.serving.downloads import downloaded
from tritonlm.serving.errors import ServingError

from .checkpoints import Model, errors_printed
from .common import AsJson, console, print_json
from .engine_process import engine_command, engine_environment


class Weights(str, Enum):
    INT4 = "int4"
    INT8 = "int8"


def quantize(
    model: Model,
    weights: Annotated[Weights, typer.Option(help="bits of a weight; each group of 32 has a scale")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="the new checkpoint; it must not exist yet")],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a text: the perplexity on it is printed, before and after")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model with its linear layers in 4 or 8 bits, as compressed-tensors reads it (pack-quantized).

    The embedding, the output matrix and the norms keep their numbers.
    """
    with errors_printed():
        facts = _quantize(model, weights, out, text)
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def _quantize(model: str, weights: Weights, out: Path, text: Path | None) -> dict[str, Any]:
    if out.exists():
        raise ServingError(f"{out} exists; give a folder that does not exist yet to --out")
    checkpoint = Checkpoint(folder_of(downloaded(parse(model))))
    checkpoint.check()
    ids = [] if text is None else _ids(checkpoint, text)
    # It gets its name when it is complete.
    folder = out.parent / f".{out.name}.{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        copy_texts(checkpoint.folder, folder)
        bits = int(weights.value.removeprefix("int"))
        request = {"source": str(checkpoint.folder), "folder": str(folder), "bits": bits, "ids": ids}
        result = _run(request, f"quantizing {model}")
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {
        "model": model,
        "folder": str(out),
        "weights": weights.value,
        "file_bytes": checkpoint.file_bytes(),
        "quantized_bytes": result["bytes"],
        "quantized": result["quantized"],
        "plain": result["plain"],
        "tokens": len(ids),
        "perplexity_before": result.get("before"),
        "perplexity_after": result.get("after"),
    }


def _ids(checkpoint: Checkpoint, text: Path) -> list[int]:
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ServingError(f"--text {text} cannot be read: {error}") from None
    ids: list[int] = load_tokenizer(checkpoint).encode(content).ids
    if len(ids) < 2:
        raise ServingError(
            f"--text {text} has {len(ids)} tokens; a perplexity needs two, and is meaningful with thousands"
        )
    return ids


def _run(request: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The engine's result; its progress is shown."""
    result: dict[str, Any] | None = None
    with (
        terminal.step(text) as show,
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            engine_command("quantization"), env=engine_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, text=True,
        ) as process,
    ):  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            for line in process.stdout:
                content = json.loads(line)
                result = content.get("result", result)
                if "stage" in content:
                    share = f" {content['done'] / content['total']:.0%}" if content["total"] else ""
                    show(f"{content['stage']}{share}")
        except BaseException:
            process.kill()
            raise
        process.wait()
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    if process.returncode or result is None:
        raise CheckpointError(lines[-1] if lines else f"the engine ends with code {process.returncode}")
    return result


def _print(facts: Mapping[str, Any]) -> None:
    size, quantized_size = facts["file_bytes"] / 1e6, facts["quantized_bytes"] / 1e6
    lines = [
        f"{facts['folder']}: {len(facts['quantized'])} matrices in {facts['weights']}, {len(facts['plain'])} as they "
        f"were; {size:,.0f} MB → {quantized_size:,.0f} MB"
    ]
    before, after = facts["perplexity_before"], facts["perplexity_after"]
    if before is not None:
        change = f"{after / before - 1:+.2%}"
        lines.append(f"perplexity on {facts['tokens']:,} tokens: {before:.4g} → {after:.4g} ({change})")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
