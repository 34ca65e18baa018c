"""Triton's side of `generate`: requests and commands in, chunks and reports out, FINAL exactly once on every path.

It knows tensors and response senders; what becomes of a request is the engine's matter. `execute` hands over and
returns: the requests wait in the engine's own bounded queue, where they can be cancelled and timed out.
"""

from __future__ import annotations

import json
import time
from typing import Any

import triton_python_backend_utils as pb_utils
from tritonlm.checkpoints.hub import checkpoint_folder
from tritonlm.checkpoints.tokenizer import load_decoder
from tritonlm.contract import Checkpoint, CheckpointError, GenerationRequest, InvalidRequest, TritonLMError
from tritonlm.contract.adapter import (
    error_response,
    inputs_of,
    model_parameters,
    response,
    text_of,
    trace_of,
)
from tritonlm.contract.control import DRAIN, RETIRE, STATUS, Command
from tritonlm.contract.parts import language_model_of
from tritonlm.contract.tensors import CONTROL, PROMPT_IDS, REPORT, REQUEST
from tritonlm.observability import logs

from .engine.config import EngineConfig
from .engine.engine import Engine
from .engine.fleet import together
from .engine.monitoring.step_journal import StepJournal, journal_file
from .engine.request import Item, Request
from .engine.runners.interface import choose_devices
from .engine.runners.select import open_runner
from .engine.scheduling.admission import RETIRED_SECONDS
from .metrics_exporter import Publisher
from .request_log import Accounts

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        logs.configure_from()
        folder = checkpoint_folder(args, weights=True)
        self._config = EngineConfig.from_strings(model_parameters(args))
        self._runners = [open_runner(folder, self._config, device) for device in choose_devices(self._config.device)]
        checkpoint = Checkpoint(folder)
        self._folder, self._loaded = folder, checkpoint.fingerprint()
        tokenizer = load_decoder(checkpoint)

        def decode(ids: list[int], skip_special_tokens: bool) -> str:
            return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

        self._engine = together(
            [
                Engine(
                    runner,
                    self._config,
                    decode,
                    checkpoint.eos_token_ids,
                    checkpoint.about,
                    StepJournal(journal_file(args["model_name"], number, self._loaded)),
                )
                for number, runner in enumerate(self._runners)
            ]
        )
        self._engine.start()
        model = language_model_of(args["model_name"], folder)
        self._accounts = Accounts(model)
        self._publisher = Publisher(pb_utils, self._engine, model)
        self._publisher.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender, wanted = request.get_response_sender(), list(request.requested_output_names())
            try:
                self._hand_over(request, sender, wanted)
            except Exception as error:  # each request stands alone
                sender.send(error_response(pb_utils, error), flags=FINAL)

    def finalize(self) -> None:
        self._engine.close()
        self._publisher.close()
        self._accounts.close()
        for runner in self._runners:
            runner.close()

    def _hand_over(self, request: Any, sender: Any, wanted: list[str]) -> None:
        arrays = inputs_of(request)
        control = text_of(CONTROL, arrays)
        if control is not None:
            self._obey(Command.from_json(control), sender, wanted)
            return
        text = text_of(REQUEST, arrays)
        if text is None or PROMPT_IDS.name not in arrays:
            raise InvalidRequest("generate needs prompt_ids and request, or control", "prompt_ids")
        prompt_ids = [int(token_id) for token_id in arrays[PROMPT_IDS.name].reshape(-1)]
        self._engine.submit(self._make(request, prompt_ids, GenerationRequest.from_json(text), sender, wanted))

    def _obey(self, command: Command, sender: Any, wanted: list[str]) -> None:
        def reply(report: dict[str, Any]) -> None:
            if command.name == STATUS:
                report |= {"stale": self._stale(), "broken": self._broken()}
            sender.send(response(pb_utils, {REPORT: REPORT.pack(json.dumps(report))}, wanted), flags=FINAL)

        if command.name in (DRAIN, RETIRE):
            self._publisher.rest(RETIRED_SECONDS)
        self._engine.command(command, reply)

    def _stale(self) -> str:
        """Empty while the checkpoint on disk is the loaded one; else what it is like now."""
        now = Checkpoint(self._folder).fingerprint()
        return "" if now == self._loaded else now

    def _broken(self) -> str:
        """Why what is on disk now cannot be loaded; empty where it looks well."""
        try:
            Checkpoint(self._folder).check()
        except CheckpointError as error:
            return error.message
        return ""

    def _make(
        self, request: Any, prompt_ids: list[int], asked: GenerationRequest, sender: Any, wanted: list[str]
    ) -> Request:
        def deliver(item: Item, last: bool) -> None:
            if isinstance(item, TritonLMError):
                answer = error_response(pb_utils, item)
            else:
                answer = response(pb_utils, item.to_arrays(), wanted)
            try:
                sender.send(answer, flags=FINAL if last else 0)
            finally:
                # Its caller does not wait for it.
                if last:
                    self._accounts.settle(made, item, traceparent)

        now = time.monotonic()
        seconds = min(asked.parameters.timeout or self._config.max_seconds, self._config.max_seconds)
        queue_seconds = min(self._config.queue_seconds or seconds, seconds)
        # A timeout of Triton's own protocol (microseconds, in the request itself) bounds the wait as well.
        if microseconds := request.timeout():
            queue_seconds = min(queue_seconds, microseconds / 1e6)
        traceparent = trace_of(request) if self._accounts.has_traces else ""
        made = Request(
            request.request_id(), prompt_ids, asked, deliver, queue_deadline=now + queue_seconds, deadline=now + seconds
        )
        return made
