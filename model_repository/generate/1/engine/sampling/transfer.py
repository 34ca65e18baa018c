"""Small inputs and results of sampling on their way to the device of the logits and back, without waiting for it.

It does not know what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch


def to_device(
    values: Sequence[float] | npt.NDArray[np.generic], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """To a GPU through pinned memory: another copy would wait until the device has computed the steps before it."""
    host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def row_index(rows: Sequence[int], device: torch.device) -> torch.Tensor:
    """Rows as an index. A list as an index is copied to a GPU by a copy that waits."""
    return to_device(rows, torch.int64, device)


def to_host(tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """Start to copy tensors of one device to the host. The result waits for the copies and returns them."""
    if tensors[0].device.type != "cuda":
        return lambda: list(tensors)
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(tensors[0].device))

    def wait() -> list[torch.Tensor]:
        copied.synchronize()
        return copies

    return wait
