"""Downloads one file of the Hub into the Hub's own cache, so that an interrupted download continues where it stopped.

The Hub's library keeps no part of a file whose download was interrupted. Here the part stays beside the cache's blobs,
the next attempt asks for the rest, and the whole must have the size and the SHA-256 that the Hub lists. Then it becomes
the blob that the library looks for. Of several processes that need a file, one downloads it. This module knows a file,
not what a checkpoint is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tritonlm.contract.errors import CheckpointError

# Called with the number of bytes that have arrived.
Count = Callable[[int], None]
# Beyond this the Hub serves files only by its chunk protocol, which the Hub's library speaks.
MAX_BYTES = 50 * 10**9
_HASH_BLOCK_BYTES = 1 << 20
# Of another process that downloads the same file. Computing the SHA-256 of a large file takes minutes.
STALLED_SECONDS, _POLL_SECONDS = 600.0, 0.1


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit, and where its blob belongs."""

    repo: str
    commit: str
    name: str
    size: int
    sha256: str
    blobs: Path

    @property
    def blob(self) -> Path:
        return self.blobs / self.sha256

    @property
    def part(self) -> Path:
        return self.blobs / f"{self.sha256}.tritonlm-part"


def download(file: RemoteFile, count: Count) -> None:
    """Make sure that the blob exists. An error or an interruption keeps what has arrived."""
    file.blobs.mkdir(parents=True, exist_ok=True)
    with _locked_part(file) as part:
        if part is None:
            count(file.size)
            return
        for is_last in (False, True):
            _fetch_rest(file, part, count)
            if _sha256(part) == file.sha256:
                break
            part.seek(0)
            part.truncate()
            if is_last:
                raise CheckpointError(
                    f"{file.name} of {file.repo} arrives damaged: it has another SHA-256 than the Hub lists"
                )
            count(-file.size)
        part.flush()
        os.fsync(part.fileno())
        os.replace(file.part, file.blob)


@contextlib.contextmanager
def _locked_part(file: RemoteFile) -> Iterator[IO[bytes] | None]:
    """The part, opened and locked; None if another process has completed the file meanwhile."""
    while not file.blob.exists():
        with file.part.open("ab+") as part:
            _lock(part, file)
            with contextlib.suppress(FileNotFoundError):
                # Another process may have renamed it while this one waited.
                if os.fstat(part.fileno()).st_ino == file.part.stat().st_ino:
                    yield part
                    return
    yield None


def _lock(part: IO[bytes], file: RemoteFile) -> None:
    """Wait for a process that downloads the file, as long as bytes arrive."""
    size, deadline = 0, time.monotonic() + STALLED_SECONDS
    while True:
        try:
            return fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            now, grown = time.monotonic(), os.fstat(part.fileno()).st_size
        if grown != size:
            size, deadline = grown, now + STALLED_SECONDS
        elif now >= deadline:
            raise CheckpointError(
                f"another process is downloading {file.name} of {file.repo}, and nothing has arrived for "
                f"{STALLED_SECONDS:.0f} s; end it and try again"
            )
        time.sleep(_POLL_SECONDS)


def _fetch_rest(file: RemoteFile, part: IO[bytes], count: Count) -> None:
    # Slow to import, and most models are local.
    from huggingface_hub import get_hf_file_metadata, hf_hub_url  # noqa: PLC0415
    from huggingface_hub.file_download import http_get  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415

    done = part.seek(0, os.SEEK_END)
    if done > file.size:
        done = part.seek(0)
        part.truncate()
    count(done)
    if done == file.size:
        return
    _check_space(file, file.size - done)
    url, headers = hf_hub_url(file.repo, file.name, revision=file.commit), build_hf_headers()
    location = get_hf_file_metadata(url, timeout=30, retry_on_errors=True).location
    if location.split("/")[:3] != url.split("/")[:3]:
        # Another host: the address is signed, and the token is not for it.
        headers.pop("authorization", None)
    http_get(
        location,
        part,  # type: ignore[arg-type]
        resume_size=done,
        headers=headers,
        expected_size=file.size,
        displayed_filename=file.name,
        tqdm_class=_progress_class(count),
    )


def _check_space(file: RemoteFile, missing: int) -> None:
    if (free := shutil.disk_usage(file.blobs).free) < missing:
        raise CheckpointError(
            f"{file.name} of {file.repo} needs {missing / 1e6:,.0f} MB more, and {file.blobs} has {free / 1e6:,.0f}; "
            "free some, or set HF_HOME to another disk"
        )


def _sha256(part: IO[bytes]) -> str:
    digest = hashlib.sha256()
    part.flush()
    part.seek(0)
    while block := part.read(_HASH_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _progress_class(count: Count) -> Any:
    """What the Hub's library takes for a progress bar; it prints nothing."""

    class Progress:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __enter__(self) -> Progress:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, size: float | None = 1) -> None:
            count(int(size or 0))

    return Progress
