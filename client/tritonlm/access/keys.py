"""API keys: a file of names, hashes, scopes and limits. The keys themselves are not stored.

A key is a random secret of 256 bits, so one round of SHA-256 protects it as well as a slow hash protects a password.
Writers hold a lock and replace the file as a whole, and readers reload it when it changes. This module knows no HTTP.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tritonlm.contract import CheckpointError
from tritonlm.contract.file_edits import locked, replace_text

Scope = Literal["infer", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = ("infer", "admin", "metrics")
INFER, ADMIN, METRICS = SCOPES
_PREFIX = "tlm_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OWNER_ONLY = 0o600
# How often a reader checks whether the file has changed.
_CHECK_SECONDS = 1.0


class KeysError(Exception):
    """A message for a person: what is wrong with the keys, and the remedy."""


class Limits(BaseModel):
    """The limits of one key; None means unlimited."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    running_requests: int | None = Field(default=None, ge=1)


class Key(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str
    scopes: tuple[Scope, ...] = (INFER,)
    limits: Limits = Limits()
    created: int = 0
    revoked: int | None = None


_Keys = TypeAdapter(list[Key])


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class KeyFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Key]:
        """All keys, including revoked ones; an empty list if there is no file."""
        try:
            return _Keys.validate_python(json.loads(self.path.read_text(encoding="utf-8"))["keys"])
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"{type(error).__name__}"
            raise KeysError(f"{self.path} cannot be read as a key file: {problem}") from None

    def create(self, name: str, scopes: Iterable[str], limits: Limits) -> str:
        """Add a key and return its secret, which is not stored."""
        key_scopes = tuple(dict.fromkeys(scopes)) or (INFER,)
        if not _NAME.fullmatch(name):
            raise KeysError("a key's name has 1 to 64 letters, digits, dots, dashes and underscores")
        if unknown := [scope for scope in key_scopes if scope not in SCOPES]:
            raise KeysError(f"there is no scope {unknown[0]!r}; there are {', '.join(SCOPES)}")
        with self._editing() as keys:
            if any(key.name == name and key.revoked is None for key in keys):
                raise KeysError(f"there is a key {name!r} already; revoke it first, or take another name")
            secret = _PREFIX + secrets.token_urlsafe(32)
            created = int(time.time())
            new_key = Key(name=name, sha256=digest(secret), scopes=key_scopes, limits=limits, created=created)  # type: ignore[arg-type]
            # A new key replaces a revoked one of the same name.
            keys[:] = [*(key for key in keys if key.name != name), new_key]
        return secret

    def revoke(self, name: str) -> None:
        with self._editing() as keys:
            if not any(key.name == name and key.revoked is None for key in keys):
                raise KeysError(f"there is no key {name!r}; tritonlm keys list shows them")
            now = int(time.time())
            keys[:] = [key.model_copy(update={"revoked": now}) if key.name == name else key for key in keys]

    @contextlib.contextmanager
    def _editing(self) -> Iterator[list[Key]]:
        """The keys, to be edited in place; written back as a whole unless an error is raised."""
        try:
            with locked(self.path):
                keys = self.read()
                yield keys
                content: dict[str, Any] = {"keys": [key.model_dump(mode="json", exclude_none=True) for key in keys]}
                replace_text(self.path, json.dumps(content, indent=2) + "\n", _OWNER_ONLY)
        except CheckpointError as error:
            raise KeysError(error.message) from None


class KeyRing:
    """The valid keys: those of the file, which is reloaded when it changes, and the one from the settings."""

    def __init__(self, file: KeyFile | None, secret: str | None) -> None:
        self._file = file
        # The key from the settings has every scope.
        self._configured = [Key(name="default", sha256=digest(secret), scopes=SCOPES)] if secret else []
        self._version: tuple[int, int, int] | None = None
        self._checked_at = float("-inf")
        self._keys: list[Key] = self._configured
        self.problem = ""
        self.reload()

    @property
    def is_empty(self) -> bool:
        """Whether no key was ever created. After the last key is revoked, a key is still required."""
        return not self._keys and not self.problem

    def find(self, secret: str) -> Key | None:
        """The key with this secret, revoked or not. All keys are compared, so that the time reveals nothing."""
        self.reload()
        sha256, match = digest(secret), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, sha256):
                match = key
        return match

    def is_valid(self, name: str) -> bool:
        """Whether there is a key of this name that is not revoked."""
        self.reload()
        return any(key.name == name and key.revoked is None for key in self._keys)

    def reload(self) -> None:
        """Read the file again if it has changed. If it cannot be read, keep the keys and set `problem`."""
        if self._file is None or time.monotonic() - self._checked_at < _CHECK_SECONDS:
            return
        self._checked_at = time.monotonic()
        try:
            status = self._file.path.stat()
            version = (status.st_mtime_ns, status.st_ino, status.st_size)
        except FileNotFoundError:
            if self._version is not None and self._keys != self._configured:
                # A deleted file must not open the gateway to everybody.
                self.problem = f"{self._file.path} is gone; its keys stay valid"
                return
            version = (0, 0, 0)
        if version == self._version:
            return
        try:
            self._keys, self.problem = [*self._configured, *self._file.read()], ""
        except KeysError as error:
            self.problem = str(error)
        self._version = version
