"""The engine: takes requests in, steps them all together, hands out chunks.

One thread steps: take in → plan → one forward over the flat batch → sample all rows → release. A second one delivers,
because a delivery may block. The engine speaks token ids; text is known to `release` alone, Triton to nobody here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tritonlm.contract import (
    ContextLengthExceeded,
    Draining,
    EngineFailure,
    InvalidRequest,
    NotOffered,
    QueueTimeout,
    RequestFailedRepeatedly,
    TritonLMError,
)
from tritonlm.contract.control import ABOUT, CANCEL, DRAIN, FIND, KNOWN, RETIRE, Command

from .config import EngineConfig
from .monitoring.metrics import DECODE_SECONDS, PREFILL_SECONDS, QUEUE_SECONDS, STEP_SECONDS, STEP_SEQUENCES, Metrics
from .monitoring.progress import Progress
from .monitoring.reports import SLOW_STEP_SECONDS, Reports
from .monitoring.step_journal import StepJournal, fingerprint
from .output.delivery import Delivery
from .output.embedding import PooledPrompt
from .output.sequence_output import CANCELLED, TIMEOUT, Answer, Decode
from .output.step_output import Outcome
from .request import Item, Request
from .runners.async_step import Ahead, AheadRunner
from .runners.interface import Runner
from .sampling.sampler import SamplingState
from .scheduling.admission import Door
from .scheduling.blocks import BlockPool
from .scheduling.scheduler import Scheduler, Slice
from .scheduling.speculation import Lookup, Trial
from .scheduling.step_budget import StepBudget

_log = logging.getLogger("tritonlm.engine")
_IDLE_SECONDS = 0.25
_JOIN_SECONDS = 10.0


class Engine:
    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        decode: Decode,
        end_ids: Collection[int],
        about: Mapping[str, Any] | None = None,
        journal: StepJournal | None = None,
    ) -> None:
        """`about` is what the command of that name tells of the checkpoint; `journal` outlives this process."""
        self.runner = runner
        self._about = dict(about or {})
        self.config = config
        self._decode = decode
        self._end_ids = end_ids
        self.pool = BlockPool(runner.blocks, config.block_tokens, runner.memory.usable, runner.memory.grow)
        budget = StepBudget(
            config.prefill_tokens,
            config.block_tokens,
            config.decode_step_milliseconds / 1000,
            config.prefill_step_milliseconds / 1000,
        )
        self.scheduler = Scheduler(self.pool, config.max_sequences, budget)
        self._journal = journal
        if journal:
            self.scheduler.note, self.scheduler.harmless = journal.note, journal.clear
        self._progress = Progress()
        runner.watch(self._progress)
        self.metrics = Metrics()
        self._outcome = Outcome(runner, self.scheduler, self.metrics, self._end)
        self._ahead = Ahead(runner, self.scheduler, self._outcome) if isinstance(runner, AheadRunner) else None
        self._trial = Trial() if config.speculative_tokens else None
        self._released_at = float("-inf")
        self._inbox: deque[Request] = deque()
        # All that have come in and not ended, by number: commands look here, whatever a step takes.
        self._inside: dict[int, Request] = {}
        self._wake = threading.Condition()
        self._door = Door(config.max_sequences, config.max_queue_size)
        self.reports = Reports(runner, config, self.scheduler, self._door, self.metrics, self._progress)
        self._closing = False
        self._delivery = Delivery()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # What callers on other threads use.

    def start(self) -> None:
        self._thread.start()
        self._delivery.start()

    def close(self) -> None:
        """Cancel what runs, deliver what is left, and end both threads."""
        with self._wake:
            self._closing = True
            self._door.close()
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)
            self._delivery.join(_JOIN_SECONDS)
            if self._journal and not self._thread.is_alive():
                self._journal.close()

    def submit(self, request: Request) -> None:
        """Take a request, or raise the error that refuses it. From here on its end will be delivered."""
        self._check(request)
        self._suspect(request)
        with self._wake:
            try:
                self._door.enter(goes_on=bool(request.parameters.resume_token_ids))
            except TritonLMError:
                self.metrics.count("refused")
                raise
            self._inside[request.number] = request
            self._inbox.append(request)
            self._wake.notify()

    def _suspect(self, request: Request) -> None:
        """What killed two processes does not get a third one; what was beside it runs apart for a while."""
        if self._journal is None:
            return
        request.fingerprint = fingerprint(request)
        suspect = self._journal.suspect(request)
        if suspect and suspect.kills:
            self.metrics.count("refused")
            raise RequestFailedRepeatedly(
                f"this request was being computed when {suspect.deaths} processes of the model died; "
                "it is not tried again"
            )
        request.apart_steps = suspect.apart_steps if suspect else 0

    @property
    def inside(self) -> int:
        """How many requests have come in and not ended."""
        return self._door.inside

    def measures(self) -> dict[str, float]:
        return self.reports.measures()

    def take_timed(self) -> dict[str, list[float]]:
        """What requests took, since the last taking."""
        return self.metrics.take_timed()

    def command(self, command: Command, reply: Callable[[dict[str, Any]], None]) -> None:
        """Obey a command at once, on the caller's thread, whatever a step takes; the report tells of its progress."""
        with self._wake:
            if self._closing:
                raise Draining("this model has been stopped")
            if command.name == DRAIN:
                self._door.drain()
            elif command.name == RETIRE:
                self._door.retire()
            report = self._obey(command)
        reply(report)

    def _check(self, request: Request) -> None:
        wanted, context = request.parameters, self.runner.context_length
        if request.wanted.embed and not self.config.enable_embeddings:
            raise NotOffered("embeddings are off; start the server with TRITONLM_ENABLE_EMBEDDINGS=true")
        if not request.prompt_ids:
            raise InvalidRequest("prompt_ids must hold at least one token id", "prompt_ids")
        if max(request.prompt_ids) >= self.runner.vocab_size or min(request.prompt_ids) < 0:
            raise InvalidRequest(f"prompt_ids must be from 0 to {self.runner.vocab_size - 1}", "prompt_ids")
        if wanted.max_tokens is None or wanted.seed is None:
            raise InvalidRequest("request must name max_tokens and seed", "request")
        if len(request.prompt_ids) + wanted.max_tokens > context:
            raise ContextLengthExceeded.of(context, len(request.prompt_ids), wanted.max_tokens)
        if wanted.resume_token_ids and len(wanted.resume_token_ids) >= wanted.max_tokens:
            raise InvalidRequest("resume_token_ids must be fewer than max_tokens", "resume_token_ids")

    # The engine's thread.

    def step(self) -> bool:
        """One step of all running requests; False when there was nothing to compute."""
        self._progress.begin()
        try:
            return self._step()
        finally:
            self._progress.end()

    def _step(self) -> bool:
        began = time.monotonic()
        decoding = self.scheduler.decoding
        crowd = len(self.scheduler.running)
        if self._trial:
            self.scheduler.guessing = self._trial.wants(crowd)
        generated = self.metrics.counted["generated_tokens"]
        plan = self._ahead.step(began) if self._ahead else self._compute_step(began)
        if not plan:
            return False
        self.runner.memory.update(self.pool.touched)
        self._release_chunks()
        generated = self.metrics.counted["generated_tokens"] - generated
        now = time.monotonic()
        self._count_step(len(plan), now - began, generated, now)
        prompt_tokens = sum(piece.known for piece in plan if piece.known > 1)
        self.scheduler.budget.note(decoding, prompt_tokens, now - began)
        # Prompts take time of their own.
        if self._trial and len(plan) == crowd and all(piece.known == 1 for piece in plan):
            self._trial.note(crowd, self.scheduler.guessing, generated, now - began)
        return True

    def _compute_step(self, began: float) -> list[Slice]:
        plan = self.scheduler.plan()
        if plan:
            self._outcome.give(plan, self.runner.forward(plan), began)
        return plan

    def _count_step(self, sequences: int, seconds: float, generated: float, now: float) -> None:
        self.metrics.count("steps")
        self.metrics.count(STEP_SEQUENCES, sequences)
        self.metrics.count(STEP_SECONDS, seconds)
        if seconds > SLOW_STEP_SECONDS:
            # Once: the metric tells how often.
            level = logging.DEBUG if self.metrics.counted["slow_steps"] else logging.WARNING
            _log.log(level, "a step of %d requests took %.1f s: slow, not hung", sequences, seconds)
            self.metrics.count("slow_steps")
        self.metrics.generated.add(generated, now)

    def _run(self) -> None:
        while not self._closing:
            if not self.try_step():
                self._wait_for_work()
        self.take_in()  # what came in at the last moment gets its end too
        self._cancel_where(lambda _: True)
        self._delivery.end()

    def try_step(self) -> bool:
        """Take in and step; a broken step fails the requests that ran in it, and must not end the service."""
        try:
            self.take_in()
            return self.step()
        except Exception as error:
            _log.exception("a step failed")
            self._fail_running(f"the engine failed in this step ({type(error).__name__}); send the request again")
            return True

    def _wait_for_work(self) -> None:
        with self._wake:
            if not self._inbox and not self._closing:
                self._wake.wait(_IDLE_SECONDS)

    def deliver_now(self) -> None:
        """For those who step the engine themselves."""
        self._delivery.now()

    def take_in(self) -> None:
        """Take in what has come, end what has been cancelled, and what has run out of time."""
        while self._inbox:
            self._take_in(self._inbox.popleft())
        self._cancel_where(lambda request: request.cancelled)
        now = time.monotonic()
        with_slot = self.scheduler.with_slot()
        for request in self.scheduler.remove_where(
            lambda r: now > (r.deadline if r.number in with_slot else r.queue_deadline)
        ):
            self.metrics.count("timed_out")
            if request.started:
                self._deliver(request, request.answer.final(TIMEOUT), last=True)
            else:
                self._deliver(request, QueueTimeout("Request timeout expired before a slot was free"), last=True)

    def _take_in(self, request: Request) -> None:
        wanted = request.parameters
        assert wanted.seed is not None
        self.metrics.count("requests")
        if request.wanted.embed:
            request.answer = PooledPrompt(request)
            self.scheduler.add(request)
            return
        try:
            request.answer = Answer(request, self._decode, self._end_ids)
            request.sampling = SamplingState(
                wanted, wanted.seed, self.runner.vocab_size, request.prompt_ids, wanted.resume_token_ids,
                end_ids=() if wanted.ignore_eos else self._end_ids, device=self.runner.device,
            )  # fmt: skip
            request.lookup = Lookup(self.config.speculative_tokens) if self.config.speculative_tokens else None
        except TritonLMError as error:
            self._deliver(request, error, last=True)
            return
        except Exception as error:
            _log.exception("a request could not be taken in")
            self._deliver(
                request, EngineFailure(f"the engine could not take this request in ({type(error).__name__})"), last=True
            )
            return
        if request.answer.finish_reason:
            self._deliver(request, request.answer.final(request.answer.finish_reason), last=True)
        else:
            self.scheduler.add(request)

    def _obey(self, command: Command) -> dict[str, Any]:
        if command.name == CANCEL:
            return {"cancelled": self.cancel(command.request_id)}
        if command.name == FIND:
            return {"requests": self.reports.find(command.request_id, self._inside.values())}
        if command.name == KNOWN:
            asked = set(command.request_ids)
            return {"known": [request.id for request in self._inside.values() if request.id in asked]}
        return self._about if command.name == ABOUT else self.reports.status()

    def cancel(self, request_id: str) -> int:
        """Have the requests of this id end before the next step; how many there were."""
        found = [request for request in self._inside.values() if request.id == request_id and not request.cancelled]
        for request in found:
            request.cancelled = True
        return len(found)

    def _cancel_where(self, condition: Callable[[Request], bool]) -> None:
        for request in self.scheduler.remove_where(condition):
            self.metrics.count("cancelled")
            self._deliver(request, request.answer.final(CANCELLED), last=True)

    def _release_chunks(self) -> None:
        # All together: one crowd of chunks costs the processes around less, and interrupts fewer steps, than many few.
        now = time.monotonic()
        due = now - self._released_at >= self.config.chunk_seconds(len(self.scheduler.running))
        if due:
            self._released_at = now
        for request in self.scheduler.running:
            # A chunk whose predecessor has not been delivered yet waits, and takes more text along: this bounds the
            # outbox by the number of requests.
            if not request.in_delivery and (chunk := request.answer.chunk(due)):
                self._deliver(request, chunk, last=False)

    def _end(self, request: Request, item: Item) -> None:
        self.scheduler.remove(request)
        self._deliver(request, item, last=True)

    def _fail_running(self, message: str) -> None:
        for request in self.scheduler.remove_where(lambda r: r.started):
            self._deliver(request, EngineFailure(message), last=True)
        if self._ahead:
            self._ahead.forget()
        self.pool.forget_idle()

    def _deliver(self, request: Request, item: Item, *, last: bool) -> None:
        request.in_delivery = True
        if isinstance(item, TritonLMError):
            self.metrics.count("failed")
        if last:
            self._close_account(request)
            with self._wake:
                self._inside.pop(request.number, None)
                self._door.leave()

        def hand_over() -> None:
            try:
                request.deliver(item, last)
            finally:
                request.in_delivery = False
                if last:
                    request.forget()

        self._delivery.put(hand_over)

    def _close_account(self, request: Request) -> None:
        now = request.ended = time.monotonic()
        self.metrics.count("cached_tokens", request.cached_tokens)
        self.metrics.time(QUEUE_SECONDS, (request.began or now) - request.arrived)
        if request.began is not None:
            self.metrics.time(PREFILL_SECONDS, (request.answered or now) - request.began)
        if request.answered is not None:
            self.metrics.time(DECODE_SECONDS, now - request.answered)
