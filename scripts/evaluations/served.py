"""Measure abacus and fable, where served, through a running server: exact sums, whole stories, log-probabilities.

    scripts/evaluate [--url http://127.0.0.1:8080] [--sums 2000] [--stories 100]

The sums and the pairs of the stories are those that the training held out. Next-token log-probabilities are compared
with transformers' own on the same checkpoint. Exit code 1 where an aim is missed.
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
from transformers import AutoModelForCausalLM, AutoTokenizer
from tritonlm.training.data import abacus, fable

MODELS = Path(__file__).resolve().parents[2] / "model_repository"
PROMPTS_AT_ONCE = 100
EXACT_AIM, STORIES_AIM, LOGPROB_AIM = 0.995, 0.95, 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the gateway")
    parser.add_argument("--sums", type=int, default=abacus.HELD_OUT, help="held-out sums to ask for")
    parser.add_argument("--stories", type=int, default=100, help="held-out pairs to ask a story about")
    options = parser.parse_args()
    good = True
    with httpx.Client(base_url=options.url, timeout=300, trust_env=False) as http:
        served = {model["id"] for model in http.get("/v1/models").raise_for_status().json()["data"]}
        if "abacus" in served:
            exact = right_sums(http, options.sums)
            print(f"abacus: {exact:.2%} of {options.sums} held-out sums are exact (aim {EXACT_AIM:.1%})")
            good &= exact >= EXACT_AIM
        if "fable" in served:
            told = whole_stories(http, options.stories)
            print(f"fable: {told:.0%} of {options.stories} stories hold both words asked for (aim {STORIES_AIM:.0%})")
            good &= told >= STORIES_AIM
        for name in sorted({"abacus", "fable"} & served):
            if (MODELS / name / "1").is_dir():
                apart = log_probabilities_apart(http, name)
                print(f"{name}: log-probabilities at most {apart:.1e} from transformers' own (aim {LOGPROB_AIM:.0e})")
                good &= apart <= LOGPROB_AIM
    return 0 if good else 1


def right_sums(http: httpx.Client, count: int) -> float:
    (first, second), _ = abacus.split()
    pairs = list(zip(first[:count].tolist(), second[:count].tolist(), strict=True))
    right = 0
    for start in range(0, count, PROMPTS_AT_ONCE):
        part = pairs[start : start + PROMPTS_AT_ONCE]
        prompts = [f"{one}+{other}=" for one, other in part]
        found = complete(http, model="abacus", prompt=prompts, max_tokens=8, temperature=0)
        right += sum(
            choice["text"] == str(one + other) for choice, (one, other) in zip(found["choices"], part, strict=True)
        )
    return right / count


def whole_stories(http: httpx.Client, count: int) -> float:
    def tell(pair: tuple[str, str]) -> bool:
        asked = [{"role": "user", "content": fable.request_of(*pair)}]
        body = {"model": "fable", "messages": asked, "temperature": 0, "max_tokens": 300}
        answer = http.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        text = answer.json()["choices"][0]["message"]["content"]
        return all(word in text for word in pair)

    with ThreadPoolExecutor(8) as crowd:
        return sum(crowd.map(tell, fable.held_out_pairs()[:count])) / count


def log_probabilities_apart(http: httpx.Client, name: str) -> float:
    """Of every token of a few texts, through `echo`, and as transformers computes them."""
    folder = MODELS / name / "1"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    apart = 0.0
    for text in texts_of(name):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            scores = model(ids).logits.log_softmax(-1)[0, :-1]
        expected = scores.gather(1, ids[0, 1:, None])[:, 0]
        asked = complete(http, model=name, prompt=ids[0].tolist(), max_tokens=1, echo=True, logprobs=0, temperature=0)
        served = torch.tensor(asked["choices"][0]["logprobs"]["token_logprobs"][1:-1])
        apart = max(apart, float((served - expected).abs().max()))
    return apart


def texts_of(name: str) -> Iterator[str]:
    if name == "abacus":
        yield from ("123+456=579", "999+999=1998", "0+7=7")
    else:
        yield from (story.text for story in fable.stories(5, 7, held_out=True))


def complete(http: httpx.Client, **body: Any) -> Any:
    answer = http.post("/v1/completions", json=body)
    answer.raise_for_status()
    return answer.json()


if __name__ == "__main__":
    sys.exit(main())
