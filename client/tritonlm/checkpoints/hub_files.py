"""Which files of a repository on the Hugging Face Hub make the checkpoint: plain names in, names out. No network.

Safetensors and their JSON, or one GGUF file with all its parts. What cannot be served is refused here, before anything
is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tritonlm.contract.checkpoint import TEMPLATE_FOLDER
from tritonlm.contract.errors import CheckpointError
from tritonlm.contract.weight_files import weight_names

from .reference import HubModel, stem

_TEXTS = (".json", ".jinja")
_TEMPLATES = re.compile(rf"{TEMPLATE_FOLDER}/[^/]+\.jinja")
_GGUF = ".gguf"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
# The quantization in a GGUF file's name, such as Q4_K_M, IQ4_XS, UD-Q4_K_XL, BF16.
_QUANTIZATION = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|T?Q\d_\d|MXFP4\w*|BF16|F16|F32|FP16|FP32))$", re.IGNORECASE
)
# No language models, by a file's name without its ending: the projector of a multimodal model, and importance matrices
# (imatrix.gguf, imatrix_unsloth.gguf, lm.imatrix.gguf), but not lm-imatrix-Q4_K_M.gguf, which was quantized with one.
_OTHER_GGUF = re.compile(r"mmproj|(?:^|/)imatrix[^/]*$|[-._]imatrix$", re.IGNORECASE)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


def choose_files(model: HubModel, names: Iterable[str], weights: bool = True) -> list[str]:
    """The files to download; the first part of a GGUF file is first. Without `weights` only texts, if it has some."""
    names = sorted(names)
    files = [name for name in names if name.lower().endswith(_GGUF)]
    ggufs = [name for name in files if not _OTHER_GGUF.search(stem(name))]
    if model.file:
        return _choose_gguf(model, files, ggufs)
    top = [name for name in names if "/" not in name]
    tensors = weight_names(top)
    if ggufs and not tensors:
        return _only_gguf(model, ggufs)
    _refuse_incomplete(model, top, tensors)
    texts = [name for name in names if name.endswith(_TEXTS) and ("/" not in name or _TEMPLATES.fullmatch(name))]
    return [*texts, *tensors] if weights else texts


def is_gguf(names: Sequence[str]) -> bool:
    """Whether the chosen files are a GGUF file."""
    return bool(names) and names[0].lower().endswith(_GGUF)


def _refuse_incomplete(model: HubModel, top: Sequence[str], tensors: Sequence[str]) -> None:
    if "config.json" not in top:
        adapter = "adapter_config.json" in top
        raise CheckpointError(
            f"{model} is an adapter (LoRA) without its base; add it to one with tritonlm adapters add NAME --base LM"
            if adapter
            else f"{model} has no config.json: it is not a checkpoint in Hugging Face format"
        )
    if not tensors:
        pickled = any(name.endswith(_PICKLED) for name in top)
        raise CheckpointError(
            f"{model} has no safetensors weights"
            + (
                ", only pickled ones, which can run code and are not loaded; look for a revision with safetensors"
                * pickled
            )
        )
    if "tokenizer.json" not in top:
        raise CheckpointError(f"{model} has no tokenizer.json; save its tokenizer with transformers' save_pretrained()")


def _choose_gguf(model: HubModel, files: Sequence[str], ggufs: Sequence[str]) -> list[str]:
    """`files` may be chosen by name, `ggufs` of them also by quantization."""
    requested = model.file.lower()
    if requested.endswith(_GGUF):
        chosen = [name for name in files if requested in (name.lower(), name.lower().rpartition("/")[2])]
    else:
        token = re.compile(rf"(?:^|[-._/]){re.escape(requested)}$")
        chosen = [name for name in ggufs if token.search(stem(name).lower())]
    groups = _by_file(chosen)
    if len(groups) == 1:
        return _all_parts(model, next(iter(groups.values())), files)
    if not ggufs:
        raise CheckpointError(f"{model.repo} has no GGUF files")
    problem = f"several files for {model.file}" if groups else f"no {model.file}"
    raise CheckpointError(f"{model.repo} has {problem}; its GGUF files are {_listed(list(groups) or _by_file(ggufs))}")


def _only_gguf(model: HubModel, ggufs: Sequence[str]) -> list[str]:
    groups = _by_file(ggufs)
    if len(groups) == 1:
        return _all_parts(model, next(iter(groups.values())), ggufs)
    raise CheckpointError(f"{model} has several GGUF files; name one as {model}:NAME, of {_listed(groups)}")


def _by_file(names: Iterable[str]) -> dict[str, list[str]]:
    """The parts of each file, by its name without the number of a part."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(stem(name), []).append(name)
    return groups


def _all_parts(model: HubModel, parts: Sequence[str], ggufs: Sequence[str]) -> list[str]:
    match = _PART.search(parts[0])
    if match is None:
        return list(parts)
    whole = [name for name in ggufs if stem(name) == stem(parts[0])]
    if len(whole) != int(match[2]):
        raise CheckpointError(f"{model.repo} has {len(whole)} of the {int(match[2])} parts of {stem(parts[0])}.gguf")
    return whole


def _listed(groups: Iterable[str]) -> str:
    """The quantizations, or the whole names where those do not tell the files apart."""
    names = list(groups)
    matches = [_QUANTIZATION.search(name) for name in names]
    short = [match[1] if match else name for match, name in zip(matches, names, strict=True)]
    return ", ".join(short if len(set(short)) == len(short) else [f"{name}.gguf" for name in names])
