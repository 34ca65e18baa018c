"""Tensors in memory of large pages, where the system has them: reading weights misses the TLB less often.

It knows the size of tensors, not what they hold.
"""

from __future__ import annotations

import contextlib
import mmap

import torch

# Memory that is not written at once lies in large pages from this many on. A page that is written for the first time
# costs a fault, which virtual machines make dear; large pages round up what is resident, here by less than a sixteenth.
_LEAST_LARGE_PAGES = 16
# A smaller tensor stays where it is: few of its pages are read one after the other.
_LEAST_BYTES = 1 << 17
# Memory is taken from the system in extents, so that tensors share their large pages. What is not written is not used.
LARGE_PAGE, _EXTENT = 2 << 20, 64 << 20
_ALIGNMENT = 4096


class LargePages:
    def __init__(self) -> None:
        # The last extent, and how many of its bytes are taken.
        self._extent, self._taken = torch.empty(0, dtype=torch.uint8), 0

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
        size = _aligned(count)
        if size > len(self._extent) - self._taken:
            self._extent, self._taken = _extent(max(size, _EXTENT)), 0
        place = self._extent[self._taken : self._taken + count]
        self._taken += size
        return place

    def give_back(self, last: torch.Tensor) -> None:
        """Take the bytes back that were taken last; they are zeros again."""
        if len(last) >= _LEAST_BYTES:
            last.zero_()
            self._taken -= _aligned(len(last))


class Scratch:
    """Bytes in large pages for one intermediate result after the other, each valid until the next one.

    A new tensor for each would cost a page fault for every small page.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int) -> torch.Tensor:
        if count > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = own_memory(count)
        return self._memory[:count]


class KeptRows:
    """Rows of float32 in large pages, which the next ones overwrite.

    Logits of a large vocabulary take more memory than the allocator keeps: it would return it after each step.
    """

    def __init__(self, width: int) -> None:
        self._memory = torch.empty(0, width)

    def rows(self, count: int) -> torch.Tensor:
        if count > len(self._memory):
            width = self._memory.shape[1]
            # Twice as many, so that a growing batch seldom takes new memory; what is not written is not used.
            self._memory = torch.empty(0, width)
            self._memory = own_memory(2 * count * width * torch.float32.itemsize).view(torch.float32).view(-1, width)
        return self._memory[:count]


def _aligned(count: int) -> int:
    return count + -count % _ALIGNMENT


def untouched_memory(size: int) -> torch.Tensor:
    """Zero bytes that become resident as they are written, in large pages if they are many."""
    if size >= _LEAST_LARGE_PAGES * LARGE_PAGE:
        return own_memory(size)
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


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
