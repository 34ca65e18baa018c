"""Batches for the tests: their lines, the calls of OpenAI's SDK that run them, and their answers."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
from fakes.fake_transport import LM
from tritonlm.gateway.batches.store import Batch, BatchStore

from .conftest import WAIT_SECONDS, Gateway

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def sdk_of(gateway: Gateway, key: str = "unused") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)


def line(number: int, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    fields = {"model": LM, "max_tokens": 3, **({"prompt": f"p{number}"} if url == COMPLETIONS else {}), **body}
    return {"custom_id": f"c{number}", "method": "POST", "url": url, "body": fields}


def upload(sdk: openai.OpenAI, lines: list[Any]) -> str:
    content = "\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in lines).encode()
    return sdk.files.create(file=("in.jsonl", content), purpose="batch").id


def run(sdk: openai.OpenAI, lines: list[Any], endpoint: Any = COMPLETIONS) -> Any:
    batch = sdk.batches.create(input_file_id=upload(sdk, lines), endpoint=endpoint, completion_window="24h")
    return wait(sdk, batch.id)


def wait(sdk: openai.OpenAI, batch_id: str, *statuses: str) -> Any:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        batch = sdk.batches.retrieve(batch_id)
        if batch.status in (statuses or ("completed", "failed", "expired", "cancelled")):
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)


def stored_batch(store: BatchStore, lines: list[Any]) -> Batch:
    """A batch as the route creates it, with its input file."""
    source = store.folder / "source"
    source.write_text("\n".join(map(json.dumps, lines)))
    data = {
        "input_file_id": store.add_file("", "in", "batch", source).id, "endpoint": COMPLETIONS, "status": "validating",
        "expires_at": time.time() + 1000, "request_counts": {"total": 0}, "output_seconds": None,
    }  # fmt: skip
    batch = Batch("batch_1", "", "validating", time.time(), data)
    store.put(batch)
    return batch


def answers(sdk: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    rows = [json.loads(row) for row in sdk.files.content(file_id).text.splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows)
    return {row["custom_id"]: row["response"] for row in rows}
