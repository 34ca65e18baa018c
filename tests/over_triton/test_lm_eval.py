"""`lm_eval --model local-completions` with the gateway gives the results of lm_eval's own `hf` model."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from tritonlm.serving.paths import model_repository

from .gateways import gateway_to
from .servers import LM, Server

pytestmark = pytest.mark.triton

SCRIPT = model_repository().parent / "scripts" / "lm_eval"
WORDS = [
    "clockmaker",
    "window",
    "birds",
    "fence",
    "number",
    "book",
    "noon",
    "coat",
    "stick",
    "bread",
    "small",
    "model",
    "house",
    "wood",
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
{rest}
"""
TASKS = {
    "birds": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "pages": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "stories": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{page}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def write_tasks(folder: Path) -> None:
    rows = [
        {
            "question": f"One day the {WORDS[n]} saw the {WORDS[n - 1]} and",
            "choices": [f" {WORDS[n - k]}" + " and bread" * (k % 2) for k in range(2, 6)],
            "answer": n % 4,
            # Longer than the context, so that lm_eval splits it into windows.
            "page": " ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 300 if n < 2 else 30)),
        }
        for n in range(len(WORDS))
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, rest in TASKS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, rest=rest), encoding="utf-8")


def test_the_results_equal_those_of_hf(server: Server, repository: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with gateway_to(server.grpc, tmp_path) as gateway:
        checkpoint = repository / LM / "1"
        command = [SCRIPT, "--url", gateway.url, "--model", LM, "--checkpoint", checkpoint, "--include-path", tmp_path]
        result = subprocess.run(
            [*map(str, command), "--tasks", *TASKS],
            env=environment, capture_output=True, text=True, timeout=250, check=False,
        )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("acc", "acc_norm", "word_perplexity", "bits_per_byte", "exact_match", "texts that differ: 0"):
        assert name in result.stdout
