"""From an HTTP request for a training to a job: names and paths checked before anything starts, results registered.

It knows which folders are open to callers. Jobs are `tritonlm.jobs`' matter; without `--training` there are none.
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

from tritonlm.contract import Checkpoint, InvalidRequest, ModelNotFound, NotOffered
from tritonlm.jobs import Job, JobKeeper, JobStore
from tritonlm.jobs.store import QUEUED, RUNNING, STATES
from tritonlm.serving import ServingError, paths
from tritonlm.serving.catalogue import BUNDLED
from tritonlm.serving.entries import repository_of
from tritonlm.serving.registry import NAME, Entry, add_entry, make_entry, read_registry, remove_entry
from tritonlm.training.errors import TrainingError
from tritonlm.training.plan import PRESETS, make_plan
from tritonlm.training.sizes import check_it_fits

from .settings import GatewaySettings

_log = logging.getLogger("tritonlm.gateway")
_LOOK_SECONDS = 0.5
# Of a log at a time.
_LOG_BYTES = 64 * 1024
# What a caller of an older system names, and what it is called in a plan.
_NAMES = {"dataset": "data", "max_iters": "steps", "eval_interval": "eval_steps", "model_type": "model"}


class Training:
    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._registry = settings.registry or paths.registry()
        self._keeper: JobKeeper | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if self._settings.training:
            store = JobStore(self._settings.runs_folder / "jobs.sqlite")
            self._keeper = JobKeeper(store, self._settings.max_jobs, self._register)
            self._keeper.look()
            self._watch = asyncio.get_running_loop().create_task(self._look())

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._keeper is not None:
            await asyncio.to_thread(self._keeper.close)

    @property
    def keeper(self) -> JobKeeper:
        if self._keeper is None:
            raise NotOffered("this server does not train; start it with --training, or use tritonlm train")
        return self._keeper

    def counts(self) -> dict[str, int]:
        """Jobs by state."""
        if self._keeper is None:
            return {}
        counted = Counter(job.state for job in self._keeper.all())
        return {state: counted[state] for state in STATES}

    def begin(self, config: dict[str, Any]) -> Job:
        """Everything that can be refused is refused here, by the name of the field."""
        keeper = self.keeper
        out = self._out(config["output_dir"])
        values = {_NAMES.get(name, name): value for name, value in config.items() if name != "output_dir"}
        values["data"] = self._data(config["dataset"])
        if config.get("model_type") is not None:
            values["model"] = self._model(config["model_type"])
        try:
            plan = make_plan(**values, out=out)
            check_it_fits(plan)
        except TrainingError as error:
            field, _, why = str(error).partition(": ")
            theirs = {ours: name for name, ours in _NAMES.items()}.get(field, field)
            raise InvalidRequest(f"{theirs}: {why}", theirs) from None
        return keeper.add(out.name, out, config, plan.model_dump(mode="json"))

    async def log(self, job_id: str) -> AsyncIterator[str]:
        """The lines of a job's log, as they come, to its end."""
        place = 0
        while True:
            # Asked before the log is read: what was written before the end is in it.
            job = self.keeper.get(job_id)
            lines, place, more = _lines_from(job.log, place)
            for line in lines:
                yield line
            if more:
                continue
            if job.state not in (QUEUED, RUNNING):
                return
            await asyncio.sleep(_LOOK_SECONDS)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await asyncio.to_thread(self.keeper.look)
            except Exception:
                # A disk that is full for a while must not end the watch over all jobs.
                _log.exception("looking after the training jobs failed")

    def _out(self, asked: str) -> Path:
        out = _inside(self._settings.runs_folder, asked)
        if out is None:
            raise InvalidRequest("output_dir must be a folder inside the server's folder for runs", "output_dir")
        if not re.match(NAME, out.name):
            raise InvalidRequest("output_dir must end in a name: letters, digits, dot, dash, underscore", "output_dir")
        taken = {entry.name for entry in self._entries()}
        if out.exists() or out.name in taken or out.name in BUNDLED:
            raise InvalidRequest(f"output_dir: {out.name} is there already; choose another name", "output_dir")
        return out

    def _data(self, asked: str) -> str:
        if asked in PRESETS:
            return asked
        found = _inside(self._settings.data_folder, asked)
        if found is None or not found.exists():
            known = ", ".join(PRESETS)
            raise InvalidRequest(
                f"dataset must be {known}, or a file or folder inside the server's folder for data", "dataset"
            )
        return str(found)

    def _model(self, asked: str) -> str:
        folders = {name: paths.model_repository() / name / "1" for name in BUNDLED}
        folders |= {entry.name: entry.path for entry in self._entries() if entry.path is not None}
        if asked not in folders:
            raise InvalidRequest(
                f"model_type must name a language model of this server ({', '.join(folders)}); without it the training "
                "is from scratch",
                "model_type",
            )
        Checkpoint(folders[asked]).check()
        return str(folders[asked])

    def _register(self, job: Job) -> None:
        """A finished job's model can be loaded by its name."""
        with contextlib.suppress(ServingError):
            add_entry(self._registry, make_entry(name=job.name, path=(Path(job.out) / "final").resolve()))
            self._bring_up_to_date()

    def check_is_ours(self, name: str) -> None:
        """Only what was trained here is a caller's to delete."""
        if self._keeper is None:
            raise NotOffered("this server does not train, and only what it has trained can be deleted")
        found = [entry for entry in self._entries() if entry.name == name]
        if not found and name not in BUNDLED:
            raise ModelNotFound(f"the model {name!r} is not among those that were trained here", "model")
        runs = self._settings.runs_folder.resolve()
        if not found or found[0].path is None or not found[0].path.is_relative_to(runs):
            raise InvalidRequest(f"{name} was not trained by a job here; tritonlm remove takes it away", "model")

    def forget(self, name: str) -> None:
        with contextlib.suppress(ServingError):
            remove_entry(self._registry, name)
            self._bring_up_to_date()

    def _entries(self) -> list[Entry]:
        return read_registry(self._registry) if self._registry.is_file() else []

    def _bring_up_to_date(self) -> None:
        repository_of(str(self._registry.resolve()), self._entries(), paths.model_repository())


def _inside(root: Path, asked: str) -> Path | None:
    """A path under this folder, links followed; None where it is not one."""
    if "\0" in asked or Path(asked).is_absolute():
        return None
    root = root.resolve()
    found = (root / asked).resolve()
    return found if found.is_relative_to(root) and found != root else None


def _lines_from(log: Path, place: int) -> tuple[list[str], int, bool]:
    """The whole lines from this place on, the place after them, and whether there is more at once."""
    try:
        with log.open("rb") as file:
            file.seek(place)
            text = file.read(_LOG_BYTES)
    except OSError:
        return [], place, False
    full = len(text) == _LOG_BYTES
    # A line that is longer than all that is read at a time is given in parts.
    whole = text.rfind(b"\n") + 1 or (len(text) if full else 0)
    return text[:whole].decode("utf-8", "replace").splitlines(), place + whole, full
