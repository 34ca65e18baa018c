"""Evaluate abacus and fable through a running server: exact sums, complete stories, log-probabilities; or an adapter.

    scripts/evaluate [--url http://127.0.0.1:8080] [--sums 2000] [--stories 100]
    scripts/evaluate --adapter NAME --chats FILE.jsonl

The sums and the pairs of the stories are held out from training. Next-token log-probabilities are compared with those
of transformers on the same checkpoint. Exit code 1 when a target is missed. An adapter, or any other model by its name,
is scored by the share of chats whose last answer it gives exactly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from answers import exact_answers, questions_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from tritonlm.training.data import abacus, fable

MODELS = Path(__file__).resolve().parents[2] / "model_repository"
BATCH_SIZE = 100
EXACT_TARGET, STORIES_TARGET, LOGPROB_TARGET = 0.995, 0.95, 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the gateway")
    parser.add_argument("--sums", type=int, default=abacus.HELD_OUT, help="number of held-out sums")
    parser.add_argument("--stories", type=int, default=100, help="number of stories with held-out pairs")
    parser.add_argument("--adapter", metavar="NAME", help="score this adapter, or any model, on --chats instead")
    parser.add_argument("--chats", type=Path, metavar="FILE", help="chats as for tritonlm train, none of them learnt")
    options = parser.parse_args()
    if (options.adapter is None) != (options.chats is None):
        parser.error("--adapter and --chats go together: the adapter's name, and the chats that score it")
    with httpx.Client(base_url=options.url, timeout=300, trust_env=False) as http:
        if options.adapter is not None:
            questions = questions_of(options.chats)
            exact = exact_answers(http, options.adapter, questions)
            print(f"{options.adapter}: {exact:.2%} of {len(questions)} answers are exact")
            return 0
        return 0 if passes(http, options) else 1


def passes(http: httpx.Client, options: argparse.Namespace) -> bool:
    """Whether the bundled models reach their targets."""
    passed = True
    served = {model["id"] for model in http.get("/v1/models").raise_for_status().json()["data"]}
    if "abacus" in served:
        exact = exact_sums(http, options.sums)
        print(f"abacus: {exact:.2%} of {options.sums} held-out sums are exact (target {EXACT_TARGET:.1%})")
        passed &= exact >= EXACT_TARGET
    if "fable" in served:
        share = complete_stories(http, options.stories)
        print(f"fable: {share:.0%} of {options.stories} stories have both words (target {STORIES_TARGET:.0%})")
        passed &= share >= STORIES_TARGET
    for name in sorted({"abacus", "fable"} & served):
        if (MODELS / name / "1").is_dir():
            difference = max_logprob_difference(http, name)
            print(f"{name}: log-probabilities within {difference:.1e} of transformers (target {LOGPROB_TARGET:.0e})")
            passed &= difference <= LOGPROB_TARGET
    return passed


def exact_sums(http: httpx.Client, count: int) -> float:
    (first, second), _ = abacus.split()
    pairs = list(zip(first[:count].tolist(), second[:count].tolist(), strict=True))
    correct = 0
    for start in range(0, count, BATCH_SIZE):
        batch = pairs[start : start + BATCH_SIZE]
        prompts = [f"{one}+{other}=" for one, other in batch]
        response = complete(http, model="abacus", prompt=prompts, max_tokens=8, temperature=0)
        correct += sum(
            choice["text"] == str(one + other) for choice, (one, other) in zip(response["choices"], batch, strict=True)
        )
    return correct / count


def complete_stories(http: httpx.Client, count: int) -> float:
    def is_complete(pair: tuple[str, str]) -> bool:
        messages = [{"role": "user", "content": fable.story_request(*pair)}]
        body = {"model": "fable", "messages": messages, "temperature": 0, "max_tokens": 300}
        response = http.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        text = response.json()["choices"][0]["message"]["content"]
        return all(word in text for word in pair)

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(is_complete, fable.held_out_pairs()[:count])) / count


def max_logprob_difference(http: httpx.Client, name: str) -> float:
    """The largest difference to transformers over all tokens of a few texts, requested with `echo`."""
    folder = MODELS / name / "1"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    difference = 0.0
    for text in texts_of(name):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            scores = model(ids).logits.log_softmax(-1)[0, :-1]
        expected = scores.gather(1, ids[0, 1:, None])[:, 0]
        response = complete(
            http, model=name, prompt=ids[0].tolist(), max_tokens=1, echo=True, logprobs=0, temperature=0
        )
        served = torch.tensor(response["choices"][0]["logprobs"]["token_logprobs"][1:-1])
        difference = max(difference, float((served - expected).abs().max()))
    return difference


def texts_of(name: str) -> Iterator[str]:
    if name == "abacus":
        yield from ("123+456=579", "999+999=1998", "0+7=7")
    else:
        yield from (story.text for story in fable.stories(5, 7, held_out=True))


def complete(http: httpx.Client, **body: Any) -> Any:
    response = http.post("/v1/completions", json=body)
    response.raise_for_status()
    return response.json()


if __name__ == "__main__":
    sys.exit(main())
