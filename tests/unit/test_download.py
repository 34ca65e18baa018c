"""The lock of a download: another process is waited for as long as bytes arrive."""

from __future__ import annotations

import fcntl
import hashlib
import threading
import time
from pathlib import Path

import pytest
from tritonlm.checkpoints import download as module
from tritonlm.checkpoints.download import RemoteFile, download
from tritonlm.contract.errors import CheckpointError

CONTENT = b"weights"


def test_a_download_that_has_stopped_is_named_and_one_that_goes_on_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALLED_SECONDS", 0.5)
    file = RemoteFile("org/lm", "main", "lm.gguf", 12, hashlib.sha256(CONTENT).hexdigest(), tmp_path)
    with file.part.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=r"is downloading lm\.gguf of org/lm, and nothing has arrived for"):
            download(file, lambda count: None)

        def finish() -> None:
            for _ in range(12):
                held.write(b"x")
                held.flush()
                time.sleep(0.1)
            file.part.rename(file.blob)
            fcntl.flock(held, fcntl.LOCK_UN)

        other = threading.Thread(target=finish)
        other.start()
        counted: list[int] = []
        download(file, counted.append)
        other.join()
    assert counted == [12]
