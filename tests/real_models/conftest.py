"""A trained model, SmolLM2-135M-Instruct, downloaded once, and one server of it for all files of this folder.

Where the model cannot be downloaded, these tests are skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from over_triton.test_serve import Serve, serving
from real_checkpoints import SMOLLM2, Unavailable, checkpoint
from tritonlm.serving.paths import model_repository

# The name under which the server has it.
LM = "smollm2"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    try:
        return checkpoint(SMOLLM2)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", autouse=True)
def no_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Do not use the key file of this checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITONLM_KEYS", str(tmp_path_factory.mktemp("keys") / "keys.json"))
        yield


@pytest.fixture(scope="session")
def served_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    options = ("--checkpoint", f"{LM}={smollm2}", "--device", "cpu", "--kv-cache-tokens", "8192")
    with serving(model_repository(), tmp_path_factory.mktemp("served"), *options) as serve:
        yield serve


@pytest.fixture(scope="session")
def url(served_smollm2: Serve) -> str:
    return f"http://127.0.0.1:{served_smollm2.ports['port']}"


@pytest.fixture(scope="session")
def sdk(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=120) as client:
        yield client
