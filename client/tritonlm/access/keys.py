"""API keys: a file of names, hashes, scopes and limits. The keys themselves are in no file.

A key is a random secret of 256 bits, so that one round of SHA-256 hides it as well as a slow hash hides a password. The
file is replaced as a whole, and whoever reads it follows its changes. It knows no HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

Scope = Literal["infer", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = ("infer", "admin", "metrics")
INFER, ADMIN, METRICS = SCOPES
_PREFIX = "tlm_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# How often a reader looks whether the file has changed.
_LOOK_SECONDS = 1.0


class KeysError(Exception):
    """For a person: what is wrong with the keys, and what helps."""


class Limits(BaseModel):
    """What one key may use; None: as much as there is."""

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
        """All keys, revoked ones among them; none where there is no file."""
        try:
            return _Keys.validate_python(json.loads(self.path.read_text(encoding="utf-8"))["keys"])
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"{type(error).__name__}"
            raise KeysError(f"{self.path} cannot be read as a file of keys: {problem}") from None

    def create(self, name: str, scopes: Iterable[str], limits: Limits) -> str:
        """Add a key; its secret is told once."""
        keys, wanted = self.read(), tuple(dict.fromkeys(scopes)) or (INFER,)
        if not _NAME.fullmatch(name):
            raise KeysError("a key's name has 1 to 64 letters, digits, dots, dashes and underscores")
        if unknown := [scope for scope in wanted if scope not in SCOPES]:
            raise KeysError(f"there is no scope {unknown[0]!r}; there are {', '.join(SCOPES)}")
        if any(key.name == name and key.revoked is None for key in keys):
            raise KeysError(f"there is a key {name!r} already; revoke it first, or take another name")
        secret = _PREFIX + secrets.token_urlsafe(32)
        made = Key(name=name, sha256=digest(secret), scopes=wanted, limits=limits, created=int(time.time()))  # type: ignore[arg-type]
        # One name, one key: of a revoked one nothing is left but what the logs say.
        self._write([*(key for key in keys if key.name != name), made])
        return secret

    def revoke(self, name: str) -> None:
        keys = self.read()
        if not any(key.name == name and key.revoked is None for key in keys):
            raise KeysError(f"there is no key {name!r}; tritonlm keys list shows them")
        now = int(time.time())
        self._write([key.model_copy(update={"revoked": now}) if key.name == name else key for key in keys])

    def _write(self, keys: list[Key]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        shown: dict[str, Any] = {"keys": [key.model_dump(mode="json", exclude_none=True) for key in keys]}
        # mkstemp gives a file that its owner alone may read.
        handle, made = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(shown, file, indent=2)
                file.write("\n")
            os.replace(made, self.path)
        except BaseException:
            Path(made).unlink(missing_ok=True)
            raise


class KeyRing:
    """The keys that hold now: those of the file, read again when it changes, and one from the settings."""

    def __init__(self, file: KeyFile | None, secret: str | None) -> None:
        self._file = file
        # Whoever has the one key of the settings may do everything.
        self._own = [Key(name="default", sha256=digest(secret), scopes=SCOPES)] if secret else []
        self._seen: tuple[int, int, int] | None = None
        self._looked = float("-inf")
        self._keys: list[Key] = self._own
        self.trouble = ""
        self.look()

    @property
    def is_empty(self) -> bool:
        """Whether there has never been a key: one that was revoked leaves the door locked."""
        return not self._keys and not self.trouble

    def find(self, secret: str) -> Key | None:
        """The key with this secret, revoked or not. The time it takes tells nothing: all are compared."""
        self.look()
        given, found = digest(secret), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, given):
                found = key
        return found

    def look(self) -> None:
        """Follow the file. One that cannot be read leaves the keys as they were, and says so."""
        if self._file is None or time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            about = self._file.path.stat()
            seen = (about.st_mtime_ns, about.st_ino, about.st_size)
        except FileNotFoundError:
            if self._seen is not None and self._keys != self._own:
                # A door does not open because its lock was taken away.
                self.trouble = f"{self._file.path} is gone; its keys still hold"
                return
            seen = (0, 0, 0)
        if seen == self._seen:
            return
        try:
            self._keys, self.trouble = [*self._own, *self._file.read()], ""
        except KeysError as error:
            self.trouble = str(error)
        self._seen = seen
