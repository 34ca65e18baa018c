"""Where a model's checkpoint lies: in a folder, or on the Hugging Face Hub, from where it is fetched first.

`HF_TOKEN`, `HF_HOME` and `HF_ENDPOINT` mean what they always mean to the Hub's library. Only safetensors are fetched.
It knows no Triton beyond the arguments of a model's `initialize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tritonlm.contract.adapter import named_checkpoint
from tritonlm.contract.checkpoint import HUB
from tritonlm.contract.errors import CheckpointError

_TEXTS = ("*.json", "*.jinja")
_WEIGHTS = ("*.safetensors",)


def checkpoint_folder(args: Mapping[str, str], weights: bool = False) -> Path:
    """The folder of the checkpoint that a model's config.pbtxt names; fetched first where it is on the Hub."""
    named = named_checkpoint(args)
    if named.startswith(HUB):
        return fetch(named, weights)
    # Relative to the model's own folder.
    return (Path(args["model_repository"]) / named).resolve()


def fetch(reference: str, weights: bool = True) -> Path:
    """hf://org/name@revision as a folder on this machine."""
    # Slow to import, and most models lie in a folder.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    repo, _, revision = reference.removeprefix(HUB).partition("@")
    patterns = [*_TEXTS, *(_WEIGHTS if weights else ())]
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repo} is not on this machine and the Hugging Face Hub does not answer; check the network, or fetch it "
            "elsewhere and give its folder as path"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "?"
        raise CheckpointError(
            f"the Hugging Face Hub does not give {repo} at {revision or 'main'} (HTTP status {status}); check the name "
            "and the revision, and for a private or gated one set HF_TOKEN"
        ) from None
    except (HFValidationError, OSError) as error:
        raise CheckpointError(f"{repo} cannot be fetched: {str(error)[:200]}") from None
