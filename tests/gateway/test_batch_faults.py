"""Batches in trouble: faults of the gateway, a missing model, a cancel at the last moment."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.fake_transport import FakeTransport
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from tritonlm.contract import InvalidRequest, NotLoaded
from tritonlm.gateway.batches import runner as runner_module
from tritonlm.gateway.batches.runner import BatchRunner
from tritonlm.gateway.batches.store import ACTIVE, Batch, BatchStore
from tritonlm.gateway.limits.admission import AdmissionQueue
from tritonlm.serving import backoff

from .batch_calls import COMPLETIONS, answers, line, run, sdk_of, stored_batch, upload, wait
from .conftest import WAIT_SECONDS, running_gateway

MISSING = "missing"


class PartlyLoaded(FakeTransport):
    """The model MISSING is there, but not loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.searches = 0

    def _find(self, model: str) -> None:
        if model == MISSING:
            self.searches += 1
            raise NotLoaded(f"the model {model!r} is not loaded", "model")
        super()._find(model)


def test_a_request_that_fails_inside_the_gateway_is_an_error_and_the_others_run_once(tmp_path: Path) -> None:
    class Faulty(FakeTransport):
        def _find(self, model: str) -> None:
            super()._find(model)
            if self.calls and self.calls[-1].prompt.text == "p4":
                raise RuntimeError("a fault")

    transport = Faulty()
    with running_gateway(transport, batch_folder=tmp_path, batch_requests=2) as gateway, sdk_of(gateway) as sdk:
        batch = run(sdk, [line(number) for number in range(13)])
        assert batch.request_counts.to_dict() == {"total": 13, "completed": 12, "failed": 1}
        assert answers(sdk, batch.error_file_id)["c4"]["body"]["error"]["code"] == "internal_error"
        assert len(answers(sdk, batch.output_file_id)) == 12
        assert len(transport.calls) == 13


def test_requests_of_a_batch_that_failed_do_not_go_on_beside_its_next_run(tmp_path: Path) -> None:
    store = BatchStore(tmp_path / "b", 1, 2**20)
    batch = stored_batch(store, [line(number) for number in range(3)])
    # The answer to p0 cannot be written.
    store.output(batch, "output").mkdir()
    running: set[str] = set()
    starts: Counter[str] = Counter()

    async def check() -> None:
        repeated = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            prompt = json.loads((await receive())["body"])["prompt"]
            assert prompt not in running
            starts[prompt] += 1
            if prompt == "p0":
                await JSONResponse({})(scope, receive, send)
                return
            running.add(prompt)
            if starts["p2"] > 1:
                repeated.set()
            try:
                await asyncio.Event().wait()
            finally:
                running.discard(prompt)

        # Slots for the requests of two runs at once.
        runner = BatchRunner(store, app, AdmissionQueue(9, 9, 1.0), lambda _: True, 6)
        runner.start()
        await asyncio.wait_for(repeated.wait(), WAIT_SECONDS)
        await runner.close()

    asyncio.run(check())


def test_a_batch_that_fails_waits_longer_before_each_of_its_next_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Polled(BatchStore):
        polls = 0

        def active(self) -> list[Batch]:
            self.polls += 1
            return super().active()

    store = Polled(tmp_path, 1, 2**20)
    batch = stored_batch(store, [line(1)])
    output, answered, now = store.output(batch, "output"), 0, 1000.0
    # The answer cannot be written.
    output.mkdir()
    monkeypatch.setattr(runner_module, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(backoff, "time", SimpleNamespace(monotonic=lambda: now))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal answered
        answered += 1
        await JSONResponse({})(scope, receive, send)

    async def answers_after_polls() -> int:
        seen = store.polls
        while store.polls < seen + 100:
            await asyncio.sleep(0.001)
        return answered

    async def check() -> None:
        nonlocal now
        runner = BatchRunner(store, app, AdmissionQueue(9, 9, 1.0), lambda _: True, 2)
        runner.start()
        for number, seconds in enumerate((1, 2, 4, 8), 1):
            assert await answers_after_polls() == number
            now += seconds - 0.5
            assert await answers_after_polls() == number, "it waits longer"
            now += 0.5
        output.rmdir()
        now += 100
        while store.batch("", batch.id).status in ACTIVE:
            await asyncio.sleep(0.01)
        await runner.close()

    asyncio.run(asyncio.wait_for(check(), 3 * WAIT_SECONDS))
    assert store.batch("", batch.id).status == "completed"


def test_a_cancel_while_the_last_answers_are_saved_loses_none(tmp_path: Path) -> None:
    class CancelledLate(BatchStore):
        def update(self, batch: Batch, changes: dict[str, Any]) -> bool:
            if changes.get("status") == "finalizing":
                self.cancel("", batch.id)
            return super().update(batch, changes)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({})(scope, receive, send)

    async def complete() -> None:
        runner = BatchRunner(store, app, AdmissionQueue(9, 9, 1.0), lambda _: True, 2)
        runner.start()
        while store.batch("", batch.id).status in ACTIVE:
            await asyncio.sleep(0.01)
        await runner.close()

    store = CancelledLate(tmp_path, 1, 2**20)
    batch = stored_batch(store, [line(number) for number in range(3)])
    asyncio.run(asyncio.wait_for(complete(), WAIT_SECONDS))
    ended = store.batch("", batch.id)
    assert (ended.status, ended.data["request_counts"]["completed"]) == ("cancelled", 3)
    assert {"cancelling_at", "cancelled_at"} <= set(ended.data)
    assert store.content(ended.data["output_file_id"]).read_bytes().count(b"\n") == 3


def test_a_batch_that_has_ended_is_not_cancelled(tmp_path: Path) -> None:
    class EndedMeanwhile(BatchStore):
        """The batch ends after it was read for the cancel."""

        def batch(self, owner: str, batch_id: str) -> Batch:
            read = super().batch(owner, batch_id)
            if read.status == "in_progress":
                self.put(Batch(batch_id, owner, "completed", read.created, {**read.data, "output_file_id": "file-1"}))
            return read

    store = EndedMeanwhile(tmp_path, 1, 2**20)
    batch = stored_batch(store, [line(1)])
    store.put(Batch(batch.id, "", "in_progress", batch.created, batch.data))
    with pytest.raises(InvalidRequest, match="the batch is completed: there is nothing to cancel"):
        store.cancel("", batch.id)
    ended = store.batch("", batch.id)
    assert (ended.status, ended.data["output_file_id"]) == ("completed", "file-1")


def test_batches_whose_model_is_missing_hold_up_no_other_and_can_be_cancelled(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_folder": tmp_path / "b", "batch_requests": 2, "load_on_demand": False}
    transport = PartlyLoaded()
    with running_gateway(transport, **settings) as gateway, sdk_of(gateway) as sdk:
        file_id = upload(sdk, [line(number, model=MISSING) for number in range(4)])
        # More than run at once.
        for _ in range(5):
            batch = sdk.batches.create(input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h")
        wait(sdk, batch.id, "in_progress")
        gateway.wait_until(lambda: transport.searches > 1)
        assert run(sdk, [line(1), line(2)]).request_counts.completed == 2
        sdk.batches.cancel(batch.id)
        ended = wait(sdk, batch.id)
        assert (ended.status, ended.request_counts.completed, ended.request_counts.failed) == ("cancelled", 0, 0)
