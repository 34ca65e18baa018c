"""What other threads see of an engine, and may change, while one thread is in the middle of something."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from engine.engine import Engine
from engine.request import Request

from .harness import make_engine, run, save_model, step, submit


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return make_engine(save_model("gpt2", tmp_path))


def test_the_status_counts_all_running_requests_while_they_are_sorted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        submit(engine, [5, 6, 7], max_tokens=30)
    while engine.reports.status()["running"] < 3:
        step(engine)
    counts: list[object] = []

    def rank(request: Request) -> tuple[int, int]:
        # The key of the sort.
        counts.append(engine.reports.status()["running"])
        return (0, request.number)

    monkeypatch.setattr(Request, "rank", property(rank))
    engine.scheduler.plan()
    assert set(counts) == {3}


def test_no_request_enters_or_leaves_while_cancel_looks_for_its_own(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = submit(engine, [5, 6, 7], request_id="own")
    lock, could_change = engine._intake._changed, list[bool]()

    def watched_id(_: Request) -> str:
        other_thread = threading.Thread(target=lambda: could_change.append(lock.acquire(blocking=False)))
        other_thread.start()
        other_thread.join()
        return "own"

    with monkeypatch.context() as patched:
        patched.setattr(Request, "id", property(watched_id), raising=False)
        assert engine.cancel("own") == 1
    assert could_change == [False]
    run(engine)
    assert output.final.finish_reason == "cancelled"
