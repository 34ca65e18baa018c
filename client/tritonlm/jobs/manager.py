"""Starts, monitors and stops jobs, a limited number at once; adopts jobs that an earlier manager left running."""

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
from tritonlm.contract.idle_threads import ASLEEP

from .store import CANCELLED, FAILED, FINISHED, INTERRUPTED, QUEUED, RESUMABLE, RUNNING, Job, JobStore

_END_SECONDS = 10.0
_MAX_ERROR_CHARACTERS = 500


Method = TypeVar("Method", bound=Callable[..., Any])


def _synchronized(method: Method) -> Method:
    @functools.wraps(method)
    def locked(self: JobManager, *arguments: Any) -> Any:
        with self._lock:
            return method(self, *arguments)

    return cast(Method, locked)


class JobManager:
    """The owner calls `poll` regularly. All methods are thread-safe."""

    def __init__(
        self, store: JobStore, max_running: int = 1, on_finished: Callable[[Job], None] = lambda _: None
    ) -> None:
        self._store, self._max_running, self._on_finished = store, max_running, on_finished
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.RLock()

    @_synchronized
    def add(self, name: str, out: Path, config: dict[str, Any], plan: dict[str, Any]) -> Job:
        """Queue a job; it starts at once when fewer than `max_running` jobs run."""
        if any(job.out == str(out) and job.state in (QUEUED, RUNNING) for job in self.all()):
            raise InvalidRequest(f"output_dir: another job writes {out.name}; choose another name", "output_dir")
        job = Job(secrets.token_hex(6), name, str(out), config, plan)
        self._store.put(job)
        self.poll()
        return self.get(job.id)

    def get(self, job_id: str) -> Job:
        job = self._store.get(job_id)
        if job is None:
            raise ModelNotFound(f"there is no job {job_id[:64]!r}", "job_id")
        return job

    def all(self) -> list[Job]:
        return self._store.all()

    @_synchronized
    def cancel(self, job_id: str) -> Job:
        job = self.get(job_id)
        if job.state not in (QUEUED, RUNNING):
            raise InvalidRequest(f"the job {job.id} is {job.state}: there is nothing to cancel", "job_id")
        self._end(job, CANCELLED)
        self.poll()
        return self.get(job_id)

    @_synchronized
    def resume(self, job_id: str) -> Job:
        job = self.get(job_id)
        if job.state not in RESUMABLE:
            raise InvalidRequest(f"the job {job.id} is {job.state}: there is nothing to resume", "job_id")
        job.state, job.ended, job.error = QUEUED, None, None
        # A job that never wrote its plan starts from the beginning.
        job.resume = (Path(job.out) / "plan.json").is_file()
        self._store.put(job)
        self.poll()
        return self.get(job_id)

    @_synchronized
    def poll(self) -> None:
        """Record the jobs that have ended, and start the next ones."""
        jobs = self._store.all()
        for job in jobs:
            if job.state == RUNNING and not self._is_running(job):
                self._record_end(job)
        running = sum(job.state == RUNNING for job in jobs)
        for job in jobs:
            if job.state == QUEUED and running < self._max_running:
                running += self._try_start(job)

    @_synchronized
    def close(self) -> None:
        """Interrupt the running jobs; they can be resumed. (A killed manager leaves them running instead.)"""
        for job in self._store.all():
            if job.state == RUNNING:
                self._end(job, INTERRUPTED)

    def _try_start(self, job: Job) -> bool:
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
        command = [sys.executable, "-m", "tritonlm", "train", "--out", str(out)]
        command += ["--resume"] if job.resume else ["--plan", _write_plan(out / "requested_plan.json", job.plan)]
        with job.log.open("ab") as log:
            # Its own session: it survives a killed manager, and one signal reaches the whole process group.
            child = subprocess.Popen(
                command,
                env={**ASLEEP, **os.environ},
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

    def _is_running(self, job: Job) -> bool:
        if job.id in self._children:
            return self._children[job.id].poll() is None
        return _process_of(job) is not None

    def _record_end(self, job: Job) -> None:
        child = self._children.pop(job.id, None)
        job.ended = time.time()
        if (Path(job.out) / "final" / "training.json").is_file():
            job.state = FINISHED
        elif child is None or child.returncode < 0:
            job.state, job.error = INTERRUPTED, "the process ended before the training was complete; resume the job"
        else:
            job.state, job.error = FAILED, _last_error(job.log)
        self._store.put(job)
        if job.state == FINISHED:
            self._on_finished(job)

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
    """The job's process; None when it has ended or its number belongs to another process."""
    try:
        process = psutil.Process(job.process_id or -1)
        is_alive = process.create_time() == job.process_started and process.status() != psutil.STATUS_ZOMBIE
        return process if is_alive else None
    except (psutil.Error, ValueError):
        return None


def _last_error(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it wrote no log"
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-1:]
    return errors[-1][:_MAX_ERROR_CHARACTERS] if errors else "it ended without a message"


def _write_plan(file: Path, plan: dict[str, Any]) -> str:
    file.write_text(json.dumps(plan), encoding="utf-8")
    return str(file)
