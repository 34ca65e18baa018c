"""The whole path: Triton, gateway and engine on the device, where their packages are installed or were carried.

The engine alone, with the same checkpoint and the same requests, is measured in the same stage.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import random_models
import torch
from random_models import DTYPE, Shape
from stage import ROOT, Options, Report, Skipped
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_SECTIONS = ("dependencies", "gateway", "server")
# What the load client needs.
_CLIENT = ("aiohttp", "httpx")
_CONCURRENCY = 64


def run(options: Options, report: Report) -> None:
    if missing := sorted({name for name in (*_needed(), *_CLIENT) if not _is_installed(name)}):
        raise Skipped(
            f"not installed: {', '.join(missing)}; carry their wheels, and set PYTHONPATH to the folder they are in"
        )
    import checkpoints  # noqa: PLC0415 (httpx and aiohttp may be missing)
    import servers  # noqa: PLC0415
    from load import Workload, prompts_of  # noqa: PLC0415
    from tritonlm.serving import backend  # noqa: PLC0415

    checkpoints.FOLDER = servers.FOLDER = options.scratch
    os.environ["TRITONLM_RUNNER"] = "graphs"
    shape = random_models.shapes(options)[0]
    folder = _checkpoint(shape, options)
    backend.main()
    concurrency = 4 if options.tiny else _CONCURRENCY
    work = Workload("gpu", concurrency, 2 * concurrency, shape.prompt_tokens, shape.new_tokens)
    prompts = prompts_of(work, Tokenizer.from_file(str(folder / "tokenizer.json")), 0)
    with servers.running(servers.OURS, folder, "bfloat16", ["--device", options.device]) as server:
        server.measure(work, prompts)
        result = server.measure(work, prompts)
    speed = result.tokens / result.seconds
    report(
        shape=shape.name, concurrency=concurrency, tokens_s=round(speed, 1),
        first_token_ms=round(result.first_milliseconds, 1), beside=f"figures: {shape.name}, batch {concurrency}",
    )  # fmt: skip


def _needed() -> Iterator[str]:
    """The packages of pyproject.toml that a server needs."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for section in _SECTIONS:
        match = re.search(rf"^{section} = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
        assert match is not None, section
        yield from re.findall(r'^ *"([A-Za-z0-9._-]+)', match[1], re.MULTILINE)


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _checkpoint(shape: Shape, options: Options) -> Path:
    """A checkpoint with weights, whose tokenizer has one word for each id."""
    folder = options.scratch / f"served-{shape.name}"
    model: Any = random_models.make_model(shape.config, DTYPE, torch.device("cpu"))
    model.save_pretrained(folder)
    words = {f"▁{_letters(i)}": i for i in range(shape.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=f"▁{_letters(0)}"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _letters(number: int) -> str:
    """A word of letters for each number: `load` makes its prompts of such words."""
    text = ""
    while True:
        number, digit = divmod(number, 26)
        text += chr(ord("a") + digit)
        if not number:
            return f"w{text}"
