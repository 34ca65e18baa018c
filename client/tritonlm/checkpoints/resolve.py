"""MODEL → the folder of its checkpoint: the one place where a folder, a GGUF file or a model of the Hub becomes one.

Used by `tritonlm serve` before it starts a process, and by the processes of a model, from the parameter `checkpoint` of
their config.pbtxt. Of Triton, this module knows only the arguments of a model's `initialize`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tritonlm.contract.errors import CheckpointError
from tritonlm.contract.load_progress import LoadProgress, load_file
from tritonlm.contract.triton_requests import checkpoint_reference

from .hub import Progress, fetch
from .reference import HubModel, Source, source_of, stem

_GGUF, _GGUF_MAGIC = ".gguf", b"GGUF"


def checkpoint_folder(args: Mapping[str, str], weights: bool = False) -> Path:
    """The folder of the checkpoint that a model's config.pbtxt names; a path is relative to the model's folder."""
    source = source_of(checkpoint_reference(args), Path(args["model_repository"]))
    if isinstance(source, Path) or not weights:
        return folder_of(source, weights)
    # `tritonlm serve` shows the bytes, and takes them for progress. The file belongs to a download, if there is one.
    counted: LoadProgress | None = None

    def progress(done: int, total: int) -> None:
        nonlocal counted
        counted = counted or LoadProgress(total, load_file(os.getppid(), args["model_name"]))
        counted.add(done - counted.done)

    try:
        return folder_of(source, weights, progress)
    finally:
        if counted is not None:
            counted.close()


def folder_of(source: Source, weights: bool = True, progress: Progress = lambda _done, _total: None) -> Path:
    """The source's checkpoint folder. A model of the Hub is downloaded, a GGUF file prepared."""
    path = fetch(source, weights, progress) if isinstance(source, HubModel) else source
    if path.is_dir():
        return _prepared(file) if (file := _single_gguf(path)) else path
    if not path.exists():
        raise CheckpointError(f"checkpoint folder {path} does not exist")
    if not is_gguf_file(path):
        raise CheckpointError(
            f"{path} is neither a folder in Hugging Face format nor a GGUF file; give the folder that holds config.json"
        )
    return _prepared(path)


def is_gguf_file(path: Path) -> bool:
    """By its ending or, since a blob has none, by its first bytes."""
    if path.suffix.lower() == _GGUF:
        return path.is_file()
    try:
        with path.open("rb") as file:
            return file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
    except OSError:
        return False


def _single_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds nothing else to serve; CheckpointError if it holds several."""
    if (folder / "config.json").exists():
        return None
    files = sorted(folder.glob(f"*{_GGUF}"))
    if len({stem(file.name) for file in files}) > 1:
        raise CheckpointError(f"{folder} holds several GGUF files ({', '.join(file.name for file in files)}); name one")
    return files[0] if files else None


def _prepared(file: Path) -> Path:
    # It reads the whole header, and needs a library of its own.
    from .gguf import prepare  # noqa: PLC0415

    folder: Path = prepare(file)
    return folder
