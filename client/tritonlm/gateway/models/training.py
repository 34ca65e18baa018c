"""Turns an HTTP training request into a job: checks names and paths first, and registers the finished model.

This module knows which folders callers may use. `tritonlm.jobs` runs the jobs. Without `--training` it refuses all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tritonlm.client.model_names import ModelNames
from tritonlm.contract import (
    AdapterNotFound,
    Checkpoint,
    CheckpointError,
    InvalidRequest,
    ModelNotFound,
    NotOffered,
    TritonLMError,
)
from tritonlm.contract.adapters_file import AdapterEntry, adapters_file, add_adapter, check_name, remove_adapter
from tritonlm.jobs import Job, JobManager, JobStore
from tritonlm.jobs.store import QUEUED, RUNNING, STATES
from tritonlm.serving import ServingError, paths
from tritonlm.serving.entries import sync_registry
from tritonlm.serving.model_selection import BUNDLED
from tritonlm.serving.registry import NAME, Entry, add_entry, make_entry, read_registry, remove_entry
from tritonlm.training.errors import TrainingError
from tritonlm.training.plan import PRESETS, make_plan, with_sizes
from tritonlm.training.sizes import check_memory

from ..settings import GatewaySettings

_log = logging.getLogger("tritonlm.gateway")
_POLL_SECONDS = 0.5
# The block size in which a log is read.
_LOG_BYTES = 64 * 1024
# The API's field names (those of an older system) and the plan's names for them.
_PLAN_NAMES = {"dataset": "data", "max_iters": "steps", "eval_interval": "eval_steps", "model_type": "model"}


class TrainingService:
    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._registry = settings.registry or paths.registry()
        self._adapters = settings.adapters_folder or paths.adapters()
        self._jobs: JobManager | None = None
        self._poll_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if self._settings.training:
            store = JobStore(self._settings.runs_folder / "jobs.sqlite")
            self._jobs = JobManager(store, self._settings.max_jobs, self._register)
            self._jobs.poll()
            self._poll_task = asyncio.get_running_loop().create_task(self._poll())

    async def close(self) -> None:
        if self._poll_task is not None:
            self._poll_task.cancel()
        if self._jobs is not None:
            await asyncio.to_thread(self._jobs.close)

    @property
    def jobs(self) -> JobManager:
        if self._jobs is None:
            raise NotOffered("this server does not train; start it with --training, or use tritonlm train")
        return self._jobs

    def counts(self) -> dict[str, int]:
        """The number of jobs by state."""
        if self._jobs is None:
            return {}
        counts = Counter(job.state for job in self._jobs.all())
        return {state: counts[state] for state in STATES}

    def submit(self, config: dict[str, Any]) -> Job:
        """Check all fields and add a job. An error names the field."""
        jobs = self.jobs
        out = self._resolve_output(config["output_dir"])
        if "lora" in config:
            check_name(out.name, "output_dir")
        values = {_PLAN_NAMES.get(name, name): value for name, value in config.items() if name != "output_dir"}
        values["data"] = self._resolve_dataset(config["dataset"])
        if "context" in values:
            values["sizes"] = with_sizes(values["data"], {"context": values.pop("context")})
        if config.get("model_type") is not None:
            values["model"] = self._resolve_model(config["model_type"])
        try:
            plan = make_plan(**values, out=out)
            check_memory(plan)
        except TrainingError as error:
            plan_name, _, reason = str(error).partition(": ")
            field = {plan: name for name, plan in _PLAN_NAMES.items()}.get(plan_name, plan_name)
            raise InvalidRequest(f"{field}: {reason}", field) from None
        return jobs.add(out.name, out, config, plan.model_dump(mode="json"))

    async def log(self, job_id: str) -> AsyncIterator[str]:
        """The lines of a job's log as they are written, until the job ends."""
        offset = 0
        while True:
            # The state is read first, so that a job that has ended has written its whole log.
            job = self.jobs.get(job_id)
            lines, offset, more = _lines_from(job.log, offset)
            for line in lines:
                yield line
            if more:
                continue
            if job.state not in (QUEUED, RUNNING):
                return
            await asyncio.sleep(_POLL_SECONDS)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            try:
                await asyncio.to_thread(self.jobs.poll)
            except Exception:
                # A temporary failure, such as a full disk, must not end this task.
                _log.exception("polling the training jobs failed")

    def _resolve_output(self, path: str) -> Path:
        out = _resolve_inside(self._settings.runs_folder, path)
        if out is None:
            raise InvalidRequest("output_dir must be a folder inside the server's runs folder", "output_dir")
        if not re.match(NAME, out.name):
            raise InvalidRequest("output_dir must end in a name: letters, digits, dot, dash, underscore", "output_dir")
        names = {entry.name for entry in self._entries()}
        names |= {name for _, name, _ in self._adapter_entries()}
        if out.exists() or out.name in names or out.name in BUNDLED:
            raise InvalidRequest(f"output_dir: {out.name} already exists; choose another name", "output_dir")
        return out

    def _resolve_dataset(self, name: str) -> str:
        if name in PRESETS:
            return name
        path = _resolve_inside(self._settings.data_folder, name)
        if path is None or not path.exists():
            presets = ", ".join(PRESETS)
            raise InvalidRequest(
                f"dataset must be {presets}, or a file or folder inside the server's data folder", "dataset"
            )
        return str(path)

    def _resolve_model(self, name: str) -> str:
        folders = {bundled: paths.model_repository() / bundled / "1" for bundled in BUNDLED}
        folders |= {entry.name: entry.path for entry in self._entries() if entry.path is not None}
        if name not in folders:
            raise InvalidRequest(
                f"model_type must name a bundled language model or one of the registry ({', '.join(folders)}); add one "
                "that was named when the server started with tritonlm add, or leave it out to train from scratch",
                "model_type",
            )
        Checkpoint(folders[name]).check()
        return str(folders[name])

    def _register(self, job: Job) -> None:
        """Register a finished job's model, so that it can be loaded by its name; an adapter is added to its base."""
        final = (Path(job.out) / "final").resolve()
        if job.plan.get("lora"):
            file = adapters_file(self._adapters.resolve(), job.config["model_type"])
            try:
                # A job that is resumed replaces what it made before.
                add_adapter(file, job.name, AdapterEntry(str(final)), replace=True)
            except (TritonLMError, OSError) as error:
                _log.warning("the adapter %s is trained and not added: %s", job.name, error)
            return
        with contextlib.suppress(ServingError, CheckpointError):
            add_entry(self._registry, make_entry(name=job.name, path=final))
            sync_registry(self._registry)

    def check_deletable(self, name: str) -> None:
        """Callers may delete only models that a job of this server has trained."""
        if self._jobs is None:
            raise NotOffered("this server does not train, and only models that it has trained can be deleted")
        folders = {entry.name: entry.path for entry in self._entries()}
        folders |= {adapter: Path(entry.path) for _, adapter, entry in self._adapter_entries()}
        if name not in folders and name not in BUNDLED:
            raise ModelNotFound(f"the model {name!r} was not trained by this server", "model")
        path = folders.get(name)
        if path is None or not path.is_relative_to(self._settings.runs_folder.resolve()):
            raise InvalidRequest(f"{name} was not trained by a job of this server; use tritonlm remove", "model")

    def unregister(self, name: str) -> None:
        for base in [base for base, adapter, _ in self._adapter_entries() if adapter == name]:
            with contextlib.suppress(AdapterNotFound):
                remove_adapter(adapters_file(self._adapters, base), name)
        with contextlib.suppress(ServingError, CheckpointError):
            remove_entry(self._registry, name)
            sync_registry(self._registry)

    def _adapter_entries(self) -> list[tuple[str, str, AdapterEntry]]:
        """Base, name and entry of each adapter."""
        known = ModelNames(self._adapters).adapters()
        return [(base, name, entry) for base, adapters in known.items() for name, entry in adapters.items()]

    def _entries(self) -> list[Entry]:
        return read_registry(self._registry) if self._registry.is_file() else []


def _resolve_inside(root: Path, path: str) -> Path | None:
    """A relative path inside the root folder, with links resolved; None if it leads outside."""
    if "\0" in path or Path(path).is_absolute():
        return None
    root = root.resolve()
    resolved = (root / path).resolve()
    return resolved if resolved.is_relative_to(root) and resolved != root else None


def _lines_from(log: Path, offset: int) -> tuple[list[str], int, bool]:
    """The complete lines after this offset, the offset behind them, and whether more can be read at once."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            text = file.read(_LOG_BYTES)
    except OSError:
        return [], offset, False
    full = len(text) == _LOG_BYTES
    # A line longer than one block is returned in parts.
    end = text.rfind(b"\n") + 1 or (len(text) if full else 0)
    return text[:end].decode("utf-8", "replace").splitlines(), offset + end, full
