"""The store of adapters within a memory budget: entered before they are loaded, evicted where it is short."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine.adapters.loaded import LoadedAdapter
from engine.config import EngineConfig
from engine.memory import EngineMemory, MemoryLedger, PoolSize
from fakes.adapter_store import BYTES, SECONDS, Adapters, Make, stores
from tritonlm.contract import NoRoom, file_edits
from tritonlm.contract.adapters_file import remove_adapter


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    with stores(tmp_path) as make:
        yield make


@pytest.fixture
def budget(tmp_path: Path) -> MemoryLedger:
    """Room for two adapters and a half beside an engine."""
    return MemoryLedger(1000 + 5 * BYTES // 2, tmp_path / "ledger")


def within(budget: MemoryLedger, adapters: Adapters) -> EngineMemory:
    """An engine of 1,000 bytes that loads these adapters."""
    memory = adapters.runner.memory = EngineMemory(budget, "cpu", lambda: 1000)
    memory.measure()
    memory.open_pool(PoolSize(2, 2, 0, 16, False), grows=True)
    return memory


def test_adapters_are_entered_in_the_memory_ledger_before_they_are_loaded(make: Make, budget: MemoryLedger) -> None:
    adapters = make()
    memory = within(budget, adapters)
    adapters.write("a", "b")
    adapters.runner.gate.clear()
    adapters.request("a")
    assert adapters.runner.begun.wait(SECONDS)
    assert (memory.claimed, adapters.store.nbytes) == (1000 + BYTES, 0)
    adapters.runner.gate.set()
    adapters.next()
    adapters.use("b")
    assert memory.claimed == 1000 + adapters.store.nbytes == 1000 + 2 * BYTES


def test_unused_adapters_are_evicted_where_the_budget_is_short(make: Make, budget: MemoryLedger) -> None:
    adapters = make()
    memory = within(budget, adapters)
    adapters.write("a", "b", "c")
    adapters.use("a", "b", "c")
    assert (adapters.store.count, memory.claimed) == (2, 1000 + 2 * BYTES)
    # While both are in use, a further one waits for the first that is released.
    used = [adapters.acquire(name) for name in ("b", "c")]
    adapters.request("a")
    assert adapters.idle
    adapters.store.release(used[1])
    assert isinstance(adapters.next(), LoadedAdapter)
    assert adapters.runner.loaded == ["a", "b", "c", "a"]
    assert memory.claimed == 1000 + 2 * BYTES


def test_an_adapter_that_does_not_fit_beside_other_engines_is_refused(
    make: Make, budget: MemoryLedger, tmp_path: Path
) -> None:
    adapters = make()
    memory = within(budget, adapters)
    adapters.write("a")
    other = EngineMemory(MemoryLedger(budget.budget, tmp_path / "ledger"), "cpu", lambda: 2 * BYTES)
    other.measure()
    other.reserve_adapters(0)
    refusal = adapters.refusal("a")
    assert isinstance(refusal, NoRoom)
    assert "adapter 'a' does not fit into the memory budget" in refusal.message
    assert memory.claimed == 1000
    # What fails to load is entered no longer.
    other.reserve_weights(-BYTES)
    adapters.runner.failure = RuntimeError("damaged")
    adapters.refusal("a")
    assert (memory.claimed, adapters.store.nbytes) == (1000, 0)


def test_an_adapter_that_is_removed_leaves_the_ledger(make: Make, budget: MemoryLedger) -> None:
    adapters = make()
    memory = within(budget, adapters)
    adapters.write("a", "b")
    used = adapters.acquire("a")
    adapters.use("b")
    remove_adapter(adapters.file, "a")
    adapters.use("b")
    assert memory.claimed == 1000 + 2 * BYTES, "a request still uses it"
    adapters.store.release(used)
    assert memory.claimed == 1000 + BYTES
    assert adapters.store.limit == EngineConfig().adapter_memory
    remove_adapter(adapters.file, "b")
    assert adapters.store.limit == adapters.store.nbytes == BYTES


def test_an_adapter_is_released_while_another_process_holds_the_lock(
    make: Make, budget: MemoryLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = make()
    memory = within(budget, adapters)
    adapters.write("a", "b")
    used = adapters.acquire("a")
    remove_adapter(adapters.file, "a")
    adapters.use("b")
    monkeypatch.setattr(file_edits, "LOCK_SECONDS", 0.0)
    with (tmp_path / "ledger").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        adapters.store.release(used)
    assert (adapters.store.count, memory.claimed) == (1, 1000 + 2 * BYTES)
    # What is loaded is entered by the next change.
    adapters.write("c")
    adapters.use("c")
    remove_adapter(adapters.file, "c")
    adapters.use("b")
    assert (adapters.store.count, memory.claimed) == (1, 1000 + BYTES)
