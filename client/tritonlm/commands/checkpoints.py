"""`tritonlm pull`: downloads a model of the Hub and prepares it, so that serving needs no network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from tritonlm.checkpoints.reference import parse
from tritonlm.checkpoints.resolve import folder_of
from tritonlm.contract import Checkpoint
from tritonlm.serving import terminal
from tritonlm.serving.downloads import downloaded

from . import common
from .common import AsJson, console, print_json

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="a folder, a GGUF file, or a model of the Hub: ORG/NAME, ORG/NAME:Q4_K_M")
]


def pull(model: Model, as_json: AsJson = False) -> None:
    """Download a model of the Hugging Face Hub, check it, and print where it is and its size."""
    with errors_printed():
        path = downloaded(parse(model))
        checkpoint = Checkpoint(folder_of(path))
        checkpoint.check()
    size = checkpoint.file_bytes()
    if as_json:
        print_json({"model": model, "path": str(path), "folder": str(checkpoint.folder), "weight_bytes": size})
    else:
        console.print(f"{path}  {size / 1e6:,.0f} MB", highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def errors_printed() -> Iterator[None]:
    """As in `common`, for commands that download: an unusable model is no misuse, and an interrupt loses nothing."""
    try:
        with common.errors_printed(misused=()):
            yield
    except KeyboardInterrupt:
        terminal.say("interrupted; the same command continues a download where it stopped")
        raise typer.Exit(130) from None
