"""Starts jobs, so many at once, watches them, ends them; and finds those again that an earlier keeper left running."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil

from tritonlm.contract import InvalidRequest, ModelNotFound

from .store import CANCELLED, FAILED, FINISHED, INTERRUPTED, QUEUED, RESUMABLE, RUNNING, Job, JobStore

_END_SECONDS = 10.0
# Threads that wait by spinning would starve the language models that are served beside a training, and it as well.
_QUIET = {"OMP_WAIT_POLICY": "passive"}
_ERROR_CHARACTERS = 500


Method = TypeVar("Method", bound=Callable[..., Any])


def _alone(method: Method) -> Method:
    @functools.wraps(method)
    def locked(self: JobKeeper, *arguments: Any) -> Any:
        with self._alone:
            return method(self, *arguments)

    return cast(Method, locked)


class JobKeeper:
    """Whoever owns it calls `look` every now and then; each call has the list to itself."""

    def __init__(
        self, store: JobStore, at_once: int = 1, when_finished: Callable[[Job], None] = lambda _: None
    ) -> None:
        self._store, self._at_once, self._when_finished = store, at_once, when_finished
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._alone = threading.RLock()

    @_alone
    def add(self, name: str, out: Path, config: dict[str, Any], plan: dict[str, Any]) -> Job:
        """Take a job in; it starts at once if there is room."""
        if any(job.out == str(out) and job.state in (QUEUED, RUNNING) for job in self.all()):
            raise InvalidRequest(f"output_dir: another job is to write {out.name}; choose another name", "output_dir")
        job = Job(secrets.token_hex(6), name, str(out), config, plan)
        self._store.put(job)
        self.look()
        return self.get(job.id)

    def get(self, job_id: str) -> Job:
        found = self._store.get(job_id)
        if found is None:
            raise ModelNotFound(f"there is no job {job_id[:64]!r}", "job_id")
        return found

    def all(self) -> list[Job]:
        return self._store.all()

    @_alone
    def cancel(self, job_id: str) -> Job:
        job = self.get(job_id)
        if job.state not in (QUEUED, RUNNING):
            raise InvalidRequest(f"the job {job.id} is {job.state}: there is nothing to cancel", "job_id")
        self._end(job, CANCELLED)
        self.look()
        return self.get(job_id)

    @_alone
    def resume(self, job_id: str) -> Job:
        job = self.get(job_id)
        if job.state not in RESUMABLE:
            raise InvalidRequest(f"the job {job.id} is {job.state}: there is nothing to resume", "job_id")
        job.state, job.ended, job.error = QUEUED, None, None
        # One that never came to its first checkpoint begins anew.
        job.resume = (Path(job.out) / "plan.json").is_file()
        self._store.put(job)
        self.look()
        return self.get(job_id)

    @_alone
    def look(self) -> None:
        """Note who has ended, and start who is next."""
        jobs = self._store.all()
        for job in jobs:
            if job.state == RUNNING and not self._runs(job):
                self._note_end(job)
        running = sum(job.state == RUNNING for job in jobs)
        for job in jobs:
            if job.state == QUEUED and running < self._at_once:
                running += self._started(job)

    @_alone
    def close(self) -> None:
        """End what runs, to be resumed; a keeper that is killed leaves it running instead."""
        for job in self._store.all():
            if job.state == RUNNING:
                self._end(job, INTERRUPTED)

    def _started(self, job: Job) -> bool:
        try:
            self._start(job)
        except OSError as error:
            job.state, job.ended, job.error = FAILED, time.time(), f"it cannot be started: {error.strerror}"
            self._store.put(job)
            return False
        return True

    def _start(self, job: Job) -> None:
        out = Path(job.out)
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tritonlm.cli", "train", "--out", str(out)]
        command += ["--resume"] if job.resume else ["--plan", _written(out / "asked.json", job.plan)]
        with job.log.open("ab") as log:
            # A session of its own: it outlives a keeper that is killed, and one signal ends all of it.
            child = subprocess.Popen(
                command,
                env={**os.environ, **_QUIET},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children[job.id] = child
        job.state, job.process_id, job.started = RUNNING, child.pid, time.time()
        with contextlib.suppress(psutil.Error):
            job.process_started = psutil.Process(child.pid).create_time()
        self._store.put(job)

    def _runs(self, job: Job) -> bool:
        if job.id in self._children:
            return self._children[job.id].poll() is None
        return _process_of(job) is not None

    def _note_end(self, job: Job) -> None:
        child = self._children.pop(job.id, None)
        job.ended = time.time()
        if (Path(job.out) / "final" / "training.json").is_file():
            job.state = FINISHED
        elif child is None or child.returncode < 0:
            job.state, job.error = INTERRUPTED, "the process ended before its work did; resume it"
        else:
            job.state, job.error = FAILED, _last_words(job.log)
        self._store.put(job)
        if job.state == FINISHED:
            self._when_finished(job)

    def _end(self, job: Job, state: str) -> None:
        process = _process_of(job) if job.state == RUNNING else None
        if process is not None:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(_END_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if child := self._children.pop(job.id, None):
            child.wait(_END_SECONDS)
        job.state, job.ended = state, time.time()
        self._store.put(job)


def _process_of(job: Job) -> psutil.Process | None:
    """The job's process, if it is still that one and has not ended."""
    try:
        process = psutil.Process(job.process_id or -1)
        lives = process.create_time() == job.process_started and process.status() != psutil.STATUS_ZOMBIE
        return process if lives else None
    except (psutil.Error, ValueError):
        return None


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it left no log"
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-1:]
    return said[-1][:_ERROR_CHARACTERS] if said else "it ended without a word"


def _written(file: Path, plan: dict[str, Any]) -> str:
    file.write_text(json.dumps(plan), encoding="utf-8")
    return str(file)
