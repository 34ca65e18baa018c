"""Small inputs of sampling on their way to the device of the logits. It does not know what they mean."""

from __future__ import annotations

from collections.abc import Sequence

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
