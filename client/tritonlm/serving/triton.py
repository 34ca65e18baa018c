"""One local `tritonserver`: its command line, its environment, and the cleanup after it.

It knows how Triton runs, not which models it loads (see `control`) nor when it stops (see `supervisor`).
"""

from __future__ import annotations

import os
import secrets
import site
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from tritonlm.access import control_secret as secret
from tritonlm.contract.idle_threads import ASLEEP
from tritonlm.contract.process_files import SERIES

from . import paths
from .backend import Installation
from .child import Child
from .preflight import SHARED_MEMORY
from .settings import LogLevel, Settings

# drain() has waited for running requests before; the rest are cut off after this time.
EXIT_SECONDS = 5

# Loading a model runs code, shared memory is accessible to all callers, and logs and traces contain prompts.
_RESTRICTED = ("model-repository", "shared-memory", "logging", "trace")
_LOG_FLAGS: dict[LogLevel, list[str]] = {
    "debug": ["--log-verbose=1"],
    "info": [],
    "warning": ["--log-info=false"],
    "error": ["--log-info=false", "--log-warning=false"],
}


def triton_environment(installation: Installation, settings: Settings) -> dict[str, str]:
    """This process's environment, plus the paths by which Triton's model processes find this Python's packages."""
    package_root = Path(__file__).resolve().parents[2]
    python_path = [str(package_root), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    python_path += site.getsitepackages()
    environment = {
        **ASLEEP,
        # The cache of kernels compiled for this machine.
        "TRITONLM_NATIVE_CACHE": str(paths.cache() / "native"),
        **os.environ,
        **settings.engine_environment(),
        "TRITONLM_ADAPTERS_FILE": str(settings.adapters),
    }

    def prepend(name: str, values: Sequence[str]) -> None:
        old = environment.get(name, "")
        environment[name] = os.pathsep.join([*dict.fromkeys(values), *([old] if old else [])])

    # The embedded Python of a model process finds its prefix through the first `python3` on PATH.
    prepend("PATH", [str(Path(sys.executable).parent)])
    prepend("PYTHONPATH", python_path)
    prepend("LD_LIBRARY_PATH", [str(folder) for folder in installation.library_path])
    return environment


def triton_command(
    binary: Path,
    backend: Path,
    settings: Settings,
    repositories: Sequence[Path],
    shared_memory_prefix: str,
    control_secret: str,
) -> list[str]:
    restricted = f"{','.join(_RESTRICTED)}:{secret.HEADER}={control_secret}"
    return [
        str(binary),
        *(f"--model-repository={folder.resolve()}" for folder in repositories),
        "--model-control-mode=explicit",
        "--disable-auto-complete-config",
        f"--backend-directory={backend}",
        f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix}",
        *_addresses(settings.triton_host),
        f"--http-port={settings.http_port}",
        f"--grpc-port={settings.grpc_port}",
        f"--metrics-port={settings.metrics_port}",
        f"--http-restricted-api={restricted}",
        f"--grpc-restricted-protocol={restricted}",
        f"--exit-timeout-secs={EXIT_SECONDS}",
        *_LOG_FLAGS[settings.log_level],
        *_trace_flags(settings.otlp_endpoint),
    ]


def _addresses(host: str) -> list[str]:
    """Triton's servers write an IPv6 address in two ways; HTTP's takes any other for a broadcast."""
    http, grpc = (f"ipv6:{host}", f"[{host}]") if ":" in host else (host, host)
    return [f"--http-address={http}", f"--grpc-address={grpc}", f"--metrics-address={http}"]


def _trace_flags(endpoint: str | None) -> list[str]:
    """Options that export Triton's own spans for every request that carries a trace."""
    if endpoint is None:
        return []
    options = {
        "mode": "opentelemetry",
        "level": "TIMESTAMPS",
        "rate": "1000000",
        "opentelemetry,url": f"{endpoint.rstrip('/')}/v1/traces",
        "opentelemetry,resource": "service.name=triton",
    }
    return [f"--trace-config={name}={value}" for name, value in options.items()]


class LocalTriton(Child):
    """Triton as a child process; its shared-memory regions are removed after it."""

    def __init__(
        self, settings: Settings, installation: Installation, backend: Path, repositories: Sequence[Path]
    ) -> None:
        # Unique per run, so that the cleanup never touches another Triton's regions.
        self.shared_memory_prefix = f"tritonlm-{os.getpid()}-{secrets.token_hex(4)}-"
        self._ports = (settings.http_port, settings.grpc_port)
        self.secret = secret.new_secret()
        environment = triton_environment(installation, settings)
        environment[SERIES] = f"{os.getpid()}-{secrets.token_hex(4)}"
        super().__init__(
            "Triton",
            triton_command(
                installation.binary, backend, settings, repositories, self.shared_memory_prefix, self.secret
            ),
            environment,
            paths.cache() / "logs" / f"triton-{settings.http_port}.log" if settings.logs_to_files else None,
            exit_seconds=EXIT_SECONDS + 5,
        )

    def start(self, again: bool = False) -> None:
        secret.save_secret(self.secret, self._ports)
        super().start(again)

    def stop(self) -> None:
        super().stop()
        secret.delete_secret(self._ports)
        for region in SHARED_MEMORY.glob(f"{self.shared_memory_prefix}*"):
            region.unlink(missing_ok=True)
