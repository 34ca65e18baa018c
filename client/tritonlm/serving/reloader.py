"""For development: reloads a language model when its checkpoint changes on disk; running requests finish first.

The engines report whether their checkpoint has changed. The client does the reload; it is imported at the first check,
since most servers do without.
"""

from __future__ import annotations

import time

import tritonlm.client
from tritonlm.contract import TritonLMError

from . import terminal
from .ports import reachable_host
from .settings import Settings

_INTERVAL_SECONDS = 1.0


class Reloader:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._url = f"{reachable_host(settings.triton_host)}:{settings.grpc_port}"
        self._next_check = 0.0
        # Changed checkpoints at the last check; a model is reloaded once its checkpoint has stopped changing.
        self._stale: dict[str, object] = {}

    def check(self) -> None:
        if time.monotonic() < self._next_check:
            return
        try:
            with tritonlm.client.Client(self._url, max_retries=0) as client:
                stale = {}
                for model in client.models.list().data:
                    if model.state == "ready" and (version := client.status(model.id)["stale"]):
                        stale[model.id] = version
                for name in [name for name, version in stale.items() if self._stale.get(name) == version]:
                    self._reload(client, name)
                self._stale = stale
        except TritonLMError:
            # The supervisor handles Triton's failures.
            self._stale = {}
        self._next_check = time.monotonic() + _INTERVAL_SECONDS

    def _reload(self, client: tritonlm.client.Client, name: str) -> None:
        try:
            with terminal.step(f"{name} has changed on disk: reloading"):
                client.models.load(name, self._settings.load_seconds)
            terminal.say(f"{name} is reloaded")
        except TritonLMError as error:
            terminal.say(f"{name} could not be reloaded: {error.message}")
