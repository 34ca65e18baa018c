"""Files and batches with OpenAI's SDK: answers, mistakes, limits, owners, cancelling, and going on after a stop."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fakes.fake_transport import LM, FakeTransport
from tritonlm.access.keys import KeyFile, Limits
from tritonlm.contract import QueueFull
from tritonlm.gateway.batches.lines import check_file, read_progress
from tritonlm.gateway.batches.store import BatchStore

from .batch_calls import CHATS, COMPLETIONS, answers, line, run, sdk_of, upload, wait
from .conftest import Gateway, running_gateway


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    with running_gateway(batch_folder=tmp_path / "batches", max_file_bytes=50_000) as running:
        yield running


def test_each_line_gets_an_answer_at_the_lowest_priority(gateway: Gateway) -> None:
    with sdk_of(gateway) as sdk:
        lines = [line(number, seed=7) for number in range(12)] + [line(99, temperature=9), ""]
        batch = run(sdk, lines)
        assert batch.status == "completed"
        assert batch.request_counts.to_dict() == {"total": 13, "completed": 12, "failed": 1}
        good, bad = answers(sdk, batch.output_file_id), answers(sdk, batch.error_file_id)
        direct = sdk.completions.create(model=LM, prompt="p3", max_tokens=3, seed=7)
        assert good["c3"]["body"]["choices"][0]["text"] == direct.choices[0].text
        assert set(good) == {f"c{number}" for number in range(12)}
        assert (bad["c99"]["status_code"], bad["c99"]["body"]["error"]["param"]) == (400, "temperature")
        assert batch.usage.output_tokens == 36
        assert all(call.parameters["priority"] == 3 for call in gateway.transport.calls[:-1])
        assert [entry.id for entry in sdk.batches.list()] == [batch.id]
        assert {file.purpose for file in sdk.files.list()} == {"batch", "batch_output"}


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (CHATS, {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses", {"input": "a", "max_tokens": None, "max_output_tokens": 3}),
        ("/v1/embeddings", {"input": "a", "max_tokens": None}),
    ],
)
def test_other_endpoints(gateway: Gateway, endpoint: str, body: dict[str, Any]) -> None:
    request = line(1, endpoint, **body)
    request["body"] = {name: value for name, value in request["body"].items() if value is not None}
    with sdk_of(gateway) as sdk:
        batch = run(sdk, [request], endpoint)
        assert answers(sdk, batch.output_file_id)["c1"]["status_code"] == 200


def test_a_file_with_mistakes_fails_with_their_lines(gateway: Gateway) -> None:
    lines = [line(1), "{", line(1), {**line(2), "url": CHATS}, {**line(3), "method": "GET"}, line(4, stream=True), [1]]
    with sdk_of(gateway) as sdk:
        batch = run(sdk, lines)
        assert (batch.status, batch.output_file_id) == ("failed", None)
        mistakes = [(error.line, error.param) for error in batch.errors.data]
        assert mistakes == [(2, None), (3, "custom_id"), (4, "url"), (5, "method"), (6, "body.stream"), (7, None)]
        assert run(sdk, [""]).errors.data[0].code == "empty_file"
        assert gateway.transport.calls == []


def test_refusals_name_the_field(gateway: Gateway) -> None:
    with sdk_of(gateway) as sdk:
        with pytest.raises(openai.BadRequestError, match="purpose"):
            sdk.files.create(file=("a", b"x"), purpose="vision")
        with pytest.raises(openai.APIStatusError) as large:
            sdk.files.create(file=("a", b"x" * 200_000), purpose="batch")
        assert large.value.status_code == 413
        with pytest.raises(openai.BadRequestError, match="expires_after"):
            sdk.files.create(file=("a", b"x"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 1})
        with pytest.raises(openai.BadRequestError, match="input_file_id"):
            sdk.batches.create(input_file_id="file-1", endpoint=COMPLETIONS, completion_window="24h")
        with pytest.raises(openai.BadRequestError, match="endpoint"):
            sdk.batches.create(input_file_id="file-1", endpoint="/v1/videos", completion_window="24h")
        with pytest.raises(openai.NotFoundError):
            sdk.batches.retrieve("batch_1")
        kept = sdk.files.create(
            file=("a", b"x"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert kept.expires_at == kept.created_at + 3600
        assert sdk.files.delete(kept.id).deleted
        with pytest.raises(openai.NotFoundError):
            sdk.files.content(kept.id)
    with (
        running_gateway() as without,
        sdk_of(without) as sdk,
        pytest.raises(openai.InternalServerError, match="batch-folder"),
    ):
        sdk.batches.list()


def test_owners_do_not_see_each_other(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    secrets = [keys.create(name, [], Limits(requests_per_minute=30)) for name in ("alice", "bob")]
    with (
        running_gateway(keys=keys.path, batch_folder=tmp_path / "batches") as gateway,
        sdk_of(gateway, secrets[0]) as alice,
        sdk_of(gateway, secrets[1]) as bob,
    ):
        # More requests than the key may send in a minute.
        batch = run(alice, [line(number) for number in range(40)])
        assert batch.request_counts.completed == 40
        assert list(bob.files.list()) == list(bob.batches.list()) == []
        with pytest.raises(openai.NotFoundError):
            bob.batches.retrieve(batch.id)
        with pytest.raises(openai.NotFoundError):
            bob.files.content(batch.output_file_id)
        with pytest.raises(openai.BadRequestError):
            bob.batches.create(input_file_id=batch.input_file_id, endpoint=COMPLETIONS, completion_window="24h")


def test_a_full_server_is_tried_again(gateway: Gateway) -> None:
    full = QueueFull("full")
    full.retry_after = 1
    gateway.transport.trouble = [full]
    with sdk_of(gateway) as sdk:
        assert run(sdk, [line(1)]).request_counts.completed == 1


def test_a_cancelled_batch_keeps_its_answers(tmp_path: Path) -> None:
    transport = FakeTransport(pause=0.2)
    with running_gateway(transport, batch_folder=tmp_path / "b", batch_requests=1) as gateway, sdk_of(gateway) as sdk:
        file_id = upload(sdk, [line(number) for number in range(50)])
        batch = sdk.batches.create(input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h")
        wait(sdk, batch.id, "in_progress")
        gateway.wait_until(lambda: len(transport.calls) > 1)
        with pytest.raises(openai.BadRequestError, match="cancel the batch first"):
            sdk.files.delete(file_id)
        assert sdk.batches.cancel(batch.id).status == "cancelling"
        ended = wait(sdk, batch.id)
        assert ended.status == "cancelled"
        assert 0 < len(answers(sdk, ended.output_file_id)) < 50
        with pytest.raises(openai.BadRequestError, match="nothing to cancel"):
            sdk.batches.cancel(batch.id)


def test_a_batch_goes_on_after_a_stop(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_folder": tmp_path / "b", "batch_requests": 2}
    transport = FakeTransport()
    transport.held_from = 6
    with running_gateway(transport, **settings) as gateway, sdk_of(gateway) as sdk:
        file_id = upload(sdk, [line(number, seed=1) for number in range(40)])
        batch = sdk.batches.create(input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h")
        gateway.wait_until(lambda: len(transport.calls) > 6)
    output = tmp_path / "b" / "work" / f"{batch.id}.output.jsonl"
    before = output.read_bytes()
    assert 0 < before.count(b"\n") < 40
    # As a kill in the middle of a line leaves it.
    output.write_bytes(before + b'{"id": "batch_req_1", "custom')
    with running_gateway(**settings) as gateway, sdk_of(gateway) as sdk:
        ended = wait(sdk, batch.id)
        assert (ended.status, ended.request_counts.completed) == ("completed", 40)
        rows = answers(sdk, ended.output_file_id)
        assert len(rows) == 40
        assert len(gateway.transport.calls) == 40 - before.count(b"\n")
        assert sdk.files.content(ended.output_file_id).content.startswith(before)


def test_a_batch_that_was_being_finished_is_finished(tmp_path: Path) -> None:
    with running_gateway(batch_folder=tmp_path) as gateway, sdk_of(gateway) as sdk:
        ended = run(sdk, [line(1)])
        store = BatchStore(tmp_path, 1, 2**20)
        batch = store.batch("", ended.id)
        # As a kill leaves it between the two steps.
        batch.status = batch.data["status"] = "finalizing"
        store.put(batch)
        again = wait(sdk, ended.id)
        assert (again.output_file_id, again.request_counts) == (ended.output_file_id, ended.request_counts)
        assert answers(sdk, again.output_file_id)


def test_what_is_not_sent_in_time_expires(tmp_path: Path) -> None:
    transport = FakeTransport(pause=0.1)
    with running_gateway(transport, batch_folder=tmp_path, batch_requests=1) as gateway, sdk_of(gateway) as sdk:
        file_id = upload(sdk, [line(number) for number in range(30)])
        store = BatchStore(tmp_path, 1, 2**20)
        batch_id = sdk.batches.create(input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h").id
    batch = store.batch("", batch_id)
    batch.data["expires_at"] = int(time.time()) - 1
    store.put(batch)
    with running_gateway(batch_folder=tmp_path) as gateway, sdk_of(gateway) as sdk:
        ended = wait(sdk, batch_id)
        assert ended.status == "expired"
        rows = [json.loads(row) for row in sdk.files.content(ended.error_file_id).text.splitlines()]
        assert {row["error"]["code"] for row in rows} == {"batch_expired"}
        assert gateway.transport.calls == []


def test_the_space_for_files_is_limited_and_swept(tmp_path: Path) -> None:
    store = BatchStore(tmp_path, days=1, max_bytes=100)
    source = tmp_path / "source"

    def add(size: int, seconds: int | None = None) -> str:
        source.write_bytes(b"x" * size)
        return store.add_file("", "a", "batch", source, seconds).id

    first = add(60)
    with pytest.raises(Exception, match="used up"):
        add(60)
    store.delete_file("", first)
    second = add(60, -1)
    assert store.files("") == []
    store.sweep()
    assert not store.content(second).exists()
    assert store.content(add(100)).stat().st_size == 100


def test_lines_are_checked_and_progress_is_read(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text(json.dumps(line(1)) + "\n\n" + json.dumps(line(2)))
    assert check_file(file, COMPLETIONS) == (2, [])
    # In the runner's stack Python reads fewer levels than here: such a batch would fail and be run again for ever.
    nested = [json.dumps(line(1, x=1)).replace('"x": 1', f'"x": {"[" * depth}{"]" * depth}') for depth in (498, 600)]
    file.write_text("\n".join([*nested, json.dumps("[" * 600)]).replace("c1", "c2", 1))
    mistakes = [(error["line"], "levels deep" in error["message"]) for error in check_file(file, COMPLETIONS)[1]]
    assert mistakes == [(2, True), (3, False)]
    assert read_progress(tmp_path / "none").done == set()
