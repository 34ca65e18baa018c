"""The book of memory: what is entered never exceeds the budget, whoever comes, goes or dies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engine import memory
from engine.memory import EngineMemory, MemoryBook, PoolSize, full_context_slots
from tritonlm.contract import CheckpointError, NoRoom
from tritonlm.contract.errors import from_wire

# Another process: it enters what it is told, says whether it could, and stays until its input ends.
OTHER = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from engine.memory import MemoryBook
from tritonlm.contract import NoRoom
book = MemoryBook(100, Path(sys.argv[1]))
try:
    book.reserve("cpu", int(sys.argv[2]))
    print("entered", flush=True)
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


def test_what_is_missing_is_told_and_one_who_died_is_struck_off(tmp_path: Path) -> None:
    file, book = tmp_path / "book", MemoryBook(100, tmp_path / "book")
    beside, said = other(file, 70)
    assert said == "entered"
    book.reserve("cpu", 30)
    book.reserve("gpu", 100)
    with pytest.raises(NoRoom) as refused:
        book.reserve("cpu", 45)
    assert refused.value.missing == 15
    # What was refused has changed nothing.
    assert json.loads(file.read_text())[str(beside.pid)] == {"cpu": 70}
    third, said = other(file, 1)
    assert said == "1"
    for process in (beside, third):
        process.kill()
        process.communicate(timeout=20)
    book.reserve("cpu", 100)
    fourth, said = other(file, 1)
    assert said == "1"
    # Who ends in peace takes the book along only as the last.
    book.leave()
    assert not file.exists()
    fourth.communicate(timeout=20)


def test_many_at_once_never_enter_more_than_there_is(tmp_path: Path) -> None:
    found = [other(tmp_path / "book", 30) for _ in range(6)]
    assert [said for _, said in found].count("entered") == 3
    for process, _ in found:
        process.communicate(timeout=20)


def test_what_is_larger_than_the_whole_budget_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="needs 3 MiB on cpu, and the memory budget is 2 MiB; raise the budget"):
        MemoryBook(2 << 20, tmp_path / "book").reserve("cpu", 3 << 20)
    # Without a budget there is no book.
    MemoryBook(0, tmp_path / "book").reserve("cpu", 1 << 60)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extents of ten blocks, and no pause after a refusal or a measurement."""
    for name, value in {"_EXTENT_BYTES": 100, "_REFUSED_SECONDS": 0.0, "_MEASURED_SECONDS": 0.0}.items():
        monkeypatch.setattr(memory, name, value)


class Taken:
    """An engine that takes what the test says."""

    def __init__(self, file: Path, budget: int, taken: int, device: str = "cpu") -> None:
        self.bytes, self.book = taken, MemoryBook(budget, file)
        self.memory = EngineMemory(self.book, device, lambda: self.bytes)

    def load(
        self, blocks: int = 50, least: int = 10, *, grows: bool = True, explicit: bool = False
    ) -> tuple[int, int, int]:
        self.memory.measure()
        size = PoolSize(blocks + 1, least + 1, 10, 100, explicit)
        return self.memory.open_pool(size, grows=grows), self.memory.usable, self.memory.claimed


@pytest.mark.usefixtures("small_extents")
def test_a_pool_is_entered_by_need_and_grows_as_far_as_the_budget_allows(tmp_path: Path) -> None:
    first, second = (Taken(tmp_path / "book", 1000, 200) for _ in range(2))
    # Both pools whole would take 1,420. What each enters: 200, ten blocks and the padding block.
    assert first.load() == (51, 10, 310)
    assert second.load() == (51, 10, 310)
    assert (first.memory.resident, first.memory.reserved) == (200, 710)
    assert (first.memory.grow(11), first.memory.claimed) == (20, 410), "an extent at a time"
    assert (first.memory.grow(31), first.memory.claimed) == (40, 610)
    # 80 bytes are left: no whole extent.
    assert (second.memory.grow(18), second.memory.claimed) == (18, 390)
    assert second.memory.grow(19) == 18
    assert first.memory.grow(41) == 40
    first.book.leave()
    assert not (tmp_path / "book").exists()


@pytest.mark.usefixtures("small_extents")
def test_without_a_budget_the_whole_pool_may_be_used(tmp_path: Path) -> None:
    alone = Taken(tmp_path / "book", 0, 200)
    assert alone.load() == (51, 50, 0)
    assert (alone.memory.measure(), alone.memory.reserved) == (None, 710)


@pytest.mark.usefixtures("small_extents")
def test_a_pool_that_is_allocated_at_once_takes_what_is_left_but_no_less_than_one_context(tmp_path: Path) -> None:
    first, second, third = (Taken(tmp_path / "book", 1000, 200, "cuda:0") for _ in range(3))
    assert first.load(30, grows=False) == (31, 30, 510)
    assert second.load(grows=False) == (29, 28, 490)
    assert second.memory.reserved == 490
    with pytest.raises(NoRoom) as refused:
        third.load(grows=False)
    assert refused.value.missing == 310, "what one context needs, not the whole pool"
    with pytest.raises(NoRoom) as refused:
        third.load(20, grows=False, explicit=True)
    assert refused.value.missing == 410, "what was asked for"


@pytest.mark.usefixtures("small_extents")
def test_what_can_never_be_is_refused_at_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lower max_context_tokens or kv_cache_tokens"):
        Taken(tmp_path / "book", 300, 200).load()
    with pytest.raises(CheckpointError, match="the memory budget is"):
        Taken(tmp_path / "book", 700, 200).load(explicit=True)
    assert Taken(tmp_path / "book", 700, 200).load() == (51, 10, 310)


@pytest.mark.usefixtures("small_extents")
def test_what_steps_have_taken_is_entered_even_beyond_the_budget(tmp_path: Path) -> None:
    first, second = (Taken(tmp_path / "book", 1000, 200) for _ in range(2))
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


def test_slots_of_full_context_are_counted_by_what_runs_together() -> None:
    assert [full_context_slots(blocks, 10, 4) for blocks in (9, 10, 39, 40, 100)] == [0, 1, 3, 4, 4]


def test_what_triton_tells_of_a_refused_load_is_the_same_error() -> None:
    error = NoRoom.of(needed=3 << 20, taken=5 << 20, budget=6 << 20)
    told = f"load failed for model 'x': version 1 is at UNAVAILABLE state: NoRoom: {error}\n\nAt:\n  /a.py(3): f\n;"
    found = from_wire(told)
    assert isinstance(found, NoRoom)
    assert (found.message, found.missing) == (error.message, 2 << 20)
