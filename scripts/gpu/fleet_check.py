"""Several engines behind one interface, one for each device; where there are fewer devices, they share one."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import torch
from engine.fleet import Fleet
from engine.request import Request
from inference import harness
from stage import Options, Report
from tritonlm.contract import Chunk, GenerationRequest, SamplingParameters

_REQUESTS, _TOKENS = 12, 16


def run(options: Options, report: Report) -> None:
    found = torch.cuda.device_count() if options.on_gpu else 0
    devices = [f"cuda:{n}" if n < found else options.device for n in range(options.devices)]
    folder = harness.save_model("llama", options.scratch / "fleet")
    source = random.Random(1)
    some = [[source.randrange(3, harness.VOCABULARY) for _ in range(20)] for _ in range(_REQUESTS)]
    settings: dict[str, Any] = {"runner": "graphs", "dtype": "float32", "max_sequences": 4}
    single = harness.make_engine(folder, device=devices[0], **settings)
    alone = [harness.submit(single, prompt, max_tokens=_TOKENS, ignore_eos=True) for prompt in some]
    harness.run(single)
    engines = [harness.make_engine(folder, device=device, **settings) for device in devices]
    fleet = Fleet(engines)
    fleet.start()
    began = time.perf_counter()
    try:
        together = _generate(fleet, some, options)
    finally:
        fleet.close()
    seconds = time.perf_counter() - began
    shares = [int(engine.metric_values()["requests"]) for engine in engines]
    equal = sum(ids == output.token_ids for ids, output in zip(together, alone, strict=True))
    report(
        devices=devices, simulated=found < options.devices, requests=shares, equal=equal, of=len(some),
        seconds=round(seconds, 2),
    )  # fmt: skip
    if equal != len(some) or 0 in shares:
        raise AssertionError("the engines of a fleet must share the requests and give the tokens of one engine")


def _generate(fleet: Fleet, some: list[list[int]], options: Options) -> list[list[int]]:
    """The tokens of all prompts, sent at once."""
    parameters = SamplingParameters.from_mapping(
        {"max_tokens": _TOKENS, "temperature": 0, "seed": 7, "return_token_ids": True, "ignore_eos": True}
    )
    tokens: list[list[int]] = [[] for _ in some]
    ends = [threading.Event() for _ in some]

    def receive(number: int, item: Any, last: bool) -> None:
        if isinstance(item, Chunk):
            tokens[number] += item.token_ids
        if last:
            ends[number].set()

    for number, prompt in enumerate(some):
        request = GenerationRequest(parameters, False)
        fleet.submit(Request(str(number), prompt, request, lambda item, last, n=number: receive(n, item, last)))  # type: ignore[misc]
    for number, end in enumerate(ends):
        if not end.wait(max(options.left() - 2, 1)):
            raise TimeoutError(f"request {number} has not ended")
    return tokens
