"""The store of adapters: loaded once, kept while they are used, evicted in order, and replaced when files change."""

from __future__ import annotations

import gc
import json
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine.adapters.loaded import LoadedAdapter
from engine.adapters.peft_files import WEIGHTS
from engine.adapters.store import Acquired
from fakes.adapter_store import BYTES, SECONDS, Make, Weights, stores
from fakes.peft_folders import tensors
from safetensors.torch import save
from tritonlm.contract import CheckpointError, Draining, EngineFailure
from tritonlm.contract.adapters_file import AdapterEntry, add_adapter, remove_adapter
from tritonlm.contract.errors import AdapterNotFound


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    with stores(tmp_path) as make:
        yield make


def test_an_adapter_is_loaded_at_its_first_request_and_stays(make: Make) -> None:
    adapters = make()
    adapters.write("a", "b")
    first, again, other = adapters.acquire("a"), adapters.acquire("a"), adapters.acquire("b")
    assert first is again
    assert (first.name, other.name) == ("a", "b")
    assert isinstance(first.weights, Weights)
    assert adapters.runner.loaded == ["a", "b"]
    assert (adapters.store.count, adapters.store.nbytes, adapters.store.loads) == (2, 2 * BYTES, 2)


def test_requests_that_come_while_an_adapter_is_loaded_share_it(make: Make) -> None:
    adapters = make()
    adapters.write("a")
    adapters.runner.gate.clear()
    for _ in range(3):
        adapters.request("a")
    assert adapters.idle
    adapters.runner.gate.set()
    acquired = [adapters.next() for _ in range(3)]
    assert len(set(map(id, acquired))) == 1
    assert adapters.runner.loaded == ["a"]


def test_the_least_recently_used_one_is_evicted(make: Make) -> None:
    adapters = make(max_adapters=2)
    adapters.write("a", "b", "c")
    adapters.use("a", "b", "a", "c")
    assert adapters.store.count == 2
    adapters.use("a", "c", "b")
    assert adapters.runner.loaded == ["a", "b", "c", "b"]


def test_bytes_are_bounded_too(make: Make) -> None:
    adapters = make(adapter_memory=2 * BYTES + 1)
    adapters.write("a", "b", "c")
    adapters.use("a", "b", "c")
    assert (adapters.store.count, adapters.store.nbytes) == (2, 2 * BYTES)


def test_an_adapter_beyond_the_memory_is_refused_with_both_sizes(make: Make) -> None:
    adapters = make(adapter_memory=BYTES - 1)
    adapters.write("a")
    refusal = adapters.refusal("a")
    assert isinstance(refusal, CheckpointError)
    assert f"needs {BYTES} bytes, and adapter_memory is {BYTES - 1}" in refusal.message


def test_a_further_adapter_waits_while_all_loaded_ones_are_in_use(make: Make) -> None:
    adapters = make(max_adapters=1)
    adapters.write("a", "b")
    used = adapters.acquire("a")
    adapters.request("b")
    # One that is loaded is given out meanwhile.
    again = adapters.acquire("a")
    adapters.store.release(used)
    assert adapters.idle
    assert adapters.store.count == 1
    adapters.store.release(again)
    waited = adapters.next()
    assert isinstance(waited, LoadedAdapter)
    assert waited.name == "b"
    assert adapters.store.count == 1


def test_the_size_is_checked_before_a_file_is_read(make: Make) -> None:
    adapters = make()
    adapters.write("a")
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 20, 1 << 10], "data_offsets": [0, 1 << 32]}}).encode()
    (adapters.folder / "a" / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    refusal = adapters.refusal("a")
    assert isinstance(refusal, CheckpointError)
    assert f"needs {1 << 32} bytes, and adapter_memory is {1 << 30}; raise it" in refusal.message


def test_an_adapter_without_room_does_not_block_others(make: Make) -> None:
    adapters = make(adapter_memory=2 * BYTES)
    adapters.write("a", "b", "broken")
    (adapters.folder / "broken" / WEIGHTS).write_bytes(b"")
    adapters.write_large()
    used = adapters.acquire("a")
    # It fits when `a` is released, and waits, also for two requests.
    adapters.request("large")
    adapters.request("large")
    assert isinstance(adapters.refusal("broken"), CheckpointError)
    other = adapters.acquire("b")
    assert adapters.runner.loaded == ["a", "b"]
    adapters.store.release(other)
    adapters.use("a")
    assert adapters.idle
    adapters.store.release(used)
    large = [adapters.next(), adapters.next()]
    assert large[0] is large[1]
    assert adapters.runner.loaded == ["a", "b", "large"]


def test_small_adapters_overtake_a_large_one_for_some_seconds_only(make: Make) -> None:
    adapters = make(adapter_memory=2 * BYTES, queue_seconds=60)
    adapters.write("a", "b", "c", "d")
    adapters.write_large()
    used = adapters.acquire("a")
    adapters.request("large")
    other = adapters.acquire("b")
    # Later `c` waits too, though `b` leaves its room.
    adapters.seconds = 30
    adapters.request("c")
    adapters.store.release(other)
    assert adapters.acquire("a") is used
    adapters.store.release(used)
    assert adapters.idle
    adapters.store.release(used)
    large = adapters.next()
    assert isinstance(large, LoadedAdapter)
    adapters.store.release(large)
    small = adapters.next()
    assert isinstance(small, LoadedAdapter)
    assert (large.name, small.name) == ("large", "c")
    assert adapters.runner.loaded == ["a", "b", "large", "c"]


def test_an_adapter_whose_requests_must_have_ended_holds_no_other_up(make: Make) -> None:
    adapters = make(adapter_memory=2 * BYTES, queue_seconds=60)
    adapters.write("a", "b", "c")
    adapters.write_large()
    used = [adapters.acquire("a"), adapters.acquire("a")]
    adapters.request("large")
    adapters.use("b")
    adapters.seconds = 30
    adapters.request("c")
    adapters.use("a")
    assert adapters.idle
    adapters.seconds = 60
    # Any request's end suffices, also when its adapter stays in use.
    adapters.store.release(used.pop())
    small = adapters.next()
    assert isinstance(small, LoadedAdapter)
    assert small.name == "c"


def test_changed_files_are_loaded_for_later_requests(make: Make) -> None:
    adapters = make()
    adapters.write("a")
    old = adapters.acquire("a")
    adapters.write("a", value=2.0)
    new = adapters.acquire("a")
    assert new.identity != old.identity
    assert adapters.store.count == 2, "a request runs with the old one"
    adapters.store.release(old)
    assert adapters.store.count == 1
    assert adapters.acquire("a") is new


def test_files_that_are_written_again_with_the_same_content_are_not_loaded_again(make: Make) -> None:
    adapters = make()
    adapters.write("a")
    before = adapters.acquire("a")
    adapters.write("a")
    assert adapters.acquire("a") is before
    assert adapters.runner.loaded == ["a"]


@pytest.mark.parametrize("content", [b"", save(tensors())[:-1], save({"x": torch.ones(1)})])
def test_broken_new_files_leave_the_loaded_adapter_in_use(make: Make, content: bytes) -> None:
    adapters = make()
    adapters.write("a")
    before = adapters.acquire("a")
    (adapters.folder / "a" / WEIGHTS).write_bytes(content)
    assert adapters.acquire("a") is before
    adapters.write("a", value=2.0)
    assert adapters.acquire("a") is not before


def test_a_broken_adapter_is_refused_until_its_files_are_repaired(make: Make) -> None:
    adapters = make()
    adapters.write("a")
    (adapters.folder / "a" / WEIGHTS).write_bytes(b"")
    first, second = adapters.refusal("a"), adapters.refusal("a")
    assert isinstance(first, CheckpointError)
    assert first is not second
    adapters.write("a")
    assert adapters.acquire("a").name == "a"


def test_a_removed_adapter_is_not_found_and_leaves_with_its_last_request(make: Make) -> None:
    adapters = make()
    adapters.write("a", "b")
    used = adapters.acquire("a")
    remove_adapter(adapters.file, "a")
    refusal = adapters.refusal("a")
    assert isinstance(refusal, AdapterNotFound)
    assert refusal.message == "lm has no adapter 'a'; it has b"
    adapters.use("b")
    assert adapters.store.count == 2
    adapters.store.release(used)
    assert adapters.store.count == 1


def test_a_broken_adapters_file_is_refused_and_read_again(make: Make) -> None:
    adapters = make()
    adapters.file.write_text("{")
    assert isinstance(adapters.refusal("a"), CheckpointError)
    adapters.file.unlink()
    assert isinstance(adapters.refusal("a"), AdapterNotFound)
    adapters.write("a")
    adapters.use("a")


def test_a_path_that_no_system_has_is_refused(make: Make) -> None:
    adapters = make()
    add_adapter(adapters.file, "a", AdapterEntry(f"{adapters.folder}/nul\0"))
    refusal = adapters.refusal("a")
    assert isinstance(refusal, CheckpointError)
    assert "does not exist" in refusal.message


@pytest.mark.parametrize("failure", [CheckpointError("layer x is unknown"), RuntimeError("out of memory")])
def test_a_runners_failure_refuses_the_request_and_not_the_next_one(make: Make, failure: Exception) -> None:
    adapters = make()
    adapters.write("a")
    adapters.runner.failure = failure
    refusal = adapters.refusal("a")
    assert type(refusal) is (CheckpointError if isinstance(failure, CheckpointError) else EngineFailure)
    adapters.runner.failure = None
    adapters.use("a")
    assert adapters.store.count == 1


@pytest.mark.parametrize("loaded", [False, True], ids=["refused", "served by the one before"])
def test_a_failed_load_keeps_none_of_its_requests(make: Make, loaded: bool) -> None:
    adapters = make()
    adapters.write("a")
    if loaded:
        adapters.use("a")
    (adapters.folder / "a" / WEIGHTS).write_bytes(b"broken")
    acquired: queue.Queue[Acquired] = queue.Queue()

    class Caller:
        """What waits for an adapter, such as a request with its prompt."""

        def put(self, adapter: Acquired) -> None:
            acquired.put(adapter)

    caller = Caller()
    dead = weakref.ref(caller)
    gc.disable()
    try:
        adapters.store.acquire("a", caller.put)
        assert isinstance(acquired.get(timeout=SECONDS), LoadedAdapter if loaded else CheckpointError)
        del caller
        deadline = time.monotonic() + 2
        while dead() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert dead() is None
    finally:
        gc.enable()


def test_a_stopped_store_refuses_what_waits(make: Make) -> None:
    adapters = make(max_adapters=1)
    adapters.write("a", "b", "c")
    adapters.acquire("a")
    adapters.request("b")
    adapters.request("c")
    adapters.store.close()
    assert isinstance(adapters.next(), Draining)
    assert isinstance(adapters.next(), Draining)


def test_a_stopped_store_refuses_further_requests(make: Make) -> None:
    adapters = make()
    adapters.write("a")
    adapters.use("a")
    adapters.write("b")
    adapters.store.close()
    assert [type(adapters.refusal(name)) for name in "ab"] == [Draining, Draining]


def test_many_threads_leave_no_reference_and_no_adapter_too_many(make: Make) -> None:
    adapters = make(max_adapters=2)
    names = "abcde"
    adapters.write(*names)
    received: queue.Queue[Acquired] = queue.Queue()

    def requests(offset: int) -> None:
        for number in range(20):
            own: queue.Queue[Acquired] = queue.Queue()
            adapters.store.acquire(names[(number * offset) % len(names)], own.put)
            acquired = own.get(timeout=SECONDS)
            received.put(acquired)
            assert isinstance(acquired, LoadedAdapter)
            adapters.store.release(acquired)

    threads = [threading.Thread(target=requests, args=(offset,)) for offset in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert received.qsize() == 80
    assert adapters.store.count <= 2
    assert not any(entry.references for entry in adapters.store._entries.values())
