"""The shared memory budget of all engines of one Triton: each engine reserves memory before it allocates it.

The engines are separate processes, so the ledger is a locked file, named after the Triton process that started them.
The entry of a process that has died is removed by the next access. A process id counts with its start: a container that
is started again gives its processes the ids of the last time. `EngineMemory` is the part of one engine: its
current memory, its maximum, and what it has reserved. This module knows bytes and devices, and not what they hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from tritonlm.contract import CheckpointError, NoRoom
from tritonlm.contract.file_edits import take_lock
from tritonlm.contract.process_files import process_file

_PAGE = os.sysconf("SC_PAGE_SIZE")
# A KV cache grows by this much at a time, because a reservation locks a file and checks the other processes.
_EXTENT_BYTES = 64 << 20
# The pause after a refusal. Without it a step would ask again for every request.
_REFUSED_SECONDS = 0.25
# The time between two measurements of the memory in use.
_MEASURED_SECONDS = 1.0
# The reserved bytes by process and device.
Entries = dict[str, dict[str, int]]


class MemoryLedger:
    """The reservations of this process. With a budget of 0 there is no ledger and no limit."""

    def __init__(self, budget: int, file: Path | None = None) -> None:
        self.budget = budget
        # The part of the process's entries that belongs to this object. Several engines may share process and device.
        self._reserved: dict[str, int] = {}
        self._process = _process_key(os.getpid())
        self._file = file or process_file("memory", _process_key(os.getppid()), "ledger.json")

    def reserve(self, device: str, needed: int, *, in_use: bool = False) -> None:
        """Reserve this many bytes in place of the previous reservation; NoRoom holds how many bytes are missing.

        `in_use`: the memory is in use already, so it is reserved even beyond the budget.
        """
        if not self.budget:
            return
        if not in_use:
            self.check(device, needed)
        with self._open() as entries:
            own = entries.get(self._process, {})
            other_engines = max(0, own.get(device, 0) - self._reserved.get(device, 0))
            taken = other_engines + sum(entry.get(device, 0) for key, entry in entries.items() if key != self._process)
            if taken + needed > self.budget and not in_use:
                raise NoRoom.for_sizes(needed, taken, self.budget)
            entries[self._process] = {**own, device: other_engines + needed}
            self._reserved[device] = needed

    def check(self, device: str, needed: int) -> None:
        """Refuse a need that exceeds the whole budget."""
        if self.budget and needed > self.budget:
            raise CheckpointError(
                f"this model needs {_format_size(needed)} on {device}, and the memory budget is "
                f"{_format_size(self.budget)}; raise the budget, or lower max_context_tokens or kv_cache_tokens"
            )

    def reserved(self, device: str) -> int:
        """The bytes that this object has reserved; 0 without a budget."""
        return self._reserved.get(device, 0)

    def close(self) -> None:
        """Remove the ledger if this is its only process. Otherwise the entry stays until the process ends."""
        if self.budget:
            with self._open() as entries:
                if entries.keys() <= {self._process}:
                    entries.clear()

    @contextlib.contextmanager
    def _open(self) -> Iterator[Entries]:
        """The entries of living processes, to be changed. After an error the file stays as it was."""
        with self._locked() as file:
            written: Entries = json.loads(file.read() or "{}")
            entries = {process: entry for process, entry in written.items() if _is_alive(process)}
            yield entries
            file.seek(0)
            file.truncate()
            json.dump(entries, file)
            if not entries:
                self._file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        while True:
            # Readable by this user only, and never through a symbolic link.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            with os.fdopen(os.open(self._file, flags, 0o600), "r+", encoding="utf-8") as file:
                take_lock(file, self._file)
                # The last process removes the file. A process that waited for its lock meanwhile tries again.
                with contextlib.suppress(FileNotFoundError):
                    if os.fstat(file.fileno()).st_ino == self._file.stat().st_ino:
                        yield file
                        return


@dataclass(frozen=True)
class PoolSize:
    """The size of a KV cache. Blocks include the padding block."""

    blocks: int
    # The need of one request of full context, or the whole pool if that is smaller.
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
    """The memory of one engine on its device.

    Weights and process are reserved as measured: when the checkpoint is loaded, and repeatedly later. The KV cache of
    one request of full context is reserved with them. On a CPU, memory becomes resident only as blocks are used, so the
    rest is reserved by need, one extent at a time. On a GPU the KV cache is allocated and reserved at once, as far as
    the budget allows. Adapters are reserved before each is loaded. The engine's thread and the one that loads adapters
    change this object, others may read it.
    """

    def __init__(self, ledger: MemoryLedger, device: str, measure_usage: Callable[[], int]) -> None:
        """`measure_usage` returns the bytes of this process on the device."""
        self._ledger, self._device, self._measure_usage = ledger, device, measure_usage
        # Guards what two threads change.
        self._lock = threading.Lock()
        # Weights and process: everything but the KV cache and the adapters.
        self._base = self._adapters = 0
        self._size, self._grows = PoolSize(2, 2, 0, 0, False), False
        # Blocks that may be used now, without the padding block.
        self.usable = 1
        self._refused_until, self._measured_at = 0.0, float("-inf")

    @property
    def resident(self) -> int:
        """The measured bytes in use now."""
        return self._measure_usage()

    @property
    def pool_bytes(self) -> int:
        """The bytes of the whole KV cache."""
        return self._size.bytes

    @property
    def reserved(self) -> int:
        """The most bytes in use with the adapters that are loaded."""
        return self.most(self._adapters)

    def most(self, adapters: int) -> int:
        """The most bytes in use: weights, process, the whole KV cache and so many of adapters, within the budget."""
        whole = self._base + self._size.bytes + adapters
        return min(whole, max(self._ledger.budget, self.claimed)) if self._ledger.budget else whole

    @property
    def claimed(self) -> int:
        """The bytes reserved in the memory budget; 0 without one."""
        return self._ledger.reserved(self._device)

    def reserve_weights(self, size: int) -> None:
        """Reserve the size of the checkpoint's files before they are loaded."""
        self._ledger.reserve(self._device, self._measure_usage() + size)

    def measure(self) -> int | None:
        """Measure weights and process after the load. Return the bytes of the budget that remain for the KV cache."""
        self._base = self._measure_usage()
        return max(0, self._ledger.budget - self._base) if self._ledger.budget else None

    def open_pool(self, size: PoolSize, *, grows: bool) -> int:
        """Reserve the KV cache before it is allocated. Return how many blocks to allocate, with the padding block."""
        self._size, self._grows = size, grows
        if size.is_explicit:
            self._ledger.check(self._device, self._base + size.bytes)
        if not self._ledger.budget:
            self.usable = size.blocks - 1
        elif grows:
            self._reserve_blocks(size.least_blocks)
        else:
            self._reserve_most(size.blocks if size.is_explicit else size.least_blocks)
        return size.blocks if grows else self.usable + 1

    def _reserve_most(self, least_blocks: int) -> None:
        """Reserve as many blocks as the budget has left, but at least `least_blocks`."""
        try:
            self._reserve_blocks(self._size.blocks)
        except NoRoom as error:
            left = self._size.blocks - -(-error.missing // max(self._size.block_bytes, 1))
            self._reserve_blocks(max(left, least_blocks))
            self._size = replace(self._size, blocks=self.usable + 1)

    def _reserve_blocks(self, blocks: int) -> None:
        with self._lock:
            self._ledger.reserve(self._device, self._needed(blocks))
            self.usable = blocks - 1

    def _needed(self, blocks: int) -> int:
        return self._base + blocks * self._size.block_bytes + self._adapters

    def reserve_adapters(self, size: int) -> None:
        """Reserve the bytes of all adapters, in place of the last number. If that is refused, nothing changes."""
        with self._lock:
            before, self._adapters = self._adapters, size
            try:
                self._ledger.reserve(self._device, self._needed(self.usable + 1), in_use=size <= before)
            except BaseException:
                self._adapters = before
                raise

    def grow(self, usable: int) -> int:
        """Reserve `usable` blocks and the rest of an extent. Return how many may be used from now on."""
        if time.monotonic() < self._refused_until:
            return self.usable
        extent = max(1, _EXTENT_BYTES // max(self._size.block_bytes, 1))
        more = -(-(usable - self.usable) // extent) * extent
        for blocks in (min(self.usable + more + 1, self._size.blocks), usable + 1):
            with contextlib.suppress(NoRoom, CheckpointError, OSError):
                self._reserve_blocks(blocks)
                return self.usable
        self._refused_until = time.monotonic() + _REFUSED_SECONDS
        return self.usable

    def update(self, touched: int) -> None:
        """Measure again, at most once per second: steps allocate buffers that they keep. `touched` blocks are resident.

        Memory in use is reserved even if it exceeds the budget. Then no other engine can reserve anything.
        """
        now = time.monotonic()
        if now - self._measured_at < _MEASURED_SECONDS:
            return
        self._measured_at = now
        pool_blocks = touched if self._grows else self._size.blocks
        with self._lock:
            base = self._measure_usage() - pool_blocks * self._size.block_bytes - self._adapters
            if base > self._base:
                self._base = base
                # Memory in use is refused only while another process holds the ledger's lock: CheckpointError.
                with contextlib.suppress(CheckpointError, OSError):
                    self._ledger.reserve(self._device, self._needed(self.usable + 1), in_use=True)

    def close(self) -> None:
        self._ledger.close()


def full_context_slots(blocks: int, context_blocks: int, slots: int) -> int:
    """How many of the slots can hold a request of full context at once, in a pool of this many blocks."""
    return min(slots, blocks // context_blocks)


def _process_key(pid: int | str) -> str:
    """The process's id and start; empty if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    # Fields 3 and 22 of proc_pid_stat(5). A zombie process holds no memory any more.
    state, *_, start = text.rpartition(")")[2].split()[:20]
    return "" if state in "ZX" else f"{pid}-{start}"


def _is_alive(process: str) -> bool:
    return _process_key(process.partition("-")[0]) == process


def resident_memory() -> int:
    """The resident bytes of this process."""
    with open("/proc/self/statm", encoding="ascii") as numbers:
        return int(numbers.read().split()[1]) * _PAGE


def trim_heap() -> None:
    """Return freed memory to the system after a load. Otherwise the C library keeps a varying part of it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _format_size(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
