"""Adds and removes adapters of language models while they serve.

An adapter that is added to a loaded model is tried at once, so that one that does not fit is refused here and not at a
request. This module knows the adapters files, not what is in an adapter.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import replace
from pathlib import Path

from tritonlm.checkpoints.adapter_files import adapter_folder
from tritonlm.client.async_client import AsyncClient
from tritonlm.client.model_names import SEPARATOR
from tritonlm.contract import AdapterNotFound, CheckpointError, InvalidRequest, ModelNotFound, NotOffered
from tritonlm.contract.adapters_file import (
    TRIAL,
    AdapterEntry,
    adapters_file,
    add_adapter,
    check_name,
    remove_adapter,
)

NAME, PATH, BASE = "lora_name", "lora_path", "base_model"
# A prompt of one token, which every vocabulary has.
_SHORTEST_PROMPT = [0]


class AdapterService:
    def __init__(self, client: AsyncClient, folder: Path | None) -> None:
        self._client, self._folder = client, folder

    def _file(self, base: str) -> Path:
        if self._folder is None:
            raise NotOffered("this server has no folder for adapters files; start it with --adapters-folder")
        return adapters_file(self._folder, base)

    async def add(self, name: str, path: str, base: str, *, in_place: bool = False) -> None:
        """Errors name the fields of the route. A replaced adapter's running requests end with the old weights."""
        check_name(name, NAME)
        file = self._file(base)
        is_ready = await self._check_names(name, base)
        try:
            folder, source = await asyncio.to_thread(adapter_folder, path)
        except CheckpointError as error:
            raise InvalidRequest(f"{PATH}: {error.message}", PATH) from None
        entry = AdapterEntry(str(folder), source)
        if not in_place and name in self._client.names.adapters().get(base, {}):
            raise InvalidRequest(
                f"{NAME}: {base} has an adapter {name!r} already; send load_inplace: true to replace it", NAME
            )
        if is_ready:
            await self._try(name, base, entry)
        await asyncio.to_thread(add_adapter, file, name, entry, replace=in_place)

    async def _check_names(self, name: str, base: str) -> bool:
        """Refuse a name that would stand for several models; returns whether the base is loaded."""
        models = {model.id: model for model in (await self._client.models.list()).data}
        if base not in models:
            raise ModelNotFound(f"{BASE}: the model {base!r} does not exist", BASE)
        if owner := self._client.names.owner(name, models, base):
            raise InvalidRequest(f"{NAME}: {name!r} is {owner} already; choose another name", NAME)
        return models[base].state == "ready"

    async def _try(self, name: str, base: str, entry: AdapterEntry) -> None:
        """Generate a token with it, under a name of its own: what has its name now goes on undisturbed."""
        file, trial = self._file(base), f"trial-{secrets.token_hex(8)}"
        await asyncio.to_thread(add_adapter, file, trial, replace(entry, declared_by=TRIAL))
        try:
            await self._client.completions.create(
                f"{base}{SEPARATOR}{trial}", _SHORTEST_PROMPT, max_tokens=1, temperature=0
            )
        except AdapterNotFound:
            raise NotOffered(
                f"the engine of {base} does not follow {self._folder}; start its Triton with TRITONLM_ADAPTERS_FILE "
                "set to this folder"
            ) from None
        except (CheckpointError, InvalidRequest) as error:
            raise InvalidRequest(f"{PATH}: {error.message.replace(trial, name)}", PATH) from None
        finally:
            await asyncio.to_thread(remove_adapter, file, trial)

    async def remove(self, name: str, base: str | None) -> None:
        """Remove it from the list; its folder stays, and requests that run end with it."""
        check_name(name, NAME)
        bases = self._client.names.bases(name, base)
        if not bases:
            names = [name for adapters in self._client.names.adapters().values() for name in adapters]
            raise AdapterNotFound.of(name, base or "this server", names)
        if len(bases) > 1:
            raise InvalidRequest(f"{BASE}: {', '.join(bases)} have an adapter {name!r}; name one of them", BASE)
        await asyncio.to_thread(remove_adapter, self._file(bases[0]), name)
