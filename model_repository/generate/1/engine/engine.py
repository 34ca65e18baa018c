"""The engine: continuous batching. It takes requests, computes all of them together step by step, and sends chunks.

One thread runs the steps: process the inbox → plan → one forward over the flat batch → sample all rows → release
chunks. A second thread delivers the chunks, because a delivery may block. The engine works on token ids. Only `release`
knows text, and nothing here knows Triton.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tritonlm.contract import EngineFailure, QueueTimeout, TritonLMError

from .adapters.store import AdapterStore
from .config import EngineConfig
from .constraints.compiler import ConstraintCompiler
from .constraints.mask_worker import MaskWorker
from .intake import Intake
from .interrupt import Interrupt
from .monitoring.metrics import Metrics
from .monitoring.progress import Progress
from .monitoring.recorder import Recorder
from .monitoring.reports import Reports
from .monitoring.step_journal import StepJournal
from .output.delivery import Delivery
from .output.embedding import PooledPrompt
from .output.sequence_output import CANCELLED, STOP, TIMEOUT, Decode, SequenceOutput
from .output.step_output import StepOutputProcessor
from .preparation import Preparation
from .request import Item, Request
from .runners.async_step import AsyncRunner, AsyncStep
from .runners.interface import Runner
from .runners.multi_step import MultiStep, MultiStepRunner
from .sampling.sampler import SamplingState
from .scheduling.admission import AdmissionQueue
from .scheduling.blocks import BlockPool
from .scheduling.scheduler import Scheduler, Slice
from .scheduling.speculation import PromptLookup, SpeculationGate
from .scheduling.step_budget import StepBudget

_log = logging.getLogger("tritonlm.engine")
# How late a request may end while it waits for its adapter or its grammar.
_LATE_SECONDS = 0.25
_JOIN_SECONDS = 10.0
# How long a stopping engine waits for adapters that are being loaded and grammars that are being compiled.
_PREPARED_SECONDS = 2.0


class Engine:
    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        decode: Decode,
        end_ids: Collection[int],
        about: Mapping[str, Any] | None = None,
        journal: StepJournal | None = None,
        constraints: ConstraintCompiler | None = None,
    ) -> None:
        """`about` describes the checkpoint, for the command of that name. `journal` outlives this process.

        `constraints` is shared by the engines of a process; without it structured outputs are not offered.
        """
        self.runner, self.config = runner, config
        self._decode, self._end_ids, self._journal = decode, end_ids, journal
        self.pool = BlockPool(runner.blocks, config.block_tokens, runner.memory.usable, runner.memory.grow)
        budget = StepBudget(
            config.prefill_tokens,
            config.block_tokens,
            config.decode_step_milliseconds / 1000,
            config.prefill_step_milliseconds / 1000,
        )
        self.scheduler = Scheduler(self.pool, config.max_sequences, budget)
        if journal:
            self.scheduler.on_step, self.scheduler.on_harmless = journal.record, journal.clear
        self._progress = Progress()
        runner.watch(self._progress)
        self.metrics = Metrics()
        self._masks = MaskWorker(runner.vocab_size)
        self._step_output = StepOutputProcessor(runner, self.scheduler, self.metrics, self._masks, self._end)
        self._async_step = (
            AsyncStep(runner, self.scheduler, self._step_output) if isinstance(runner, AsyncRunner) else None
        )
        self._interrupt = Interrupt()
        self._multi_step = (
            MultiStep(runner, self.scheduler, self._step_output, self._interrupt, config.multi_step_tokens)
            if isinstance(runner, MultiStepRunner)
            else None
        )
        self._speculation_gate = SpeculationGate() if config.speculative_tokens else None
        self._recorder = Recorder(self.metrics, self.scheduler, self._speculation_gate)
        self._adapters = AdapterStore(runner, config) if config.adapters_file else None
        admission = AdmissionQueue(config.max_sequences, config.max_queue_size)
        self.reports = Reports(runner, config, self.scheduler, admission, self.metrics, self._progress, self._adapters)
        preparation = Preparation(self._adapters, constraints)
        self._intake = Intake(
            runner, config, admission, self.reports, self.metrics, journal, about or {}, preparation, self._interrupt
        )
        # Called by other threads: they meet the intake, and no step.
        self.submit, self.command, self.cancel = self._intake.submit, self._intake.command, self._intake.cancel
        self.isolates = self._intake.isolates
        self._delivery = Delivery()
        self._released_at = float("-inf")
        self._cores = len(os.sched_getaffinity(0))
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # Called by other threads.

    def start(self) -> None:
        self._thread.start()
        self._delivery.start()

    def close(self) -> None:
        """Cancel the running requests, deliver their ends, and stop both threads."""
        self._intake.close()
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)
            self._delivery.join(_JOIN_SECONDS)
            if self._journal and self.has_ended:
                self._journal.close()

    @property
    def has_ended(self) -> bool:
        """Whether its thread has ended, so that no step uses the runner."""
        return not self._thread.is_alive()

    @property
    def in_flight(self) -> int:
        """The number of requests that have been submitted and have not ended."""
        return self._intake.in_flight

    @property
    def has_room(self) -> bool:
        """Whether a further request would find a slot or room in the queue."""
        return self.in_flight < self.config.max_sequences + self.config.max_queue_size

    def metric_values(self) -> dict[str, float]:
        return self.reports.metric_values()

    def take_timed(self) -> dict[str, list[float]]:
        """The timings of requests since the last call."""
        return self.metrics.take_timed()

    # The engine's thread: the loop, and one step from top to bottom.

    def _run(self) -> None:
        while not self._intake.closed:
            if not self.try_step():
                self._intake.wait(_LATE_SECONDS)
        self._cancel_where(lambda _: True)
        # Requests that came in at the last moment get an end, too.
        if self._adapters:
            self._adapters.close()
        self._intake.wait_for_prepared(_PREPARED_SECONDS)
        self.process_inbox()
        self._cancel_where(lambda _: True)
        self._masks.close()
        self._delivery.close()

    def try_step(self) -> bool:
        """Process the inbox and run a step. A failed step fails its running requests, and not the service."""
        try:
            self.process_inbox()
            return self.step()
        except Exception as error:
            _log.exception("a step failed")
            self._fail_running(f"the engine failed in this step ({type(error).__name__}); send the request again")
            return True

    def process_inbox(self) -> None:
        """Add new requests to the scheduler, end cancelled ones, and end those past their time limit."""
        # Before the inbox is read: what comes in later sets it again.
        self._interrupt.clear()
        for request in self._intake.take():
            self._add(request)
        self._cancel_where(lambda request: request.cancelled)
        self._time_out()

    def step(self) -> bool:
        """Compute one step of all running requests. Return False if there is nothing to compute."""
        self._progress.begin()
        try:
            return self._step()
        finally:
            self._progress.end()

    def _step(self) -> bool:
        begin = self._recorder.begin_step()
        if self._speculation_gate:
            self.scheduler.speculating = self._speculation_gate.is_open(begin.batch_size)
        if self._async_step:
            plan, steps = self._async_step.step(begin.at), 1
        elif plan := self.scheduler.plan():
            steps = self._compute(plan, begin.at)
        if not plan:
            return False
        self.runner.memory.update(self.pool.touched)
        self._release_chunks()
        self._recorder.end_step(plan, begin, steps)
        return True

    def _compute(self, plan: Sequence[Slice], began: float) -> int:
        """Compute a plan, and return for how many steps."""
        if self._multi_step and (steps := self._multi_step.run(plan, began, self._seconds_until_chunks(began))):
            return steps
        masks = self._step_output.begin(plan)
        self._step_output.process(plan, self.runner.forward(plan), began, masks)
        return 1

    def _seconds_until_chunks(self, now: float) -> float:
        """At most those of a single stream: other threads use the pauses between steps."""
        due = self._released_at + self.config.chunk_seconds(len(self.scheduler.running), self._cores)
        return min(due - now, self.config.chunk_milliseconds / 1000)

    def _release_chunks(self) -> None:
        # All chunks together: one burst costs the receiving processes less, and interrupts fewer steps.
        now = time.monotonic()
        due = now - self._released_at >= self.config.chunk_seconds(len(self.scheduler.running), self._cores)
        if due:
            self._released_at = now
        for request in self.scheduler.running:
            # While a chunk waits for delivery, the next one gathers more text. So the number of waiting deliveries is
            # bounded by the number of requests.
            if not request.in_delivery and (chunk := request.output.chunk(due)):
                self._deliver(request, chunk, last=False)

    # Begin and end of requests.

    def _add(self, request: Request) -> None:
        self.metrics.count("requests")
        try:
            self._prepare(request)
        except TritonLMError as error:
            self._deliver(request, error, last=True)
        except Exception as error:
            _log.exception("a request could not be taken in")
            message = f"the engine could not take this request in ({type(error).__name__})"
            self._deliver(request, EngineFailure(message), last=True)
        else:
            # A cancelled one may lack the adapter or the grammar that it names: `process_inbox` ends it.
            if request.output.finish_reason and not request.cancelled:
                self._deliver(request, request.output.finish(request.output.finish_reason), last=True)
            else:
                self.scheduler.add(request)

    def _prepare(self, request: Request) -> None:
        """Set the output and the sampling state of a request, or raise the error that refuses it."""
        if request.refusal:
            raise request.refusal
        if request.embeds:
            request.output = PooledPrompt(request)
            return
        params = request.parameters
        assert params.seed is not None
        request.output = SequenceOutput(request, self._decode, self._end_ids)
        if request.constraint:
            request.constraint.start(params)
            if request.constraint.complete:
                request.output.finish_reason = STOP
        request.sampling = SamplingState(
            params, params.seed, self.runner.vocab_size, request.prompt_ids, params.resume_token_ids,
            end_ids=() if params.ignore_eos else self._end_ids, device=self.runner.device,
        )  # fmt: skip
        if self.config.speculative_tokens:
            request.prompt_lookup = PromptLookup(self.config.speculative_tokens)

    def _time_out(self) -> None:
        now, slot_holders = time.monotonic(), self.scheduler.slot_holders()
        for request in self.scheduler.remove_where(
            lambda r: now > (r.deadline if r.number in slot_holders else r.queue_deadline)
        ):
            self.metrics.count("timed_out")
            if request.started:
                self._deliver(request, request.output.finish(TIMEOUT), last=True)
            else:
                self._deliver(request, QueueTimeout("Request timeout expired before a slot was free"), last=True)

    def _cancel_where(self, condition: Callable[[Request], bool]) -> None:
        for request in self.scheduler.remove_where(condition):
            self.metrics.count("cancelled")
            self._deliver(request, request.output.finish(CANCELLED), last=True)

    def _fail_running(self, message: str) -> None:
        for request in self.scheduler.remove_where(lambda r: r.started):
            self._deliver(request, EngineFailure(message), last=True)
        if self._async_step:
            self._async_step.discard()
        self.pool.forget_idle()

    def _end(self, request: Request, item: Item) -> None:
        self.scheduler.remove(request)
        self._deliver(request, item, last=True)

    def _deliver(self, request: Request, item: Item, *, last: bool) -> None:
        request.in_delivery = True
        if isinstance(item, TritonLMError):
            self.metrics.count("failed")
        if last:
            self._recorder.end_request(request)
            self._intake.leave(request)

        def send() -> None:
            try:
                request.deliver(item, last)
            finally:
                request.in_delivery = False
                if last:
                    request.drop_state()

        self._delivery.put(send)

    def deliver_now(self) -> None:
        """Deliver all waiting items on the caller's thread. For callers that step the engine themselves."""
        self._delivery.flush()
