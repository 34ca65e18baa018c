"""The memory ledger: the reserved memory never exceeds the budget, whichever processes start, end or die."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest
from engine import memory
from engine.memory import EngineMemory, MemoryLedger, PoolSize, full_context_slots
from tritonlm.contract import CheckpointError, NoRoom, file_edits
from tritonlm.contract.errors import from_wire

# Another process: it reserves memory, prints the result, and runs until its input ends.
OTHER = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from engine.memory import MemoryLedger
from tritonlm.contract import NoRoom
ledger = MemoryLedger(100, Path(sys.argv[1]))
try:
    ledger.reserve("cpu", int(sys.argv[2]))
    print("reserved", flush=True)
except NoRoom as error:
    print(error.missing, flush=True)
sys.stdin.read()
"""


def other(file: Path, needed: int) -> tuple[subprocess.Popen[str], str]:
    program = OTHER.format(paths=[path for path in sys.path if path])
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(file), str(needed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_the_lock_of_a_stopped_process_is_not_waited_for_without_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_edits, "LOCK_SECONDS", 0.0)
    with (tmp_path / "ledger").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=r"another process has been editing .*ledger for 0 s; end it"):
            MemoryLedger(100, tmp_path / "ledger").reserve("cpu", 1)


def test_a_refusal_holds_the_missing_bytes_and_dead_processes_are_removed(tmp_path: Path) -> None:
    file, ledger = tmp_path / "ledger", MemoryLedger(100, tmp_path / "ledger")
    beside, message = other(file, 70)
    assert message == "reserved"
    ledger.reserve("cpu", 30)
    ledger.reserve("gpu", 100)
    with pytest.raises(NoRoom) as refused:
        ledger.reserve("cpu", 45)
    assert refused.value.missing == 15
    # The refusal changes nothing.
    entries = {key.partition("-")[0]: entry for key, entry in json.loads(file.read_text()).items()}
    assert entries[str(beside.pid)] == {"cpu": 70}
    third, message = other(file, 1)
    assert message == "1"
    for process in (beside, third):
        process.kill()
        process.communicate(timeout=20)
    ledger.reserve("cpu", 100)
    fourth, message = other(file, 1)
    assert message == "1"
    # Closing removes the ledger only in the last process.
    ledger.close()
    assert not file.exists()
    fourth.communicate(timeout=20)


def test_a_process_that_got_the_id_of_a_dead_one_does_not_hold_its_memory(tmp_path: Path) -> None:
    file = tmp_path / "ledger"
    beside, message = other(file, 70)
    assert message == "reserved"
    ((key, entry),) = json.loads(file.read_text()).items()
    pid, _, start = key.partition("-")
    # As in a container that was killed and started again: its processes have the ids of the last time.
    file.write_text(json.dumps({f"{pid}-{int(start) - 1}": entry}))
    MemoryLedger(100, file).reserve("cpu", 100)
    beside.communicate(timeout=20)


def test_concurrent_processes_never_reserve_more_than_the_budget(tmp_path: Path) -> None:
    processes = [other(tmp_path / "ledger", 30) for _ in range(6)]
    assert [message for _, message in processes].count("reserved") == 3
    for process, _ in processes:
        process.communicate(timeout=20)


def test_a_need_beyond_the_whole_budget_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="needs 3 MiB on cpu, and the memory budget is 2 MiB; raise the budget"):
        MemoryLedger(2 << 20, tmp_path / "ledger").reserve("cpu", 3 << 20)
    # Without a budget there is no file.
    MemoryLedger(0, tmp_path / "ledger").reserve("cpu", 1 << 60)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extents of ten blocks, and no pause after a refusal or a measurement."""
    for name, value in {"_EXTENT_BYTES": 100, "_REFUSED_SECONDS": 0.0, "_MEASURED_SECONDS": 0.0}.items():
        monkeypatch.setattr(memory, name, value)


class FakeEngine:
    """An engine with the memory use that the test sets."""

    def __init__(self, file: Path, budget: int, taken: int, device: str = "cpu") -> None:
        self.bytes, self.ledger = taken, MemoryLedger(budget, file)
        self.memory = EngineMemory(self.ledger, device, lambda: self.bytes)

    def load(
        self, blocks: int = 50, least: int = 10, *, grows: bool = True, explicit: bool = False
    ) -> tuple[int, int, int]:
        self.memory.measure()
        size = PoolSize(blocks + 1, least + 1, 10, 100, explicit)
        return self.memory.open_pool(size, grows=grows), self.memory.usable, self.memory.claimed


@pytest.mark.usefixtures("small_extents")
def test_a_pool_is_reserved_by_need_and_grows_up_to_the_budget(tmp_path: Path) -> None:
    first, second = (FakeEngine(tmp_path / "ledger", 1000, 200) for _ in range(2))
    # Both whole pools would need 1,420. Each reserves 200, ten blocks and the padding block.
    assert first.load() == (51, 10, 310)
    assert second.load() == (51, 10, 310)
    assert (first.memory.resident, first.memory.reserved) == (200, 710)
    assert (first.memory.grow(11), first.memory.claimed) == (20, 410), "an extent at a time"
    assert (first.memory.grow(31), first.memory.claimed) == (40, 610)
    # 80 bytes are left: less than an extent.
    assert (second.memory.grow(18), second.memory.claimed) == (18, 390)
    assert second.memory.grow(19) == 18
    assert first.memory.grow(41) == 40
    first.ledger.close()
    assert not (tmp_path / "ledger").exists()


@pytest.mark.usefixtures("small_extents")
def test_without_a_budget_the_whole_pool_is_usable(tmp_path: Path) -> None:
    alone = FakeEngine(tmp_path / "ledger", 0, 200)
    assert alone.load() == (51, 50, 0)
    assert (alone.memory.measure(), alone.memory.reserved) == (None, 710)


@pytest.mark.usefixtures("small_extents")
def test_a_pool_allocated_at_once_takes_the_rest_but_at_least_one_context(tmp_path: Path) -> None:
    first, second, third = (FakeEngine(tmp_path / "ledger", 1000, 200, "cuda:0") for _ in range(3))
    assert first.load(30, grows=False) == (31, 30, 510)
    assert second.load(grows=False) == (29, 28, 490)
    assert second.memory.reserved == 490
    with pytest.raises(NoRoom) as refused:
        third.load(grows=False)
    assert refused.value.missing == 310, "what one context needs, not the whole pool"
    with pytest.raises(NoRoom) as refused:
        third.load(20, grows=False, explicit=True)
    assert refused.value.missing == 410, "the configured size"


@pytest.mark.usefixtures("small_extents")
def test_a_need_beyond_the_budget_is_refused_at_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lower max_context_tokens or kv_cache_tokens"):
        FakeEngine(tmp_path / "ledger", 300, 200).load()
    with pytest.raises(CheckpointError, match="the memory budget is"):
        FakeEngine(tmp_path / "ledger", 700, 200).load(explicit=True)
    assert FakeEngine(tmp_path / "ledger", 700, 200).load() == (51, 10, 310)


@pytest.mark.usefixtures("small_extents")
def test_memory_in_use_is_reserved_even_beyond_the_budget(tmp_path: Path) -> None:
    first, second = (FakeEngine(tmp_path / "ledger", 1000, 200) for _ in range(2))
    first.load()
    first.bytes = 300
    first.memory.update(touched=10)
    assert (first.memory.claimed, first.memory.reserved) == (310, 710), "ten blocks are in use, no more"
    first.bytes = 350
    first.memory.update(touched=10)
    assert (first.memory.claimed, first.memory.reserved) == (360, 760)
    first.bytes = 1200
    first.memory.update(touched=10)
    assert first.memory.claimed == first.memory.reserved == 1210
    with pytest.raises(NoRoom):
        second.load()
    assert first.memory.grow(11) == 10


@pytest.mark.usefixtures("small_extents")
def test_a_step_goes_on_while_another_process_holds_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(tmp_path / "ledger", 1000, 200)
    engine.load()
    monkeypatch.setattr(file_edits, "LOCK_SECONDS", 0.0)
    with (tmp_path / "ledger").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        engine.bytes = 350
        engine.memory.update(touched=10)
        assert engine.memory.claimed == 310
    engine.bytes = 360
    engine.memory.update(touched=10)
    assert engine.memory.claimed == 370


@pytest.mark.usefixtures("small_extents")
def test_adapters_are_reserved_beside_weights_and_cache(tmp_path: Path) -> None:
    first, second = (FakeEngine(tmp_path / "ledger", 1000, 200) for _ in range(2))
    first.load()
    second.load()
    first.memory.reserve_adapters(150)
    assert (first.memory.claimed, first.memory.grow(11)) == (460, 20)
    assert (first.memory.claimed, first.memory.reserved, first.memory.most(400)) == (560, 860, 1000)
    with pytest.raises(NoRoom) as refused:
        first.memory.reserve_adapters(300)
    assert (refused.value.missing, first.memory.claimed) == (20, 560), "a refusal changes nothing"
    # What is measured holds the adapters, which are not counted twice.
    first.bytes = 350 + 200
    first.memory.update(touched=20)
    assert first.memory.claimed == 560
    second.memory.reserve_adapters(100)
    first.memory.reserve_adapters(0)
    assert (first.memory.claimed, second.memory.claimed) == (410, 410)
    # One adapter more than the whole budget, and fewer ones beyond it.
    with pytest.raises(CheckpointError, match="the memory budget is"):
        first.memory.reserve_adapters(1000)
    first.bytes = 1200
    first.memory.update(touched=20)
    second.memory.reserve_adapters(50)
    assert second.memory.claimed == 360


@pytest.mark.usefixtures("small_extents")
def test_without_a_budget_adapters_are_counted_and_never_refused(tmp_path: Path) -> None:
    alone = FakeEngine(tmp_path / "ledger", 0, 200)
    alone.load()
    alone.memory.reserve_adapters(1 << 60)
    alone.memory.reserve_adapters(90)
    assert (alone.memory.claimed, alone.memory.reserved, alone.memory.most(1000)) == (0, 800, 1710)


def test_full_context_slots_are_limited_by_the_slots() -> None:
    assert [full_context_slots(blocks, 10, 4) for blocks in (9, 10, 39, 40, 100)] == [0, 1, 3, 4, 4]


def test_a_refused_load_is_the_same_error_through_triton() -> None:
    error = NoRoom.for_sizes(needed=3 << 20, taken=5 << 20, budget=6 << 20)
    wire_text = (
        f"load failed for model 'x': version 1 is at UNAVAILABLE state: NoRoom: {error}\n\nAt:\n  /a.py(3): f\n;"
    )
    error_from_wire = from_wire(wire_text)
    assert isinstance(error_from_wire, NoRoom)
    assert (error_from_wire.message, error_from_wire.missing) == (error.message, 2 << 20)
