"""The gRPC transport against a fake server: a caller that leaves while it waits, and a host that does not answer."""

from __future__ import annotations

import asyncio
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonlm.client.transport import Call, Prompt
from tritonlm.client.transport.grpc_stream import grpc_errors
from tritonlm.client.transport.grpc_transport import GrpcTransport
from tritonlm.contract import Unavailable
from tritonlm.contract.tensors import CHUNK, PROMPT_IDS, REPORT, TEXT_INPUT


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Knows the request only at the third cancel, as an engine that has not received it yet."""

    def __init__(self) -> None:
        self.cancels, self.was_cut = 0, False
        self.known = asyncio.Event()

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802 (the protocol's name)
        response = service_pb2.ModelConfigResponse()
        for model, tensor in {"tokenize": TEXT_INPUT, "generate": PROMPT_IDS, "detokenize": CHUNK}.items():
            step = response.config.ensemble_scheduling.step.add(model_name=model)
            step.input_map[tensor.name] = tensor.name
        return response

    async def ModelStreamInfer(self, requests: Any, context: Any) -> Any:  # noqa: N802 (the protocol's name)
        request = await requests.__anext__()
        if request.model_name == "generate":
            self.cancels += 1
            if self.cancels == 3:
                self.known.set()
            report = json.dumps({"cancelled": int(self.cancels == 3)}).encode()
            response = service_pb2.ModelStreamInferResponse()
            response.infer_response.outputs.add(name=REPORT.name, datatype="BYTES", shape=[1, 1])
            response.infer_response.raw_output_contents.append(len(report).to_bytes(4, "little") + report)
            yield response
            return
        try:
            await self.known.wait()
        except asyncio.CancelledError:
            self.was_cut = True
            raise


def test_leaving_while_waiting_cancels_the_request_and_drains_the_stream() -> None:
    async def leave() -> Server:
        service, server = Server(), grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        transport = GrpcTransport(f"127.0.0.1:{port}", 5.0)
        pieces = transport.generate(Call("lm", "r", Prompt(text="x"), {}, True, 20.0))
        reading = asyncio.ensure_future(pieces.__anext__())
        await asyncio.sleep(0.1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await transport.close()
        await server.stop(0)
        return service

    service = asyncio.run(asyncio.wait_for(leave(), 20))
    assert service.cancels >= 3
    assert not service.was_cut


@pytest.mark.parametrize(
    "details", ["errors resolving nowhere:8001: [Domain name not found]", "DNS resolution failed for nowhere:8001"]
)
def test_a_name_that_does_not_resolve_is_no_broken_connection(details: str) -> None:
    """A mistyped address would be waited for like a Triton that is being restarted."""
    metadata = grpc.aio.Metadata()
    with (
        pytest.raises(Unavailable, match="nowhere:8001: its name does not resolve") as error,
        grpc_errors("nowhere:8001"),
    ):
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, metadata, metadata, details)
    assert type(error.value) is Unavailable


def test_a_host_that_does_not_answer_times_out() -> None:
    async def call() -> None:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            transport = GrpcTransport(f"127.0.0.1:{silent.getsockname()[1]}", 0.3)
            with pytest.raises(Unavailable):
                await transport.models()
            await transport.close()

    asyncio.run(asyncio.wait_for(call(), 20))


def test_a_transport_may_be_made_before_its_event_loop() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        transport = GrpcTransport(f"127.0.0.1:{unused.getsockname()[1]}", 5.0)

    async def ask() -> bool:
        try:
            return await transport.is_live()
        finally:
            await transport.close()

    # A thread has no event loop of its own, as a program's main thread from Python 3.14 on.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asyncio.run, ask()).result() is False
