"""The Triton adapter of `generate`: requests and commands in, chunks and reports out, FINAL exactly once on every path.

It knows tensors and response senders. The engine decides everything else about a request. `execute` only hands requests
over: they wait in the engine's own bounded queue, where they can be cancelled and timed out.
"""

from __future__ import annotations

import json
import os
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from tritonlm.checkpoints.resolve import checkpoint_folder
from tritonlm.checkpoints.tokenizer import load_decoder
from tritonlm.contract import Checkpoint, CheckpointError, GenerationRequest, InvalidRequest, TritonLMError
from tritonlm.contract.adapters_file import adapters_file
from tritonlm.contract.control import DRAIN, RETIRE, STATUS, Command
from tritonlm.contract.load_progress import LoadProgress, load_file
from tritonlm.contract.parts import language_model_of
from tritonlm.contract.tensors import CONTROL, PROMPT_IDS, REPORT, REQUEST
from tritonlm.contract.tool_formats import AUTO, SETTING
from tritonlm.contract.triton_requests import (
    error_response,
    inputs_of,
    model_parameters,
    response,
    text_of,
    trace_of,
)
from tritonlm.observability import logs

from .engine.runners.loading import import_torch

# Before the imports that need torch.
import_torch()

from .engine.config import EngineConfig  # noqa: E402
from .engine.constraints.compiler import ConstraintCompiler  # noqa: E402
from .engine.engine import Engine  # noqa: E402
from .engine.fleet import combine  # noqa: E402
from .engine.monitoring.step_journal import journal_file, open_journals  # noqa: E402
from .engine.request import Item, Request  # noqa: E402
from .engine.runners.interface import choose_devices  # noqa: E402
from .engine.runners.select import open_runner  # noqa: E402
from .engine.scheduling.admission import RETIRED_SECONDS  # noqa: E402
from .metrics_exporter import MetricsExporter  # noqa: E402
from .request_log import RequestLog  # noqa: E402

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        logs.configure_from_environment()
        folder = checkpoint_folder(args, weights=True)
        self._config = _config(args, folder)
        checkpoint = Checkpoint(folder)
        devices = choose_devices(self._config.device)
        load_progress = LoadProgress(
            len(devices) * checkpoint.weight_bytes(), load_file(os.getppid(), args["model_name"])
        )
        try:
            runners = [open_runner(folder, self._config, device, load_progress) for device in devices]
        finally:
            load_progress.close()
        self._folder, self._fingerprint = folder, checkpoint.fingerprint()
        tokenizer = load_decoder(checkpoint)
        about = checkpoint.about
        if self._config.tool_format != AUTO:
            about[SETTING] = self._config.tool_format

        def decode(ids: list[int], skip_special_tokens: bool) -> str:
            return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

        self._constraints = ConstraintCompiler(
            checkpoint.tokenizer_file, checkpoint.vocab_size, checkpoint.eos_token_ids
        )
        journals = open_journals(journal_file(args["model_name"], self._fingerprint), len(runners))
        self._engines = [
            Engine(runner, self._config, decode, checkpoint.eos_token_ids, about, journal, self._constraints)
            for runner, journal in zip(runners, journals, strict=True)
        ]
        self._engine = combine(self._engines)
        self._engine.start()
        model = language_model_of(args["model_name"], folder)
        self._request_log = RequestLog(model)
        self._metrics_exporter = MetricsExporter(pb_utils, self._engine, model)
        self._metrics_exporter.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender, outputs = request.get_response_sender(), list(request.requested_output_names())
            try:
                self._dispatch(request, sender, outputs)
            except Exception as error:  # an error of one request must not affect the others
                sender.send(error_response(pb_utils, error), flags=FINAL)

    def finalize(self) -> None:
        self._engine.close()
        self._constraints.close()
        self._metrics_exporter.close()
        self._request_log.close()
        for engine in self._engines:
            # A step that hangs still uses its weights: they go with the process.
            if engine.has_ended:
                engine.runner.close()

    def _dispatch(self, request: Any, sender: Any, outputs: list[str]) -> None:
        arrays = inputs_of(request)
        control = text_of(CONTROL, arrays)
        if control is not None:
            self._run_command(Command.from_json(control), sender, outputs)
            return
        text = text_of(REQUEST, arrays)
        if text is None or PROMPT_IDS.name not in arrays:
            raise InvalidRequest("generate needs prompt_ids and request, or control", "prompt_ids")
        prompt_ids = [int(token_id) for token_id in arrays[PROMPT_IDS.name].reshape(-1)]
        generation = GenerationRequest.from_json(text)
        self._engine.submit(self._make_request(request, prompt_ids, generation, sender, outputs))

    def _run_command(self, command: Command, sender: Any, outputs: list[str]) -> None:
        def reply(report: dict[str, Any]) -> None:
            if command.name == STATUS:
                report |= {"stale": self._changed_fingerprint(), "broken": self._checkpoint_error()}
            sender.send(response(pb_utils, {REPORT: REPORT.pack(json.dumps(report))}, outputs), flags=FINAL)

        if command.name in (DRAIN, RETIRE):
            self._metrics_exporter.pause(RETIRED_SECONDS)
        self._engine.command(command, reply)

    def _changed_fingerprint(self) -> str:
        """The fingerprint of the checkpoint on disk if it differs from the loaded one, else an empty string."""
        current = Checkpoint(self._folder).fingerprint()
        return "" if current == self._fingerprint else current

    def _checkpoint_error(self) -> str:
        """Why the checkpoint on disk cannot be loaded; empty if it looks valid."""
        try:
            Checkpoint(self._folder).check()
        except CheckpointError as error:
            return error.message
        return ""

    def _make_request(
        self, triton_request: Any, prompt_ids: list[int], generation: GenerationRequest, sender: Any, outputs: list[str]
    ) -> Request:
        def deliver(item: Item, last: bool) -> None:
            if isinstance(item, TritonLMError):
                message = error_response(pb_utils, item)
            else:
                message = response(pb_utils, item.to_arrays(), outputs)
            try:
                sender.send(message, flags=FINAL if last else 0)
            finally:
                # After the send, so that the caller does not wait for the log.
                if last and (ended := reference()):
                    self._request_log.write(ended, item, traceparent)

        now = time.monotonic()
        seconds = min(generation.parameters.timeout or self._config.max_seconds, self._config.max_seconds)
        queue_seconds = min(self._config.queue_seconds or seconds, seconds)
        # A timeout in Triton's own protocol (in microseconds) also limits the time in the queue.
        if microseconds := triton_request.timeout():
            queue_seconds = min(queue_seconds, microseconds / 1e6)
        traceparent = trace_of(triton_request) if self._request_log.has_traces else ""
        request = Request(
            triton_request.request_id(),
            prompt_ids,
            generation,
            deliver,
            queue_deadline=now + queue_seconds,
            deadline=now + seconds,
        )
        # Weak: otherwise `deliver` and the request keep each other, and the sender, until a garbage collection.
        reference = weakref.ref(request)
        return request


def _config(args: dict[str, str], folder: Path) -> EngineConfig:
    """The engine's settings, with the file of this LM's adapters where a folder for all LMs is set."""
    config = EngineConfig.from_strings(model_parameters(args))
    if not config.adapters_file:
        return config
    file = adapters_file(config.adapters_file, language_model_of(args["model_name"], folder))
    return replace(config, adapters_file=str(file))
