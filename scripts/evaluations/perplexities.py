"""The perplexity of a GGUF file: by the kernels, by transformers on its weights in float32, and by llama.cpp.

    scripts/evaluate perplexity FILE.gguf [--tokens 20000] [--text FILE] [--window 512] [--llama-cpp PROGRAM]

The text, this repository's documents by default, is read in windows, each for itself. As in llama.cpp's tool
llama-perplexity, which PROGRAM is, the first half of a window does not count, and each token after it does. Exit code 1
when the kernels' perplexity differs from transformers' by more than a thousandth.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from tritonlm.checkpoints.gguf import prepare

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "model_repository" / "generate" / "1"))

from engine.config import EngineConfig  # noqa: E402
from engine.perplexity import log_probabilities  # noqa: E402
from engine.runners.interface import choose_devices  # noqa: E402
from engine.runners.select import open_runner  # noqa: E402

TARGET = 0.001
_SECONDS = 7200
# The log-probability of each token of a window but the first.
LogProbabilities = Callable[[Sequence[int]], torch.Tensor]


def documents() -> str:
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md"]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def first_id_of(tokenizer: Tokenizer) -> int | None:
    """The special token that it puts before each text, which llama-perplexity puts into each window."""
    with_special, text = tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids
    return None if with_special[0] == text[0] else with_special[0]


def windows_of(ids: Sequence[int], window: int, first_id: int | None) -> Iterator[list[int]]:
    """Whole windows; with `first_id` in place of each one's first token."""
    for start in range(0, len(ids) - window + 1, window):
        part = list(ids[start : start + window])
        yield [first_id, *part[1:]] if first_id is not None else part


def perplexity(windows: Sequence[Sequence[int]], log_probabilities_of: LogProbabilities) -> float:
    values = [log_probabilities_of(window)[len(window) // 2 :] for window in windows]
    return math.exp(-torch.cat(values).double().mean().item())


def by_kernels(folder: Path, windows: Sequence[Sequence[int]]) -> float:
    config = EngineConfig(max_sequences=1, max_context_tokens=len(windows[0]))
    runner = open_runner(folder, config, choose_devices("cpu")[0])
    try:
        return perplexity(windows, lambda window: log_probabilities(runner, window))
    finally:
        runner.close()


def by_transformers(file: Path, windows: Sequence[Sequence[int]]) -> float:
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)

    @torch.inference_mode()
    def log_probabilities_of(window: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([list(window)])
        logits = model(ids).logits[0, :-1].float().log_softmax(dim=-1)
        return logits.gather(1, ids[0, 1:, None])[:, 0]

    return perplexity(windows, log_probabilities_of)


def by_llama_cpp(program: Path, file: Path, text: str, window: int, count: int) -> float:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as source:
        source.write(text)
        source.flush()
        command = [str(program), "-m", str(file), "-f", source.name, "-c", str(window), "--chunks", str(count)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    match = re.search(r"Final estimate: PPL = ([\d.]+)", result.stdout + result.stderr)
    if match is None:
        raise SystemExit(f"{program} prints no final estimate")
    return float(match[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--text", type=Path, help="a text in UTF-8")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--llama-cpp", type=Path, metavar="PROGRAM", help="llama-perplexity")
    options = parser.parse_args()
    folder = prepare(options.file)
    text = options.text.read_text(encoding="utf-8") if options.text else documents()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    windows = list(windows_of(ids[: options.tokens], options.window, first_id_of(tokenizer)))
    if not windows:
        parser.error("the text is shorter than a window")
    kernels, full = by_kernels(folder, windows), by_transformers(options.file.resolve(), windows)
    print(f"{len(windows) * options.window:,} tokens: the kernels {kernels:.4f}, transformers in float32 {full:.4f}")
    print(f"the kernels : transformers = {kernels / full:.5f}")
    if options.llama_cpp:
        other = by_llama_cpp(options.llama_cpp, options.file, text, options.window, len(windows))
        print(f"llama.cpp {other:.4f}: {other / full:.5f} times that of transformers")
    return 0 if abs(kernels / full - 1) <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
