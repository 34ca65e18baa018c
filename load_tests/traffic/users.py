"""The users: of OpenAI's API, of Triton's gRPC, those that disconnect early, and those that send invalid requests.

Each user reports to Locust the time to first text, the time between tokens and the tokens per second as separate
entries, beside the whole request. A user that is behind its schedule sends its next request at once.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import gevent
import gevent.queue
import grpc.experimental.gevent
import numpy as np
import tritonclient.grpc as triton
from locust import HttpUser, User, task
from prompts import KINDS, Prompt, PromptSource

grpc.experimental.gevent.init_gevent()

FIRST, BETWEEN, SPEED = "first text", "between tokens", "tokens/s"
MODEL = "fable"
_SECONDS = 60.0


class StreamTimer:
    """Measures one stream, and reports to Locust when it has ended."""

    def __init__(self, user: User, name: str) -> None:
        self._fire, self._name = user.environment.events.request.fire, name
        self._began = self._last = time.perf_counter()
        self._length = 0
        # For each further text: the time since the last one, and its length.
        self._gaps: list[tuple[float, int]] = []

    def piece(self, length: int) -> None:
        """`length`: the total length so far, in tokens or in characters."""
        now = time.perf_counter()
        if not self._length:
            self._report(FIRST, now - self._began)
        elif length > self._length:
            self._gaps.append((now - self._last, length - self._length))
        self._last, self._length = now, length

    def end(self, tokens: int) -> None:
        """`tokens`: the server's token count."""
        seconds = self._last - self._began
        if not self._length or seconds <= 0:
            return
        share = tokens / self._length
        for gap, length in self._gaps:
            self._report(BETWEEN, gap / (length * share))
        # Reported as a time, so that Locust computes the percentiles of the speed.
        self._report(SPEED, tokens / seconds / 1000, tokens)

    def _report(self, kind: str, seconds: float, tokens: int = 0) -> None:
        self._fire(
            request_type=kind, name=self._name, response_time=seconds * 1000, response_length=tokens,
            exception=None, context={},
        )  # fmt: skip


class Settings:
    """Command-line options, for all users of this process."""

    kind: ClassVar[str] = "fixed"
    throughput: ClassVar[float] = 1.0
    grpc: ClassVar[str] = ""
    key: ClassVar[str] = ""


class Paced(User):
    """Sends requests at random times with an average rate, and at once when it is behind."""

    abstract = True

    def on_start(self) -> None:
        self._due = time.perf_counter()
        gevent.sleep(self.wait_time())

    def wait_time(self) -> float:
        now = time.perf_counter()
        self._due = max(now, self._due + random.expovariate(Settings.throughput))
        return self._due - now


class ApiUser(Paced, HttpUser):
    """Streams completions and chats as OpenAI's clients do."""

    abstract = True

    def on_start(self) -> None:
        super().on_start()
        self.prompts = PromptSource(random.Random(random.getrandbits(32)))
        self.client.trust_env = False
        if Settings.key:
            self.client.headers["Authorization"] = f"Bearer {Settings.key}"

    def body(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": prompt.tokens}
        if prompt.messages:
            return "/v1/chat/completions", {"model": MODEL, "messages": list(prompt.messages), **options}
        return "/v1/completions", {"model": MODEL, "prompt": prompt.prompt, "ignore_eos": True, **options}

    def events(self, response: Any) -> Iterator[dict[str, Any]]:
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
            elif line == b"data: [DONE]":
                return
        raise ConnectionError("the stream broke off before its end")


class OpenAIUser(ApiUser):
    weight = 10

    @task
    def stream(self) -> None:
        path, body = self.body(KINDS[Settings.kind](self.prompts))
        timer, text, tokens = StreamTimer(self, "HTTP"), "", 0
        with self.client.post(path, json=body, stream=True, catch_response=True, timeout=_SECONDS) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return
            try:
                for chunk in self.events(response):
                    if "error" in chunk:
                        raise ConnectionError(chunk["error"]["message"])
                    for choice in chunk["choices"]:
                        text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                    if usage := chunk.get("usage"):
                        tokens = usage["completion_tokens"]
                    elif text:
                        # The token count comes at the end; until then characters are used.
                        timer.piece(len(text))
            except (ConnectionError, ValueError) as error:
                response.failure(str(error))
                return
        timer.end(tokens)
        self.prompts.add_answer(text)


class LeavingUser(ApiUser):
    """Disconnects during a stream; the engine must cancel the request."""

    weight = 1

    @task
    def leave(self) -> None:
        path, body = self.body(KINDS[Settings.kind](self.prompts))
        with self.client.post(
            path, json=body, stream=True, catch_response=True, timeout=_SECONDS, name="left early"
        ) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return
            for _, chunk in zip(range(2), self.events(response), strict=False):
                if "error" in chunk:
                    response.failure(chunk["error"]["message"])
            response.close()
        self.prompts.history.clear()


class NonsenseUser(ApiUser):
    """Sends invalid requests, which must be refused with an error message."""

    weight = 1
    _BODIES: ClassVar[list[bytes]] = [
        b"", b"{", b"[]", b'{"model": "fable"}', b'{"model": "fable", "prompt": 5}',
        b'{"model": "fable", "prompt": "a", "temperature": "hot"}',
        b'{"model": "fable", "prompt": "a", "max_tokens": -1}',
        b'{"model": "fable", "prompt": "a", "unheard_of": true}', b"\xff\xfe", b'{"model": "nobody", "prompt": "a"}',
    ]  # fmt: skip

    @task
    def nonsense(self) -> None:
        with self.client.post(
            "/v1/completions", data=random.choice(self._BODIES), catch_response=True, timeout=_SECONDS, name="nonsense",
            headers={"Content-Type": "application/json"},
        ) as response:  # fmt: skip
            if 400 <= response.status_code < 500 and "error" in response.json():
                response.success()
            else:
                response.failure(f"nonsense got status {response.status_code}")


class TritonUser(Paced):
    """Calls Triton's ensemble over gRPC without the gateway, as users of `tritonclient` do."""

    weight = 3

    def on_start(self) -> None:
        super().on_start()
        self.prompts = PromptSource(random.Random(random.getrandbits(32)))
        self.client = triton.InferenceServerClient(Settings.grpc)
        self.responses: gevent.queue.Queue[Any] = gevent.queue.Queue()
        self.client.start_stream(lambda result, error: self.responses.put(error or result), stream_timeout=None)

    def on_stop(self) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()

    @task
    def stream(self) -> None:
        kind = Settings.kind if Settings.kind != "chat" else "log-normal"
        prompt = KINDS[kind](self.prompts)
        text = triton.InferInput("text_input", [1, 1], "BYTES")
        text.set_data_from_numpy(np.array([[prompt.prompt.encode()]], dtype=object))
        streamed = triton.InferInput("stream", [1, 1], "BOOL")
        streamed.set_data_from_numpy(np.array([[True]]))
        timer, began, failure = StreamTimer(self, "gRPC"), time.perf_counter(), None
        self.client.async_stream_infer(
            MODEL, [text, streamed], parameters={"max_tokens": prompt.tokens, "ignore_eos": True, "temperature": 1.0}
        )
        try:
            while True:
                result = self.responses.get(timeout=_SECONDS)
                if isinstance(result, Exception):
                    raise result
                if (tokens := int(result.as_numpy("usage").reshape(-1)[1])) > 0:
                    timer.piece(tokens)
                if result.as_numpy("finish_reason").reshape(-1)[0]:
                    break
            timer.end(tokens)
        except Exception as error:
            failure = error
        self.environment.events.request.fire(
            request_type="gRPC", name=MODEL, response_time=(time.perf_counter() - began) * 1000, response_length=0,
            exception=failure, context={},
        )  # fmt: skip
