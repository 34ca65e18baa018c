"""Where things lie on this machine: the checkout, its model repository, the cache. It creates nothing."""

from __future__ import annotations

import os
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[3]


def in_checkout() -> bool:
    """Whether this package runs out of a clone (an editable install) and not out of site-packages."""
    return (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "model_repository").is_dir()


def model_repository() -> Path:
    return (_CHECKOUT if in_checkout() else Path.cwd()) / "model_repository"


def cache() -> Path:
    if in_checkout():
        return _CHECKOUT / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritonlm"


def registry() -> Path:
    """The registry that `tritonlm add` writes unless it is told another."""
    return _settings() / "models.yaml"


def keys() -> Path:
    """The file of keys that `tritonlm keys` writes unless it is told another."""
    return _settings() / "keys.json"


def _settings() -> Path:
    if in_checkout():
        return _CHECKOUT
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "tritonlm"
