"""One local `tritonserver`: its command line, its environment, and what has to be cleared up after it.

It knows how Triton is run, not what is loaded into it (see `control`) nor when to stop (see `supervisor`).
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

from . import paths
from .backend import Installation
from .child import Child
from .preflight import SHARED_MEMORY
from .settings import LogLevel, Settings

# Running requests were given drain_seconds before; what is left then is cut off.
EXIT_SECONDS = 5

# Loading runs code, shared memory is anybody's, and what is logged or traced shows prompts.
_RESTRICTED = ("model-repository", "shared-memory", "logging", "trace")
_LOG_FLAGS: dict[LogLevel, list[str]] = {
    "debug": ["--log-verbose=1"],
    "info": [],
    "warning": ["--log-info=false"],
    "error": ["--log-info=false", "--log-warning=false"],
}


def triton_environment(installation: Installation, settings: Settings) -> dict[str, str]:
    """Our environment, plus what lets Triton and the Python inside its model processes find this one's packages."""
    package_root = Path(__file__).resolve().parents[2]
    python_path = [str(package_root), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    python_path += site.getsitepackages()
    environment = {
        # Spinning OpenMP threads starve the other processes when cores are few.
        "OMP_WAIT_POLICY": "passive",
        # Kernels compiled for this machine.
        "TRITONLM_NATIVE_CACHE": str(paths.cache() / "native"),
        **os.environ,
        **settings.engine_environment(),
    }

    def lead(name: str, values: Sequence[str]) -> None:
        old = environment.get(name, "")
        environment[name] = os.pathsep.join([*dict.fromkeys(values), *([old] if old else [])])

    # A model process's embedded Python finds its prefix through the first `python3` on PATH.
    lead("PATH", [str(Path(sys.executable).parent)])
    lead("PYTHONPATH", python_path)
    lead("LD_LIBRARY_PATH", [str(folder) for folder in installation.library_path])
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
        *(f"--{door}-address={settings.triton_host}" for door in ("http", "grpc", "metrics")),
        f"--http-port={settings.http_port}",
        f"--grpc-port={settings.grpc_port}",
        f"--metrics-port={settings.metrics_port}",
        f"--http-restricted-api={restricted}",
        f"--grpc-restricted-protocol={restricted}",
        f"--exit-timeout-secs={EXIT_SECONDS}",
        *_LOG_FLAGS[settings.log_level],
        *_trace_flags(settings.otlp_endpoint),
    ]


def _trace_flags(endpoint: str | None) -> list[str]:
    """Triton's own spans, of every request that belongs to a trace already."""
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
    """Triton, and what it leaves in /dev/shm."""

    def __init__(
        self, settings: Settings, installation: Installation, backend: Path, repositories: Sequence[Path]
    ) -> None:
        # Unique per run, so that clearing up never touches another Triton's regions.
        self.shared_memory_prefix = f"tritonlm-{os.getpid()}-{secrets.token_hex(4)}-"
        self._ports = (settings.http_port, settings.grpc_port)
        self.secret = secret.made()
        super().__init__(
            "Triton",
            triton_command(
                installation.binary, backend, settings, repositories, self.shared_memory_prefix, self.secret
            ),
            triton_environment(installation, settings),
            paths.cache() / "logs" / f"triton-{settings.http_port}.log" if settings.logs_to_files else None,
            exit_seconds=EXIT_SECONDS + 5,
        )

    def start(self, again: bool = False) -> None:
        secret.keep(self.secret, self._ports)
        super().start(again)

    def stop(self) -> None:
        super().stop()
        secret.forget(self._ports)
        for region in SHARED_MEMORY.glob(f"{self.shared_memory_prefix}*"):
            region.unlink(missing_ok=True)
