"""`tritonlm doctor`: checks the machine and reports what to fix.

It writes nothing that a server reads, and downloads nothing.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable

import typer

from tritonlm.checkpoints.reference import HubModel
from tritonlm.contract import TritonLMError
from tritonlm.serving import ServingError, Settings, preflight, read_settings
from tritonlm.serving.backend import assemble, find_installation
from tritonlm.serving.model_selection import language_models, select_models
from tritonlm.serving.ports import check_port
from tritonlm.serving.repository import LanguageModel
from tritonlm.serving.triton import triton_environment

from .common import FAILED, AsJson, console, errors_printed, print_json


def doctor(as_json: AsJson = False) -> None:
    """Check what `tritonlm serve` needs; exit code 1 when something has to be fixed."""
    with errors_printed():
        settings = read_settings({})
    results = [_run(name, check) for name, check in _checks(settings).items()]
    if as_json:
        print_json([{"check": name, "ok": ok, "finding": finding} for name, ok, finding in results])
    else:
        for name, ok, finding in results:
            console.print("ok " if ok else "fix", style="green" if ok else "red", end="")
            console.print(f" {name}: {finding}", highlight=False)
    if not all(ok for _, ok, _ in results):
        raise typer.Exit(FAILED)


def _run(name: str, check: Callable[[], str]) -> tuple[str, bool, str]:
    try:
        return name, True, check()
    except (ServingError, TritonLMError) as error:
        return name, False, str(error)


def _checks(settings: Settings) -> dict[str, Callable[[], str]]:
    def machine() -> str:
        if platform.system() != "Linux" or platform.machine() != "x86_64":
            raise ServingError(
                f"Triton's wheel is for Linux on x86-64, not {platform.system()} on {platform.machine()}"
            )
        return f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"

    def triton() -> str:
        installation = find_installation()
        backend = assemble(installation)
        preflight.check_libraries(installation, backend, triton_environment(installation, settings))
        return f"nvidia-pytriton {installation.version} with all its libraries"

    def ports() -> str:
        preflight.check_ports(settings)
        if settings.gateway:
            check_port(settings.host, settings.port, "the gateway", "port")
        return f"{settings.port}, {settings.http_port}, {settings.grpc_port}, {settings.metrics_port} are free"

    def shared_memory() -> str:
        preflight.check_shared_memory()
        return "enough free"

    def checkpoints() -> str:
        models = language_models(settings, select_models(settings))
        return ", ".join(map(_described, preflight.check_language_models(models, download=False)))

    return {
        "machine": machine, "Triton": triton, "ports": ports, "/dev/shm": shared_memory, "checkpoints": checkpoints
    }  # fmt: skip


def _described(model: LanguageModel) -> str:
    remote = [str(source) for source in model.sources if isinstance(source, HubModel)]
    return f"{model.name} ({remote[0]} of the Hub is checked when it is served)" if remote else model.name
