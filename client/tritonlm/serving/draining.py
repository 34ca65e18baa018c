"""Drains a local server: its engines and its gateway refuse new requests, and the running ones may end.

It knows when nothing runs any more. The supervisor decides when draining begins, and stops the processes afterwards.
"""

from __future__ import annotations

import time
from typing import Any

import httpx

from tritonlm.contract.control import DRAIN, STATUS, Command

from . import terminal
from .control import TritonControl
from .errors import ServingError
from .gateway import LocalGateway
from .repository import LanguageModel
from .triton import LocalTriton
from .watchdog import Watchdog

_POLL_SECONDS = 0.1


def drain(
    models: list[LanguageModel],
    triton: LocalTriton,
    control: TritonControl,
    gateway: LocalGateway | None,
    watchdog: Watchdog,
    seconds: float,
) -> None:
    """Refuse new requests and wait up to `seconds` for the running ones; a process that dies meanwhile is restarted
    for them. The gateway exits after its own requests."""
    deadline = time.monotonic() + seconds
    with terminal.step(f"stopping: waiting up to {seconds:g} s for running requests (Ctrl-C again: stop now)"):
        names = _engines(models, control)
        draining = [engine for engine in names if _send(control, engine, DRAIN) is not None]
        if gateway:
            gateway.terminate()
        while (draining or _is_running(gateway)) and time.monotonic() < deadline and triton.is_running():
            watchdog.check(triton.process_id)
            draining = [engine for engine in draining if _is_busy(_send(control, engine, STATUS))]
            if draining or _is_running(gateway):
                time.sleep(_POLL_SECONDS)
    if draining:
        terminal.say(f"cut off the running requests of {', '.join(names[engine] for engine in draining)}")
    elif _is_running(gateway):
        terminal.say("cut off the gateway's running requests")


def _is_running(gateway: LocalGateway | None) -> bool:
    return gateway is not None and gateway.is_running()


def _engines(models: list[LanguageModel], control: TritonControl) -> dict[str, str]:
    """LM names by engine: the models loaded at start, and those that requests have loaded since."""
    try:
        loaded = control.loaded_engines()
    except (ServingError, httpx.HTTPError):
        loaded = []
    on_demand = {engine: engine.removesuffix("-generate") for engine in loaded}
    return on_demand | {model.generate: model.name for model in models}


def _send(control: TritonControl, engine: str, command: str) -> dict[str, Any] | None:
    """The engine's report; None when it does not respond, and so has nothing to drain."""
    try:
        return control.command(engine, Command(command))
    except (ServingError, httpx.HTTPError):
        return None


def _is_busy(report: dict[str, Any] | None) -> bool:
    return report is not None and report["running"] + report["waiting"] > 0
