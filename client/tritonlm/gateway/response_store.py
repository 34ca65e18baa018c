"""Stored responses in SQLite: each with its input items, its owner and its end. The oldest make room for new ones.

It knows rows, not what a response means.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonlm.contract import ModelNotFound

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, owner TEXT, previous TEXT, created REAL, bytes INTEGER, items TEXT, response TEXT
);
CREATE INDEX IF NOT EXISTS responses_by_age ON responses (created);
"""
_SECONDS_PER_DAY = 86_400
# The limit of responses in a chain of previous_response_id.
_MAX_CHAIN = 1000


@dataclass(frozen=True)
class StoredResponse:
    previous: str | None
    items: list[dict[str, Any]]
    response: dict[str, Any]


class ResponseStore:
    def __init__(self, file: Path, days: float, max_bytes: int) -> None:
        """The file is created with the first response. All methods may block on the disk."""
        self._file, self._seconds, self._max_bytes = file, days * _SECONDS_PER_DAY, max_bytes

    def put(self, owner: str, items: list[dict[str, Any]], response: dict[str, Any]) -> None:
        values = (json.dumps(items), json.dumps(response))
        size = sum(len(value) for value in values)
        with self._connection() as database:
            self._make_room(database, size)
            database.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)",
                (response["id"], owner, response["previous_response_id"], time.time(), size, *values),
            )

    def get(self, owner: str, response_id: str) -> StoredResponse:
        """Raises if there is none, it has expired, or it belongs to another caller."""
        if self._file.is_file():
            with self._connection() as database:
                row = database.execute(
                    "SELECT previous, items, response FROM responses WHERE id = ? AND owner = ? AND created > ?",
                    (response_id, owner, time.time() - self._seconds),
                ).fetchone()
            if row is not None:
                return StoredResponse(row[0], json.loads(row[1]), json.loads(row[2]))
        raise ModelNotFound(f"there is no stored response {response_id[:64]!r}", "response_id")

    def delete(self, owner: str, response_id: str) -> None:
        self.get(owner, response_id)
        with self._connection() as database:
            database.execute("DELETE FROM responses WHERE id = ? AND owner = ?", (response_id, owner))

    def conversation(self, owner: str, response_id: str) -> list[dict[str, Any]]:
        """The items of a response and of all before it, oldest first."""
        parts: list[list[dict[str, Any]]] = []
        current: str | None = response_id
        while current is not None and len(parts) < _MAX_CHAIN:
            stored = self.get(owner, current)
            parts.append([*stored.items, *stored.response["output"]])
            current = stored.previous
        return [item for part in reversed(parts) for item in part]

    def _make_room(self, database: sqlite3.Connection, size: int) -> None:
        database.execute("DELETE FROM responses WHERE created <= ?", (time.time() - self._seconds,))
        (total,) = database.execute("SELECT COALESCE(SUM(bytes), 0) FROM responses").fetchone()
        if total + size <= self._max_bytes:
            return
        # Down to nine tenths, so that not every response deletes some.
        excess = total + size - self._max_bytes * 9 // 10
        for response_id, length in database.execute("SELECT id, bytes FROM responses ORDER BY created").fetchall():
            if excess <= 0:
                break
            database.execute("DELETE FROM responses WHERE id = ?", (response_id,))
            excess -= length

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        is_new = not self._file.is_file()
        if is_new:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self._file, timeout=10)
        try:
            if is_new:
                # Conversations are private: nobody else on this machine reads the file.
                self._file.chmod(0o600)
            database.executescript(_SCHEMA)
            with database:
                yield database
        finally:
            database.close()
