"""Merges a LoRA adapter into its base: a whole checkpoint, which needs no adapter. It trains nothing."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from tritonlm.checkpoints.texts import copy_texts
from tritonlm.contract import Checkpoint, CheckpointError
from tritonlm.contract.safetensors_header import read_header

from .errors import TrainingError
from .record import RECORD

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def merge(adapter: Path, base: Path, out: Path) -> Path:
    """Write the base with the adapter's products added to its weights to `out`, which must not exist yet."""
    if out.exists():
        raise TrainingError(f"out: {out} exists; give a folder that does not exist yet")
    dtype = _check(adapter, base)
    with _adapter_errors(adapter):
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
        model = PeftModel.from_pretrained(model, adapter)
        _check_all_used(model, adapter)
        # In float32: in 16 bits a small change of a weight would be rounded away before it is added.
        merged = model.merge_and_unload(safe_merge=True)
    staging = out.parent / f".{out.name}.{os.getpid()}"
    try:
        merged.to(dtype).save_pretrained(staging)
        copy_texts(base, staging)
        # The base's record describes weights that are no longer these.
        (staging / RECORD).unlink(missing_ok=True)
        if (adapter / RECORD).is_file():
            shutil.copyfile(adapter / RECORD, staging / RECORD)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def _check(adapter: Path, base: Path) -> torch.dtype:
    """Refuse what cannot be merged; return the type of the base's numbers."""
    checkpoint = Checkpoint(base)
    checkpoint.check()
    if checkpoint.quantized_count():
        raise TrainingError(f"base: the weights of {base} are quantized; name the checkpoint that they were made from")
    for name in (_CONFIG, _WEIGHTS):
        if not (adapter / name).is_file():
            raise TrainingError(f"adapter: {adapter} has no {name}; save it with PEFT's save_pretrained()")
    # Raises CheckpointError for a damaged file.
    read_header(adapter / _WEIGHTS)
    dtypes = Counter(tensor.dtype for file in checkpoint.weight_files() for tensor in read_header(file).values())
    name = dtypes.most_common(1)[0][0]
    if name not in _DTYPES:
        raise TrainingError(f"base: {base} holds numbers of the type {name}; merge into one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _check_all_used(model: PeftModel, adapter: Path) -> None:
    """PEFT passes over tensors that no layer of the base takes."""
    unused = read_header(adapter / _WEIGHTS).keys() - get_peft_model_state_dict(model).keys()
    if unused:
        raise TrainingError(f"adapter: {adapter} has the tensor {min(unused)}, which no layer of this base takes")


@contextlib.contextmanager
def _adapter_errors(adapter: Path) -> Iterator[None]:
    try:
        yield
    except (TrainingError, CheckpointError):
        raise
    except Exception as error:  # PEFT raises errors of many kinds
        logging.getLogger(__name__).debug("merging failed", exc_info=True)
        reason = " ".join(str(error).split())[:300]
        raise TrainingError(f"adapter: {adapter} cannot be merged into this base: {reason}") from None
