"""Checks and measures the engine on a GPU machine, in stages with time limits, the most valuable first.

    scripts/gpu_check --out FOLDER [--seconds 540] [--stages basics figures] [--device cuda] [--devices 2]
    scripts/gpu_check --out FOLDER --device cpu --tiny        a rehearsal without a GPU

Every result is one JSON line, printed as soon as it is known and appended to FOLDER/results.jsonl; FOLDER/log.txt has
what libraries and tests print. A stage is a process of its own: it is killed at its time limit, and a fault in it costs
no other stage. What is missing on the machine is said, in the first line and in that of the stage. Exit code 1 when a
stage fails. This module knows stages and their order, not what they do.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import logging
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stage import ROOT, SOURCES, Options, Reporter, Run, Skipped

_TEST_PACKAGES = ("pytest", "pytest-xdist", "hypothesis", "psutil")
PACKAGES = ("torch", "transformers", "triton", "numpy", "tokenizers", "safetensors", *_TEST_PACKAGES)
# Without these no stage can run.
_REQUIRED = ("torch", "transformers", "numpy", "tokenizers", "safetensors")
_LIBRARIES = ("inference.harness", "transformers.models.llama.modeling_llama", "transformers.generation.utils")
_GRACE_SECONDS = 8.0
# A stage that has less time than this left is not started: it imports torch first.
_LEAST_SECONDS = 15.0
# The exit code of a stage that finds what it needs missing.
_SKIPPED = 3


@dataclass(frozen=True)
class Stage:
    name: str
    # The module of this folder with the function `run`.
    module: str
    seconds: float
    needs: tuple[str, ...] = ()


# By worth: what a short run must bring back comes first.
STAGES = (
    Stage("basics", "basics", 60),
    Stage("figures", "figures", 150),
    Stage("kernels", "kernel_figures", 60, ("triton",)),
    Stage("tests", "inference_tests", 70, _TEST_PACKAGES),
    Stage("continuous_batching", "continuous_batching", 120),
    Stage("profile", "profile_step", 40),
    Stage("quantized", "quantized_figures", 60, ("triton",)),
    Stage("fleet", "fleet_check", 30),
    Stage("served", "served", 100),
    Stage("start", "start", 90),
)


def main() -> int:
    options, stages, seconds = _arguments()
    began = time.monotonic()
    _prepare(options)
    results = options.out / "results.jsonl"
    results.unlink(missing_ok=True)
    report = Reporter("check", results, sys.stdout, began)
    versions = {name: _version(name) for name in PACKAGES}
    missing = [name for name, version in versions.items() if version is None]
    report(python=platform.python_version(), packages=versions, missing=missing, device=options.device)
    if any(name in missing for name in _REQUIRED):
        report(error=f"no stage can run without {', '.join(_REQUIRED)}")
        return 1
    outcome: dict[str, str] = {}
    try:
        for stage in stages:
            left = seconds - (time.monotonic() - began)
            outcome[stage.name] = _run_stage(stage, options, min(stage.seconds, left), results, began, missing)
            report(stage_done=stage.name, outcome=outcome[stage.name])
    finally:
        shutil.rmtree(options.scratch, ignore_errors=True)
    failed = [name for name, text in outcome.items() if not text.startswith(("ok", "skipped"))]
    report(summary=outcome, failed=failed, seconds=round(time.monotonic() - began, 1))
    return 1 if failed else 0


def _arguments() -> tuple[Options, list[Stage], float]:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=(__doc__ or "").splitlines()[0])
    names = [stage.name for stage in STAGES]
    parser.add_argument("--out", type=Path, required=True, help="the folder that everything is written to")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--devices", type=int, default=2, help="engines of the stage fleet; default 2")
    parser.add_argument("--tiny", action="store_true", help="tiny models: a rehearsal that takes seconds")
    parser.add_argument("--seconds", type=float, default=540.0, help="the limit of all stages together; default 540")
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="these stages only, by worth")
    arguments = parser.parse_args()
    if arguments.devices < 1:
        parser.error("--devices must be at least 1")
    device = "cuda:0" if arguments.device == "cuda" else arguments.device
    options = Options(device, arguments.tiny, arguments.devices, arguments.out.resolve())
    return options, [stage for stage in STAGES if stage.name in arguments.stages], arguments.seconds


def _prepare(options: Options) -> None:
    """Everything that libraries write goes to the scratch folder, and nothing looks for a network."""
    for name in ("tmp", "home"):
        (options.scratch / name).mkdir(parents=True, exist_ok=True)
    home = str(options.scratch / "home")
    os.environ |= {
        "TMPDIR": str(options.scratch / "tmp"), "HOME": home, "XDG_CACHE_HOME": home, "HF_HOME": home,
        "TRITON_CACHE_DIR": f"{home}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{home}/inductor",
        "CUDA_CACHE_PATH": f"{home}/cuda", "TRITONLM_BACKENDS": f"{home}/backends", "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "passive",
    }  # fmt: skip
    os.environ.setdefault("TRITONLM_NATIVE_CACHE", f"{home}/native")
    paths = [str(ROOT / folder) for folder in SOURCES]
    sys.path[1:1] = paths
    # For the processes that stages start.
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run_stage(stage: Stage, options: Options, seconds: float, results: Path, began: float, missing: list[str]) -> str:
    """Run it in a process of its own, and return what became of it."""
    if absent := [name for name in stage.needs if name in missing]:
        return f"skipped: not installed: {', '.join(absent)}"
    if seconds < _LEAST_SECONDS:
        return f"skipped: {max(seconds, 0):.0f} s of the total limit are left"
    # A forked process has the imports already, which makes rehearsals quick. CUDA does not survive a fork.
    if not options.on_gpu:
        _import_libraries()
    context: Any = multiprocessing.get_context("spawn" if options.on_gpu else "fork")
    options = replace(options, deadline=time.monotonic() + seconds)
    process = context.Process(target=run_in_process, args=(stage, options, results, began), name=stage.name)
    process.start()
    process.join(seconds)
    timed_out = process.is_alive()
    # It leads a process group, so what it has started ends with it: a server at the first signal.
    for number, grace in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        process.join(grace)
    if timed_out:
        return f"stopped at its limit of {seconds:.0f} s; results so far are above"
    if process.exitcode == _SKIPPED:
        return "skipped: the reason is above"
    return "ok" if process.exitcode == 0 else f"failed with exit code {process.exitcode}; see log.txt"


def _import_libraries() -> None:
    for module in _LIBRARIES:
        importlib.import_module(module)


def run_in_process(stage: Stage, options: Options, results: Path, began: float) -> None:
    os.setsid()
    terminal = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    with (options.out / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"\n=== {stage.name} ===\n")
        log.flush()
        sys.stdout.flush()
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    report = Reporter(stage.name, results, terminal, began)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        run: Run = importlib.import_module(stage.module).run
        run(options, report)
    except Skipped as reason:
        report(skipped=str(reason))
        sys.exit(_SKIPPED)
    except Exception as error:
        traceback.print_exc()
        report(error=f"{type(error).__name__}: {str(error)[:500]}")
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
