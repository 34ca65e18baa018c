"""`Client`: the blocking version of `AsyncClient`, which it runs on a background thread.

Every call runs the same code; this module only waits for the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from tritonlm.client.async_client import DEFAULT_URL, REPAIR_SECONDS, AsyncClient
from tritonlm.client.background_loop import BackgroundLoop
from tritonlm.client.event_stream import AsyncEventStream
from tritonlm.client.messages_api.types import MessageEvent, MessageObject, TokenCount
from tritonlm.client.models import EngineReports
from tritonlm.client.parsing import M, ParsedChatCompletion
from tritonlm.client.responses_api.calls import Input
from tritonlm.client.responses_api.types import ResponseEvent, ResponseObject
from tritonlm.client.sequences import PromptArgument
from tritonlm.client.stream import AsyncStream
from tritonlm.client.transport import Transport
from tritonlm.client.types import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Embeddings,
    Health,
    Model,
    ModelList,
    Piece,
)

T = TypeVar("T")
R = TypeVar("R")
_CLOSE_SECONDS = 40.0


class Stream(Generic[T]):
    """The result of `create(stream=True)`: an iterator. Use it as a context manager if you may leave it early."""

    def __init__(self, loop: BackgroundLoop, stream: AsyncStream[T] | AsyncEventStream[T, Any]) -> None:
        self._loop, self._stream = loop, stream
        self.request_id = stream.request_id

    def __iter__(self) -> Stream[T]:
        return self

    def __next__(self) -> T:
        try:
            return self._loop.run(self._next())
        except _End:
            raise StopIteration from None

    async def _next(self) -> T:
        try:
            return await self._stream.__anext__()
        except StopAsyncIteration:
            # A future cannot carry StopIteration.
            raise _End from None

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        # The client's own end has cancelled it.
        if not self._loop.is_closed:
            self._loop.run(self._stream.close())


class EventStream(Stream[T], Generic[T, R]):
    """The same with the events of another API; `final` is the result as without a stream."""

    def __init__(self, loop: BackgroundLoop, stream: AsyncEventStream[T, R]) -> None:
        super().__init__(loop, stream)
        self._events = stream

    def final(self) -> R:
        return self._loop.run(self._events.final())


class _End(Exception):
    pass


class Client:
    """Use it as a context manager, or call `close`."""

    def __init__(
        self,
        urls: str | Sequence[str] = DEFAULT_URL,
        *,
        timeout: float = 600.0,
        connect_timeout: float = 5.0,
        max_retries: int = 2,
        repair_seconds: float = REPAIR_SECONDS,
        authorities: str | Path | None = None,
        transports: Sequence[Transport] | None = None,
        adapters_folder: Path | None = None,
    ) -> None:
        """As for AsyncClient."""
        self._loop = BackgroundLoop()

        async def make() -> AsyncClient:
            return AsyncClient(
                urls,
                timeout=timeout,
                connect_timeout=connect_timeout,
                max_retries=max_retries,
                repair_seconds=repair_seconds,
                authorities=authorities,
                transports=transports,
                adapters_folder=adapters_folder,
            )

        try:
            self._client = self._loop.run(make())
        except BaseException:
            self._loop.close()
            raise
        self.completions = Completions(self)
        self.chat = Chat(self)
        self.embeddings = EmbeddingCalls(self)
        self.models = Models(self)
        self.responses = Responses(self)
        self.messages = Messages(self)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs, also for other threads. May be called repeatedly."""
        if self._loop.is_closed:
            return
        try:
            self._loop.run(self._client.close(), _CLOSE_SECONDS)
        finally:
            self._loop.close()

    def generate(self, model: str, prompt: str | Sequence[int], **arguments: Any) -> Stream[Piece]:
        return Stream(self._loop, self._loop.run(self._client.generate(model, prompt, **arguments)))

    def cancel(self, request_id: str, model: str | None = None) -> int:
        return self._loop.run(self._client.cancel(request_id, model))

    def status(self, model: str) -> dict[str, Any]:
        return self._loop.run(self._client.status(model))

    def about(self, model: str) -> dict[str, Any]:
        return self._loop.run(self._client.about(model))

    def progress(self, request_id: str) -> list[dict[str, Any]]:
        return self._loop.run(self._client.progress(request_id))

    def tokenize(self, model: str, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._loop.run(self._client.tokenize(model, text, add_special_tokens=add_special_tokens))

    def detokenize(self, model: str, ids: Sequence[int]) -> str:
        return self._loop.run(self._client.detokenize(model, ids))

    def health(self) -> Health:
        return self._loop.run(self._client.health())


class Completions:
    def __init__(self, client: Client) -> None:
        self._client = client

    def create(self, model: str, prompt: PromptArgument, **arguments: Any) -> Completion | Stream[Completion]:
        result = self._client._loop.run(self._client._client.completions.create(model, prompt, **arguments))
        return Stream(self._client._loop, result) if isinstance(result, AsyncStream) else result


class Chat:
    def __init__(self, client: Client) -> None:
        self.completions = ChatCompletions(client)


class ChatCompletions:
    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
        self, model: str, messages: Sequence[Mapping[str, Any]], **arguments: Any
    ) -> ChatCompletion | Stream[ChatCompletionChunk]:
        result = self._client._loop.run(self._client._client.chat.completions.create(model, messages, **arguments))
        return Stream(self._client._loop, result) if isinstance(result, AsyncStream) else result

    def apply_template(self, model: str, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        completions = self._client._client.chat.completions
        return self._client._loop.run(completions.apply_template(model, messages, **arguments))

    def parse(
        self, model: str, messages: Sequence[Mapping[str, Any]], *, response_format: type[M], **arguments: Any
    ) -> ParsedChatCompletion[M]:
        completions = self._client._client.chat.completions
        return self._client._loop.run(completions.parse(model, messages, response_format=response_format, **arguments))

    def count_tokens(self, model: str, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> int:
        completions = self._client._client.chat.completions
        return self._client._loop.run(completions.count_tokens(model, messages, **arguments))

    def context_length(self, model: str) -> int:
        return self._client._loop.run(self._client._client.chat.completions.context_length(model))


class Responses:
    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
        self,
        model: str,
        input: Input,  # noqa: A002 (OpenAI's name)
        **arguments: Any,
    ) -> ResponseObject | EventStream[ResponseEvent, ResponseObject]:
        result = self._client._loop.run(self._client._client.responses.create(model, input, **arguments))
        return EventStream(self._client._loop, result) if isinstance(result, AsyncEventStream) else result

    def stream(self, model: str, input: Input, **arguments: Any) -> EventStream[ResponseEvent, ResponseObject]:  # noqa: A002
        stream = self._client._client.responses.stream(model, input, **arguments)
        return EventStream(self._client._loop, self._client._loop.run(stream))


class Messages:
    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
        self, model: str, messages: Sequence[Mapping[str, Any]], **arguments: Any
    ) -> MessageObject | EventStream[MessageEvent, MessageObject]:
        result = self._client._loop.run(self._client._client.messages.create(model, messages, **arguments))
        return EventStream(self._client._loop, result) if isinstance(result, AsyncEventStream) else result

    def stream(
        self, model: str, messages: Sequence[Mapping[str, Any]], **arguments: Any
    ) -> EventStream[MessageEvent, MessageObject]:
        stream = self._client._client.messages.stream(model, messages, **arguments)
        return EventStream(self._client._loop, self._client._loop.run(stream))

    def count_tokens(self, model: str, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> TokenCount:
        return self._client._loop.run(self._client._client.messages.count_tokens(model, messages, **arguments))


class EmbeddingCalls:
    def __init__(self, client: Client) -> None:
        self._client = client

    def create(self, model: str, input: Any, **arguments: Any) -> Embeddings:  # noqa: A002 (OpenAI's name)
        return self._client._loop.run(self._client._client.embeddings.create(model, input, **arguments))


class Models:
    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> ModelList:
        return self._client._loop.run(self._client._client.models.list())

    def with_adapters(self) -> ModelList:
        return self._client._loop.run(self._client._client.models.with_adapters())

    def retrieve(self, model: str) -> Model:
        return self._client._loop.run(self._client._client.models.retrieve(model))

    def reports(self) -> EngineReports:
        return self._client._loop.run(self._client._client.models.reports())

    def load(self, model: str, timeout: float = 600.0) -> Model:
        return self._client._loop.run(self._client._client.models.load(model, timeout))

    def unload(self, model: str, timeout: float = 600.0) -> Model:
        return self._client._loop.run(self._client._client.models.unload(model, timeout))
