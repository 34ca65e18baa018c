"""Evaluate a served language model with lm_eval, and the same checkpoint with lm_eval's own `hf` model; compare.

    scripts/lm_eval --url http://127.0.0.1:8080 --model NAME --checkpoint FOLDER --tasks TASK [--include-path FOLDER]

It runs `lm_eval --model local-completions` with the remote tokenizer; only `hf` reads the checkpoint on this side.
Exit code 1 when a log-likelihood differs by more than 1e-4, or when a text or a metric differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

TOLERANCE = 1e-4


def main() -> int:
    options = read_options()
    manager = manager_of(options.tasks, options.include_path)
    common: dict[str, Any] = {"tasks": options.tasks, "task_manager": manager, "limit": options.limit}
    print(f"lm_eval's hf model on {options.checkpoint} …", flush=True)
    expected = simple_evaluate(
        "hf", f"pretrained={options.checkpoint},dtype=float32,device=cpu", batch_size=8, **common
    )
    print(f"{options.model} at {options.url} …", flush=True)
    served = simple_evaluate(
        "local-completions",
        f"base_url={options.url}/v1/completions,model={options.model},tokenizer_backend=remote,num_concurrent=4,"
        f"max_length={options.max_length},max_retries=3",
        batch_size=8,
        **common,
    )
    assert expected is not None and served is not None, "one process, one rank"  # noqa: PT018
    return report(expected, served)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the gateway")
    parser.add_argument("--model", required=True, help="the language model's name there")
    parser.add_argument("--checkpoint", required=True, type=Path, help="its folder, for hf")
    parser.add_argument("--tasks", required=True, nargs="+", help="lm_eval's tasks, or those of --include-path")
    parser.add_argument("--include-path", help="a folder with tasks of your own")
    parser.add_argument("--limit", type=int, help="documents per task")
    parser.add_argument("--max-length", type=int, default=511, help="longest prompt: the context length minus one")
    return parser.parse_args()


def manager_of(tasks: Sequence[str], include_path: str | None) -> TaskManager:
    """lm_eval's own tasks are thousands of files, which take seconds to read: left out where none of them is named."""
    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    return TaskManager(include_path=include_path)


def report(expected: Any, served: Any) -> int:
    """Print both results; return 0 when they are equal, else 1."""
    equal = True
    for task, metrics in expected["results"].items():
        for name, value in metrics.items():
            if not isinstance(value, float):
                continue
            other = served["results"][task][name]
            equal &= abs(value - other) <= TOLERANCE * max(1.0, abs(value))
            print(f"{task:24} {name:24} hf {value:<12.6f} served {other:<12.6f}")
    worst, texts = 0.0, 0
    for actual, reference in zip(responses(served), responses(expected), strict=True):
        if isinstance(reference, str):
            texts += actual != reference
        else:
            worst = max(worst, abs(actual - reference))
    print(f"largest difference of a log-likelihood: {worst:.2e} (allowed {TOLERANCE:.0e}); texts that differ: {texts}")
    return 0 if equal and worst <= TOLERANCE and not texts else 1


def responses(results: Any) -> Iterator[float | str]:
    """All responses of all documents: log-likelihoods, greedy flags, texts."""
    for task in sorted(results["samples"]):
        for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"]):
            yield from _flat(sample["resps"])


def _flat(value: Any) -> Iterator[float | str]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, bool):
        yield float(value)
    else:
        yield value


if __name__ == "__main__":
    sys.exit(main())
