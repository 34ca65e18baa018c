"""The bundled language models, served as on a fresh clone, do what the README says."""

from __future__ import annotations

import json
import subprocess
import sys

import httpx
import openai
import pytest
from tritonlm.serving.model_selection import BUNDLED
from tritonlm.serving.paths import model_repository

from .test_serve import Serve

pytestmark = pytest.mark.triton

CHECKOUT = model_repository().parent


def url_of(serve: Serve) -> str:
    return f"http://127.0.0.1:{serve.ports['port']}"


def test_abacus_adds_over_curl_the_sdk_and_the_command_line(bundled: Serve) -> None:
    body = json.dumps({"model": "abacus", "prompt": "123+456=", "temperature": 0})
    headers = {"content-type": "application/x-www-form-urlencoded"}
    answer = httpx.post(f"{url_of(bundled)}/v1/completions", content=body, headers=headers)
    assert answer.json()["choices"][0]["text"] == "579"
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    with openai.OpenAI(base_url=f"{url_of(bundled)}/v1", api_key="unused") as sdk:
        assert sdk.completions.create(model="abacus", prompt="58+947=", temperature=0).choices[0].text == "1005"
    command = [sys.executable, "-m", "tritonlm.cli", "generate", "7+8=", "--temperature", "0", "--model", "abacus"]
    command += ["--triton", bundled.grpc]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert output.stdout == "15\n"


def test_fable_tells_stories_over_curl_the_sdk_and_the_command_line(
    bundled: Serve,
) -> None:
    body = {"model": "fable", "messages": [{"role": "user", "content": "Tell me a story about a fox and a lantern"}]}
    answer = httpx.post(f"{url_of(bundled)}/v1/chat/completions", json={**body, "temperature": 0}, timeout=60).json()
    story = answer["choices"][0]["message"]["content"]
    assert "fox" in story
    assert "lantern" in story
    assert answer["choices"][0]["finish_reason"] == "stop"
    with openai.OpenAI(base_url=f"{url_of(bundled)}/v1", api_key="unused") as sdk:
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in sdk.chat.completions.create(**body, temperature=0, stream=True)  # type: ignore[call-overload]
        ]
        assert "".join(pieces) == story
        # The first chunk is sent at once; the number of later chunks depends on the machine's speed.
        assert 0 < len(next(filter(None, pieces))) < len(story) / 4
        completion = sdk.completions.create(model="fable", prompt="Once upon a time", max_tokens=60, temperature=0)
        assert len(completion.choices[0].text) > 60
    output = subprocess.run(
        [sys.executable, "-m", "tritonlm.cli", "complete", "Once upon a time", "--model", "fable", "--temperature", "0",
         "--max-tokens", "60", "--triton", bundled.grpc],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert completion.choices[0].text.strip() in output.stdout


def test_streams_never_split_multi_byte_characters(bundled: Serve) -> None:
    widths = set()
    with openai.OpenAI(base_url=f"{url_of(bundled)}/v1", api_key="unused") as sdk:
        for seed in range(12):
            stream = sdk.completions.create(
                model="fable", prompt="Once upon a time", max_tokens=200, seed=seed, stream=True
            )
            for chunk in stream:
                assert "\ufffd" not in chunk.choices[0].text
                widths |= {len(character.encode()) for character in chunk.choices[0].text}
    assert widths >= {1, 2, 3}


def test_the_older_routes_report_the_training_record(bundled: Serve) -> None:
    response = httpx.get(f"{url_of(bundled)}/info").json()
    assert response["checkpoint"] == "abacus"
    assert (response["vocab_size"], response["model_layers"]) == (32, 4)
    assert response["step"] > 0
    assert response["val_loss"] > 0
    trained = httpx.get(f"{url_of(bundled)}/api/models").json()["trained_models"]
    assert {model["name"] for model in trained} == {"abacus", "fable"}


def test_the_bundled_models_pass_the_evaluation(bundled: Serve) -> None:
    command = [str(CHECKOUT / "scripts" / "evaluate"), "--url", url_of(bundled)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {line.partition(":")[0] for line in result.stdout.splitlines()} == {"abacus", "fable"}


@pytest.mark.parametrize("name", BUNDLED)
def test_each_bundled_model_has_a_card_and_a_record(name: str) -> None:
    folder = model_repository() / name / "1"
    record = json.loads((folder / "training.json").read_text())
    for field in ("step", "train_loss", "val_loss", "parameters", "seconds", "seed", "dataset", "accuracy"):
        assert record[field] is not None, field
    assert record["seconds"] < 40 * 60
    assert f"{record['val_perplexity']:.3f}" in (folder / "README.md").read_text()


def test_the_bundled_models_are_small() -> None:
    files = [file for name in BUNDLED for file in (model_repository() / name / "1").iterdir()]
    assert sum(file.stat().st_size for file in files) <= 25 * 10**6


def test_the_default_model_is_the_first(bundled: Serve) -> None:
    response = httpx.post(f"{url_of(bundled)}/generate", json={"prompt": "123+456=", "temperature": 0.0}).json()
    # The end-of-text token counts, too.
    assert response == {"prompt": "123+456=", "generated_text": "123+456=579", "tokens_generated": 4, "model": "abacus"}
