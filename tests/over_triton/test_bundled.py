"""The language model that lies in the repository, served as on a fresh clone: what the README promises of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import httpx
import openai
import pytest
from tritonlm.serving.paths import model_repository

from .test_serve import Serve, serving

pytestmark = pytest.mark.triton

CHECKOUT = model_repository().parent


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    with serving(model_repository(), tmp_path_factory.mktemp("bundled")) as serve:
        yield serve


def url_of(serve: Serve) -> str:
    return f"http://127.0.0.1:{serve.ports['port']}"


def test_abacus_adds_by_curls_body_by_the_sdk_and_by_the_command_line(bundled: Serve) -> None:
    body = json.dumps({"model": "abacus", "prompt": "123+456=", "temperature": 0})
    headers = {"content-type": "application/x-www-form-urlencoded"}
    answer = httpx.post(f"{url_of(bundled)}/v1/completions", content=body, headers=headers)
    assert answer.json()["choices"][0]["text"] == "579"
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    with openai.OpenAI(base_url=f"{url_of(bundled)}/v1", api_key="unused") as sdk:
        assert sdk.completions.create(model="abacus", prompt="58+947=", temperature=0).choices[0].text == "1005"
    command = [sys.executable, "-m", "tritonlm.cli", "generate", "7+8=", "--temperature", "0", "--model", "abacus"]
    told = subprocess.run([*command, "--triton", bundled.grpc], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout == "15\n"


def test_an_older_servers_user_finds_the_training_record(bundled: Serve) -> None:
    found = httpx.get(f"{url_of(bundled)}/info").json()
    assert found["checkpoint"] == "abacus"
    assert (found["vocab_size"], found["model_layers"]) == (32, 4)
    assert found["step"] > 0
    assert found["val_loss"] > 0
    trained = httpx.get(f"{url_of(bundled)}/api/models").json()["trained_models"]
    assert {model["name"] for model in trained} == {"abacus"}


def test_it_is_as_good_as_its_card_says(bundled: Serve) -> None:
    command = [str(CHECKOUT / "scripts" / "evaluate"), "--url", url_of(bundled)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_its_card_and_record_lie_beside_it() -> None:
    folder = model_repository() / "abacus" / "1"
    record = json.loads((folder / "training.json").read_text())
    for field in ("step", "train_loss", "val_loss", "parameters", "seconds", "seed", "dataset"):
        assert record[field] is not None, field
    assert f"{record['val_perplexity']:.3f}" in (folder / "README.md").read_text()


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in (model_repository() / "abacus" / "1").iterdir()) <= 5 * 2**20


def test_the_default_model_is_the_first_one(bundled: Serve) -> None:
    found = httpx.post(f"{url_of(bundled)}/generate", json={"prompt": "123+456=", "temperature": 0.0}).json()
    # The end of the text is a token too.
    assert found == {"prompt": "123+456=", "generated_text": "123+456=579", "tokens_generated": 4, "model": "abacus"}
