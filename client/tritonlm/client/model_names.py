"""What a model's name stands for: a language model, or one of its adapters as `LM:ADAPTER` or by its name alone.

Names alone are found in the adapters files of a folder, which are read again when they change. This module knows which
names there are, not what Triton has loaded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonlm.contract import CheckpointError, InvalidRequest
from tritonlm.contract.adapters_file import SUFFIX, TRIAL, AdapterEntry, check_name, read_adapters
from tritonlm.contract.errors import shown
from tritonlm.contract.structured_outputs import check_unicode

_log = logging.getLogger("tritonlm.client")
SEPARATOR = ":"
# The adapters of each LM.
Adapters = dict[str, dict[str, AdapterEntry]]


@dataclass(frozen=True)
class ServedModel:
    """`name` as the caller wrote it, `lm` as Triton knows it, and an adapter of that LM; empty: the base alone."""

    name: str
    lm: str
    adapter: str = ""

    @property
    def label(self) -> str:
        """The name in metrics: the adapter's own."""
        return self.adapter or self.lm

    def parameters(self, sent: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of a request, with the adapter that the model's name stands for."""
        if not self.adapter:
            return dict(sent)
        if sent.get("adapter") not in (None, "", self.adapter):
            raise InvalidRequest(
                f"model names the adapter {self.adapter}, and adapter names {shown(sent['adapter'])}; send one of them",
                "adapter",
            )
        return {**sent, "adapter": self.adapter}


class ModelNames:
    def __init__(self, folder: Path | None = None) -> None:
        """`folder` holds an adapters file LM.json for each LM; without it, adapters are named as `LM:ADAPTER` only."""
        self.folder = folder
        # The content of each file, and the version that was read.
        self._files: dict[str, tuple[tuple[int, int, int], dict[str, AdapterEntry]]] = {}

    def resolve(self, name: Any) -> ServedModel:
        if not isinstance(name, str) or not name:
            raise InvalidRequest("model must name a language model; models.list() lists them", "model")
        check_unicode("model", name)
        lm, separator, adapter = name.partition(SEPARATOR)
        if separator:
            return ServedModel(name, lm, check_name(adapter, "the adapter in model"))
        known = self.adapters()
        bases = [lm for lm, adapters in known.items() if name in adapters and name not in known]
        if len(bases) > 1:
            names = " or ".join(f"{lm}{SEPARATOR}{name}" for lm in bases)
            raise InvalidRequest(f"several models have an adapter {name!r}; name it as {names}", "model")
        return ServedModel(name, bases[0], name) if bases else ServedModel(name, name)

    def bases(self, name: str, base: str | None = None) -> list[str]:
        """The LMs that have an adapter of this name; with `base` at most that one."""
        return [lm for lm, adapters in self.adapters().items() if name in adapters and base in (None, lm)]

    def owner(self, name: str, models: Container[str] = (), base: str = "") -> str:
        """Whose a name is beside an adapter of `base`, for an error; empty: nobody's. `models`: the LMs there are.

        A name stands for one model: a request may send it alone.
        """
        if others := [lm for lm in self.bases(name) if lm != base]:
            return f"an adapter of {others[0]}"
        return "a language model" if name in models else ""

    def adapters(self) -> Adapters:
        """The adapters of all LMs. Those of a file that cannot be read stay as they were."""
        if self.folder is None:
            return {}
        versions = _versions(self.folder)
        for lm in self._files.keys() - versions.keys():
            del self._files[lm]
        for lm, version in sorted(versions.items()):
            known, adapters = self._files.get(lm, (None, {}))
            if known != version:
                try:
                    read = read_adapters(self.folder / f"{lm}{SUFFIX}")
                    adapters = {name: entry for name, entry in read.items() if entry.declared_by != TRIAL}
                except CheckpointError as error:
                    _log.warning("%s", error.message)
                self._files[lm] = version, adapters
        return {lm: adapters for lm, (_, adapters) in sorted(self._files.items())}


def _versions(folder: Path) -> dict[str, tuple[int, int, int]]:
    """The LMs that have a file, and what tells its versions apart."""
    versions = {}
    try:
        with os.scandir(folder) as files:
            for file in files:
                if file.name.endswith(SUFFIX) and not file.name.startswith("."):
                    status = file.stat()
                    versions[file.name.removesuffix(SUFFIX)] = (status.st_mtime_ns, status.st_ino, status.st_size)
    except OSError:
        # No folder: no adapter was ever added.
        return {}
    return versions
