"""The thread-safe front of an engine: other threads submit requests and commands here, the engine's thread takes them.

It knows all requests in flight, the lock, and the limits of a request. It does not know how steps are computed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tritonlm.contract import (
    ContextLengthExceeded,
    Draining,
    InvalidRequest,
    NotOffered,
    QueueTimeout,
    RequestFailedRepeatedly,
    TritonLMError,
)
from tritonlm.contract.control import ABOUT, CANCEL, DRAIN, FIND, KNOWN, RETIRE, Command

from .config import EngineConfig
from .interrupt import Interrupt
from .monitoring.metrics import Metrics
from .monitoring.reports import Reports
from .monitoring.step_journal import StepJournal, Suspect, fingerprint
from .preparation import Preparation, Prepared
from .request import Request
from .runners.interface import Runner
from .scheduling.admission import AdmissionQueue

# The longest wait of an engine without requests.
_IDLE_SECONDS = 10.0


class Intake:
    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        admission: AdmissionQueue,
        reports: Reports,
        metrics: Metrics,
        journal: StepJournal | None,
        about: Mapping[str, Any],
        preparation: Preparation,
        interrupt: Interrupt,
    ) -> None:
        """`about` is the report of the command `about`. `interrupt` is set when the engine's thread has to look."""
        self._interrupt = interrupt
        self._preparation = preparation
        self._runner, self._config, self._admission, self._reports = runner, config, admission, reports
        self._metrics, self._journal, self._about = metrics, journal, dict(about)
        self._inbox: deque[Request] = deque()
        # Requests whose adapters are being loaded or whose grammars are being compiled, by number.
        self._preparing: dict[int, Request] = {}
        # All requests that have been submitted and have not ended, by number.
        self._requests: dict[int, Request] = {}
        self._changed = threading.Condition()
        self.closed = False

    # Called by other threads.

    def submit(self, request: Request) -> None:
        """Take a request, or raise the error that refuses it. The end of a request that is taken will be delivered."""
        self._check_limits(request)
        self._check_suspect(request)
        with self._changed:
            try:
                self._admission.enter(resumed=bool(request.parameters.resume_token_ids))
            except TritonLMError:
                self._metrics.count("refused")
                raise
            self._requests[request.number] = request
            self._preparing[request.number] = request
            # An idle engine waits from now on for no longer than requests may stay late or cancelled.
            self._changed.notify()
        self._preparation.prepare(request, self._put)

    def command(self, command: Command, reply: Callable[[dict[str, Any]], None]) -> None:
        """Run a command at once on the caller's thread, however long the current step takes."""
        with self._changed:
            if self.closed:
                raise Draining("this model has been stopped")
            report = self._run_command(command)
        reply(report)

    def cancel(self, request_id: str) -> int:
        """Mark the requests with this id as cancelled: they end before the next step. Return their number."""
        with self._changed:
            requests = self._requests.values()
            matches = [request for request in requests if request.id == request_id and not request.cancelled]
            for request in matches:
                request.cancelled = True
        self._interrupt.set()
        return len(matches)

    def isolates(self, request: Request) -> bool:
        """Whether this request, or one that is in flight, must be computed without others."""
        suspect = self._suspect(request)
        with self._changed:
            in_flight = any(other.isolated_steps for other in self._requests.values())
        return in_flight or (suspect is not None and suspect.isolated_steps > 0)

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._admission.close()
            self._interrupt.set()
            self._changed.notify()

    @property
    def in_flight(self) -> int:
        """The number of requests that have been submitted and have not ended."""
        return self._admission.in_flight

    def _put(self, request: Request, prepared: Prepared) -> None:
        """Put the request into the inbox with what it waited for, unless it has been put there to end."""
        with self._changed:
            if self._preparing.pop(request.number, None):
                request.adapter, request.constraint = prepared.adapter, prepared.constraint
                request.refusal = prepared.refusal
                self._inbox.append(request)
                self._interrupt.set()
                self._changed.notify()
                return
        self._preparation.release(prepared.adapter)

    # Called by the engine's thread.

    def wait_for_prepared(self, seconds: float) -> None:
        """Wait until every submitted request is in the inbox. Cancel those that are not after this long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._preparing, seconds)
            for request in self._preparing.values():
                request.cancelled = True

    def take(self) -> Iterator[Request]:
        """The submitted requests that the engine's thread has not taken yet."""
        if self._preparing:
            self._stop_waiting()
        while self._inbox:
            yield self._inbox.popleft()

    def _stop_waiting(self) -> None:
        """Put cancelled and late requests into the inbox without what they wait for: they end there."""
        now = time.monotonic()
        with self._changed:
            for request in list(self._preparing.values()):
                if now > request.queue_deadline:
                    request.refusal = QueueTimeout("Request timeout expired before its adapter or grammar was ready")
                if request.cancelled or request.refusal:
                    del self._preparing[request.number]
                    self._inbox.append(request)

    def wait(self, seconds: float) -> None:
        """Wait for a new request or for the end, at most this long while there are requests."""
        with self._changed:
            if not self._inbox and not self.closed:
                self._changed.wait(seconds if self._requests else _IDLE_SECONDS)

    def leave(self, request: Request) -> None:
        """Forget a request that has ended."""
        with self._changed:
            self._requests.pop(request.number, None)
            self._admission.leave()
        # After the counts, which would never be right again if this failed.
        self._preparation.release(request.adapter)

    def _run_command(self, command: Command) -> dict[str, Any]:
        if command.name == CANCEL:
            return {"cancelled": self.cancel(command.request_id)}
        if command.name == FIND:
            return {"requests": self._reports.find(command.request_id, self._requests.values())}
        if command.name == KNOWN:
            ids = set(command.request_ids)
            return {"known": [request.id for request in self._requests.values() if request.id in ids]}
        if command.name == ABOUT:
            return self._about
        if command.name == DRAIN:
            self._admission.drain()
        elif command.name == RETIRE:
            self._admission.retire()
        return self._reports.status()

    def _check_limits(self, request: Request) -> None:
        params, context = request.parameters, self._runner.context_length
        if request.embeds and not self._config.enable_embeddings:
            raise NotOffered("embeddings are off; start the server with TRITONLM_ENABLE_EMBEDDINGS=true")
        if not request.prompt_ids:
            raise InvalidRequest("prompt_ids must hold at least one token id", "prompt_ids")
        self._check_vocabulary(request)
        if params.max_tokens is None or params.seed is None:
            raise InvalidRequest("request must name max_tokens and seed", "request")
        if len(request.prompt_ids) + params.max_tokens > context:
            raise ContextLengthExceeded.for_lengths(context, len(request.prompt_ids), params.max_tokens)
        self._preparation.check(request)
        if params.resume_token_ids and len(params.resume_token_ids) >= params.max_tokens:
            raise InvalidRequest("resume_token_ids must be fewer than max_tokens", "resume_token_ids")

    def _check_vocabulary(self, request: Request) -> None:
        params, last = request.parameters, self._runner.vocab_size - 1
        for name, ids in (
            ("prompt_ids", request.prompt_ids),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
            ("resume_token_ids", params.resume_token_ids),
        ):
            if ids and not 0 <= min(ids) <= max(ids) <= last:
                raise InvalidRequest(f"{name} must be from 0 to {last}", name)

    def _check_suspect(self, request: Request) -> None:
        """Refuse a request that has killed two processes. Isolate a request that was in a step of a dead process."""
        suspect = self._suspect(request)
        if suspect and suspect.is_killer:
            self._metrics.count("refused")
            raise RequestFailedRepeatedly(
                f"this request was being computed when {suspect.deaths} processes of the model died; "
                "it is not tried again"
            )
        request.isolated_steps = suspect.isolated_steps if suspect else 0

    def _suspect(self, request: Request) -> Suspect | None:
        if self._journal is None:
            return None
        request.fingerprint = request.fingerprint or fingerprint(request)
        return self._journal.suspect(request)
