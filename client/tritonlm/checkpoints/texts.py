"""Copies what a checkpoint has beside its weights into a new one that is made from it. It knows file names only."""

from __future__ import annotations

import shutil
from pathlib import Path

from tritonlm.contract import gguf_tensors
from tritonlm.contract.checkpoint import TEMPLATE_FOLDER

# Everything but the weights that a checkpoint consists of: configuration, tokenizer, templates, licences.
_COPIED = ("*.json", "*.jinja", f"{TEMPLATE_FOLDER}/*.jinja", "*.txt", "*.model", "LICENSE*")
# What describes the weights of the original.
_NOT_COPIED = {"config.json", "quantize_config.json", "quant_config.json", gguf_tensors.FILE_NAME}
_INDEX = ".index.json"


def copy_texts(source: Path, folder: Path) -> None:
    for file in sorted({file for pattern in _COPIED for file in source.glob(pattern)}):
        if file.is_file() and file.name not in _NOT_COPIED and not file.name.endswith(_INDEX):
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
