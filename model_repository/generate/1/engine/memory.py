"""The memory that all engines of one Triton may take together: each enters what it needs before it takes it.

They are processes of their own, so the book is a file, under a lock, named after the Triton that started them all. Who
dies without leaving is struck off by the next who looks. `EngineMemory` is one engine's part: what it takes now, what
at most, and what of that it has entered. This module knows bytes and devices, and nothing of what lies in them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from tritonlm.contract import CheckpointError, NoRoom

_PAGE = os.sysconf("SC_PAGE_SIZE")
# A KV cache grows by so much at a time: an entry costs a lock on a file and a look at the other processes.
_EXTENT_BYTES = 64 << 20
# After a refusal the budget is not asked again for so long: a step would ask for every request.
_REFUSED_SECONDS = 0.25
# How often an engine at work measures what it takes.
_MEASURED_SECONDS = 1.0
# For each process, what it has entered for each device.
Entries = dict[str, dict[str, int]]


class MemoryBook:
    """This process's part in it. A budget of 0 is none: then there is no book."""

    def __init__(self, budget: int, file: Path | None = None) -> None:
        self.budget = budget
        # What of this process's entry for a device is this object's: several engines may share a process and a device.
        self._entered: dict[str, int] = {}
        self._file = file or Path(tempfile.gettempdir()) / f"tritonlm-memory-{os.getuid()}-{os.getppid()}.json"

    def reserve(self, device: str, needed: int, *, taken_already: bool = False) -> None:
        """Enter this need, in place of what was entered here before; NoRoom tells by how much it is too much."""
        if not self.budget:
            return
        if not taken_already:
            self.check(device, needed)
        with self._open() as entries:
            me = str(os.getpid())
            mine = entries.get(me, {})
            beside = max(0, mine.get(device, 0) - self._entered.get(device, 0))
            taken = beside + sum(entry.get(device, 0) for pid, entry in entries.items() if pid != me)
            if taken + needed > self.budget and not taken_already:
                raise NoRoom.of(needed, taken, self.budget)
            entries[me] = {**mine, device: beside + needed}
            self._entered[device] = needed

    def check(self, device: str, needed: int) -> None:
        """Refuse what does not fit even where nothing else is loaded."""
        if self.budget and needed > self.budget:
            raise CheckpointError(
                f"this model needs {_shown(needed)} on {device}, and the memory budget is {_shown(self.budget)}; "
                "raise the budget, or lower max_context_tokens or kv_cache_tokens"
            )

    def entered(self, device: str) -> int:
        """Bytes that were entered here; 0 without a budget."""
        return self._entered.get(device, 0)

    def leave(self) -> None:
        """The last one takes the book along. Else the entry stays: what it tells of is free when the process ends."""
        if self.budget:
            with self._open() as entries:
                if entries.keys() <= {str(os.getpid())}:
                    entries.clear()

    @contextlib.contextmanager
    def _open(self) -> Iterator[Entries]:
        """The entries of those who live, to be changed; after an error the file stays as it was."""
        with self._locked() as file:
            written: Entries = json.loads(file.read() or "{}")
            entries = {pid: entry for pid, entry in written.items() if _lives(pid)}
            yield entries
            file.seek(0)
            file.truncate()
            json.dump(entries, file)
            if not entries:
                self._file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        while True:
            # Nobody else's business, and no link that somebody laid there is followed.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            with os.fdopen(os.open(self._file, flags, 0o600), "r+", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # The last one to leave removes the file: whoever waited for its lock holds nothing.
                with contextlib.suppress(FileNotFoundError):
                    if os.fstat(file.fileno()).st_ino == self._file.stat().st_ino:
                        yield file
                        return


@dataclass(frozen=True)
class PoolSize:
    """How large a KV cache is; blocks include the padding block."""

    blocks: int
    # What one request of full context needs, or the whole pool where that is less.
    least_blocks: int
    block_bytes: int
    # The longest context that fits.
    context_length: int
    # Whether kv_cache_tokens has set the size.
    is_explicit: bool

    @property
    def bytes(self) -> int:
        return self.blocks * self.block_bytes


class EngineMemory:
    """One engine's memory on its device.

    Weights and process are entered as they are measured, when the checkpoint has been loaded and now and then later,
    and with them as much of the KV cache as one request of full context needs. Where its memory becomes resident only
    as blocks are used (on a CPU) the rest is entered by need, an extent at a time; where it is allocated at once (on a
    GPU), it is entered at once, as far as the budget has room. One thread changes it, others may look.
    """

    def __init__(self, book: MemoryBook, device: str, taken: Callable[[], int]) -> None:
        """`taken` measures the bytes of this process on the device."""
        self._book, self._device, self._taken = book, device, taken
        # Weights and process: all but the KV cache.
        self._base = 0
        self._size, self._grows = PoolSize(2, 2, 0, 0, False), False
        # Blocks beside the padding block that may be used now.
        self.usable = 1
        self._refused_until, self._measured_at = 0.0, float("-inf")

    @property
    def resident(self) -> int:
        """Bytes taken now: measured."""
        return self._taken()

    @property
    def reserved(self) -> int:
        """Bytes taken at most: weights, process and the whole KV cache, as far as a budget allows it to grow."""
        whole = self._base + self._size.bytes
        return min(whole, max(self._book.budget, self.claimed)) if self._book.budget else whole

    @property
    def claimed(self) -> int:
        """Bytes entered into the memory budget; 0 without one."""
        return self._book.entered(self._device)

    def announce(self, weights: int) -> None:
        """Before a checkpoint is loaded: its files tell what there will be at least."""
        self._book.reserve(self._device, self._taken() + weights)

    def measure(self) -> int | None:
        """The checkpoint has been loaded: how many bytes the budget leaves for the KV cache, if there is a budget."""
        self._base = self._taken()
        return max(0, self._book.budget - self._base) if self._book.budget else None

    def open_pool(self, size: PoolSize, *, grows: bool) -> int:
        """Enter the KV cache, before it is allocated; how many blocks to allocate, the padding block included."""
        self._size, self._grows = size, grows
        if size.is_explicit:
            self._book.check(self._device, self._base + size.bytes)
        if not self._book.budget:
            self.usable = size.blocks - 1
        elif grows:
            self._enter(size.least_blocks)
        else:
            self._enter_most(size.blocks if size.is_explicit else size.least_blocks)
        return size.blocks if grows else self.usable + 1

    def _enter_most(self, least_blocks: int) -> None:
        """As many blocks as the others have left, but no fewer than these."""
        try:
            self._enter(self._size.blocks)
        except NoRoom as error:
            left = self._size.blocks - -(-error.missing // max(self._size.block_bytes, 1))
            self._enter(max(left, least_blocks))
            self._size = replace(self._size, blocks=self.usable + 1)

    def _enter(self, blocks: int) -> None:
        self._book.reserve(self._device, self._base + blocks * self._size.block_bytes)
        self.usable = blocks - 1

    def grow(self, usable: int) -> int:
        """Enter so many usable blocks, and the rest of an extent; how many may be used from now on."""
        if time.monotonic() < self._refused_until:
            return self.usable
        extent = max(1, _EXTENT_BYTES // max(self._size.block_bytes, 1))
        more = -(-(usable - self.usable) // extent) * extent
        for blocks in (min(self.usable + more + 1, self._size.blocks), usable + 1):
            with contextlib.suppress(NoRoom, CheckpointError, OSError):
                self._enter(blocks)
                return self.usable
        self._refused_until = time.monotonic() + _REFUSED_SECONDS
        return self.usable

    def update(self, touched: int) -> None:
        """Measure again now and then, beside the first `touched` blocks: steps take buffers that they keep.

        What is taken already is entered even where it exceeds the budget: then nothing else is let in.
        """
        now = time.monotonic()
        if now - self._measured_at < _MEASURED_SECONDS:
            return
        self._measured_at = now
        pool_blocks = touched if self._grows else self._size.blocks
        base = self._taken() - pool_blocks * self._size.block_bytes
        if base > self._base:
            self._base = base
            with contextlib.suppress(OSError):
                self._book.reserve(self._device, base + (self.usable + 1) * self._size.block_bytes, taken_already=True)

    def close(self) -> None:
        self._book.leave()


def full_context_slots(blocks: int, context_blocks: int, slots: int) -> int:
    """How many requests of full context fit into a pool of so many blocks at once, of those that run together."""
    return min(slots, blocks // context_blocks)


def _lives(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return False
    # What has ended and waits for its parent to notice holds no memory any more.
    return state not in "ZX"


def resident_memory() -> int:
    """Bytes of this process that lie in memory."""
    with open("/proc/self/statm", encoding="ascii") as numbers:
        return int(numbers.read().split()[1]) * _PAGE


def return_freed() -> None:
    """Give back what loading has used and freed: the C library would keep some of it, once more and once less."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _shown(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
