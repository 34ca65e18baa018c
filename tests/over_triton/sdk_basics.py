"""Common uses of OpenAI's SDK, as a separate program: test_sdks runs it with each version of the SDK.

python sdk_basics.py URL MODEL
"""

from __future__ import annotations

import sys
from typing import Any

import openai
import pytest


def main(url: str, model: str) -> None:
    client: Any = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
    request = {"model": model, "prompt": "Once upon", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**request, n=2, logprobs=2)
    streamed = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
    assert "".join(streamed) == whole.choices[0].text == whole.choices[1].text
    assert whole.usage.completion_tokens == 24
    assert len(whole.choices[0].logprobs.tokens) == 12

    chat = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**chat, logprobs=True, top_logprobs=3)
    options = {"include_usage": True}
    *chunks, last = list(client.chat.completions.create(**chat, stream=True, stream_options=options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    assert last.usage.total_tokens == answer.usage.total_tokens
    assert model in [entry.id for entry in client.models.list()]

    errors = {
        openai.BadRequestError: {"temperature": 3},
        openai.NotFoundError: {"model": "nope"},
    }
    for error_type, changed in errors.items():
        for stream in (False, True):
            with pytest.raises(error_type) as error:
                client.completions.create(**{**request, **changed}, stream=stream)
            assert error.value.request_id
    print(openai.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
