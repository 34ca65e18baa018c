"""Teach SmolLM2-135M a form as a LoRA adapter, by a job of a running server, and score it there.

    scripts/evaluate adapter_lesson [--minutes 10] [--model FOLDER] [--keep FOLDER]

The lesson: a sentence about an order becomes one line of JSON. 300 generated chats are learnt. 100 others are asked, of
which none has a customer and an article of a learnt one together; base and adapter answer through the gateway, greedy.
Exit code 1 when fewer than 90 % of the adapter's answers are exact, or the training takes longer. `--keep` copies the
adapter and the chats that are asked into a folder, for `scripts/evaluate --adapter`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
import soak_server
from answers import exact_answers, questions_of
from tritonlm.serving.registry import add_entry, make_entry

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from real_checkpoints import SMOLLM2, checkpoint  # noqa: E402

LEARNT, ASKED, EXACT_TARGET = 300, 100, 0.9
BASE, ADAPTER = "smollm2", "orders"
CUSTOMERS = (
    "Anna", "Boris", "Chen", "Dalia", "Emil", "Farah", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Luca",
    "Mona", "Nils", "Olga", "Pavel", "Rosa", "Sven",
)  # fmt: skip
ARTICLES = (
    "apples", "books", "candles", "chairs", "cups", "flowers", "hats", "lamps", "maps", "pens", "plates",
    "shirts", "spoons", "tickets", "umbrellas",
)  # fmt: skip
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CITIES = ("Lisbon", "Oslo", "Madrid", "Vienna", "Athens", "Dublin", "Prague", "Warsaw", "Zurich", "Bergen")
SENTENCES = (
    "{customer} from {city} wants {number} {article} by {day}.",
    "Please send {number} {article} to {customer} in {city} on {day}.",
    "On {day}, {customer} ordered {number} {article}. Ship them to {city}.",
    "{number} {article} for {customer}, {city}, to arrive {day}.",
    "Can you deliver {number} {article} to {city} before {day}? The name is {customer}.",
)
# Eight chats a step. The loss is below 0.01 after twenty steps.
TRAINING = {
    "lora": {"rank": 16, "alpha": 32, "targets": "all"}, "max_iters": 60, "eval_interval": 30, "batch_size": 8,
    "learning_rate": 1e-3, "warmup_steps": 10, "context": 256,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="the longest that the training may take")
    parser.add_argument("--model", type=Path, help="the base's checkpoint; default: SmolLM2-135M-Instruct")
    parser.add_argument("--keep", type=Path, help="folder for the adapter and the chats that are asked; not yet there")
    arguments = parser.parse_args()
    if arguments.keep and arguments.keep.exists():
        parser.error(f"{arguments.keep} exists")
    folder = arguments.model or checkpoint(SMOLLM2)
    learnt, asked = orders()
    with tempfile.TemporaryDirectory() as work:
        data = Path(work, "data")
        data.mkdir()
        write_chats(data / "orders.jsonl", learnt)
        write_chats(data / "asked.jsonl", asked)
        questions = questions_of(data / "asked.jsonl")
        registry = Path(work, "models.yaml")
        add_entry(registry, make_entry(name=BASE, path=folder.resolve()))
        variables = {
            "TRITONLM_TRAINING": "true",
            "TRITONLM_DATA_FOLDER": str(data),
            "TRITONLM_RUNS_FOLDER": str(Path(work, "runs")),
            "TRITONLM_ADAPTERS_FOLDER": str(Path(work, "adapters")),
        }
        with soak_server.serving(BASE, folder, 600, registry=registry, variables=variables) as server:
            server.wait_until_ready(600)
            seconds = train(server.http)
            if arguments.keep:
                keep(arguments.keep, Path(work, "runs", ADAPTER, "final"), data / "asked.jsonl")
            base, adapter = (exact_answers(server.http, model, questions) for model in (BASE, ADAPTER))
    print(f"trained in {seconds / 60:.1f} minutes (target {arguments.minutes:.0f})")
    print(
        f"exact answers to {ASKED} held-out sentences: {BASE} {base:.0%}, {ADAPTER} {adapter:.0%} "
        f"(target {EXACT_TARGET:.0%})"
    )
    return 0 if adapter >= EXACT_TARGET and seconds <= arguments.minutes * 60 else 1


def orders() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Sentences and their JSON: those to learn, and those to ask. They share no pair of a customer and an article."""
    rng = random.Random("orders")
    pairs = [(customer, article) for customer in CUSTOMERS for article in ARTICLES]
    rng.shuffle(pairs)
    learnt_pairs, asked_pairs = pairs[len(pairs) // 4 :], pairs[: len(pairs) // 4]
    return (
        [order(rng, *rng.choice(learnt_pairs)) for _ in range(LEARNT)],
        [order(rng, *rng.choice(asked_pairs)) for _ in range(ASKED)],
    )


def order(rng: random.Random, customer: str, article: str) -> tuple[str, str]:
    number, day, city = rng.randrange(len(NUMBERS)), rng.choice(DAYS), rng.choice(CITIES)
    words = {"customer": customer, "article": article, "number": NUMBERS[number], "day": day, "city": city}
    text = rng.choice(SENTENCES).format(**words)
    answer = {"customer": customer, "article": article, "count": number + 2, "city": city, "day": day}
    return text[0].upper() + text[1:], json.dumps(answer)


def write_chats(file: Path, rows: list[tuple[str, str]]) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for text, answer in rows:
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            lines.write(json.dumps({"messages": messages}) + "\n")


def keep(folder: Path, adapter: Path, asked: Path) -> None:
    shutil.copytree(adapter, folder / ADAPTER)
    shutil.copy(asked, folder)
    print(
        f"kept: {folder / ADAPTER}; with it as an adapter of a served SmolLM2: "
        f"scripts/evaluate --adapter {ADAPTER} --chats {folder / asked.name}"
    )


def train(http: httpx.Client) -> float:
    """Train the adapter by a job; return its seconds."""
    body = {"dataset": "orders.jsonl", "output_dir": ADAPTER, "model_type": BASE, **TRAINING}
    response = http.post("/api/train", json=body)
    if not response.is_success:
        raise soak_server.CheckFailed(response.text[:300])
    job: dict[str, Any] = response.json()
    with http.stream("GET", f"/api/jobs/{job['job_id']}/log", timeout=None) as log:
        for line in log.iter_lines():
            if line.startswith("data: "):
                print(line.removeprefix("data: "), flush=True)
    ended = http.get(f"/api/jobs/{job['job_id']}").json()
    if ended["state"] != "finished":
        raise soak_server.CheckFailed(f"the training is {ended['state']}: {ended['error']}")
    return float(ended["ended"] - ended["started"])


if __name__ == "__main__":
    sys.exit(main())
