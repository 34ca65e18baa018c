"""A trained model, SmolLM2-135M-Instruct, downloaded once; without it these tests are skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from real_checkpoints import SMOLLM2, Unavailable, checkpoint


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
