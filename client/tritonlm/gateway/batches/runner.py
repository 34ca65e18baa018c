"""Runs batches in the background, a few requests at once, each at the lowest priority and only while nobody waits.

Progress is what the output files hold: after a kill the next gateway goes on behind the last whole line. Of several
gateways with one folder, the holder of its lock runs the batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from starlette.types import ASGIApp

from tritonlm.access.keys import Limits
from tritonlm.serving.backoff import RestartBackoff

from ..limits.admission import AdmissionQueue
from ..limits.quota import Caller
from . import lines, store
from .calls import send
from .store import Batch, BatchStore

_log = logging.getLogger("tritonlm.gateway")
_POLL_SECONDS = 0.5
_SWEEP_SECONDS = 600.0
_SAVE_SECONDS = 1.0
_BUSY_SECONDS = 0.05
_MAX_BATCHES_AT_ONCE = 4
_LOWEST_PRIORITY = 3
# Answers after which a request is sent again: too many requests, or a model that is not there at the moment.
_NOT_LOADED = 503
_RETRIED = (429, _NOT_LOADED)
# The endpoints without the field `priority`.
_NO_PRIORITY = ("/v1/embeddings",)
OUTPUT, ERRORS = "output", "errors"


class _BatchBackoff(RestartBackoff):
    """Every repetition waits, since it computes answers that may be lost again. However long it ran before it failed:
    only a run without a failure ends the backoff."""

    IMMEDIATE_ATTEMPTS, HEALTHY_SECONDS = 1, float("inf")


class BatchRunner:
    def __init__(
        self,
        batches: BatchStore,
        app: ASGIApp,
        admission: AdmissionQueue,
        is_valid: Callable[[str], bool],
        max_requests: int,
    ) -> None:
        """`is_valid`: whether a key of this name may still send requests."""
        self._store, self._app, self._admission, self._is_valid = batches, app, admission, is_valid
        self._max_requests = max_requests
        self._slots = asyncio.Semaphore(max_requests)
        self._runs: dict[str, _BatchRun] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # Of batches whose last run failed.
        self._backoffs: dict[str, _BatchBackoff] = {}
        self._poll_task: asyncio.Task[None] | None = None
        self._lock: IO[bytes] | None = None

    def start(self) -> None:
        self._poll_task = asyncio.get_running_loop().create_task(self._poll())

    async def close(self) -> None:
        """Stop; batches go on at the next start."""
        tasks = [*self._tasks.values(), *([self._poll_task] if self._poll_task else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._lock is not None:
            self._lock.close()

    async def _poll(self) -> None:
        swept = float("-inf")
        while True:
            try:
                if await asyncio.to_thread(self._has_lock):
                    if time.monotonic() - swept > _SWEEP_SECONDS:
                        swept = time.monotonic()
                        await asyncio.to_thread(self._store.sweep)
                    for batch in await asyncio.to_thread(self._store.active):
                        self._begin(batch)
            except Exception:
                # A temporary failure, such as a full disk, must not end this task.
                _log.exception("polling the batches failed")
            await asyncio.sleep(_POLL_SECONDS)

    def _has_lock(self) -> bool:
        if self._lock is None:
            file = (self._store.folder / "lock").open("wb")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                return False
            self._lock = file
        return True

    def _begin(self, batch: Batch) -> None:
        """Run a batch; if it runs already, stop it when its owner has cancelled it."""
        if (running := self._runs.get(batch.id)) is not None:
            if batch.status == store.CANCELLING:
                running.cancelled.set()
        elif self._is_due(batch) and self._count_served() < _MAX_BATCHES_AT_ONCE and not self._admission.closed:
            run = self._runs[batch.id] = _BatchRun(self._store, batch, self._max_requests, self._call)
            task = self._tasks[batch.id] = asyncio.get_running_loop().create_task(self._run(batch.id, run))
            task.add_done_callback(lambda _: self._forget(batch.id))

    def _is_due(self, batch: Batch) -> bool:
        return batch.id not in self._backoffs or not self._backoffs[batch.id].delay

    def _count_served(self) -> int:
        """Without those that wait for a model, perhaps until they expire."""
        return sum(not run.waits_for_model for run in self._runs.values())

    def _forget(self, batch_id: str) -> None:
        del self._runs[batch_id], self._tasks[batch_id]

    async def _run(self, batch_id: str, run: _BatchRun) -> None:
        try:
            await run.run()
        except Exception:
            backoff = self._backoffs.setdefault(batch_id, _BatchBackoff())
            backoff.record_attempt()
            _log.exception("the batch %s failed and is run again in %.0f s", batch_id, backoff.delay)
        else:
            self._backoffs.pop(batch_id, None)

    async def _call(self, batch: Batch, line: lines.Line, run: _BatchRun) -> dict[str, Any] | None:
        """The answer's line; None if the gateway stops, or the batch expires or is cancelled."""
        endpoint = batch.data["endpoint"]
        body = line.body if endpoint in _NO_PRIORITY else {**line.body, "priority": _LOWEST_PRIORITY}
        # Its tokens count for the key's usage; the key's limits are for interactive requests.
        caller = Caller(batch.owner, Limits(), has_key=bool(batch.owner))
        request_id = f"{batch.id}-{os.urandom(6).hex()}"
        while True:
            # Not held during the pauses: a batch whose model is missing would keep the slots from the others.
            async with self._slots:
                if run.cancelled.is_set() or self._admission.closed or time.time() >= batch.data["expires_at"]:
                    return None
                if batch.owner and not self._is_valid(batch.owner):
                    return lines.error_line(line.custom_id, "invalid_api_key", "the key of this batch is revoked")
                answer = None if self._admission.waiting else await send(self._app, endpoint, body, caller, request_id)
            if answer is not None:
                run.waits_for_model = answer.status == _NOT_LOADED
                if answer.status not in _RETRIED:
                    return lines.answer_line(line.custom_id, answer.status, request_id, answer.body)
            with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(run.cancelled.wait(), _BUSY_SECONDS if answer is None else answer.retry_after)


class _BatchRun:
    """One batch from its present state to its end."""

    def __init__(self, batches: BatchStore, batch: Batch, max_requests: int, call: Callable[..., Any]) -> None:
        self._store, self._batch, self._call = batches, batch, call
        self._max_requests = max_requests
        # Set when the owner has cancelled it.
        self.cancelled = asyncio.Event()
        # Whether the last answer said that the model is not there at the moment.
        self.waits_for_model = False
        self._files = {kind: batches.output(batch, kind) for kind in (OUTPUT, ERRORS)}
        self._progress = lines.Progress()
        self._saved = 0.0
        self._stopped = False

    async def run(self) -> None:
        # Read again: since the poll has read it, an earlier run of it may have ended.
        self._batch = await asyncio.to_thread(self._store.batch, self._batch.owner, self._batch.id)
        if self._batch.status == store.VALIDATING:
            await asyncio.to_thread(self._validate)
        if self._batch.status not in store.ACTIVE:
            return
        if "end" not in self._batch.data:
            self._progress = await asyncio.to_thread(lines.read_progress, *self._files.values())
        if self._batch.status == store.IN_PROGRESS:
            await self._work_together()
        if not self._stopped:
            await asyncio.to_thread(self._finish)

    def _validate(self) -> None:
        data = self._batch.data
        try:
            total, errors = lines.check_file(self._store.content(data["input_file_id"]), data["endpoint"])
        except FileNotFoundError:
            message = "the input file was deleted"
            total, errors = 0, [{"code": "missing_file", "line": None, "param": "input_file_id", "message": message}]
        data["request_counts"]["total"] = total
        if errors:
            data["errors"] = {"object": "list", "data": errors}
        self._write(store.FAILED if errors else store.IN_PROGRESS)

    def _requests(self) -> Iterator[lines.Line]:
        for line in lines.read_lines(self._store.content(self._batch.data["input_file_id"])):
            if line.custom_id not in self._progress.done:
                yield line

    async def _work_together(self) -> None:
        requests = self._requests()
        workers = [asyncio.ensure_future(self._work(requests)) for _ in range(self._max_requests)]
        try:
            await asyncio.gather(*workers)
        finally:
            # When one has failed, the batch is run again: the others must not go on beside that.
            for worker in workers:
                worker.cancel()
            await asyncio.wait(workers)

    async def _work(self, requests: Iterator[lines.Line]) -> None:
        """Take requests one after the other, until there are none or the batch ends."""
        while self._batch.status == store.IN_PROGRESS and not self._stopped:
            # Reading on while others write: the file itself does not change.
            line = next(requests, None)
            if line is None:
                return
            answer = await self._call(self._batch, line, self)
            if answer is None:
                self._stopped = not self.cancelled.is_set() and time.time() < self._batch.data["expires_at"]
                return
            is_good = (answer["response"] or {}).get("status_code") == 200
            await asyncio.to_thread(lines.append, self._files[OUTPUT if is_good else ERRORS], answer)
            self._progress.add(answer)
            if time.monotonic() - self._saved > _SAVE_SECONDS:
                self._saved = time.monotonic()
                await asyncio.to_thread(self._save)

    def _save(self) -> None:
        """Note the progress."""
        self._count()
        self._write()

    def _finish(self) -> None:
        """Turn the output files into files of the owner. Every step may be repeated after a kill."""
        data = self._batch.data
        if "end" not in data:
            self._save()
            data["end"] = self._end()
            for kind, field in ((OUTPUT, "output_file_id"), (ERRORS, "error_file_id")):
                if self._files[kind].is_file():
                    data[field] = store.new_file_id()
            # A batch that is `finalizing` cannot be cancelled any more.
            self._write("" if data["end"] == store.CANCELLED else store.FINALIZING)
            if self._batch.status == store.CANCELLING:
                data["end"] = store.CANCELLED
        for kind, field in ((OUTPUT, "output_file_id"), (ERRORS, "error_file_id")):
            if field in data:
                name, seconds = f"{self._batch.id}_{kind}.jsonl", data["output_seconds"]
                self._store.add_file(
                    self._batch.owner, name, "batch_output", self._files[kind], seconds, file_id=data[field]
                )
        self._write(data["end"])

    def _end(self) -> str:
        if self._batch.status == store.CANCELLING:
            return store.CANCELLED
        if len(self._progress.done) >= self._batch.data["request_counts"]["total"]:
            return store.COMPLETED
        for line in self._requests():
            lines.append(self._files[ERRORS], lines.error_line(line.custom_id, "batch_expired", "not sent in time"))
        return store.EXPIRED

    def _count(self) -> None:
        progress, data = self._progress, self._batch.data
        data["request_counts"] |= {"completed": progress.completed, "failed": progress.failed}
        data["usage"] = {
            "input_tokens": progress.input_tokens,
            "input_tokens_details": {"cached_tokens": progress.cached_tokens},
            "output_tokens": progress.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": progress.input_tokens + progress.output_tokens,
        }

    def _write(self, status: str = "") -> None:
        """Write the batch, with a new status; but if its owner has cancelled it in the meantime, it is `cancelling`."""
        changes = {"status": status, f"{status}_at": int(time.time())} if status else {}
        if not self._store.update(self._batch, changes):
            row = self._store.batch(self._batch.owner, self._batch.id)
            self._batch.status = row.status
            self._store.update(self._batch, {name: row.data[name] for name in ("status", "cancelling_at")})
