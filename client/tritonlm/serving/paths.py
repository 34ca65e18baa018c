"""Paths on this machine: the checkout, its model repository, the cache, the settings. It creates nothing."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ServingError

_CHECKOUT = Path(__file__).resolve().parents[3]


def in_checkout() -> bool:
    """Whether this package runs from a clone (an editable install) rather than from site-packages."""
    return (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "model_repository").is_dir()


def model_repository() -> Path:
    return (_CHECKOUT if in_checkout() else Path.cwd()) / "model_repository"


def cache() -> Path:
    if in_checkout():
        return _CHECKOUT / ".cache"
    return _user_folder("XDG_CACHE_HOME", ".cache")


def registry() -> Path:
    """The default registry of `tritonlm add`."""
    return _settings() / "models.yaml"


def keys() -> Path:
    """The default key file of `tritonlm keys`."""
    return _settings() / "keys.json"


def adapters() -> Path:
    """The default folder of the adapters files, which `tritonlm adapters` writes: LM.json for each language model."""
    return _settings() / "adapters"


def _settings() -> Path:
    if in_checkout():
        return _CHECKOUT
    return _user_folder("XDG_CONFIG_HOME", ".config")


def _user_folder(variable: str, name: str) -> Path:
    try:
        return Path(os.environ.get(variable) or Path.home() / name) / "tritonlm"
    except RuntimeError:
        raise ServingError(f"this user has no home folder; set HOME or {variable} to one that can be written") from None
