"""The book of memory: what is entered never exceeds the budget, whoever comes, goes or dies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engine.memory import MemoryBook
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


def test_what_triton_tells_of_a_refused_load_is_the_same_error() -> None:
    error = NoRoom.of(needed=3 << 20, taken=5 << 20, budget=6 << 20)
    told = f"load failed for model 'x': version 1 is at UNAVAILABLE state: NoRoom: {error}\n\nAt:\n  /a.py(3): f\n;"
    found = from_wire(told)
    assert isinstance(found, NoRoom)
    assert (found.message, found.missing) == (error.message, 2 << 20)
