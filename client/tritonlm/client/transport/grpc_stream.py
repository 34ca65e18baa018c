"""Reads one gRPC stream, and maps gRPC errors to those of the contract. It does not know the responses' content."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc

from tritonlm.contract import Broken, TimedOut, TritonLMError, Unavailable
from tritonlm.contract.errors import from_wire

# In the words of several releases of gRPC.
_UNRESOLVED = re.compile(r"errors resolving|dns resolution failed", re.IGNORECASE)


async def single_request(request: Any) -> AsyncIterator[Any]:
    yield request


class GrpcStream:
    """The responses of one stream. If a reader is cancelled while it waits, the stream stays open and can be drained.

    Cancelling the read itself would cancel the gRPC call, and Triton would pass the cancellation on to `detokenize`.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._reading: asyncio.Future[Any] | None = None
        self._waiting: asyncio.Future[None] | None = None
        self._failure: TritonLMError | None = None

    async def next(self) -> Any:
        """The next response; None after the last. Raises the error passed to `fail`."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._call.read())
            self._reading.add_done_callback(self._wake)
        reading = self._reading
        if not reading.done() and self._failure is None:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        if self._failure is not None:
            raise self._failure
        self._reading = None
        message = reading.result()
        return None if message is grpc.aio.EOF else message

    def _wake(self, _: object = None) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def fail(self, error: TritonLMError) -> None:
        """Raise this error in `next`, now and later; the stream itself stays open."""
        self._failure = error
        self._wake()

    async def drain(self) -> None:
        """Read until the stream ends, ignoring failures."""
        self._failure = None
        with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
            while await self.next() is not None:
                pass

    def cancel(self) -> None:
        self._call.cancel()


@contextlib.contextmanager
def grpc_errors(url: str) -> Iterator[None]:
    """Raise errors of the connection and of Triton as errors of the contract."""
    try:
        yield
    except grpc.RpcError as error:
        code, details = error.code(), error.details() or ""
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise TimedOut(f"Triton at {url} does not answer in time") from None
        if code == grpc.StatusCode.UNAVAILABLE and "failed to connect" in details.lower():
            raise Unavailable(f"no Triton answers at {url}") from None
        if code == grpc.StatusCode.UNAVAILABLE and _UNRESOLVED.search(details):
            raise Unavailable(f"no Triton answers at {url}: its name does not resolve") from None
        if code == grpc.StatusCode.CANCELLED:
            raise Unavailable(f"the connection to Triton at {url} was closed") from None
        parsed = from_wire(details)
        if type(parsed) is TritonLMError and code == grpc.StatusCode.UNAVAILABLE:
            raise Broken(f"lost the connection to Triton at {url}") from None
        raise parsed from None
