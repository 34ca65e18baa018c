"""Fetches a model of the Hugging Face Hub into the Hub's own cache and returns its folder, or its GGUF file.

`HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` have their usual meaning. Only safetensors and GGUF weights
are downloaded. Without a network, what the cache holds completely is used. Each refusal is one sentence.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from http.client import TOO_MANY_REQUESTS
from pathlib import Path

from tritonlm.contract.errors import CheckpointError

from .download import MAX_BYTES, RemoteFile, download
from .hub_files import choose_files, is_gguf
from .reference import HubModel
from .tensors import Tensor

# Called with the bytes that have arrived, and those that the download takes.
Progress = Callable[[int, int], None]
# The names that are downloaded, of all in a repository; without weights only the texts.
Choose = Callable[[HubModel, Iterable[str], bool], list[str]]
_MAIN = "main"


@dataclass(frozen=True)
class RepositoryFile:
    name: str
    size: int
    # Of a large file; the Hub lists none for a small one.
    sha256: str | None = None


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    commit: str
    files: tuple[RepositoryFile, ...]

    def chosen(self, model: HubModel, weights: bool = True, choose: Choose = choose_files) -> list[RepositoryFile]:
        by_name = {file.name: file for file in self.files}
        return [by_name[name] for name in choose(model, by_name, weights)]


def fetch(
    model: HubModel,
    weights: bool = True,
    progress: Progress = lambda _done, _total: None,
    choose: Choose = choose_files,
) -> Path:
    """The folder of a checkpoint in safetensors, or a GGUF file; what is missing in the Hub's cache is downloaded."""
    _require_library()
    with _errors_explained(model):
        listing = list_files(model)
        if listing is None:
            return _cached(model, weights, choose)
        files = listing.chosen(model, weights, choose)
        folder = _snapshots(model) / listing.commit
        if missing := [file for file in files if not (folder / file.name).exists()]:
            _download(model, listing.commit, missing, progress)
        # Even if nothing is missing: it records the commit that the revision stands for, for times without a network.
        return _path_of(_complete_snapshot(model, [file.name for file in files]), [file.name for file in files])


def fetch_texts(model: HubModel) -> tuple[Path, list[Tensor]]:
    """The folder with the checkpoint's texts, and its tensors as the headers of the remote files list them.

    A GGUF file is read where it is: it must have been downloaded.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415

    _require_library()
    with _errors_explained(model):
        listing = list_files(model)
        if listing is None:
            return fetch(model), []
        names = [file.name for file in listing.chosen(model)]
        folder = _snapshots(model) / listing.commit
        if all((folder / name).exists() for name in names):
            return fetch(model), []
        if is_gguf(names):
            raise CheckpointError(
                f"{model} is not on this machine, and a GGUF file is read whole; run tritonlm pull first"
            )
        path, api = fetch(model, weights=False), HfApi()
        headers = [
            api.parse_safetensors_file_metadata(model.repo, name, revision=listing.commit)
            for name in names
            if name.endswith(".safetensors")
        ]
        return path, [
            Tensor(name, info.dtype, tuple(info.shape)) for header in headers for name, info in header.tensors.items()
        ]


def list_files(model: HubModel) -> Listing | None:
    """The repository's files, from the Hub; None if it does not answer or must not be asked."""
    import httpx2  # noqa: PLC0415 (the Hub's library, too, is slow to import)
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled  # noqa: PLC0415
    from huggingface_hub.hf_api import RepoFile  # noqa: PLC0415

    api = HfApi()
    try:
        commit = api.model_info(model.repo, revision=model.revision or None).sha
        assert commit is not None, "the Hub names the commit of each revision"
        entries = list(api.list_repo_tree(model.repo, recursive=True, revision=commit))
    except (OfflineModeIsEnabled, httpx2.TransportError):
        return None
    except HfHubHTTPError as error:
        # A Hub that fails or asks to slow down must not keep a model from being served that is on this machine.
        if error.response.status_code < 500 and error.response.status_code != TOO_MANY_REQUESTS:
            raise
        return None
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return Listing(commit, tuple(RepositoryFile(f.path, f.size, f.lfs.sha256 if f.lfs else None) for f in files))


def _download(model: HubModel, commit: str, files: Sequence[RepositoryFile], progress: Progress) -> None:
    """Download the large files. The Hub's library downloads the small ones when it completes the snapshot."""
    large = [file for file in files if file.sha256 is not None and file.size <= MAX_BYTES]
    done, total = 0, sum(file.size for file in large)

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    # A small file first: it tells whether the model is gated before much is downloaded.
    for file in sorted(large, key=lambda file: file.size):
        assert file.sha256 is not None
        blobs = _snapshots(model).parent / "blobs"
        download(RemoteFile(model.repo, commit, file.name, file.size, file.sha256, blobs), count)


def _complete_snapshot(model: HubModel, names: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415

    disable_progress_bars()
    patterns = [glob.escape(name) for name in names]
    return Path(snapshot_download(model.repo, revision=model.revision or None, allow_patterns=patterns))


def _cached(model: HubModel, weights: bool, choose: Choose) -> Path:
    """What the cache holds, if it is complete."""
    from huggingface_hub import constants, get_cached_repo_tree  # noqa: PLC0415
    from huggingface_hub.errors import CachedRepoTreeNotFoundError  # noqa: PLC0415

    folder = _cached_snapshot(model)
    if folder is None:
        offline, silent = "HF_HUB_OFFLINE is set; unset it", f"{constants.ENDPOINT} does not answer; check the network"
        raise CheckpointError(
            f"{model} is not on this machine{_missing_path(model, ',')}, and "
            f"{offline if constants.is_offline_mode() else silent}, or download it elsewhere and give its folder"
        )
    present = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    try:
        names = [file.path for file in get_cached_repo_tree(model.repo, revision=folder.name)]
    except CachedRepoTreeNotFoundError:
        names = present
    chosen = choose(model, names, weights)
    if missing := [name for name in chosen if name not in present]:
        raise CheckpointError(
            f"{model} is not complete on this machine ({missing[0]} is missing), and the Hub cannot be reached; "
            "download it with tritonlm pull when there is a network"
        )
    return _path_of(folder, chosen)


def _missing_path(model: HubModel, joined: str) -> str:
    """ORG/NAME may also be a path that is mistyped, or meant in another working folder."""
    return f"{joined} there is no folder {model.missing_path}" if model.missing_path else ""


def _path_of(folder: Path, names: Sequence[str]) -> Path:
    return folder / names[0] if is_gguf(names) else folder


def _snapshots(model: HubModel) -> Path:
    from huggingface_hub import constants  # noqa: PLC0415
    from huggingface_hub.file_download import repo_folder_name  # noqa: PLC0415

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model.repo, repo_type="model") / "snapshots"


def _cached_snapshot(model: HubModel) -> Path | None:
    """The cached folder of this revision, which a commit names directly and a branch through a file."""
    snapshots, revision = _snapshots(model), model.revision or _MAIN
    with contextlib.suppress(OSError):
        revision = (snapshots.parent / "refs" / revision).read_text(encoding="utf-8").strip()
    folder = snapshots / revision
    return folder if folder.is_dir() else None


def _require_library() -> None:
    try:
        import huggingface_hub  # noqa: F401, PLC0415
    except ModuleNotFoundError:
        raise CheckpointError(
            "models of the Hub need the library huggingface_hub; pip install 'tritonlm[server]'"
        ) from None


@contextlib.contextmanager
def _errors_explained(model: HubModel) -> Iterator[None]:
    """Errors of the Hub's library become one sentence."""
    import httpx2  # noqa: PLC0415
    from huggingface_hub import constants, errors, get_token  # noqa: PLC0415

    token = "the token that is set has no access" if get_token() else "for a private one set HF_TOKEN"
    page = f"{constants.ENDPOINT}/{model.repo}"
    try:
        yield
    except errors.GatedRepoError:
        remedy = "the token that is set has no access yet" if get_token() else "set HF_TOKEN to a token of yours"
        raise CheckpointError(f"{model.repo} is gated: accept its terms at {page}, and {remedy}") from None
    except errors.RepositoryNotFoundError:
        nowhere = f"the Hugging Face Hub has no model {model.repo}{_missing_path(model, ' and')}"
        raise CheckpointError(f"{nowhere}; check the name, and {token}") from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{model.repo} has no revision {model.revision or _MAIN}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise CheckpointError(f"the Hugging Face Hub refuses {model} (HTTP status {status}); see {page}") from None
    except errors.HFValidationError:
        raise CheckpointError(f"{model.repo} is not a name of the Hugging Face Hub (ORG/NAME)") from None
    except (httpx2.HTTPError, errors.LocalEntryNotFoundError):
        raise CheckpointError(
            f"the download of {model} was interrupted; the same command continues it where it stopped"
        ) from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise CheckpointError(f"{model} cannot be downloaded: {' '.join(reason.split())[:200]}") from None
