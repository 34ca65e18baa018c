"""Resolves a model's checkpoint to a folder. A checkpoint on the Hugging Face Hub is downloaded first.

`HF_TOKEN`, `HF_HOME` and `HF_ENDPOINT` have their usual meaning. Only safetensors weights are downloaded. Of Triton,
this module knows only the arguments of a model's `initialize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tritonlm.contract.adapter import checkpoint_reference
from tritonlm.contract.checkpoint import HUB
from tritonlm.contract.errors import CheckpointError

_TEXTS = ("*.json", "*.jinja")
_WEIGHTS = ("*.safetensors",)


def checkpoint_folder(args: Mapping[str, str], weights: bool = False) -> Path:
    """The folder of the checkpoint named in a model's config.pbtxt; a checkpoint on the Hub is downloaded first."""
    reference = checkpoint_reference(args)
    if reference.startswith(HUB):
        return fetch(reference, weights)
    # Relative to the model's own folder.
    return (Path(args["model_repository"]) / reference).resolve()


def fetch(reference: str, weights: bool = True) -> Path:
    """Download hf://org/name@revision and return its local folder."""
    # Slow to import, and most models are local folders.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    repo, _, revision = reference.removeprefix(HUB).partition("@")
    patterns = [*_TEXTS, *(_WEIGHTS if weights else ())]
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repo} is not on this machine and the Hugging Face Hub does not answer; check the network, or download "
            "it elsewhere and give its folder as path"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "?"
        raise CheckpointError(
            f"the Hugging Face Hub refuses {repo} at {revision or 'main'} (HTTP status {status}); check the name "
            "and the revision, and for a private or gated model set HF_TOKEN"
        ) from None
    except (HFValidationError, OSError) as error:
        raise CheckpointError(f"{repo} cannot be fetched: {str(error)[:200]}") from None
