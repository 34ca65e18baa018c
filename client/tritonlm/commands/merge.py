"""`tritonlm adapters merge`: writes a base with an adapter's products in its weights, as a checkpoint of its own."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from tritonlm.checkpoints.adapter_files import adapter_folder
from tritonlm.checkpoints.reference import parse
from tritonlm.checkpoints.resolve import folder_of
from tritonlm.client.model_names import ModelNames
from tritonlm.contract.adapters_file import NAME
from tritonlm.serving import ServingError, paths, terminal
from tritonlm.serving.downloads import downloaded, shown_progress
from tritonlm.serving.model_selection import BUNDLED
from tritonlm.serving.registry import read_registry
from tritonlm.training.errors import TrainingError

from .checkpoints import errors_printed
from .common import FAILED, AsJson, console, print_json


def merge(
    adapter: Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="an adapter by name, its folder, or ORG/NAME")],
    base: Annotated[str, typer.Option(metavar="MODEL", help="a language model by name, its folder, or ORG/NAME")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="the new checkpoint; it must not exist yet")],
    folder: Annotated[
        Path | None,
        typer.Option(
            "--adapters-folder",
            envvar="TRITONLM_ADAPTERS_FOLDER",
            help="folder of the adapters files, in which NAME is found; default: the one that tritonlm serve reads",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a whole checkpoint, which needs no adapter: merged in float32, stored as the base is."""
    with errors_printed(), _training_errors():
        # Slow to import, and in an optional extra.
        from tritonlm.training.merge import merge as run  # noqa: PLC0415

        adapter_path, base_path = _adapter(adapter, base, folder or paths.adapters()), _base(base)
        with terminal.step(f"merging {adapter} into {base}"):
            merged = run(adapter_path, base_path, out)
    if as_json:
        print_json({"adapter": str(adapter_path), "base": str(base_path), "checkpoint": str(merged)})
        return
    console.print(f"{merged} is ready: tritonlm serve {merged}", highlight=False, markup=False, soft_wrap=True)


def _adapter(text: str, base: str, folder: Path) -> Path:
    """The folder of an adapter's files. A name comes first: that of an adapter of the base, else of any model."""
    names = ModelNames(folder)
    bases = names.bases(text) if re.fullmatch(NAME, text) else []
    if base in bases or len(bases) == 1:
        return Path(names.adapters()[base if base in bases else bases[0]][text].path)
    if len(bases) > 1:
        raise ServingError(f"{' and '.join(bases)} have an adapter {text}; name one of them with --base")
    with shown_progress(text) as progress:
        return adapter_folder(text, progress=progress)[0]


def _base(text: str) -> Path:
    """The folder of a language model of the registry, or of a checkpoint."""
    registry = paths.registry()
    folders: dict[str, Path | None] = {name: paths.model_repository() / name / "1" for name in BUNDLED}
    if registry.is_file():
        folders |= {entry.name: entry.path for entry in read_registry(registry)}
    return folder_of(folders.get(text) or downloaded(parse(text)))


@contextlib.contextmanager
def _training_errors() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as missing:
        raise ServingError(f"{missing.name} is missing; pip install 'tritonlm[train]'") from None
    except TrainingError as error:
        terminal.print_error(error)
        raise typer.Exit(FAILED) from None
