"""The gateway as a child of `tritonlm serve`: its command line, its port, when it answers. It imports nothing of it."""

from __future__ import annotations

import os
import sys
import time

import httpx

from . import paths
from .child import Child
from .errors import ServingError
from .placeholder import Reception
from .ports import reachable_host
from .repairs import file_of
from .settings import Settings

_START_SECONDS = 30.0
_POLL_SECONDS = 0.05
# It was asked before, and given the time that running requests may take; asked again it ends at once.
_EXIT_SECONDS = 5.0


class LocalGateway(Child):
    def __init__(self, settings: Settings, default_model: str, reception: Reception) -> None:
        triton = f"{reachable_host(settings.triton_host)}:{settings.grpc_port}"
        command = [
            *(sys.executable, "-m", "tritonlm.cli", "gateway"),
            *("--triton", triton, "--host", settings.host, "--port", str(settings.port)),
            *("--drain-seconds", str(settings.drain_seconds), "--repairs", str(file_of(settings.http_port))),
            *(("--default-model", default_model) if default_model else ()),
            *(("--registry", str(settings.registry)) if settings.registry else ()),
            *("--log-format", settings.log_format),
            *(("--otlp-endpoint", settings.otlp_endpoint) if settings.otlp_endpoint else ()),
            "--training" if settings.training else "--no-training",
        ]
        on_terminal = settings.logs == "auto" and sys.stderr.isatty()
        to_file = settings.logs_to_files and not on_terminal
        log = paths.cache() / "logs" / f"gateway-{settings.port}.log" if to_file else None
        super().__init__("the gateway", command, os.environ, log, _EXIT_SECONDS)
        self.url = f"http://{reachable_host(settings.host)}:{settings.port}"
        self._reception, self._whole_command = reception, command

    def start(self, again: bool = False) -> None:
        sockets, baton = self._reception.sockets, self._reception.baton
        self.given = [*sockets, *([baton] if baton is not None else [])]
        self.command = [*self._whole_command]
        for name, given in (("--listening-fd", sockets), ("--ready-fd", self.given[len(sockets) :])):
            for descriptor in given:
                self.command += [name, str(descriptor)]
        super().start(again)
        self._reception.let_go()

    def stop(self) -> None:
        super().stop()
        # Nobody comes after it.
        self._reception.stop()

    def wait_until_live(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        with httpx.Client(base_url=self.url, timeout=5, trust_env=False) as http:
            while not _is_live(http):
                if not self.is_running():
                    raise self.crash()
                if time.monotonic() > deadline:
                    raise ServingError(f"the gateway does not answer after {_START_SECONDS:.0f} s; see {self.log}")
                time.sleep(_POLL_SECONDS)


def _is_live(http: httpx.Client) -> bool:
    try:
        return http.get("/health/live").is_success
    except httpx.TransportError:
        return False
