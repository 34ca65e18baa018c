"""The gateway as a child process of `tritonlm serve`: command line, sockets, liveness.

It imports nothing from the gateway package.
"""

from __future__ import annotations

import os
import sys
import time

import httpx

from . import paths
from .child import Child
from .errors import ServingError
from .placeholder import PlaceholderListener
from .ports import reachable_host
from .restart_counts import restart_counts_file
from .settings import Settings

_START_SECONDS = 30.0
_POLL_SECONDS = 0.05
# drain() has sent SIGTERM and waited for running requests; a second SIGTERM ends the gateway at once.
_EXIT_SECONDS = 5.0


class LocalGateway(Child):
    yields_to_engine = True

    def __init__(self, settings: Settings, url: str, default_model: str, placeholder: PlaceholderListener) -> None:
        """`url`: where it will listen; with https when its own settings have a certificate."""
        triton = f"{reachable_host(settings.triton_host)}:{settings.grpc_port}"
        command = [
            *(sys.executable, "-m", "tritonlm", "gateway"),
            *("--triton", triton, "--host", settings.host, "--port", str(settings.port)),
            *("--drain-seconds", str(settings.drain_seconds)),
            *("--repairs", str(restart_counts_file(settings.http_port))),
            *(("--default-model", default_model) if default_model else ()),
            *(("--registry", str(settings.registry)) if settings.registry else ()),
            *(("--adapters-folder", str(settings.adapters_folder)) if settings.adapters_folder else ()),
            *("--log-format", settings.log_format),
            *(("--otlp-endpoint", settings.otlp_endpoint) if settings.otlp_endpoint else ()),
            "--training" if settings.training else "--no-training",
        ]
        on_terminal = settings.logs == "auto" and sys.stderr.isatty()
        to_file = settings.logs_to_files and not on_terminal
        log = paths.cache() / "logs" / f"gateway-{settings.port}.log" if to_file else None
        super().__init__("the gateway", command, os.environ, log, _EXIT_SECONDS)
        self.url, self._placeholder, self._base_command = url, placeholder, command

    def start(self, again: bool = False) -> None:
        socket_fds, ready_fd = self._placeholder.socket_fds, self._placeholder.ready_fd
        ready_fds = [ready_fd] if ready_fd is not None else []
        self.inherited_fds = [*socket_fds, *ready_fds]
        self.command = [*self._base_command]
        for option, descriptors in (("--listening-fd", socket_fds), ("--ready-fd", ready_fds)):
            for descriptor in descriptors:
                self.command += [option, str(descriptor)]
        super().start(again)
        self._placeholder.release()

    def stop(self) -> None:
        super().stop()
        # No other gateway follows.
        self._placeholder.stop()

    def wait_until_live(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        # The certificate is not verified: this process itself opened the port, and it need not name this address.
        with httpx.Client(base_url=self.url, timeout=5, trust_env=False, verify=False) as http:
            while not _is_live(http):
                if not self.is_running():
                    raise self.crash_error()
                if time.monotonic() > deadline:
                    raise ServingError(f"the gateway does not respond after {_START_SECONDS:.0f} s; see {self.log}")
                time.sleep(_POLL_SECONDS)


def _is_live(http: httpx.Client) -> bool:
    try:
        return http.get("/health/live").is_success
    except httpx.TransportError:
        return False
