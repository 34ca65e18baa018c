"""Tensors in memory of large pages, where the system has them: reading weights misses the TLB less often.

It knows the size of tensors, not what they hold.
"""

from __future__ import annotations

import contextlib
import mmap

import torch

# A smaller tensor stays where it is: few of its pages are read one after the other.
_LEAST_BYTES = 1 << 17
# Memory is taken from the system in extents, so that tensors share their large pages. What is not written is not used.
LARGE_PAGE, _EXTENT = 2 << 20, 64 << 20
_ALIGNMENT = 4096


class LargePages:
    def __init__(self) -> None:
        # The free rest of the last extent.
        self._rest = torch.empty(0, dtype=torch.uint8)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, if it is small, or a contiguous copy in large pages."""
        if tensor.nbytes < _LEAST_BYTES:
            return tensor.contiguous()
        copy = self.zeros(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        copy.copy_(tensor)
        return copy

    def zeros(self, count: int) -> torch.Tensor:
        """So many bytes, in large pages unless they are few."""
        if count < _LEAST_BYTES:
            return torch.zeros(count, dtype=torch.uint8)
        size = count + -count % _ALIGNMENT
        if size > len(self._rest):
            self._rest = _extent(max(size, _EXTENT))
        place, self._rest = self._rest[:count], self._rest[size:]
        return place


def own_memory(size: int, head: int = 0) -> torch.Tensor:
    """So many bytes, which go back to the system with the tensor. `head` of them precede the first large page.

    Only whole large pages are such: no more is used.
    """
    memory = mmap.mmap(-1, head + size + 2 * LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages = torch.frombuffer(memory, dtype=torch.uint8)
    large = head + -(pages.data_ptr() + head) % LARGE_PAGE
    if (whole := (size - head) // LARGE_PAGE * LARGE_PAGE) > 0:
        # Other systems than Linux have no such advice.
        with contextlib.suppress(OSError, AttributeError):
            memory.madvise(mmap.MADV_HUGEPAGE, large, whole)
    return pages[large - head : large - head + size]


def _extent(size: int) -> torch.Tensor:
    """At least `size` bytes from the beginning of a large page on."""
    memory = mmap.mmap(-1, size + 2 * LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    pages = torch.frombuffer(memory, dtype=torch.uint8)
    return pages[-pages.data_ptr() % LARGE_PAGE :]
