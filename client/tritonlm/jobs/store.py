"""The jobs in SQLite: their configuration and state. It starts nothing."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

QUEUED, RUNNING, FINISHED, FAILED, CANCELLED, INTERRUPTED = (
    "queued", "running", "finished", "failed", "cancelled", "interrupted"
)  # fmt: skip
STATES = (QUEUED, RUNNING, FINISHED, FAILED, CANCELLED, INTERRUPTED)
# States from which a job can be resumed.
RESUMABLE = (FAILED, CANCELLED, INTERRUPTED)


@dataclass
class Job:
    id: str
    # The name of the language model that the job trains.
    name: str
    out: str
    # The request as received, and the training plan made from it.
    config: dict[str, Any]
    plan: dict[str, Any]
    state: str = QUEUED
    resume: bool = False
    process_id: int | None = None
    # The start time of that process: process numbers are reused.
    process_started: float | None = None
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    error: str | None = None

    @property
    def log(self) -> Path:
        return Path(self.out) / "log.txt"


_JSON = ("config", "plan")
_COLUMNS = [spec.name for spec in fields(Job)]


class JobStore:
    """The database file is created with the first job; without jobs nothing is written."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def put(self, job: Job) -> None:
        row = {**asdict(job), **{name: json.dumps(getattr(job, name)) for name in _JSON}}
        parameters = ", ".join(f":{name}" for name in _COLUMNS)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._connection() as database:
            database.execute(f"CREATE TABLE IF NOT EXISTS jobs ({', '.join(_COLUMNS)}, PRIMARY KEY (id))")
            database.execute(f"INSERT OR REPLACE INTO jobs VALUES ({parameters})", row)

    def get(self, job_id: str) -> Job | None:
        return next(iter(self._select("WHERE id = ?", (job_id,))), None)

    def all(self) -> list[Job]:
        return self._select("ORDER BY created", ())

    def _select(self, clause: str, values: tuple[Any, ...]) -> list[Job]:
        if not self._file.is_file():
            return []
        with self._connection() as database:
            rows = database.execute(f"SELECT {', '.join(_COLUMNS)} FROM jobs {clause}", values).fetchall()
        return [_job_of(dict(zip(_COLUMNS, row, strict=True))) for row in rows]

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection per use: uses are rare, and a killed process leaves none open."""
        database = sqlite3.connect(self._file, timeout=10)
        try:
            with database:
                yield database
        finally:
            database.close()


def _job_of(row: dict[str, Any]) -> Job:
    return Job(**{**row, "resume": bool(row["resume"]), **{name: json.loads(row[name]) for name in _JSON}})
