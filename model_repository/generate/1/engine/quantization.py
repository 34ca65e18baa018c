"""Quantizes a checkpoint, and measures what it costs: `tritonlm quantize` runs it in a process of its own.

    python -m engine.quantization < REQUEST

REQUEST is JSON: `source` and `folder` (an existing, empty one), `bits`, and `ids`, the tokens of a text for the
perplexity. It prints a line of JSON for each progress, and the result as the last one. The settings come from the
environment, as the engine's do.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tritonlm.contract import Checkpoint, CheckpointError

from .config import AUTO, EngineConfig
from .perplexity import WINDOW, perplexity
from .runners.interface import choose_devices, own_dtype
from .runners.native.quantized_files.writer import write_quantized
from .runners.select import open_runner


def quantize(source: Path, folder: Path, bits: int, ids: list[int]) -> dict[str, Any]:
    checkpoint = Checkpoint(source)
    written = write_quantized(
        checkpoint, folder, bits, own_dtype(checkpoint), lambda done, total: _say("quantizing", done, total)
    )
    result: dict[str, Any] = {"bytes": written.bytes, "quantized": written.quantized, "plain": written.plain}
    if len(ids) > 1:
        result |= {"before": _perplexity(source, ids, "before"), "after": _perplexity(folder, ids, "after")}
    return result


def _perplexity(folder: Path, ids: list[int], when: str) -> float:
    config = EngineConfig.from_strings({})
    context = min(WINDOW, config.max_context_tokens or WINDOW, Checkpoint(folder).context_length)
    config = replace(config, weights=AUTO, max_sequences=1, max_context_tokens=context, kv_cache_tokens=0)
    _say(f"perplexity {when}: loading", 0, 0)
    runner = open_runner(folder, config, choose_devices(config.device)[0])
    try:
        return perplexity(runner, ids, lambda done, total: _say(f"perplexity {when}", done, total))
    finally:
        runner.close()


def _say(stage: str, done: int, total: int) -> None:
    print(json.dumps({"stage": stage, "done": done, "total": total}), flush=True)


def main() -> None:
    request = json.load(sys.stdin)
    try:
        result = quantize(Path(request["source"]), Path(request["folder"]), request["bits"], request["ids"])
    except CheckpointError as error:
        sys.exit(error.message)
    print(json.dumps({"result": result}), flush=True)


if __name__ == "__main__":
    main()
