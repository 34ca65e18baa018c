"""The engine: takes requests in, steps them all together, hands out chunks.

One thread steps: take in → plan → one forward over the flat batch → sample all rows → release. A second one delivers,
because a delivery may block. The engine speaks token ids; text is known to `release` alone, Triton to nobody here.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from tritonlm.contract import (
    ContextLengthExceeded,
    Draining,
    EngineFailure,
    InvalidRequest,
    NotOffered,
    QueueTimeout,
    TokenLogprob,
    TritonLMError,
)
from tritonlm.contract.control import ABOUT, CANCEL, DRAIN, FIND, KNOWN, RETIRE, Command

from .answer import CANCELLED, STOP, TIMEOUT, Answer, Decode
from .blocks import BlockPool
from .config import EngineConfig
from .door import Door
from .embedding import PooledPrompt
from .model_runner import Computed, Runner
from .request import Item, Request
from .sampler import SamplingState, sample, score_prompt
from .scheduler import Scheduler, Slice

_log = logging.getLogger("tritonlm.engine")
_IDLE_SECONDS = 0.25
_JOIN_SECONDS = 10.0

COUNTERS = (
    "requests", "finished", "cancelled", "timed_out", "failed", "refused", "steps", "prompt_tokens", "generated_tokens",
    "cached_tokens",
)  # fmt: skip


class Engine:
    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        decode: Decode,
        end_ids: Collection[int],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """`about` is what the command of that name tells of the checkpoint."""
        self.runner = runner
        self._about = dict(about or {})
        self.config = config
        self._decode = decode
        self._end_ids = end_ids
        self.pool = BlockPool(runner.blocks, config.block_tokens)
        self.scheduler = Scheduler(self.pool, config.max_sequences, config.prefill_tokens)
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._released_at = float("-inf")
        self._created, self._born = int(time.time()), time.monotonic()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._door = Door(config.max_sequences, config.max_queue_size)
        self._closing = False
        self._outbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    # What callers on other threads use.

    def start(self) -> None:
        for work in (self._run, self._send):
            self._threads.append(threading.Thread(target=work, name=f"engine{work.__name__}", daemon=True))
            self._threads[-1].start()

    def close(self) -> None:
        """Cancel what runs, deliver what is left, and end both threads."""
        with self._wake:
            self._closing = True
            self._door.drain()
            self._wake.notify()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)

    def submit(self, request: Request) -> None:
        """Take a request, or raise the error that refuses it. From here on its end will be delivered."""
        self._check(request)
        with self._wake:
            try:
                self._door.enter()
            except TritonLMError:
                self._counters["refused"] += 1
                raise
            self._inbox.append(lambda: self._take_in(request))
            self._wake.notify()

    @property
    def inside(self) -> int:
        """How many requests have come in and not ended."""
        return self._door.inside

    def command(self, command: Command, reply: Callable[[dict[str, Any]], None]) -> None:
        """Obey a command on the engine's own thread, between two steps: an answer proves that it is alive."""
        with self._wake:
            if self._closing:
                raise Draining("this model has been stopped")
            if command.name == DRAIN:
                self._door.drain()
            elif command.name == RETIRE:
                self._door.retire()
            self._inbox.append(lambda: self._answer_command(command, reply))
            self._wake.notify()

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
        plan = self.scheduler.plan()
        if not plan:
            return False
        computed = self.runner.forward(plan)
        self._advance(plan, computed)
        self._release_chunks()
        self._counters["steps"] += 1
        return True

    def _run(self) -> None:
        while not self._closing:
            if not self.try_step():
                self._wait_for_work()
        self.take_in()  # what came in at the last moment gets its end too
        self._cancel_where(lambda _: True)
        self._outbox.put(None)

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

    def take_in(self) -> None:
        """Obey what has come in, and end what has run out of time."""
        while self._inbox:
            self._inbox.popleft()()
        now = time.monotonic()
        for request in self.scheduler.remove_where(lambda r: now > (r.deadline if r.started else r.queue_deadline)):
            self._counters["timed_out"] += 1
            if request.started:
                self._deliver(request, request.answer.final(TIMEOUT), last=True)
            else:
                self._deliver(request, QueueTimeout("Request timeout expired before a place was free"), last=True)

    def _take_in(self, request: Request) -> None:
        wanted = request.parameters
        assert wanted.seed is not None
        self._counters["requests"] += 1
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

    def _answer_command(self, command: Command, reply: Callable[[dict[str, Any]], None]) -> None:
        report = self._obey(command)
        self._outbox.put(lambda: reply(report))

    def _obey(self, command: Command) -> dict[str, Any]:
        if command.name == CANCEL:
            return {"cancelled": self.cancel(command.request_id)}
        if command.name == FIND:
            return {"requests": self.find(command.request_id)}
        if command.name == KNOWN:
            return {"known": self.known(command.request_ids)}
        return self._about if command.name == ABOUT else self.status()

    def find(self, request_id: str) -> list[dict[str, Any]]:
        """How far the requests of this id have come; `position` counts those that get a place before it."""
        places = [("running", 0, request) for request in self.scheduler.running]
        places += [("waiting", position, request) for position, request in enumerate(self.scheduler.waiting)]
        return [
            {"state": state, "position": position, "completion_tokens": request.generated}
            for state, position, request in places
            if request.id == request_id
        ]

    def known(self, request_ids: Collection[str]) -> list[str]:
        """Those of them that run or wait: the others have ended, or were lost with another process."""
        asked = set(request_ids)
        return [request.id for request in (*self.scheduler.running, *self.scheduler.waiting) if request.id in asked]

    def cancel(self, request_id: str) -> int:
        """End the requests of this id, wherever they are; how many there were."""
        return self._cancel_where(lambda request: request.id == request_id)

    def _cancel_where(self, condition: Callable[[Request], bool]) -> int:
        found = self.scheduler.remove_where(condition)
        for request in found:
            self._counters["cancelled"] += 1
            self._deliver(request, request.answer.final(CANCELLED), last=True)
        return len(found)

    def status(self) -> dict[str, Any]:
        return {
            **self._counters,
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "draining": self._door.is_draining,
            "retired": self._door.is_retired,
            "idle_seconds": round(self._door.idle_seconds, 3),
            "idle_unload_seconds": self.config.idle_unload_seconds,
            "memory_bytes": self.runner.memory_bytes,
            "memory_budget": self.config.memory_budget,
            "created": self._created,
            "age_seconds": round(time.monotonic() - self._born, 3),
            "places": self.config.max_sequences,
            "preemptions": self.scheduler.preemptions,
            "blocks": self.pool.total,
            "blocks_used": self.pool.used,
            "blocks_idle": self.pool.idle,
            "kv_cache_tokens": self.pool.total * self.pool.block_tokens,
            "context_length": self.runner.context_length,
            "vocab_size": self.runner.vocab_size,
            "device": str(self.runner.device),
            "dtype": str(self.runner.dtype).removeprefix("torch."),
        }

    def _advance(self, plan: Sequence[Slice], computed: Computed) -> None:
        """Give every slice its rows: pool or score prompts, sample next tokens, end what has ended."""
        logits = computed.logits
        row, sampling_rows, sampling = 0, [], []
        for piece in plan:
            request = piece.request
            if not request.started_answering:
                self._counters["prompt_tokens"] += piece.count
            self.scheduler.advance(piece)
            if request.wanted.embed:
                request.answer.add(piece.start, computed.hidden[row : row + piece.count])
                row += piece.count
                if piece.samples:
                    self._counters["finished"] += 1
                    self._end(request, request.answer.final(STOP))
                continue
            if request.scores_prompt:
                self._score_prompt(piece, logits[row : row + piece.count])
                row += piece.count
            elif piece.samples:
                row += 1
            if piece.samples:
                request.answer.end_of_prompt()
                sampling_rows.append(row - 1)
                sampling.append(request)
        chosen = computed.only(sampling_rows)
        drawn = sample(chosen.logits, [request.sampling for request in sampling], chosen.best) if sampling else []
        for request, token in zip(sampling, drawn, strict=True):
            if token is None:
                self.runner.clear(request.table.blocks)
                self._end(
                    request, EngineFailure("the model produced numbers that are not finite (NaN) for this prompt")
                )
                continue
            if not request.answer.finish_reason:
                request.ids.append(token.token_id)
                request.sampling.append(token.token_id)
                request.answer.feed(token.token_id, token.logprob)
                request.started_answering = True
                self._counters["generated_tokens"] += 1
            if request.answer.finish_reason:
                self._counters["finished"] += 1
                self._end(request, request.answer.final(request.answer.finish_reason))

    def _score_prompt(self, piece: Slice, logits: torch.Tensor) -> None:
        request = piece.request
        if piece.start == 0 and not request.scored:
            request.answer.score_prompt([TokenLogprob(request.prompt_ids[0], None)])
        first = max(piece.start, request.scored)
        last = min(piece.start + piece.count, len(request.prompt_ids) - 1)
        if first < last:
            rows = logits[first - piece.start : last - piece.start]
            entries = score_prompt(rows, request.prompt_ids[first + 1 : last + 1], request.parameters.logprobs or 0)
            request.answer.score_prompt([entry for entry in entries if entry is not None])
            request.scored = last

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
        self.pool.forget_idle()

    def _deliver(self, request: Request, item: Item, *, last: bool) -> None:
        request.in_delivery = True
        if isinstance(item, TritonLMError):
            self._counters["failed"] += 1
        if last:
            self._counters["cached_tokens"] += request.cached_tokens
            with self._wake:
                self._door.leave()

        def hand_over() -> None:
            try:
                request.deliver(item, last)
            finally:
                request.in_delivery = False
                if last:
                    request.forget()

        self._outbox.put(hand_over)

    # The delivering thread.

    def _send(self) -> None:
        while (hand_over := self._outbox.get()) is not None:
            self._hand_over(hand_over)

    def deliver_now(self) -> None:
        """Deliver what is ready, on the caller's thread: for those who step the engine themselves."""
        while not self._outbox.empty():
            hand_over = self._outbox.get()
            assert hand_over is not None
            self._hand_over(hand_over)

    def _hand_over(self, hand_over: Callable[[], None]) -> None:
        try:
            hand_over()
        except Exception:  # its caller is gone; the others' chunks must go on
            _log.exception("a chunk could not be delivered")
