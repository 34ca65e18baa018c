"""For development: a loaded checkpoint that changes on disk is replaced, and its running requests end first.

It asks the engines whether they are out of date; how one is replaced the client knows.
"""

from __future__ import annotations

import time

from tritonlm.client.sync import Client
from tritonlm.contract import TritonLMError

from . import terminal
from .ports import reachable_host
from .settings import Settings

_EVERY_SECONDS = 1.0


class Reloader:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._url = f"{reachable_host(settings.triton_host)}:{settings.grpc_port}"
        self._next = 0.0
        # What was out of date at the last look: a checkpoint is taken when it has stopped changing.
        self._stale: dict[str, object] = {}

    def look(self) -> None:
        if time.monotonic() < self._next:
            return
        try:
            with Client(self._url, max_retries=0) as client:
                stale = {}
                for model in client.models.list().data:
                    if model.state == "ready" and (found := client.status(model.id)["stale"]):
                        stale[model.id] = found
                for name in [name for name, found in stale.items() if self._stale.get(name) == found]:
                    self._reload(client, name)
                self._stale = stale
        except TritonLMError:
            # Whether Triton is well is the supervisor's matter.
            self._stale = {}
        self._next = time.monotonic() + _EVERY_SECONDS

    def _reload(self, client: Client, name: str) -> None:
        try:
            with terminal.step(f"{name} has changed on disk: loading it again"):
                client.models.load(name, self._settings.load_seconds)
            terminal.say(f"{name} is loaded again")
        except TritonLMError as error:
            terminal.say(f"{name} is not loaded again: {error.message}")
