"""Uploaded files and batches: rows in SQLite, contents in a folder. It runs nothing, and knows owners by name.

Every method may block on the disk.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonlm.contract import InvalidRequest, ModelNotFound

SECONDS_PER_DAY = 86_400
VALIDATING, IN_PROGRESS, FINALIZING, CANCELLING = "validating", "in_progress", "finalizing", "cancelling"
COMPLETED, FAILED, EXPIRED, CANCELLED = "completed", "failed", "expired", "cancelled"
ACTIVE = (VALIDATING, IN_PROGRESS, FINALIZING, CANCELLING)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, owner TEXT, name TEXT, purpose TEXT, bytes INTEGER, created INTEGER, expires INTEGER
);
CREATE TABLE IF NOT EXISTS batches (id TEXT PRIMARY KEY, owner TEXT, status TEXT, created REAL, data TEXT);
"""


@dataclass(frozen=True)
class StoredFile:
    id: str
    owner: str
    name: str
    purpose: str
    bytes: int
    created: int
    expires: int


@dataclass
class Batch:
    """`data`: the fields of OpenAI's object, which the routes return."""

    id: str
    owner: str
    status: str
    created: float
    data: dict[str, Any]


def new_file_id() -> str:
    return f"file-{secrets.token_hex(12)}"


class BatchStore:
    def __init__(self, folder: Path, days: float, max_bytes: int) -> None:
        """At most `max_bytes` of files at once, each kept for `days` unless its owner wants less."""
        self.folder, self._seconds, self._max_bytes = folder, int(days * SECONDS_PER_DAY), max_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in ("files", "work"):
            (folder / name).mkdir(exist_ok=True)

    def content(self, file_id: str) -> Path:
        return self.folder / "files" / file_id

    def output(self, batch: Batch, kind: str) -> Path:
        """The unfinished file of a batch; `kind`: output or errors."""
        return self.folder / "work" / f"{batch.id}.{kind}.jsonl"

    def add_file(
        self, owner: str, name: str, purpose: str, source: Path, seconds: int | None = None, file_id: str = ""
    ) -> StoredFile:
        """Move a file into the store. With an id it may be repeated after a kill."""
        file_id, now = file_id or new_file_id(), int(time.time())
        size = (source if source.is_file() else self.content(file_id)).stat().st_size
        expires = now + min(seconds or self._seconds, self._seconds)
        file = StoredFile(file_id, owner, name, purpose, size, now, expires)
        with self._connection() as database:
            (total,) = database.execute("SELECT COALESCE(SUM(bytes), 0) FROM files").fetchone()
            # The output of a batch always finds room: its requests are computed.
            if purpose == "batch" and total + size > self._max_bytes:
                raise InvalidRequest("file: this server's space for files is used up; delete some first", "file")
            if source.is_file():
                shutil.move(source, self.content(file_id))
            database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", tuple(vars(file).values()))
        return file

    def file(self, owner: str, file_id: str, param: str = "file_id") -> StoredFile:
        rows = self._files("WHERE id = ? AND owner = ? AND expires > ?", (file_id, owner, time.time()))
        if not rows:
            raise ModelNotFound(f"there is no file {file_id[:64]!r}", param)
        return rows[0]

    def files(self, owner: str) -> list[StoredFile]:
        """Oldest first."""
        return self._files("WHERE owner = ? AND expires > ? ORDER BY created, rowid", (owner, time.time()))

    def delete_file(self, owner: str, file_id: str) -> None:
        file = self.file(owner, file_id)
        if file.id in self._in_use():
            raise InvalidRequest("file_id: a batch reads this file; cancel the batch first", "file_id")
        self._remove([file])

    def put(self, batch: Batch) -> None:
        with self._connection() as database:
            values = (batch.id, batch.owner, batch.status, batch.created, json.dumps(batch.data))
            database.execute("INSERT OR REPLACE INTO batches VALUES (?, ?, ?, ?, ?)", values)

    def update(self, batch: Batch, changes: dict[str, Any]) -> bool:
        """Write a batch with changed fields; False, and nothing is written, if its row has another status by now."""
        data = {**batch.data, **changes}
        with self._connection() as database:
            values = (data["status"], json.dumps(data), batch.id, batch.status)
            changed = database.execute("UPDATE batches SET status = ?, data = ? WHERE id = ? AND status = ?", values)
        if changed.rowcount:
            batch.status = data["status"]
            batch.data |= changes
        return bool(changed.rowcount)

    def cancel(self, owner: str, batch_id: str) -> Batch:
        """Mark a batch, so that no further request is sent. One that ends at this moment stays as it is."""
        batch = self.batch(owner, batch_id)
        changes = {"status": CANCELLING, "cancelling_at": int(time.time())}
        with self._connection() as database:
            changed = database.execute(
                "UPDATE batches SET status = ?, data = json_patch(data, ?) WHERE id = ? AND status IN (?, ?)",
                (CANCELLING, json.dumps(changes), batch_id, VALIDATING, IN_PROGRESS),
            )
        if not changed.rowcount:
            status = self.batch(owner, batch_id).status
            raise InvalidRequest(f"the batch is {status}: there is nothing to cancel", "batch_id")
        batch.status = CANCELLING
        batch.data |= changes
        return batch

    def batch(self, owner: str, batch_id: str) -> Batch:
        rows = self._batches("WHERE id = ? AND owner = ?", (batch_id, owner))
        if not rows:
            raise ModelNotFound(f"there is no batch {batch_id[:64]!r}", "batch_id")
        return rows[0]

    def batches(self, owner: str) -> list[Batch]:
        """Newest first."""
        return self._batches("WHERE owner = ? ORDER BY created DESC, rowid DESC", (owner,))

    def active(self) -> list[Batch]:
        """The batches that are to be run, oldest first."""
        marks = ", ".join("?" * len(ACTIVE))
        return self._batches(f"WHERE status IN ({marks}) ORDER BY created, rowid", ACTIVE)

    def counts(self) -> dict[str, int]:
        with self._connection() as database:
            return dict(database.execute("SELECT status, COUNT(*) FROM batches GROUP BY status").fetchall())

    def sweep(self) -> None:
        """Remove expired files, and batches that ended so long ago."""
        used = self._in_use()
        self._remove([file for file in self._files("WHERE expires <= ?", (time.time(),)) if file.id not in used])
        marks = ", ".join("?" * len(ACTIVE))
        with self._connection() as database:
            database.execute(
                f"DELETE FROM batches WHERE created < ? AND status NOT IN ({marks})",
                (time.time() - self._seconds, *ACTIVE),
            )

    def _in_use(self) -> set[str]:
        return {batch.data["input_file_id"] for batch in self.active()}

    def _remove(self, files: list[StoredFile]) -> None:
        with self._connection() as database:
            for file in files:
                database.execute("DELETE FROM files WHERE id = ?", (file.id,))
                with contextlib.suppress(FileNotFoundError):
                    self.content(file.id).unlink()

    def _files(self, clause: str, values: tuple[Any, ...]) -> list[StoredFile]:
        with self._connection() as database:
            return [StoredFile(*row) for row in database.execute(f"SELECT * FROM files {clause}", values)]

    def _batches(self, clause: str, values: tuple[Any, ...]) -> list[Batch]:
        with self._connection() as database:
            rows = database.execute(f"SELECT * FROM batches {clause}", values).fetchall()
        return [Batch(name, owner, status, created, json.loads(data)) for name, owner, status, created, data in rows]

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self.folder / "batches.sqlite", timeout=10)
        try:
            database.executescript(_SCHEMA)
            with database:
                yield database
        finally:
            database.close()
