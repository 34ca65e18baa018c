"""The loaded adapters of an engine: at most so many, of so many bytes, of which the least recently used one goes first.

A request holds a reference from its submission to its end, and an adapter with references is never evicted. When all
loaded ones are in use, a further one is put aside until one is released, and other loads go on: for some seconds, after
which they leave their room to it. One thread reads files and hands them to the runner while steps run. When an
adapter's files change, later requests get the new content, and running ones keep the old one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tritonlm.contract import CheckpointError, Draining, EngineFailure, NoRoom, TritonLMError

from ..config import EngineConfig
from ..memory import trim_heap
from ..runners.interface import Runner
from .folders import AdapterFolders, AdapterSource
from .loaded import LoadedAdapter
from .peft_files import read_adapter, stored_numbers
from .put_aside import PutAside

_log = logging.getLogger("tritonlm.engine")

AdapterReport = dict[str, str | int]
Acquired = LoadedAdapter | TritonLMError
Done = Callable[[Acquired], None]


@dataclass(eq=False)
class _Entry:
    loaded: LoadedAdapter
    # The files that it was loaded from, or newer ones of the same content or with an error.
    source: AdapterSource
    nbytes: int
    references: int = 0


class AdapterStore:
    def __init__(self, runner: Runner, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._runner, self._config = runner, config
        self._folders = AdapterFolders(Path(config.adapters_file))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        # Guards everything below.
        self._lock = threading.Lock()
        # What later requests get, by name, the least recently used first.
        self._current: OrderedDict[str, _Entry] = OrderedDict()
        # These, and replaced or removed ones that requests still use.
        self._entries: dict[LoadedAdapter, _Entry] = {}
        self._waiting: dict[AdapterSource, list[Done]] = {}
        # Those of them for which there was no room.
        self._aside = PutAside(config.queue_seconds, clock)
        self._closed = False
        # The bytes of one that is being loaded.
        self._loading = 0
        self.loads = 0

    def acquire(self, name: str, done: Done) -> None:
        """Call `done` with the adapter, which must be released later, or with the error that refuses it.

        It is called at once if the adapter is loaded, else on the loading thread.
        """
        try:
            source, names = self._folders.find(name), self._folders.names()
            entry = self._referenced(source, names, done)
        except TritonLMError as error:
            done(error)
            return
        if entry:
            done(entry.loaded)

    def _referenced(self, source: AdapterSource, names: Collection[str], done: Done) -> _Entry | None:
        """The loaded adapter, with one more reference; None: `done` is called when it is loaded."""
        with self._lock:
            self._check_open()
            self._drop([entry for entry in self._current.values() if entry.loaded.name not in names])
            entry = self._current.get(source.name)
            if entry is None or entry.source != source:
                self._enqueue(source, done)
                return None
            entry.references += 1
            self._current.move_to_end(source.name)
            return entry

    def release(self, adapter: LoadedAdapter) -> None:
        with self._lock:
            entry = self._entries[adapter]
            entry.references -= 1
            assert entry.references >= 0
            if not entry.references and self._current.get(adapter.name) is not entry:
                del self._entries[adapter]
                self._enter()
            self._retry_fitting()

    def close(self) -> None:
        """Refuse what waits, and stop the thread."""
        with self._lock:
            self._closed = True
            self._retry(lambda *_: True)
        self._thread.shutdown(wait=False)

    def report(self) -> list[AdapterReport]:
        """The loaded ones, and how many requests each has."""
        with self._lock:
            return [
                {"name": entry.loaded.name, "bytes": entry.nbytes, "running": entry.references}
                for entry in self._entries.values()
            ]

    @property
    def count(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._nbytes()

    @property
    def limit(self) -> int:
        """The most bytes that adapters may take: those of the loaded ones while the LM has none."""
        try:
            has_adapters = bool(self._folders.names())
        except TritonLMError:  # which the next request that names one hears
            has_adapters = False
        return self._config.adapter_memory if has_adapters else self.nbytes

    def _nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    def _enqueue(self, source: AdapterSource, done: Done) -> None:
        if source in self._waiting:
            self._waiting[source].append(done)
            self._retry_fitting()
            return
        self._waiting[source] = [done]
        self._thread.submit(self._run, source)

    def _retry_fitting(self) -> None:
        """Try those again that have room by now, such as the next one when another was loaded or has failed."""
        self._retry(self._has_room)

    def _retry(self, has_room: Callable[[AdapterSource, int], bool]) -> None:
        for source in self._aside.retry(has_room):
            self._thread.submit(self._run, source)

    # The loading thread.

    def _run(self, source: AdapterSource) -> None:
        error: TritonLMError | None = None
        try:
            entry = self._load(source)
            if entry is None:
                return
        except TritonLMError as failure:
            entry, error = self._fall_back(source, failure), _copy(failure)
        except BaseException as failure:  # whatever a damaged file may cause in a library
            _log.exception("adapter %s cannot be loaded", source.name)
            error = EngineFailure(f"adapter {source.name!r} cannot be loaded ({type(failure).__name__})", "adapter")
            entry = self._fall_back(source, error)
        with self._lock:
            self._loading = 0
            self._enter()
            waiting = self._waiting.pop(source)
            self._aside.remove(source)
            if entry:
                # It may have been removed from the file since.
                self._entries[entry.loaded] = entry
                entry.references += len(waiting)
            self._retry_fitting()
        for done in waiting:
            if entry:
                done(entry.loaded)
            else:
                assert error
                done(_copy(error))

    def _load(self, source: AdapterSource) -> _Entry | None:
        """None: there is no room until a request ends, and the source is put aside."""
        # Before the file is read, and again when it has been: it may be another one by then.
        needed = self._needed(source.name, stored_numbers(source.folder))
        with self._lock:
            # A loaded one may be of the same content.
            if source.name not in self._current and not self._make_room(source, needed):
                return None
        adapter = read_adapter(source.name, source.folder, self._config.max_adapter_rank)
        needed = self._needed(source.name, adapter.count)
        with self._lock:
            entry = self._current.get(source.name)
            if entry and entry.loaded.identity == adapter.identity:
                entry.source = source
                return entry
            if not self._make_room(source, needed):
                return None
        weights = self._runner.load_adapter(adapter)
        loaded = LoadedAdapter(adapter.name, adapter.identity, weights)
        del adapter
        trim_heap()
        with self._lock:
            self._loading = 0
            entry = self._entries[loaded] = _Entry(loaded, source, weights.nbytes)
            if old := self._current.pop(source.name, None):
                self._drop([old])
            self._current[source.name] = entry
            self.loads += 1
        return entry

    def _fall_back(self, source: AdapterSource, error: TritonLMError) -> _Entry | None:
        """The loaded adapter of this name goes on when its new files cannot be loaded."""
        with self._lock:
            entry = self._current.get(source.name)
            if entry and not self._closed:
                entry.source = source
                _log.warning("adapter %s stays as it was loaded: %s", source.name, error.message)
                return entry
        return None

    def _needed(self, name: str, numbers: int) -> int:
        """The bytes of an adapter of so many numbers."""
        needed = numbers * self._runner.dtype.itemsize
        if needed > self._config.adapter_memory:
            raise CheckpointError(
                f"adapter {name!r} needs {needed} bytes, and adapter_memory is {self._config.adapter_memory}; raise it"
            )
        return needed

    def _make_room(self, source: AdapterSource, needed: int) -> bool:
        """Evict unused adapters until one of this size fits; if that does not suffice, put the source aside."""
        self._check_open()
        if not self._has_room(source, needed):
            self._aside.put(source, needed)
            return False
        unused = self._unused()
        while not self._fits(len(self._entries), needed):
            self._drop([unused.pop(0)])
        while not self._reserve(needed):
            if unused:
                self._drop([unused.pop(0)])
            elif self._entries:
                self._aside.put(source, needed)
                return False
            else:
                raise NoRoom(
                    f"adapter {source.name!r} does not fit into the memory budget beside its LM and others; raise "
                    "memory_budget, or unload a model that is not in use",
                    "adapter",
                )
        return True

    def _check_open(self) -> None:
        if self._closed:
            raise Draining("this model has been stopped")

    def _reserve(self, needed: int) -> bool:
        """Enter one of this size, which is loaded next, in the memory ledger; False: the budget has no room for it."""
        try:
            self._runner.memory.reserve_adapters(self._nbytes() + needed)
        except (NoRoom, CheckpointError, OSError):
            self._loading = 0
            self._enter()
            return False
        self._loading = needed
        return True

    def _enter(self) -> None:
        """Enter what is loaded, which is never refused, in the memory ledger.

        While another process holds the ledger's lock (CheckpointError), it is left to the next change.
        """
        with contextlib.suppress(CheckpointError, OSError):
            self._runner.memory.reserve_adapters(self._nbytes() + self._loading)

    def _has_room(self, source: AdapterSource, needed: int) -> bool:
        """Whether one of this size fits beside those in use, and takes it from none that has waited longer."""
        unused = self._unused()
        fits = self._fits(len(self._entries) - len(unused), needed - sum(entry.nbytes for entry in unused))
        return fits and not self._aside.gives_way(source)

    def _unused(self) -> list[_Entry]:
        return [entry for entry in self._current.values() if not entry.references]

    def _fits(self, count: int, more_bytes: int) -> bool:
        return count < self._config.max_adapters and self._nbytes() + more_bytes <= self._config.adapter_memory

    def _drop(self, entries: list[_Entry]) -> None:
        """Give these to no further request; their memory goes with their last reference."""
        for entry in entries:
            if self._current.get(entry.loaded.name) is entry:
                del self._current[entry.loaded.name]
            if not entry.references:
                self._entries.pop(entry.loaded, None)
        if entries:
            self._enter()


def _copy(error: TritonLMError) -> TritonLMError:
    """One for each request, as errors carry the headers of their response; and without a traceback, whose frames would
    keep the requests until a garbage collection."""
    return type(error)(error.message, error.param)
